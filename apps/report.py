"""Show a run as one HTML page, which needs no network: OUT/report.html.

python apps/report.py runs/NAME
"""

import argparse
import sys
from pathlib import Path

from torchrec_hilomoe.training.page import write_page


def main() -> int:
    """Return 0, or 2 when the user must mend something."""
    parser = argparse.ArgumentParser(description="Write OUT/report.html of a run.")
    parser.add_argument("run", type=Path, metavar="OUT", help="the --out_dir of a run")
    try:
        print(write_page(parser.parse_args().run))
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
