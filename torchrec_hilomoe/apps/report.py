"""Show a run as one HTML page, which needs no network: OUT/report.html.

Example:
    python -m torchrec_hilomoe report runs/NAME
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from torchrec_hilomoe.command_line import AppParser
from torchrec_hilomoe.runtime.console import print_result
from torchrec_hilomoe.training.page import write_page


def main(argv: Sequence[str]) -> int:
    """Return 0, or 2 when the user must mend something."""
    parser = AppParser("report", __doc__)
    parser.add_argument("run", type=Path, metavar="OUT", help="the --out_dir of a run")
    try:
        print_result(str(write_page(parser.parse_args(argv).run)))
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
