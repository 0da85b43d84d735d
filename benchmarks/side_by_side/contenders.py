"""Who takes turns in a case, proved to train the same before anybody's clock runs."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ShardingPlan

from benchmarks.driving import assembled
from benchmarks.fuxictr_pairs.din import DINPair
from benchmarks.fuxictr_pairs.size import PLAIN, Size
from benchmarks.random_batches import draw_batches, Stream
from benchmarks.rounding import of_sums
from benchmarks.side_by_side.dlrm import assemble_dlrm, copy_weights, DLRMSize, TheirLoop
from benchmarks.side_by_side.trained import Trained
from torchrec_hilomoe.config import InjectionConfig
from torchrec_hilomoe.data.batch import CTRBatch
from torchrec_hilomoe.runtime.distributed import DistributedContext

__all__ = ["EXPERTS", "TURN", "Contender", "din_contenders", "dlrm_contenders"]

TURN = 4  # steps of a turn, and batches that lie ready: every turn trains on all of them
CHECKED = 3 * TURN  # steps whose losses are compared
EXPERTS = InjectionConfig()  # as many, and where, as the product puts them if not told otherwise


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to train.

    Attributes:
        step: Trains one step.
        plan: How many tables are cut in which way; empty where nothing is sharded.
    """

    step: Callable[[], object]
    plan: Mapping[str, int]


def din_contenders(size: Size, context: DistributedContext) -> dict[str, Contender]:
    """DIN: ours, with experts, and FuxiCTR's, which trains in one process only.

    With FuxiCTR's weights copied in, all must give the same logits. Losses in training are not the
    same: FuxiCTR trains tables with Adam, and lets padding into Dice's statistics.

    Raises:
        AssertionError: If they do not.
    """
    torch.manual_seed(0)
    pair = DINPair(size)
    pair.theirs.device = context.device
    pair.theirs.to(context.device)
    batches = _batches(size.stream, size.batch_size, context)
    ours = {
        name: assembled(pair.config(hilomoe), size.stream.schema, context)
        for name, hilomoe in (("ours", PLAIN), ("ours with experts", EXPERTS))
    }
    for assembly in ours.values():
        pair.copy_weights(assembly.model)
        for batch in batches:
            pair.check(assembly.model, batch)
    found = {
        name: Contender(
            step=Trained(assembly, cycle(batches)).step, plan=_plan(assembly.model.plan)
        )
        for name, assembly in ours.items()
    }
    if context.world.size == 1:
        padded = cycle([pair.batch(batch) for batch in batches])
        found["fuxictr"] = Contender(step=lambda: pair.theirs.train_step(next(padded)), plan={})
    return found


def dlrm_contenders(size: DLRMSize, context: DistributedContext) -> dict[str, Contender]:
    """DLRM: ours, TorchRec's example, and ours with experts; made by all ranks together.

    From equal weights, the first two must have equal losses step by step; experts begin at zero,
    and so with the same first one.

    Raises:
        AssertionError: If they do not.
    """
    torch.manual_seed(0)
    batches = _batches(size.stream, size.batch_size, context)
    theirs = TheirLoop(size, batches, context.device)
    plain, experts = assemble_dlrm(size, PLAIN, context), assemble_dlrm(size, EXPERTS, context)
    copy_weights(size, theirs, [plain, experts])
    ours, wider = (Trained(assembly, cycle(batches)) for assembly in (plain, experts))
    for number in range(CHECKED):
        losses: dict[str, Tensor] = {"ours": ours.step(), "torchrec": theirs.step()}
        loss = wider.step()
        if number == 0:
            losses["ours with experts"] = loss
        _check_equal(losses, number, size.batch_size)
    steps = {"ours": ours.step, "torchrec": theirs.step, "ours with experts": wider.step}
    plans = {"ours": plain.model, "torchrec": theirs.model, "ours with experts": experts.model}
    return {
        name: Contender(step=step, plan=_plan(plans[name].plan)) for name, step in steps.items()
    }


def _batches(stream: Stream, batch_size: int, context: DistributedContext) -> Sequence[CTRBatch]:
    return draw_batches(
        stream,
        TURN,
        batch_size=batch_size,
        rank=context.world.rank,
        ranks=context.world.size,
        device=context.device,
    )


def _check_equal(losses: Mapping[str, Tensor], number: int, rows: int) -> None:
    """Losses are means over rows, and each step before has rounded as much."""
    values = {name: loss.item() for name, loss in losses.items()}
    want = values["torchrec"]
    off = max(abs(value - want) / abs(want) for value in values.values())
    allowed = (1 + number) * of_sums(rows) * torch.finfo(torch.float32).eps
    assert off <= allowed, f"losses of step {number} are not the same: {values}"


def _plan(plan: ShardingPlan) -> dict[str, int]:
    cuts: Counter[str] = Counter()
    for module in plan.plan.values():
        assert isinstance(module, EmbeddingModuleShardingPlan)
        tables: Mapping[str, Any] = module
        cuts.update(table.sharding_type for table in tables.values())
    return dict(sorted(cuts.items()))
