"""What the generated worlds ask of a model: test AUC by width of a dense head, beside the best.

    python -m benchmarks.experiments.worlds --out benchmarks/results/worlds.jsonl

Each case trains BST without experts for one pass, in one process and unsharded, once for every
width and once more with every history emptied. ``reach`` is the share of the way from chance to
the best AUC. A world binds capacity if wider heads keep gaining.
"""

import argparse
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.harness import append, environment
from torchrec_hilomoe.backbones.bst import BST
from torchrec_hilomoe.data.batch import CTRBatch
from torchrec_hilomoe.data.loader import Loader
from torchrec_hilomoe.data.schema import Schema
from torchrec_hilomoe.data.source import BlockSource
from torchrec_hilomoe.data.synthetic import SyntheticSource, WorldName, WORLDS
from torchrec_hilomoe.embeddings.features import ModelInputs
from torchrec_hilomoe.embeddings.sparse_arch import SparseArch
from torchrec_hilomoe.models.train_task import CTRModel
from torchrec_hilomoe.training.metrics import auc
from torchrec_hilomoe.training.metrics.definitions import best_auc

BATCH = 1024
TEST_ROWS = 131_072
EMBEDDING_DIM = 16
# The best of 1e-3 to 8e-3 for the narrowest head, and of 2e-3 and 4e-3 for the widest.
LEARNING_RATE = 4e-3
TABLE_LEARNING_RATE = 0.2
DECAY_SHARE = 0.3
NO_HISTORY_WIDTH = 128


@dataclass(frozen=True, kw_only=True)
class Case:
    """A head of ``width`` and half of it, on ``world``, with or without histories."""

    world: WorldName
    width: int
    history: bool
    rows: int
    seed: int


class WithoutHistory(BlockSource):
    """A source whose rows have all their histories emptied."""

    def __init__(self, source: BlockSource) -> None:
        self._source = source

    @property
    def schema(self) -> Schema:
        """The source's."""
        return self._source.schema

    @property
    def block_rows(self) -> tuple[int, ...]:
        """The source's."""
        return self._source.block_rows

    def describe(self, block: int) -> str:
        """As the source does."""
        return self._source.describe(block)

    def read(self, epoch: int, block: int) -> pa.Table:
        """The source's block without events."""
        table = self._source.read(epoch, block)
        offsets = pa.array(np.zeros(table.num_rows + 1, dtype=np.int32))
        empty = pa.ListArray.from_arrays(offsets, pa.array([], pa.int64()))
        for field in self.schema.sequence_fields:
            table = table.set_column(table.column_names.index(field.name), field.name, empty)
        return table


def source_of(case: Case, split: str, rows: int) -> BlockSource:
    """Rows of the case's world."""
    source = SyntheticSource(world=case.world, split=split, rows=rows, seed=case.seed)
    return source if case.history else WithoutHistory(source)


def build(schema: Schema, width: int) -> CTRModel:
    """BST as in the default recipe, without experts."""
    sparse = SparseArch(schema, EMBEDDING_DIM, torch.device("cpu"))
    head = (width, width // 2)
    return CTRModel(sparse, BST(sparse.widths, position_dim=EMBEDDING_DIM, head=head))


def logits_of(model: CTRModel, batch: CTRBatch) -> torch.Tensor:
    """Predict a batch."""
    return model(ModelInputs.of(batch))


def train(model: CTRModel, source: BlockSource, seed: int) -> None:
    """One pass, Adagrad on the tables and Adam on the rest, both decaying to zero at the end."""
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Adagrad(model.sparse.parameters(), lr=TABLE_LEARNING_RATE, eps=1e-8),
        torch.optim.Adam(model.backbone.parameters(), lr=LEARNING_RATE),
    ]
    rates = [optimizer.defaults["lr"] for optimizer in optimizers]
    loader = Loader(source, batch_size=BATCH, seed=seed, epochs=1)
    for step, batch in enumerate(loader):
        decay = min(1.0, (1.0 - step / loader.steps_per_epoch) / DECAY_SHARE)
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * decay
            optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(logits_of(model, batch), batch.labels).backward()
        for optimizer in optimizers:
            optimizer.step()


@torch.no_grad()
def evaluate(model: CTRModel, source: BlockSource) -> float:
    """AUC on every row of ``source``."""
    batches = Loader(source, batch_size=4 * BATCH, shuffle=False, epochs=1)
    results = [(logits_of(model, batch).numpy(), batch.labels.numpy()) for batch in batches]
    logits, labels = (np.concatenate(parts) for parts in zip(*results, strict=True))
    return auc(logits, labels)


def head_kiloflops(model: nn.Module) -> float:
    """Multiplications and additions of the head, a row."""
    return 2e-3 * sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if ".head." in name and isinstance(module, nn.Linear)
    )


def measure(case: Case, best: float) -> dict[str, float]:
    """Train and evaluate one case."""
    torch.manual_seed(case.seed)
    model = build(source_of(case, "test", 1).schema, case.width)
    start = time.perf_counter()
    train(model, source_of(case, "train", case.rows), case.seed)
    seconds = time.perf_counter() - start
    reached = evaluate(model, source_of(case, "test", TEST_ROWS))
    return {
        "auc": round(reached, 5),
        "best_auc": round(best, 5),
        "reach": round((reached - 0.5) / (best - 0.5), 4),
        "head_kflop": round(head_kiloflops(model), 1),
        "rows_per_second": round(case.rows / seconds),
    }


def main() -> None:
    """Measure every case, print and append one line each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--worlds", nargs="+", choices=WORLDS, default=list(WORLDS))
    parser.add_argument("--widths", nargs="+", type=int, default=[64, 128, 256, 512])
    parser.add_argument("--rows", type=int, default=1_536_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="append JSON lines to this file")
    args = parser.parse_args()
    stamp = environment("cpu")
    for world in args.worlds:
        best = best_auc(SyntheticSource(world, "test", TEST_ROWS, args.seed))
        heads = [(width, True) for width in args.widths] + [(NO_HISTORY_WIDTH, False)]
        for width, history in heads:
            case = Case(world=world, width=width, history=history, rows=args.rows, seed=args.seed)
            found = measure(case, best)
            print(
                f"{world:9s} {width:4d}-{width // 2:<4d}{'' if history else 'no history':11s}"
                f"AUC {found['auc']:.4f} of {best:.4f}, reach {found['reach']:.1%}, "
                f"head {found['head_kflop']:.0f} kFLOP, {found['rows_per_second']} rows/s",
                flush=True,
            )
            append(args.out, [{**asdict(case), **found, **stamp}])


if __name__ == "__main__":
    main()
