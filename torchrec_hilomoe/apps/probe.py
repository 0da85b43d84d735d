"""Find out whether experts will pay on your data, where, and routed by which features.

Examples:
    python -m torchrec_hilomoe probe --config din-movielens --data.path DIR --plot probe.png
    python -m torchrec_hilomoe probe --checkpoint runs/plain/checkpoints/step_300 --json out.json

A plain model is trained for --steps, or taken from a checkpoint; nothing is kept of it. Other flags
are those of ``train``, but for --init_from, --resume, --out_dir, --dry_run and --train.teacher:
these are refused.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import fields

from torchrec_hilomoe.command_line import AppParser, check_flags, parse_run, parse_saved
from torchrec_hilomoe.config import RunConfig
from torchrec_hilomoe.hilomoe import draw_probe
from torchrec_hilomoe.runtime.console import print_result, set_up_console
from torchrec_hilomoe.runtime.distributed import init_distributed, PeerLostError, pg_timeout
from torchrec_hilomoe.runtime.paths import explain_unwritten, make_folders_for, write_text
from torchrec_hilomoe.runtime.pictures import check_picture
from torchrec_hilomoe.training import checkpoint
from torchrec_hilomoe.training.auto_routing.probing import probe_run, ProbeOptions, route_flags
from torchrec_hilomoe.training.non_finite import NonFiniteError


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, ProbeOptions, RunConfig]:
    """Return this app's own options, how to probe, and the run."""
    parser = AppParser("probe", __doc__)
    parser.add_argument("--json", metavar="FILE", help="write the report there, as JSON")
    parser.add_argument("--plot", metavar="FILE", help="draw it, as PNG or as the ending says")
    parser.add_argument("--checkpoint", metavar="PATH", help="a folder step_N of a plain run")
    given = parser.add_argument
    given("--steps", type=int, default=300, help="that a plain model is trained before (300)")
    given("--later_steps", type=int, default=600, help="after which it must still pay (600)")
    given("--fit_batches", type=int, default=100, help="of training rows that fit (100)")
    given("--judge_batches", type=int, default=128, help="of validation rows that judge (128)")
    given("--draws", type=int, default=4, help="of random keys for each feature (4)")
    asked, overrides = parser.parse_known_args(argv)
    check_flags(overrides, parser)
    check_picture("--plot", asked.plot)
    _refuse_one_file(asked)
    make_folders_for({"--json": asked.json, "--plot": asked.plot})
    options = ProbeOptions(
        **{field.name: getattr(asked, field.name) for field in fields(ProbeOptions)}
    )
    if asked.checkpoint is None:
        config = parse_run(overrides).config
        _refuse_ignored(config, RunConfig())
        return asked, options, config
    if any(flag.partition("=")[0] == "--config" for flag in overrides):
        raise ValueError(
            f"--checkpoint {asked.checkpoint} has a configuration of its own, and --config gives "
            "another. Drop one of them; single options may be overridden."
        )
    path = asked.checkpoint.rstrip("/")
    saved = checkpoint.open(path).document("config.yaml")
    where = f"{path}/config.yaml"
    config = parse_saved(saved, overrides, where=where).config
    _refuse_ignored(config, parse_saved(saved, where=where).config)
    return asked, options, config


def _refuse_one_file(asked: argparse.Namespace) -> None:
    """Refuse to write the picture over the report."""
    if asked.json and asked.plot and os.path.realpath(asked.json) == os.path.realpath(asked.plot):
        raise ValueError(
            f"probe: --json {asked.json} and --plot {asked.plot} are one file, and the picture "
            "would be written over the report. Give two."
        )


def _refuse_ignored(config: RunConfig, own: RunConfig) -> None:
    """Refuse options of a run that change nothing here, but promise to.

    Args:
        config: What was asked for.
        own: What a checkpoint was saved with, which promises nothing; or the defaults.
    """
    if config.init_from not in (None, own.init_from):
        raise ValueError(
            f"probe: init_from is {config.init_from}, but a plain model is trained from its "
            f"beginning, or is that of --checkpoint. Give --checkpoint {config.init_from}, or "
            "--init_from null."
        )
    if config.dry_run and not own.dry_run:
        raise ValueError(
            "probe: dry_run is true, but only a model that computes can be probed. Leave --dry_run "
            "out, or lower --steps, --fit_batches and --judge_batches."
        )
    if config.resume != own.resume:
        raise ValueError(
            f"probe: resume is {config.resume}, but a probe resumes nothing. Leave --resume out; "
            "the model of a checkpoint is probed with --checkpoint PATH."
        )
    if config.out_dir != own.out_dir:
        raise ValueError(
            f"probe: out_dir is {config.out_dir}, but a probe has no folder. Say where the report "
            "goes: --json FILE, --plot FILE."
        )
    teacher = config.train.teacher
    if teacher not in (None, own.train.teacher):
        raise ValueError(
            f"probe: train.teacher is {teacher}, but a plain model that is probed learns from "
            "clicks alone. Give --train.teacher null, or --checkpoint PATH of a plain run that has "
            "learned from it."
        )


def main(argv: Sequence[str]) -> int:
    """Return 0, 2 when the user must mend something, or 1 when a rank or the model is lost."""
    rank = int(os.environ.get("RANK", "0"))
    set_up_console(rank)
    try:
        asked, options, config = parse(argv)
        timeout = pg_timeout(config.stall_seconds)
        with init_distributed(config.train.device, timeout=timeout) as context:
            report = probe_run(config, options, context)
        if context.is_main:
            flags = f"\n{route_flags(config, report)}" if report.pays else ""
            print_result(report.table() + flags)
            if asked.json:
                with explain_unwritten("--json", asked.json):
                    write_text(asked.json, json.dumps(report.to_json(), indent=2) + "\n")
            if asked.plot:
                with explain_unwritten("--plot", asked.plot):
                    draw_probe(report, asked.plot)
    except (ValueError, ImportError, OSError, NonFiniteError, PeerLostError) as error:
        print(f"{f'[rank {rank}] ' if rank else ''}error: {error}", file=sys.stderr)
        return 1 if isinstance(error, NonFiniteError | PeerLostError) else 2
    return 0
