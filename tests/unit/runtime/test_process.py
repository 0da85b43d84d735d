"""The peak of a process is its own."""

import sys

import pytest

from tests.helpers.processes import run_command
from torchrec_hilomoe.runtime.process import peak_resident_bytes

PARENT = """
import subprocess, sys
child = "from torchrec_hilomoe.runtime.process import peak_resident_bytes as p; print(p())"
run = lambda: int(subprocess.check_output([sys.executable, "-c", child]))
alone = run()  # how much importing takes differs by the build of torch
ballast = b"1" * (2 * alone)
print(alone, run())
"""


@pytest.mark.slow
def test_the_memory_of_who_started_it_is_not_counted():
    done = run_command([sys.executable, "-c", PARENT])
    assert done.returncode == 0, done.stderr
    alone, beside_a_large_parent = map(int, done.stdout.split())
    assert 0 < beside_a_large_parent < 2 * alone


def test_what_was_freed_is_counted():
    before = peak_resident_bytes()
    held = b"1" * (before + (16 << 20))
    del held
    assert peak_resident_bytes() > before
