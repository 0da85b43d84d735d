r"""Training beside FuxiCTR and beside TorchRec's own example, in one run, on the same batches.

    python -m benchmarks.bench_side_by_side --ranks 1 2 --out benchmarks/results/side_by_side.jsonl
    torchrun --nproc_per_node 2 -m benchmarks.bench_side_by_side --only dlrm --out dlrm.jsonl
    torchx run -s local_cwd specs/benchmark.py:benchmark --bench side_by_side -j 1x2 -- \
        --out side.jsonl

``din``: ours, without experts and with those of the default sites, against FuxiCTR's of the same
widths and weights. FuxiCTR trains in one process, without sharding (its issue 77 asks for more), so
on several ranks it is compared with, but not timed. ``dlrm``: TorchRec's dense parts driven by our
trainer's step against the loop of its golden-training example, so that the ratio is the price of
our runtime; and ours with experts. What must be the same is compared before anything is timed. All
ranks share one global batch. Contenders take turns of four steps; ``median_us`` is of a step,
``ratio`` of its time to ours. One JSON line a contender.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.fuxictr_pairs.size import Size
from benchmarks.harness import append, environment, measure, Measurement
from benchmarks.launching import exit_code, per_rank_threads, run_on_ranks, without_ranks
from benchmarks.side_by_side.contenders import din_contenders, dlrm_contenders, EXPERTS, TURN
from benchmarks.side_by_side.dlrm import DLRMSize
from benchmarks.throughput.timing import agreed
from torchrec_hilomoe.runtime.distributed import DistributedContext, init_distributed

MODULE = "benchmarks.bench_side_by_side"
MODELS = ("din", "dlrm")


@dataclass(frozen=True, kw_only=True)
class Case:
    """What all contenders of a case train."""

    size: str
    widths: Size | DLRMSize

    @property
    def model(self) -> str:
        """Its name."""
        return "din" if isinstance(self.widths, Size) else "dlrm"


DIN = Size(
    embedding=16,
    attention=(64,),
    head=(256, 128),
    items=10**5,
    max_length=100,
    mean_length=15,
    batch_size=1024,
)
LIGHT = DLRMSize(
    embedding=16, bottom=(64,), top=(64,), sparse=26, dense=13, rows=10**5, batch_size=1024
)
HEAVY = replace(LIGHT, embedding=64, bottom=(512, 256), top=(1024, 1024, 512, 256))
CASES = (
    Case(size="1e5 items", widths=DIN),
    Case(size="1e6 items", widths=replace(DIN, items=10**6)),
    Case(size="light", widths=LIGHT),
    Case(size="heavy", widths=HEAVY),
)
TINY = {"embedding": 8, "batch_size": 64}
QUICK = (
    Case(
        size="quick",
        widths=replace(DIN, **TINY, attention=(8,), head=(16,), items=1000, max_length=20),
    ),
    Case(size="quick", widths=replace(LIGHT, **TINY, bottom=(16,), top=(16,), sparse=4, rows=1000)),
)


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    assert __doc__ is not None
    made = argparse.ArgumentParser(
        prog=f"python -m {MODULE}", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    made.add_argument("--out", type=Path, required=True, help="append JSON lines to this file")
    made.add_argument("--only", nargs="+", choices=MODELS, default=MODELS, help="models; all")
    made.add_argument("--ranks", type=int, nargs="+", help="start so many here, one after another")
    made.add_argument("--threads", type=int, help="of each rank; the cores are shared by default")
    made.add_argument("--seconds", type=float, default=20.0, help="of a case; 5 rounds at least")
    made.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    made.add_argument("--quick", action="store_true", help="tiny models for seconds: a test")
    return made


def main(argv: Sequence[str]) -> None:
    """Measure every case."""
    args = parser().parse_args(argv)
    if args.ranks is not None:
        run_on_ranks(MODULE, args.ranks, without_ranks(argv))
        return
    if "din" in args.only and find_spec("fuxictr") is None:
        raise ValueError(
            "fuxictr is not installed. Run pip install --no-deps -r requirements/dev.txt, or leave "
            "it out with --only dlrm."
        )
    torch.set_num_threads(per_rank_threads(args.threads))
    with init_distributed(args.device) as context:
        for case in QUICK if args.quick else CASES:
            if case.model in args.only:
                run(case, context, args.out, 0.0 if args.quick else args.seconds)


def run(case: Case, context: DistributedContext, out: Path, seconds: float) -> None:
    """Check, then time one case; a collective call."""
    widths = case.widths
    if widths.batch_size < context.world.size:
        raise ValueError(
            f"a batch of {widths.batch_size} rows for {context.world.size} ranks: each needs one "
            "at least. Start fewer ranks."
        )
    contenders = (
        din_contenders(widths, context)
        if isinstance(widths, Size)
        else dlrm_contenders(widths, context)
    )
    turns = {name: _turn(contender.step) for name, contender in contenders.items()}
    measured = measure(turns, seconds, context.device.type, agree=agreed)
    if not context.is_main:
        return
    stamp = environment(context.device.type)
    if case.model == "din":
        stamp["fuxictr"] = version("fuxictr")
    for name, turn in measured.items():
        figures = _of_a_step(turn)
        line = {
            "bench": "side_by_side",
            "model": case.model,
            "size": case.size,
            **asdict(widths),
            "provider": name,
            "layers": EXPERTS.num_layers if "experts" in name else 0,
            "experts": EXPERTS.num_experts if "experts" in name else 0,
            "world_size": context.world.size,
            "plan": contenders[name].plan,
            "rows_per_second": widths.batch_size / figures.median_us * 1e6,
            **asdict(figures),
            **stamp,
        }
        append(out, [line])
        print(say(line), flush=True)
    if case.model == "din" and "fuxictr" not in measured:
        print("    fuxictr trains in one process only, and so was checked but not timed here")


def say(line: dict[str, Any]) -> str:
    """Return a line for people."""
    # Of the baseline, whose ratio is always 1, the spread is that of its time.
    spread = line["ratio_iqr"] / line["ratio"] or line["iqr_us"] / line["median_us"]
    unsure = "" if line["conclusive"] else ", too wide to conclude"
    return (
        f"{line['model']}, {line['size']}, {line['world_size']} ranks, {line['provider']}: "
        f"{line['rows_per_second']:,.0f} rows/s, step {line['median_us'] / 1e3:.2f} ms, "
        f"{line['ratio']:.2f} of ours (spread {spread:.0%}{unsure})"
    )


def _turn(step: Any) -> Any:
    def turn() -> None:
        for _ in range(TURN):
            step()

    return turn


def _of_a_step(turn: Measurement) -> Measurement:
    return replace(turn, median_us=turn.median_us / TURN, iqr_us=turn.iqr_us / TURN)


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
