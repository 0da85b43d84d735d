"""TorchRec's models and others with experts in them, against what hosts do with their models.

``python -m tests.helpers.host_matrix`` writes the table of docs/injection.md; the tests of
``tests/distributed/test_host_matrix.py`` run the same checks. Numbers of one process and of several
are compared to the bit: with two ranks a mean is exact to the last addition.
"""

import argparse
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import distributed as dist
from torch import nn, Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torchrec import EmbeddingBagCollection, KeyedJaggedTensor, KeyedTensor
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ModuleSharder

from tests.helpers.hosts import FEATURES, Host, HOSTS, injected, plain, ROWS, rows_of
from tests.helpers.processes import ROOT, run_ranks
from tests.helpers.rounding import assert_same, assert_within, float64_rounding
from tests.helpers.sharded import load_whole
from torchrec_hilomoe.hilomoe import (
    expert_parameters,
    routers_of,
    SampleRouter,
    set_auxiliary_loss_scale,
    sites_of,
)

__all__ = ["ALONE", "ON_RANKS", "outcomes", "read_table", "table_of"]

WRAPPED = re.compile(r"^(_dmp_wrapped_module\.)?(module\.)?")
Gradients = dict[str, Tensor]


def parts_of(model: nn.Module) -> dict[str, nn.Module]:
    """The model's own parts that hold sites."""
    names = {name.partition(".")[0] for name in sites_of(model)}
    return {name: part for name, part in model.named_children() if name in names}


def loss_of(logits: Tensor) -> Tensor:
    """The mean over rows and tasks; every other row is a click."""
    clicks = torch.arange(len(logits), dtype=logits.dtype).remainder(2)
    return F.binary_cross_entropy_with_logits(logits, clicks.unsqueeze(1).expand_as(logits))


def gradients(model: nn.Module, tables: bool = True) -> Gradients:
    """What the parameters have got, whole."""
    found = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if gradient is not None and (tables or "embedding_bags." not in name):
            whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
            found[WRAPPED.sub("", name)] = whole.clone()
    return found


def stepped(model: nn.Module, seed: int, share: float = 1.0) -> nn.Module:
    """The model after a backward of ``share`` times its loss."""
    (loss_of(model(*rows_of(seed))) * share).backward()
    return model


def same_start(host: Host) -> None:
    """Outputs are the host's own to the bit."""
    assert_same(injected(host, grown=False)(*rows_of(0)), plain(host)(*rows_of(0)))


def auxiliary_loss(host: Host) -> None:
    """``backward`` of the host's own loss balances the experts, as strongly as it is told."""
    keys = [name for name in expert_parameters(injected(host)) if name.endswith("expert_keys")]
    found = {}
    for scale in (0.0, 1.0, 2.0):
        model = injected(host, grown=False)  # so that the host's own loss does not move the keys
        set_auxiliary_loss_scale(model, scale)
        found[scale] = gradients(stepped(model, 0))
    assert keys
    for name in keys:
        assert not found[0.0][name].any()
        assert found[1.0][name].any()
        assert torch.equal(found[2.0][name], 2 * found[1.0][name])


def checkpointing(host: Host) -> None:
    """Activation checkpointing gives the gradients of none."""
    model = injected(host)
    loss_of(checkpoint(model, *rows_of(0), use_reentrant=False)).backward()
    assert_same(gradients(model), gradients(stepped(injected(host), 0)))


def accumulation(host: Host) -> None:
    """Two micro-batches give the mean of their gradients, the auxiliary losses' too."""
    model = injected(host)
    set_auxiliary_loss_scale(model, 1 / 2)
    stepped(stepped(model, 0, 1 / 2), 1, 1 / 2)
    one, two = (gradients(stepped(injected(host), seed)) for seed in (0, 1))
    assert_same(gradients(model), {name: one[name] / 2 + two[name] / 2 for name in one})


def _in_float64(module: nn.Module, given: Any, pooled: KeyedTensor) -> KeyedTensor:
    return KeyedTensor(pooled.keys(), pooled.length_per_key(), pooled.values().double())


def compiled(host: Host) -> None:
    """Its parts compute the same under ``torch.compile``, forward and backward."""
    want, model = injected(host).double(), injected(host).double()
    for it in (model, want):
        for tables in it.modules():
            if isinstance(tables, EmbeddingBagCollection):  # gives float32 in any case
                tables.register_forward_hook(_in_float64)
    for part in parts_of(model).values():
        part.compile()
    dense, ids = rows_of(0)
    results = []
    for it in (model, want):
        logits = it(dense.double(), ids)
        loss_of(logits).backward()
        results.append({"logits": logits.detach(), **gradients(it)})
    terms = [p for p in want.parameters() if p.requires_grad]
    found, exact = results
    assert_within(found, exact, float64_rounding(*exact.values(), *terms))


class FromTensors(nn.Module):
    """A host that is given its ids as tensors, as an exported program is."""

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        self.host = host

    def forward(self, dense: Tensor, ids: Tensor, lengths: Tensor) -> Tensor:
        stride = dense.shape[0]
        features = KeyedJaggedTensor(list(FEATURES), ids, lengths=lengths, stride=stride)
        return self.host(dense, features)


def exported(host: Host) -> None:
    """Exported once, it computes the same for any two rows or more."""
    model = FromTensors(injected(host)).eval()
    dense, features = rows_of(0)
    given = dense, features.values(), features.lengths()
    free = {0: torch.export.Dim.AUTO}
    program = torch.export.export(model, given, dynamic_shapes=(free, free, free)).module()
    for rows in (2, 3, ROWS):
        count = len(FEATURES) * rows
        fewer = dense[:rows], features.values()[:count], features.lengths()[:count]
        assert_same(program(*fewer), model(*fewer))


def mean_of_ranks(host: Host) -> Gradients:
    """The mean of what every rank's rows give a model of one process."""
    each = [
        gradients(stepped(injected(host, losses=False), rank), tables=False)
        for rank in range(dist.get_world_size())
    ]
    return {name: torch.stack([it[name] / len(each) for it in each]).sum(dim=0) for name in each[0]}


def under_ddp(host: Host) -> None:
    """Gradients are the mean of the ranks'."""
    model = DistributedDataParallel(injected(host, losses=False))
    stepped(model, dist.get_rank())
    assert_same(gradients(model, tables=False), mean_of_ranks(host))


def under_fsdp2(host: Host) -> None:
    """Gradients of its parts, and of a shared router, are the mean of the ranks'."""
    model = injected(host, losses=False)
    routers = {n: m for n, m in routers_of(model).items() if isinstance(m, SampleRouter)}
    sharded = {**parts_of(model), **routers}
    for part in sharded.values():
        for it in part if isinstance(part, nn.ModuleList) else [part]:
            fully_shard(it)
    stepped(model, dist.get_rank())
    found, want = gradients(model, tables=False), mean_of_ranks(host)
    inside = {name for name in want if name.partition(".")[0] in sharded}
    assert_same({name: found[name] for name in inside}, {name: want[name] for name in inside})


def under_dmp(host: Host) -> None:
    """Gradients are the mean of the ranks'."""
    sharder = EmbeddingBagCollectionSharder(fused_params={"learning_rate": 0.1})
    model = DistributedModelParallel(
        injected(host, losses=False),
        device=torch.device("cpu"),
        sharders=[cast(ModuleSharder[nn.Module], sharder)],
    )
    load_whole(model, injected(host).state_dict())  # DMP starts tables anew
    stepped(model, dist.get_rank())
    assert_same(gradients(model, tables=False), mean_of_ranks(host))


ALONE = {
    "same start": same_start,
    "auxiliary loss": auxiliary_loss,
    "activation checkpointing": checkpointing,
    "accumulation": accumulation,
    "`torch.compile`": compiled,
    "export, free batch": exported,
}
ON_RANKS = {
    "DMP, 1 rank": (1, under_dmp),
    "DMP, 2 ranks": (2, under_dmp),
    "DDP": (2, under_ddp),
    "FSDP2": (2, under_fsdp2),
}


def outcome_of(check: Callable[[Host], None], host: Host) -> str:
    """What the table says of a check."""
    try:
        with warnings.catch_warnings(action="ignore"):  # hosts, compilers and exporters have many
            check(host)
    except Exception as error:  # noqa: BLE001  whatever does not work stands in the table
        return f"no: {type(error).__name__}: {str(error).strip().splitlines()[0][:80]}"
    return "yes"


def _outcomes_here(title: str, names: Sequence[str]) -> dict[str, str]:
    _, check = ON_RANKS[title]
    return {name: outcome_of(check, HOSTS[name]) for name in names}


def outcomes(title: str, names: Sequence[str]) -> dict[str, str]:
    """Run a check on some hosts, on as many ranks as it is about."""
    if title in ALONE:
        return {name: outcome_of(ALONE[title], HOSTS[name]) for name in names}
    ranks, _ = ON_RANKS[title]
    of_ranks = run_ranks(_outcomes_here, ranks, title, names)
    return {
        name: next((found[name] for found in of_ranks if found[name] != "yes"), "yes")
        for name in names
    }


PAGE = ROOT / "docs" / "injection.md"
START, END = "<!-- hosts -->\n", "<!-- end of hosts -->\n"


def table_of(found: dict[str, dict[str, str]]) -> str:
    """The table as Markdown, of what :func:`outcomes` says by title and host."""
    lines = [f"| host | {' | '.join(found)} |", "|---" * (1 + len(found)) + "|"]
    lines += [f"| {name} | {' | '.join(by[name] for by in found.values())} |" for name in HOSTS]
    return "\n".join(lines) + "\n"


def read_table(page: Path = PAGE) -> str:
    """The table as the page has it."""
    return page.read_text().partition(START)[2].partition(END)[0]


def main() -> None:
    """Write the table."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    found = {title: outcomes(title, list(HOSTS)) for title in (*ALONE, *ON_RANKS)}
    before, _, rest = PAGE.read_text().partition(START)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{START}{table_of(found)}{END}{after}")
    sys.stdout.write(table_of(found))


if __name__ == "__main__":
    main()
