"""Plan a run on machines that are not here: where tables go, what fits, how fast it should be.

Examples:
    python -m torchrec_hilomoe plan --config bst-taobao-ad --world_size 128 --hosts 16 --hbm 80GB
    python -m torchrec_hilomoe plan --world_size 8 --train.batch_size 65536

Other flags are those of ``train``.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields

from torchrec_hilomoe.command_line import AppParser, check_flags, parse_run
from torchrec_hilomoe.planning.cluster import Cluster
from torchrec_hilomoe.planning.estimate import with_rows
from torchrec_hilomoe.planning.plots import draw_plan
from torchrec_hilomoe.planning.remedies import plan_or_explain
from torchrec_hilomoe.planning.run_plan import plan_text
from torchrec_hilomoe.runtime.console import print_result, set_up_console
from torchrec_hilomoe.runtime.paths import explain_unwritten, make_folders_for, write_text
from torchrec_hilomoe.runtime.pictures import check_picture
from torchrec_hilomoe.training.inputs import schema_of

SHORT = {  # of options of the run
    "hbm": ("--sharding.hbm", "memory of a GPU, such as 80GB"),
    "ddr": ("--sharding.ddr", "host memory of a rank, such as 128GB"),
    "intra_bandwidth": ("--sharding.intra_host_bandwidth", "between a host's ranks, in GB/s"),
    "inter_bandwidth": ("--sharding.inter_host_bandwidth", "between hosts, in GB/s"),
}


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return this app's own options, and those of the run."""
    parser = AppParser("plan", __doc__)
    parser.add_argument("--world_size", type=int, default=1, help="ranks, one a device")
    parser.add_argument("--hosts", type=int, default=1, help="machines, with as many ranks each")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--device_flops", type=float, help="most FLOP/s of a device")
    parser.add_argument("--utilization", type=float, default=0.4, help="share of it reached")
    parser.add_argument("--headroom", type=float, default=0.1, help="share of memory kept free")
    for name, (option, meaning) in SHORT.items():
        parser.add_argument(f"--{name}", help=f"{meaning}; {option}")
    parser.add_argument("--rows", action="append", default=[], metavar="TABLE=N", help="its size")
    parser.add_argument("--out", metavar="FILE", help="also write the plan, as JSON")
    parser.add_argument("--plot", metavar="FILE", help="draw it, as PNG or as the ending says")
    asked, overrides = parser.parse_known_args(argv)
    check_flags(overrides, parser)
    check_picture("--plot", asked.plot)
    make_folders_for({"--out": asked.out, "--plot": asked.plot})
    given = {option: getattr(asked, name) for name, (option, _) in SHORT.items()}
    return asked, overrides + [f"{name}={value}" for name, value in given.items() if value]


def main(argv: Sequence[str]) -> int:
    """Return 0 when it fits, 1 when it does not, 2 when the user must mend something."""
    set_up_console(rank=0)
    try:
        asked, overrides = parse(argv)
        cluster = Cluster(**{field.name: getattr(asked, field.name) for field in fields(Cluster)})
        config = parse_run(overrides).config
        plan = plan_or_explain(config, with_rows(schema_of(config), asked.rows), cluster)
        if isinstance(plan, str):
            print(plan, file=sys.stderr)
            return 1
        print_result(plan_text(plan).rstrip("\n"))
        if asked.out:
            with explain_unwritten("--out", asked.out):
                write_text(asked.out, plan.to_json())
        if asked.plot:
            with explain_unwritten("--plot", asked.plot):
                draw_plan(plan, asked.plot)
    except (ValueError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return int(plan.excess > 0)
