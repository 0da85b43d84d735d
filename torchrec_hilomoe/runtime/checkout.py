"""Which commit the code that runs is; needs neither torch nor TorchRec."""

import shutil
import subprocess
from pathlib import Path

__all__ = ["commit_of"]

CODE = ("torchrec_hilomoe", "benchmarks/*.py")  # what a measurement or an export depends on


def commit_of(root: Path) -> str:
    """Return the commit of a checkout; marked where the code that runs is another."""
    if shutil.which("git") is None:
        return "none"

    def git(*words: str) -> subprocess.CompletedProcess[str]:
        command = ["git", "-C", str(root), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    commit = git("rev-parse", "--short", "HEAD").stdout.strip()
    if not commit:
        return "none"
    changed = git("diff", "--quiet", "HEAD", "--", *CODE).returncode
    return f"{commit}-dirty" if changed else commit
