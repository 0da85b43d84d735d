"""The peak of a process is its own."""

import sys

from tests.helpers.processes import run_command
from torchrec_hilomoe.runtime.memory import peak_resident_bytes

BALLAST = 1 << 30

PARENT = f"""
import subprocess, sys
ballast = b"1" * {BALLAST}
print("parent", flush=True)
child = "from torchrec_hilomoe.runtime.memory import peak_resident_bytes as p; print(p())"
subprocess.run([sys.executable, "-c", child], check=True)
"""


def test_the_memory_of_who_started_it_is_not_counted():
    done = run_command([sys.executable, "-c", PARENT])
    assert done.returncode == 0, done.stderr
    said, peak = done.stdout.split()
    assert said == "parent"
    assert 0 < int(peak) < BALLAST


def test_what_was_freed_is_counted():
    before = peak_resident_bytes()
    held = b"1" * (before + (64 << 20))
    del held
    assert peak_resident_bytes() > before
