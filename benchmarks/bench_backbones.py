"""Training throughput of DIN against FuxiCTR's: same widths, batch and histories, in one run.

    python -m benchmarks.bench_backbones --out benchmarks/results/backbones.jsonl

Ours is trained as the product trains: tables sharded by TorchRec with row-wise Adagrad fused into
their backward pass, everything else by Adam, through the sparse_dist pipeline. FuxiCTR's is trained
by its own ``train_step``: dense Adam over all parameters. Both clip gradients at 10. With FuxiCTR's
weights copied in, the two must give the same logits before they are timed. One JSON line per
contender; ``median_us`` is of a step, ``ratio`` of its time to ours.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn, Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from benchmarks.harness import append, environment, measure
from tests.helpers.fuxictr import build_fuxictr
from torchrec_hilomoe.config import DINConfig, ModelConfig, RunConfig, TrainConfig
from torchrec_hilomoe.data.batch import CTRBatch, Position
from torchrec_hilomoe.data.schema import IdFeature, Schema, SequenceGroup
from torchrec_hilomoe.models.build import build_task
from torchrec_hilomoe.models.train_task import TrainTask
from torchrec_hilomoe.runtime.distributed import join
from torchrec_hilomoe.training.assemble import assemble
from torchrec_hilomoe.training.pipelines.pipeline import Pipeline
from torchrec_hilomoe.training.stages import Stage, StageSpan
from torchrec_hilomoe.training.stages.staging import enter_stage

BATCH, MAX_LENGTH, CATEGORIES, BATCHES = 1024, 100, 1000, 4


@dataclass(frozen=True, kw_only=True)
class Case:
    """A DIN over item and category, and what it trains on."""

    size: str
    embedding: int
    attention: tuple[int, ...]
    head: tuple[int, ...]
    items: int
    mean_length: int


HEAVY = {"size": "heavy", "embedding": 64, "attention": (512, 256), "head": (1024, 512, 256)}
LIGHT = {"size": "light", "embedding": 16, "attention": (64,), "head": (256, 128)}
CASES = [
    Case(**size, items=items, mean_length=length)
    for size, rows in ((LIGHT, (10**6,)), (HEAVY, (10**5, 10**6)))
    for length, items in itertools.product((15, MAX_LENGTH), rows)
]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """A batch before either makes its own of it; ``ids`` are padded, the target last."""

    lengths: Tensor
    ids: dict[str, Tensor]
    labels: Tensor


def draw(case: Case, rng: torch.Generator) -> Rows:
    """Random ids; lengths are full, or exponential with the given mean."""
    lengths = torch.full((BATCH,), MAX_LENGTH)
    if case.mean_length < MAX_LENGTH:
        share = torch.rand(BATCH, generator=rng).clamp(min=1e-6)
        lengths = (-case.mean_length * share.log()).long().clamp(1, MAX_LENGTH)
    longest = int(lengths.max())
    before = torch.arange(longest) < longest - lengths.unsqueeze(1)
    ids = {}
    for name, size in (("item", case.items), ("category", CATEGORIES)):
        drawn = torch.randint(1, size, (BATCH, longest + 1), generator=rng)
        drawn[:, :-1][before] = 0
        ids[name] = drawn
    return Rows(lengths=lengths, ids=ids, labels=torch.randint(2, (BATCH,), generator=rng))


def our_batch(rows: Rows, schema: Schema) -> CTRBatch:
    """Jagged, as our loader makes it."""
    ones = torch.ones(BATCH, dtype=torch.int64)
    values = [drawn[:, -1] for drawn in rows.ids.values()]
    values += [drawn[:, :-1][drawn[:, :-1] > 0] for drawn in rows.ids.values()]
    return CTRBatch(
        pooled=KeyedJaggedTensor.from_lengths_sync([], torch.empty(0), torch.empty(0)),
        unpooled=KeyedJaggedTensor.from_lengths_sync(
            list(schema.unpooled_keys),
            torch.cat(values),
            torch.cat([ones, ones, rows.lengths, rows.lengths]),
        ),
        dense=torch.zeros(BATCH, 0),
        labels=rows.labels.float(),
        weights=torch.ones(BATCH),
        groups=torch.zeros(BATCH, dtype=torch.int64),
        longest=int(rows.lengths.max()),
        mean_rows=float(BATCH),
        position=Position(epoch=0, lane_rows=0, lanes=1),
    )


def their_batch(rows: Rows) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Padded in front to the longest, as their loader makes it."""
    mask = (rows.ids["item"][:, :-1] > 0).float()
    items = {name: drawn.flatten() for name, drawn in rows.ids.items()}
    return {"label": rows.labels}, items, mask


def build_theirs(case: Case) -> Any:
    """FuxiCTR's DIN, ready to train."""
    model = build_fuxictr(
        "DIN",
        {"item": case.items, "category": CATEGORIES},
        {},
        case.embedding,
        dnn_hidden_units=list(case.head),
        attention_hidden_units=list(case.attention),
        attention_hidden_activations="Dice",
        din_use_softmax=True,
    )
    model._max_gradient_norm, model._batch_index = 10.0, 0
    return model.train()


def schema_of(case: Case) -> Schema:
    """Columns of the random data."""
    names = ("item", "category")
    fields = tuple(IdFeature(name=f"{name}_history", table=name) for name in names)
    return Schema(
        dataset="random",
        tables={"item": case.items, "category": CATEGORIES},
        candidate=tuple(IdFeature(name=name, table=name) for name in names),
        sequences=(SequenceGroup(name="history", fields=fields, max_length=MAX_LENGTH),),
    )


def config_of(case: Case) -> RunConfig:
    """Our DIN of the same widths."""
    din = DINConfig(attention_units=case.attention, softmax=True)
    return RunConfig(
        model=ModelConfig(
            backbone="din", embedding_dim=case.embedding, head=case.head, din=din, hilomoe=None
        ),
        train=TrainConfig(batch_size=BATCH, clip_norm=10.0),
    )


def copy_weights(model: DistributedModelParallel, theirs: Any) -> None:
    """FuxiCTR's into ours; with no context, the heads read the same columns."""

    def layers(modules: Iterator[nn.Module]) -> list[nn.Module]:
        return [m for m in modules if list(m.state_dict())]

    task = model.module
    assert isinstance(task, TrainTask)
    backbone = task.model.backbone
    attention = theirs.attention_layers.attention_layer.mlp
    for name, mlp in (("attentions.0.mlp", attention), ("head", theirs.dnn.mlp)):
        ours = backbone.get_submodule(name)
        mine = [*ours.get_submodule("hidden").children(), ours.get_submodule("output")]
        for to, source in zip(layers(iter(mine)), layers(mlp.children()), strict=True):
            to.load_state_dict(source.state_dict())
    tables = theirs.embedding_layer.embedding_layer.embedding_layers
    for name, value in model.state_dict().items():
        if isinstance(value, ShardedTensor):
            (shard,) = value.local_shards()  # of the one process
            shard.tensor.copy_(tables[name.split(".")[-2]].weight)


@torch.no_grad()
def check(model: DistributedModelParallel, theirs: Any, rows: Rows, schema: Schema) -> None:
    """Refuse to time another model."""
    model.eval()
    theirs.eval()
    _, output = model(our_batch(rows, schema))
    want = torch.logit(theirs(their_batch(rows))["y_pred"][:, 0].double())
    torch.testing.assert_close(output.logits.double(), want, rtol=1e-4, atol=1e-4)
    model.train()
    theirs.train()


def run(case: Case, out: Path, seconds: float) -> None:
    """Check, then time one case."""
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(0)
    drawn = [draw(case, rng) for _ in range(BATCHES)]
    schema, config, theirs = schema_of(case), config_of(case), build_theirs(case)
    stage = Stage(name="all")
    with join("cpu") as job:
        assembly = assemble(config, build_task(config.model, schema), job)
        with torch.no_grad():
            copy_weights(assembly.model, theirs)
        model = enter_stage(assembly.model, stage)
        for rows in drawn:
            check(model, theirs, rows, schema)
        assembly.learners.enter(stage)
        assembly.learners.set_rates(StageSpan(stage=stage, start=0, stop=10**6), 0, decay=1.0)
        pipeline = Pipeline(model, assembly.learners.stepping, model.device)
        ours = itertools.cycle([our_batch(rows, schema) for rows in drawn])
        others = itertools.cycle([their_batch(rows) for rows in drawn])
        contenders = {
            "ours": lambda: pipeline.step(ours),
            "fuxictr": lambda: theirs.train_step(next(others)),
        }
        stamp = environment("cpu") | {
            "torchrec": version("torchrec"),
            "fuxictr": version("fuxictr"),
        }
        events = sum(int(rows.lengths.sum()) for rows in drawn) / len(drawn) / BATCH
        for name, figures in measure(contenders, seconds, "cpu").items():
            per_second = BATCH / figures.median_us * 1e6
            print(f"{case}  {name:8s} {per_second:10.0f} rows/s  x{figures.ratio:.2f}")
            measured = {"backbone": "din", "rows_per_second": per_second, "events_per_row": events}
            line = {**asdict(case), "provider": name, **measured, **asdict(figures), **stamp}
            append(out, [line])
        pipeline.detach()


def main() -> None:
    """Time every case."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="of a case; 5 rounds at least")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs="*", default=["light", "heavy"], help="sizes")
    parser.add_argument("--out", type=Path, required=True, help="append JSON lines to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for case in CASES:
        if case.size in args.only:
            run(case, args.out, args.seconds)


if __name__ == "__main__":
    sys.exit(main())
