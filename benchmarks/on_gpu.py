"""Check and measure on a host with one NVIDIA GPU, within a given time.

    python -m benchmarks.on_gpu --minutes 10 --out gpu.jsonl
    python -m benchmarks.on_gpu --minutes 4 --out gpu.jsonl --only ceilings sites warm speed
    python -m benchmarks.on_gpu --minutes 8 --out gpu.jsonl --resume
    python -m benchmarks.on_gpu --minutes 5 --out rehearsal.jsonl --rehearse

Parts, in order: what the device can do; sites against the float64 loops (and, beside it, code for
what is timed next is compiled into the caches on disk); sites against ``nn.Linear``; TorchRec's
sharded collections; training of each backbone; its throughput. The first four parts need PyTorch
and Triton only, the others TorchRec and FBGEMM as well.

Each figure is a JSON line, written as soon as it is there. Cases run in processes of their own,
which end at their part's share of the time; a crash or a hang is a line with the last of what it
said, and the part goes on with the next case. What is there already is left out with ``--resume``.
``--rehearse`` runs the same on a CPU, in small: gloo for NCCL, wall clock for CUDA's events, and
of the pipelines those that a CPU has.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.cases import Case, few_threads, grouped, Lines, run_cases, Setting
from benchmarks.gpu.table import table
from benchmarks.harness import append, environment, read_lines

# Part, its module, the function there that lists cases, and its share of the time.
PARTS = {
    "ceilings": ("ceilings", "cases", 3),
    "sites": ("sites", "cases", 25),
    "warm": ("speed", "warm", 25),
    "speed": ("speed", "cases", 25),
    "sharded": ("sharded", "cases", 10),
    "training": ("training", "cases", 30),
    "throughput": ("throughput", "cases", 30),
}
TOGETHER = (
    ("ceilings",),
    ("sites", "warm"),
    ("speed",),
    ("sharded",),
    ("training",),
    ("throughput",),
)
CLOSING = 6.0  # seconds that are kept for the table
GRACE = 3.0  # seconds after its deadline until a process is killed
LAST = 6000  # characters of what a dead process said


@dataclass
class Lane:
    """A process that runs cases one after the other.

    Attributes:
        part: Its part.
        name: Unique in the part.
        log: What it writes.
        attempts: File of the cases that began, or that are left out.
        began: How many of them there were when the process was started.
        process: The process; None before it is started.
    """

    part: str
    name: str
    log: Path
    attempts: Path
    began: int = 0
    process: subprocess.Popen[bytes] | None = None


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    assert __doc__ is not None
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.on_gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--out", type=Path, required=True, help="append JSON lines to this file")
    made.add_argument(
        "--minutes", type=float, default=10, help="after which it ends, whatever runs"
    )
    made.add_argument("--only", nargs="+", choices=[*PARTS], metavar="PART", help="these parts")
    made.add_argument("--case", nargs="+", metavar="TEXT", help="these cases, by part of the name")
    made.add_argument("--skip", nargs="+", choices=[*PARTS], metavar="PART", default=[])
    made.add_argument("--resume", action="store_true", help="leave out cases that the file has")
    made.add_argument("--rehearse", action="store_true", help="on a CPU, in small")
    made.add_argument("--scratch", type=Path, help="folder of logs; next to the file by default")
    made.add_argument("--processes", type=int, help="side by side; by default one a core")
    made.add_argument("--commit", help="of the code, where there is no git")
    made.add_argument("--worker", nargs=2, metavar=("PART", "LANE"), help=argparse.SUPPRESS)
    made.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    return made


def main(argv: Sequence[str]) -> int:
    """Run every part; return how many cases failed."""
    args = parser().parse_args(argv)
    device = "cpu" if args.rehearse else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "PyTorch sees no GPU here: python -m torchrec_hilomoe.doctor, or --rehearse"
        )
    scratch = args.scratch or args.out.with_suffix(".scratch")
    setting = Setting(
        device=device, rehearsal=args.rehearse, scratch=scratch, named=tuple(args.case or ())
    )
    stamp = environment(device) | ({"commit": args.commit} if args.commit else {})
    lines = Lines(args.out, {**stamp, "rehearsal": args.rehearse})
    if args.worker is not None:
        part, lane = args.worker
        wanted = grouped(_cases(part, setting))[lane]
        attempts = _attempts(scratch, part, lane)
        run_cases(
            part, wanted, lines=lines, attempts=attempts, deadline=args.deadline, device=device
        )
        return 0
    # Told to stop, it ends between two of its steps: not while a process starts that would be left.
    asked: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: asked.append(number))
    begin = time.time()
    end = begin + args.minutes * 60 - CLOSING
    scratch.mkdir(parents=True, exist_ok=True)
    append(args.out, [])  # an unfinished line of before is cut off
    before = args.out.stat().st_size
    done = {(line["part"], line["case"]) for line in _ok(args.out)} if args.resume else set()
    parts = [part for part in args.only or PARTS if part not in args.skip]
    groups = [[part for part in group if part in parts] for group in TOGETHER]
    groups = [group for group in groups if group]
    processes = args.processes or os.cpu_count() or 1
    for index, group in enumerate(groups):
        shares = [max(PARTS[part][2] for part in each) for each in groups[index:]]
        left = end - time.time()
        deadline = time.time() + left * shares[0] / sum(shares)
        print(f"{', '.join(group)}: {deadline - time.time():.0f} s at most", flush=True)
        lanes = _lanes(group, setting, lines, done)
        _drive(lanes, argv, lines, deadline, processes, asked)
    whole = read_lines(args.out)
    with args.out.open("rb") as file:
        file.seek(before)
        fresh = [line for line in file.read().splitlines() if line]
    print(table(whole[len(whole) - len(fresh) :], took=time.time() - begin), flush=True)
    return sum(line["status"] == "failed" for line in whole[len(whole) - len(fresh) :])


def _cases(part: str, setting: Setting) -> list[Case]:
    module, function, _ = PARTS[part]
    listed: Callable[[Setting], list[Case]] = getattr(
        import_module(f"benchmarks.gpu.{module}"), function
    )
    cases = listed(setting)
    return [case for case in cases if any(text in case.name for text in setting.named or ("",))]


def _attempts(scratch: Path, part: str, lane: str) -> Path:
    return scratch / f"{part}-{lane.replace(' ', '-')}.attempts"


def _ok(path: Path) -> list[dict[str, Any]]:
    return [line for line in read_lines(path) if line["status"] == "ok"]


def _lanes(
    group: Sequence[str], setting: Setting, lines: Lines, done: set[tuple[str, str]]
) -> list[Lane]:
    lanes = []
    for part in group:
        try:
            by_lane = grouped(_cases(part, setting))
        except ImportError as error:
            lines.add(part, "all", "failed", say=f"cannot be imported: {error}", traceback=[])
            continue
        for name, cases in by_lane.items():
            attempts = _attempts(setting.scratch, part, name)
            known = [case.name for case in cases if (part, case.name) in done]
            attempts.write_text("".join(f"{name}\n" for name in known))
            if len(known) < len(cases):
                log = attempts.with_suffix(".log")
                lanes.append(
                    Lane(part=part, name=name, log=log, attempts=attempts, began=len(known))
                )
    return lanes


def _drive(
    lanes: list[Lane],
    argv: Sequence[str],
    lines: Lines,
    deadline: float,
    processes: int,
    asked: Sequence[int],
) -> None:
    """Run the lanes side by side, a dead one again without what killed it, until the deadline."""
    running: list[Lane] = []
    try:
        _turns(lanes, running, argv, lines, deadline, processes, asked)
    finally:  # an interrupted call leaves no process behind
        for lane in running:
            assert lane.process is not None
            _end(lane.process)


def _turns(
    lanes: list[Lane],
    running: list[Lane],
    argv: Sequence[str],
    lines: Lines,
    deadline: float,
    processes: int,
    asked: Sequence[int],
) -> None:
    waiting = list(lanes)
    threads = str(few_threads(min(processes, len(lanes))))
    while waiting or running:
        if asked:
            sys.exit(128 + asked[0])
        while waiting and len(running) < processes and time.time() < deadline:
            lane = waiting.pop(0)
            lane.process = _start(lane, argv, deadline, threads)
            running.append(lane)
        if time.time() >= deadline:
            for lane in waiting:
                lines.add(lane.part, f"lane {lane.name}", "left out", say="no time was left")
            waiting = []
        time.sleep(0.05)
        for lane in list(running):
            assert lane.process is not None
            code = lane.process.poll()
            late = time.time() > deadline + GRACE
            if code is None and not late:
                continue
            _end(lane.process)
            running.remove(lane)
            if code == 0:
                continue
            why = "ran out of time" if code is None else f"ended with exit code {code}"
            _say_dead(lane, lines, why)
            began = _began(lane)
            if not late and len(began) > lane.began:  # else it would die of the same again
                lane.began = len(began)
                waiting.append(lane)


def _start(
    lane: Lane, argv: Sequence[str], deadline: float, threads: str
) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "benchmarks.on_gpu", *argv]
    command += ["--worker", lane.part, lane.name, "--deadline", str(deadline)]
    environ = {**os.environ, "OMP_NUM_THREADS": threads, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    if not torch.cuda.is_available():
        environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported
    with lane.log.open("ab") as log:
        return subprocess.Popen(
            command,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process with all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # all of them have ended by themselves
        return
    finally:
        process.wait()


def _began(lane: Lane) -> list[str]:
    return lane.attempts.read_text().splitlines() if lane.attempts.exists() else []


def _say_dead(lane: Lane, lines: Lines, why: str) -> None:
    """Record the case in whose midst a process ended, or the lane's name if none had begun."""
    names = _began(lane)[lane.began :]
    case = names[-1] if names else f"lane {lane.name}"
    said = lane.log.read_bytes()[-LAST:].decode(errors="replace").splitlines()
    stacks = [at for at, line in enumerate(said) if line.startswith(("Timeout (", "Fatal Python"))]
    if stacks:  # what it was about stands first in a stack, of which the rest is not needed
        said = said[stacks[-1] :][:9]
    status = "left out" if why == "ran out of time" else "failed"
    lines.add(lane.part, case, status, say=why, traceback=said[-12:])


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 100))
