"""The console: numbers as people write them, and a reader who has had enough."""

import subprocess
import sys

import pytest

from tests.helpers.processes import ROOT


@pytest.mark.parametrize(
    "command",
    [
        ["-m", "torchrec_hilomoe", "prepare", "--help"],
        ["-c", "from torchrec_hilomoe.runtime.console import print_result as p; p('x' * 10**6)"],
    ],
    ids=["help", "long"],
)
def test_a_reader_that_stops_reading_is_no_error(command):
    """As in ``... | head``, whose end of the pipe is closed by now."""
    with subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()  # FBGEMM 1.6 warns there about its own version
        assert b"Traceback" not in said
        assert b"BrokenPipe" not in said
    assert process.returncode == 0
