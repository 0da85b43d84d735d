"""Training throughput of DIN, DIEN and BST against FuxiCTR's, of the same widths, in one run.

    python -m benchmarks.bench_backbones --out benchmarks/results/backbones.jsonl
    python -m benchmarks.bench_backbones --only din --sizes light --out light.jsonl
    python -m benchmarks.bench_backbones --only bst --fuxictr CLONE --out bst.jsonl

Ours is trained as the product trains: tables sharded by TorchRec with row-wise Adagrad fused into
their backward pass, everything else by Adam, through the sparse_dist pipeline. FuxiCTR's is trained
by its own ``train_step``: dense Adam over all parameters; its BST is in its repository alone, of
which ``--fuxictr`` names a clone. Both clip gradients at 10. With FuxiCTR's
weights copied in, the two must give the same logits before they are timed. One JSON line per
contender; ``median_us`` is of a step, ``ratio`` of its time to ours.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks.driving import assembled, Driven
from benchmarks.fuxictr_pairs.bst import BSTPair
from benchmarks.fuxictr_pairs.dien import DIENPair
from benchmarks.fuxictr_pairs.din import DINPair
from benchmarks.fuxictr_pairs.pair import Pair
from benchmarks.fuxictr_pairs.size import Size
from benchmarks.harness import append, environment, measure
from benchmarks.launching import exit_code
from benchmarks.random_batches import draw_batches
from torchrec_hilomoe.runtime.distributed import init_distributed

BATCH, MAX_LENGTH, BATCHES = 1024, 100, 4
SIZES = ("light", "heavy")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A backbone over item and category, and what it trains on."""

    backbone: str
    size: str
    embedding: int
    attention: tuple[int, ...]
    head: tuple[int, ...]
    items: int
    mean_length: int


HEAVY = {"size": "heavy", "embedding": 64, "attention": (512, 256), "head": (1024, 512, 256)}
LIGHT = {"size": "light", "embedding": 16, "attention": (64,), "head": (256, 128)}
CASES = [
    Case(backbone=backbone, **size, items=items, mean_length=length)
    for backbone in ("din", "dien", "bst")
    for size, rows in ((LIGHT, (10**6,)), (HEAVY, (10**5, 10**6)))
    for length, items in itertools.product((15, MAX_LENGTH), rows)
]


def run(case: Case, make: Callable[[Size], Pair], out: Path, seconds: float) -> None:
    """Check, then time one case."""
    torch.manual_seed(0)
    size = Size(
        embedding=case.embedding,
        attention=case.attention,
        head=case.head,
        items=case.items,
        max_length=MAX_LENGTH,
        mean_length=case.mean_length,
        batch_size=BATCH,
    )
    pair, stream = make(size), size.stream
    with init_distributed("cpu") as context:
        drawn = draw_batches(
            stream, BATCHES, batch_size=BATCH, rank=0, ranks=1, device=context.device
        )
        assembly = assembled(pair.config(), stream.schema, context)
        pair.copy_weights(assembly.model)
        for batch in drawn:
            pair.check(assembly.model, batch)
        ours = Driven(assembly, itertools.cycle(drawn))
        others = itertools.cycle([pair.batch(batch) for batch in drawn])
        contenders = {
            "ours": ours.step,
            "fuxictr": lambda: pair.theirs.train_step(next(others)),
        }
        stamp = environment("cpu") | {"fuxictr": version("fuxictr")}
        events = sum(batch.num_tokens or 0 for batch in drawn) / len(drawn) / BATCH
        for name, figures in measure(contenders, seconds, "cpu").items():
            per_second = BATCH / figures.median_us * 1e6
            print(f"{case}  {name:8s} {per_second:10.0f} rows/s  x{figures.ratio:.2f}")
            measured = {"rows_per_second": per_second, "events_per_row": events}
            line = {**asdict(case), "provider": name, **measured, **asdict(figures), **stamp}
            append(out, [line])
        ours.detach()


def main(argv: Sequence[str]) -> None:
    """Time every case."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="of a case; 5 rounds at least")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--only", nargs="+", choices=["din", "dien", "bst"], help="backbones; all that can be"
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=SIZES)
    parser.add_argument("--items", type=float, nargs="+", help="rows of the item table; all")
    parser.add_argument("--lengths", type=int, nargs="+", help="mean histories; all")
    parser.add_argument("--fuxictr", type=Path, help="a clone of its repository, which has BST")
    parser.add_argument("--out", type=Path, required=True, help="append JSON lines to this file")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    pairs: dict[str, Callable[[Size], Pair]] = {"din": DINPair, "dien": DIENPair}
    if args.fuxictr is not None:
        pairs["bst"] = lambda size: BSTPair(size, args.fuxictr)
    only = args.only or list(pairs)
    if "bst" in only and args.fuxictr is None:
        parser.error(
            "FuxiCTR's package has no BST, its repository does: name a clone with --fuxictr"
        )
    for case in CASES:
        if (
            case.backbone in only
            and case.size in args.sizes
            and (args.items is None or case.items in args.items)
            and (args.lengths is None or case.mean_length in args.lengths)
        ):
            run(case, pairs[case.backbone], args.out, args.seconds)


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
