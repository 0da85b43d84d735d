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
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks.din_pair import build_theirs, check, copy_weights, DINSize, their_batch
from benchmarks.driving import assembled, Driven
from benchmarks.harness import append, environment, measure
from benchmarks.random_batches import draw_batches
from torchrec_hilomoe.runtime.distributed import join

BATCH, MAX_LENGTH, BATCHES = 1024, 100, 4


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


def run(case: Case, out: Path, seconds: float) -> None:
    """Check, then time one case."""
    torch.manual_seed(0)
    size = DINSize(
        embedding=case.embedding,
        attention=case.attention,
        head=case.head,
        items=case.items,
        max_length=MAX_LENGTH,
        mean_length=case.mean_length,
        batch_size=BATCH,
    )
    stream, theirs = size.stream, build_theirs(size)
    with join("cpu") as job:
        drawn = draw_batches(stream, BATCHES, batch_size=BATCH, rank=0, ranks=1, device=job.device)
        assembly = assembled(size.config(), stream.schema, job)
        copy_weights(assembly.model, theirs)
        for batch in drawn:
            check(assembly.model, theirs, batch)
        ours = Driven(assembly, itertools.cycle(drawn))
        others = itertools.cycle([their_batch(batch) for batch in drawn])
        contenders = {
            "ours": ours.step,
            "fuxictr": lambda: theirs.train_step(next(others)),
        }
        stamp = environment("cpu") | {"fuxictr": version("fuxictr")}
        events = sum(batch.steps or 0 for batch in drawn) / len(drawn) / BATCH
        for name, figures in measure(contenders, seconds, "cpu").items():
            per_second = BATCH / figures.median_us * 1e6
            print(f"{case}  {name:8s} {per_second:10.0f} rows/s  x{figures.ratio:.2f}")
            measured = {"backbone": "din", "rows_per_second": per_second, "events_per_row": events}
            line = {**asdict(case), "provider": name, **measured, **asdict(figures), **stamp}
            append(out, [line])
        ours.detach()


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
