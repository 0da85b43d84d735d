r"""Training throughput, and where it goes: steps, phases, traffic, memory, FLOP/s.

    python -m benchmarks.bench_train_throughput --out throughput.jsonl
    python -m benchmarks.bench_train_throughput --ranks 1 2 --sweep base weak --out throughput.jsonl
    torchrun --nproc_per_node 2 -m benchmarks.bench_train_throughput --out throughput.jsonl
    torchx run -s local_cwd specs/benchmark.py:benchmark --bench train_throughput -j 1x2 -- \
        --out throughput.jsonl

A case is trained by the product's own parts: assembled, wrapped for a stage, stepped by its
pipeline. Before anything is timed the pipelined loop must have trained what one step after the
other trains, and the sharded model must have the loss of a single process. Then a pass for the
throughput alone; one for the phases, without a pipeline; one step whose collectives are counted;
one whose memory is. One JSON line a case, appended when it is done.

Options of a run (``--model.backbone din``, ``--train.batch_size 4096``, ``--config NAME``) change
what every case starts from; sweeps vary one thing of it at a time.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.driving import BY_ROW
from benchmarks.harness import append
from benchmarks.launching import exit_code, per_rank_threads, run_on_ranks, without_ranks
from benchmarks.throughput.cases import Base, cases_of, parse_sweeps, SWEEPS
from benchmarks.throughput.scaling import scaling_table
from benchmarks.throughput.session import Effort, measure_case, say
from torchrec_hilomoe.command_line import parse_run
from torchrec_hilomoe.config.stage import Decay
from torchrec_hilomoe.runtime.distributed import init_distributed
from torchrec_hilomoe.training.inputs import schema_of

MODULE = "benchmarks.bench_train_throughput"
FULL = ("base", "plain", "pipeline", "loader", "weak", "batch", "length", "rows", "layers")
QUICK = ("base", "plain")
QUICK_MODEL = ["--model.head", "[16]", "--model.embedding_dim", "8"]
QUICK_MODEL += ["--train.batch_size", "64"]


def parser() -> argparse.ArgumentParser:
    """Return the command line, but for options of a run."""
    assert __doc__ is not None
    sweeps = "\n".join(f"  {name:10s}{what}" for name, what in SWEEPS.items())
    made = argparse.ArgumentParser(
        prog=f"python -m {MODULE}",
        description=__doc__.splitlines()[0],
        epilog=f"sweeps, those of numbers with values of one's own as NAME=1000,1e6:\n{sweeps}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--out", type=Path, required=True, help="append JSON lines to this file")
    made.add_argument("--sweep", nargs="+", metavar="NAME[=VALUES]", help="which; all by default")
    made.add_argument("--rows", type=float, default=1e5, help="of the random log's large tables")
    made.add_argument("--length", type=int, default=50, help="mean events of its histories")
    made.add_argument("--max_length", type=int, default=50, help="of its histories")
    made.add_argument("--skew", type=float, default=1.0, help="of ids; 1 draws all alike")
    made.add_argument("--ranks", type=int, nargs="+", help="start so many here, one after another")
    made.add_argument("--threads", type=int, help="of each rank; the cores are shared by default")
    made.add_argument("--seconds", type=float, default=6.0, help="spent on a case's throughput")
    made.add_argument("--scratch", type=Path, help="folder that all hosts see, for the loader")
    made.add_argument("--quick", action="store_true", help="a tiny model for seconds: a test")
    return made


def main(argv: Sequence[str]) -> None:
    """Measure every case."""
    args, overrides = parser().parse_known_args(argv)
    quick = args.quick
    sweeps = parse_sweeps(args.sweep or (QUICK if quick else FULL))
    if args.ranks is not None:
        own = without_ranks(argv)
        begin = args.out.stat().st_size if args.out.exists() else 0
        run_on_ranks(MODULE, args.ranks, own)
        print(scaling_table(args.out, begin))
        return
    config = parse_run([*BY_ROW, *(QUICK_MODEL if quick else []), *overrides]).config
    if config.train.gradient_accumulation_steps > 1:
        raise ValueError(
            "train.gradient_accumulation_steps must be 1, got "
            f"{config.train.gradient_accumulation_steps}: whole batches are timed. "
            "Lower train.batch_size instead."
        )
    named = config.data.path is not None or config.data.data_schema is not None
    schema = config.data.data_schema if config.data.path is None else None
    base = Base(
        config=replace(config, train=replace(config.train, decay=Decay(), warmup_steps=0)),
        schema=(schema or schema_of(config)) if named else None,
        rows=1000 if quick and args.rows == 1e5 else int(args.rows),
        length=min(args.length, 10) if quick else args.length,
        max_length=min(args.max_length, 10) if quick else args.max_length,
        skew=args.skew,
        options=" ".join([*overrides, *([f"--skew {args.skew}"] if args.skew != 1 else [])]),
    )
    effort = Effort(
        seconds=0.2 if quick else args.seconds,
        phase_steps=2 if quick else 20,
        matrix=256 if quick else 2048,
        scratch=args.scratch,
    )
    torch.set_num_threads(per_rank_threads(args.threads))
    with init_distributed(config.train.device) as context:
        if context.device.type == "cuda" and not quick:
            effort = replace(effort, matrix=8192)
        for case in cases_of(base, sweeps, context.world.size):
            line = measure_case(base, case, context, effort)
            if context.is_main:
                append(args.out, [line])
                print(say(line), flush=True)


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
