"""Can routers be better than random keys? Starts from a plain model's gradients, compared.

    python -m benchmarks.experiments.routers run --backbones din bst --seeds 0 1 2 3 4
    python -m benchmarks.experiments.routers report

A plain model trains for the first fifth of a pass over ``composed``; then experts join on its head,
routed by the three features that decide, and both train to the end. The variants of a seed go on
from the same plain model with the same rows, and differ in how keys and experts begin, or learn:

    random keys     drawn, and never learn: what the others are compared with
    learned keys    drawn, as a run has them
    keys x 5, / 5   the same with another learning rate of the keys
    spectral        learned keys; down-vectors begin as the right singular vectors of `Delta_e`
    subspace        learned keys, drawn in the directions of their query along which the gradient
                    of the map varies most
    clustered       learned keys, fitted to the values of a query clustered by their mean gradient,
                    shrunk by counts, in clusters of about equal loads
    both            clustered and spectral
    logits by id    in place of keys, a table of E numbers for each value of a feature, for a
                    history the mean over its events; their direction gives the logits

Rows of the validation split give the gradients; nothing is trained on them.
"""

import argparse
import copy
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import nn, Tensor

from benchmarks.experiments.report import difference, Line
from benchmarks.experiments.router_starts import (
    listen,
    ROUTE_BY,
    router_of,
    start_keys,
    start_spectral,
)
from benchmarks.experiments.runs import read, ROOT
from benchmarks.experiments.worlds import evaluate, logits_of
from benchmarks.harness import append, environment
from torchrec_hilomoe.backbones.base import HookPoint
from torchrec_hilomoe.command_line import parse_run
from torchrec_hilomoe.config import InjectionConfig
from torchrec_hilomoe.data.batch import CTRBatch
from torchrec_hilomoe.data.loader import Loader
from torchrec_hilomoe.data.synthetic import SyntheticSource
from torchrec_hilomoe.embeddings.features import ModelInputs
from torchrec_hilomoe.hilomoe.inject import inject_shared_router, routers_of
from torchrec_hilomoe.models.build import build_task, inject_experts, site_patterns
from torchrec_hilomoe.models.train_task import TrainTask

RESULTS = ROOT / "benchmarks/results/routers.jsonl"
BATCH, STEPS, PLAIN_STEPS, HEARD = 1024, 750, 150, 60
LEARNING_RATE, TABLE_LEARNING_RATE, DECAY_SHARE = 0.008, 0.4, 0.3
TEST_ROWS = 131_072
KEY_RATES = {"random keys": 0.0, "keys x 5": 5.0, "keys / 5": 0.2}
VARIANTS = (
    *KEY_RATES,
    "learned keys",
    "spectral",
    "subspace",
    "clustered",
    "both",
    "logits by id",
)


def build(world: str, backbone: str, seed: int) -> TrainTask:
    """A plain model of the evidence's size, unsharded."""
    config = parse_run(
        [
            f"--data.synthetic={world}",
            f"--model.backbone={backbone}",
            "--model.head=[64,32]",
            "--model.hilomoe.route_by=null",
            "--model.hilomoe.enabled=false",
        ]
    ).config
    torch.manual_seed(seed)
    schema = SyntheticSource(world=world, split="train", rows=1, seed=seed).schema  # pyright: ignore
    return build_task(config.model, schema, torch.device("cpu"))


def optimizers_of(task: TrainTask, key_rate: float = 1.0) -> list[torch.optim.Optimizer]:
    """Adagrad on the tables and Adam on the rest; keys at a rate of their own."""
    keys = [p for name, p in task.named_parameters() if name.endswith("expert_keys")]
    mine = {id(key) for key in keys}
    rest = [p for p in task.model.backbone.parameters() if id(p) not in mine]
    groups = [{"params": rest, "lr": LEARNING_RATE}]
    groups += [{"params": keys, "lr": LEARNING_RATE * key_rate}] if keys else []
    tables = task.model.sparse.parameters()
    return [
        torch.optim.Adagrad(tables, lr=TABLE_LEARNING_RATE, eps=1e-8),
        torch.optim.Adam(groups, lr=LEARNING_RATE),
    ]


def train(
    task: TrainTask,
    optimizers: list[torch.optim.Optimizer],
    batches: Iterator[CTRBatch],
    first: int,
    last: int,
) -> None:
    """Steps ``first`` to ``last`` of the pass, with the balance loss where there are experts."""
    rates = [[group["lr"] for group in it.param_groups] for it in optimizers]
    task.train()
    for step, batch in zip(range(first, last), batches, strict=False):
        decay = min(1.0, (1.0 - step / STEPS) / DECAY_SHARE)
        for optimizer, own in zip(optimizers, rates, strict=True):
            for group, rate in zip(optimizer.param_groups, own, strict=True):
                group["lr"] = rate * decay
            optimizer.zero_grad()
        loss, _ = task(batch)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    for optimizer, own in zip(optimizers, rates, strict=True):
        for group, rate in zip(optimizer.param_groups, own, strict=True):
            group["lr"] = rate


class LogitsById(HookPoint):
    """Puts behind what is known of a row a table's numbers for its values, ``E`` a layer."""

    def __init__(self, task: TrainTask, experts: int) -> None:
        super().__init__()
        tables = _tables_of(task)
        self.fields = [names[0] for names in ROUTE_BY]
        self.tables = nn.ModuleList(
            nn.EmbeddingBag(tables[field], experts, mode="mean") for field in self.fields
        )
        self.batch: ModelInputs | None = None

    def forward(self, x: Tensor) -> Tensor:
        """``(B, width + L E)``."""
        assert self.batch is not None
        parts = [x]
        for field, table in zip(self.fields, self.tables, strict=True):
            pooled = set(self.batch.pooled.keys())
            jagged = (self.batch.pooled if field in pooled else self.batch.unpooled)[field]
            parts.append(table(jagged.values(), jagged.offsets()[:-1]))
        return torch.cat(parts, dim=1)


def _tables_of(task: TrainTask) -> dict[str, int]:
    """Rows of each feature's table."""
    sparse = task.model.sparse
    configs = [
        *(sparse.pooled.embedding_bag_configs() if sparse.pooled else ()),
        *(sparse.unpooled.embedding_configs() if sparse.unpooled else ()),
    ]
    return {name: config.num_embeddings for config in configs for name in config.feature_names}


def inject_logits_by_id(task: TrainTask, config: InjectionConfig) -> None:
    """Experts whose router reads `LogitsById` through keys that stay the unit vectors."""
    backbone, E = task.model.backbone, config.num_experts
    backbone.include_history_mean = True
    widths = task.model.sparse.widths
    width = widths.candidate + widths.context + sum(it.event for it in widths.histories)
    backbone.sample = LogitsById(task, E)
    task.model.register_forward_pre_hook(
        lambda _m, args: setattr(backbone.sample, "batch", args[0])
    )
    views = [(range(width + layer * E, width + (layer + 1) * E),) for layer in range(len(ROUTE_BY))]
    inject_shared_router(
        backbone,
        config,
        site_patterns(backbone, config),
        "sample",
        width + len(ROUTE_BY) * E,
        tokens=backbone.tokens,
        views=views,
    )
    router = router_of(task)
    with torch.no_grad():
        router.expert_keys.copy_(3.0 * torch.eye(E).expand_as(router.expert_keys))
    router.expert_keys.requires_grad_(False)


def run(backbone: str, seed: int, missing: list[str], world: str) -> Iterator[Line]:
    """Train the plain prefix once, and go on from it with every variant that is missing."""
    rows = STEPS * BATCH
    plain = build(world, backbone, seed)
    source = {
        split: SyntheticSource(world=world, split=split, rows=count, seed=seed)  # pyright: ignore
        for split, count in (("train", rows), ("valid", HEARD * BATCH), ("test", TEST_ROWS))
    }
    batches = iter(Loader(source["train"], batch_size=BATCH, seed=seed, epochs=1))
    optimizers = optimizers_of(plain)
    train(plain, optimizers, batches, 0, PLAIN_STEPS)
    rest = list(batches)
    valid = Loader(source["valid"], batch_size=BATCH, shuffle=False, epochs=1)
    heard = listen(copy.deepcopy(plain), islice(iter(valid), HEARD))
    for variant in missing:
        task, tables = copy.deepcopy(plain), copy.deepcopy(optimizers[0].state_dict())
        if variant != "plain":
            experts = parse_run(
                [
                    "--model.hilomoe.rank=4",
                    "--model.hilomoe.routing=sample",
                    f"--model.hilomoe.route_by={[list(names) for names in ROUTE_BY]}",
                ]
            ).config.model.hilomoe
            torch.manual_seed(seed + 1)
            if variant == "logits by id":
                inject_logits_by_id(task, experts)
            else:
                inject_experts(task, experts)
        if variant in ("subspace", "clustered", "both"):
            kind = "subspace" if variant == "subspace" else "clustered"
            start_keys(task, heard, kind, seed)
        if variant in ("spectral", "both"):
            start_spectral(task, heard)
        own = optimizers_of(task, KEY_RATES.get(variant, 1.0))
        own[0].load_state_dict(tables)
        _load_adam(own[1], plain, task, optimizers[1])
        train(task, own, iter(rest), PLAIN_STEPS, STEPS)
        task.eval()
        yield {
            "data": world,
            "backbone": backbone,
            "variant": variant,
            "seed": seed,
            "auc": evaluate(task.model, source["test"]),
            "largest_load": _largest_load(task, valid),
        }


def _load_adam(
    own: torch.optim.Optimizer, plain: TrainTask, task: TrainTask, before: torch.optim.Optimizer
) -> None:
    """Let the parameters that were there go on with their moments."""
    old = dict(plain.model.backbone.named_parameters())
    for name, parameter in task.model.backbone.named_parameters():
        was = old.get(name)
        if was is not None and was in before.state:
            own.state[parameter] = copy.deepcopy(before.state[was])


@torch.no_grad()
def _largest_load(task: TrainTask, rows: Loader) -> float | None:
    """The largest share of rows that chose one expert of a layer."""
    if not routers_of(task.model.backbone):
        return None
    router, largest = router_of(task), 0.0
    for batch in islice(iter(rows), 4):
        logits_of(task.model, batch)
        chosen_LN = router.routing().chosen_LkN[:, 0]
        for layer in chosen_LN:
            largest = max(largest, float(torch.bincount(layer).max()) / len(layer))
    return round(largest, 3)


def report(lines: list[Line]) -> None:
    """A row a variant: test AUC less that of random keys of the same seed, in 1e-4."""
    backbones = list(dict.fromkeys(line["backbone"] for line in lines))
    print(f"| begins, or learns | {' | '.join(backbones)} | largest load |")
    print("|---" * (2 + len(backbones)) + "|")
    for variant in ("plain", *VARIANTS):
        cells, loads = [], []
        for backbone in backbones:
            auc = {
                (it["variant"], it["seed"]): it["auc"] for it in lines if it["backbone"] == backbone
            }
            paired = [
                1e4 * (value - auc["random keys", seed])
                for (name, seed), value in sorted(auc.items())
                if name == variant and ("random keys", seed) in auc
            ]
            base = [value for (name, _), value in auc.items() if name == variant]
            text = difference(paired) if paired else ""
            cells.append(f"AUC {np.mean(base):.4f}" if variant == "random keys" else text)
            loads += [
                it["largest_load"]
                for it in lines
                if it["backbone"] == backbone and it["variant"] == variant and it["largest_load"]
            ]
        loads_text = f"{max(loads):.2f}" if loads else ""
        print(f"| {variant} | {' | '.join(cells)} | {loads_text} |")


def main() -> None:
    """Run or report."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["run", "report"])
    parser.add_argument("--world", default="composed", choices=["composed"])
    parser.add_argument("--backbones", nargs="+", default=["din", "bst"], choices=["din", "bst"])
    parser.add_argument("--variants", nargs="+", default=["plain", *VARIANTS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.action == "report":
        report(read(args.out))
        return
    for seed in args.seeds:
        for backbone in args.backbones:
            done = {
                line["variant"]
                for line in read(args.out)
                if (line["backbone"], line["seed"]) == (backbone, seed)
            }
            missing = [variant for variant in args.variants if variant not in done]
            for line in run(backbone, seed, missing, args.world) if missing else ():
                append(args.out, [{**line, **environment("cpu")}])
                print(f"{backbone} seed {seed} {line['variant']:14s} {line['auc']:.5f}", flush=True)


if __name__ == "__main__":
    main()
