"""The watchdog: silent while there are beats, and deadly when there are none."""

import subprocess
import sys
import textwrap

from torchrec_hilomoe.runtime.watchdog import Watchdog


def run(body: str) -> subprocess.CompletedProcess[str]:
    code = "import time\nfrom torchrec_hilomoe.runtime import watchdog\nwatchdog.GRACE = 0.1\n"
    code += "dog = watchdog.Watchdog(0.3, 'the test')\n" + textwrap.dedent(body)
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )


def test_beats_and_pauses_keep_it_quiet():
    ended = run(
        """
        with dog:
            for _ in range(8):
                time.sleep(0.1)
                dog.beat()
            with dog.paused():
                time.sleep(0.8)
        time.sleep(0.8)  # nobody is watched any more
        """
    )
    assert (ended.returncode, ended.stderr) == (0, "")


def test_without_a_beat_it_ends_the_process_and_shows_every_thread():
    ended = run(
        """
        def linger():
            time.sleep(30)
        with dog:
            linger()
        """
    )
    assert ended.returncode == 1
    assert "error: the test has finished nothing for 0.3 s (stall_seconds)" in ended.stderr
    assert "in linger" in ended.stderr


def test_it_ends_a_process_whose_interpreter_is_held():
    """No other Python thread runs inside a long call that keeps the lock."""
    ended = run(
        """
        import re
        with dog:
            re.match(r"(a+)+$", "a" * 60 + "b")
        """
    )
    assert ended.returncode == 1
    assert "Timeout" in ended.stderr


def test_no_limit_watches_nothing():
    with Watchdog(None) as dog:
        dog.beat()
