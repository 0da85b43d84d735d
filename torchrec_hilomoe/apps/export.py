"""Export a checkpoint as a folder that scores raw rows. Other flags override its configuration.

Examples:
    python -m torchrec_hilomoe export runs/NAME/checkpoints/step_9 --out models/NAME
    python -m torchrec_hilomoe export runs/NAME/checkpoints/step_9 --out models/NAME --tables int8
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict

from torchrec_hilomoe.command_line import AppParser, check_flags
from torchrec_hilomoe.runtime.console import print_result, set_up_console
from torchrec_hilomoe.runtime.distributed import init_distributed
from torchrec_hilomoe.runtime.paths import to_json
from torchrec_hilomoe.serving.export import export_checkpoint, ExportOptions


def main(argv: Sequence[str]) -> int:
    """Return 0 when the artifact is whole, 2 when the user must mend something."""
    set_up_console(rank=0)
    parser = AppParser("export", __doc__)
    parser.add_argument("checkpoint", help="a folder step_N of a run")
    parser.add_argument("--out", metavar="DIR", required=True, help="the folder to make")
    parser.add_argument(
        "--tables", choices=["fp32", "fp16", "int8"], default="fp32", help="numbers of tables"
    )
    parser.add_argument(
        "--package", action="store_true", help="also compile for this CPU (AOTInductor)"
    )
    parser.add_argument(
        "--plain", action="store_true", help="without experts that have not begun to learn"
    )
    parser.add_argument(
        "--split",
        choices=["valid", "test", "none"],
        default="valid",
        help="rows whose metrics go into the manifest",
    )
    arguments, overrides = parser.parse_known_args(argv)
    try:
        check_flags(overrides, parser)
        options = ExportOptions(
            tables=arguments.tables,
            package=arguments.package,
            plain=arguments.plain,
            split=None if arguments.split == "none" else arguments.split,
        )
        with init_distributed("cpu"):
            origin = export_checkpoint(
                arguments.checkpoint, arguments.out, tuple(overrides), options
            )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_result(to_json({"out": arguments.out, **asdict(origin)}))
    return 0
