"""Score raw rows: ``python -m torchrec_hilomoe score``, from a clone."""

import sys

from torchrec_hilomoe.__main__ import main
from torchrec_hilomoe.runtime.launch_args import drop_launcher_residue

if __name__ == "__main__":
    sys.exit(main(["score", *drop_launcher_residue(sys.argv[1:], __file__)]))
