"""Score Parquet files of raw rows by an exported model, in order; probabilities go to --out.

Examples:
    python -m torchrec_hilomoe score models/NAME --data rows.parquet --out scored
    python -m torchrec_hilomoe score models/NAME --data DIR/test --values ids --out scored
"""

import sys
from collections.abc import Sequence

from torchrec_hilomoe.command_line import AppParser
from torchrec_hilomoe.runtime.console import print_result, set_up_console
from torchrec_hilomoe.runtime.paths import to_json
from torchrec_hilomoe.serving import Scorer
from torchrec_hilomoe.serving.files import score_files


def main(argv: Sequence[str]) -> int:
    """Return 0 when every row is scored, 2 when the user must mend something."""
    set_up_console(rank=0)
    parser = AppParser("score", __doc__)
    parser.add_argument("artifact", metavar="DIR", help="a folder that export has made")
    parser.add_argument("--data", nargs="+", metavar="FILE", required=True, help="Parquet files")
    parser.add_argument("--out", metavar="DIR", required=True, help="a folder of the same files")
    parser.add_argument(
        "--values",
        choices=["raw", "ids"],
        default="raw",
        help="whether columns hold raw values, or the ids of a prepared folder",
    )
    parser.add_argument(
        "--compiled", action="store_true", help="run the package, which is machine code"
    )
    arguments = parser.parse_args(argv)
    try:
        scorer = Scorer(arguments.artifact, compiled=arguments.compiled)
        written = score_files(scorer, arguments.data, arguments.out, values=arguments.values)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_result(to_json({"rows": written}))
    return 0
