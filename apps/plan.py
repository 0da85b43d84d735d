"""Plan a run on machines that are not here: ``python -m torchrec_hilomoe plan``, from a clone."""

import sys

from torchrec_hilomoe.__main__ import main
from torchrec_hilomoe.runtime.launch_args import drop_launcher_residue

if __name__ == "__main__":
    sys.exit(main(["plan", *drop_launcher_residue(sys.argv[1:], __file__)]))
