"""A run that stopped says how to go on, in options that can be pasted."""

from pathlib import Path

import pytest

from torchrec_hilomoe.command_line import parse_run
from torchrec_hilomoe.training.run import how_to_go_on


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--out_dir=runs/a"], "run again to go on"),
        ([], "to go on, run again with --out_dir 'runs/a b'"),
        (["--out_dir=runs/a b", "--resume=never"], "to go on, run again with --resume auto"),
        (["--resume=x/step_1"], "to go on, run again with --out_dir 'runs/a b' --resume auto"),
    ],
)
def test_what_is_missing_is_named(given, said):
    assert how_to_go_on(parse_run(given).config, Path("runs/a b")) == said


def test_what_is_named_wins_over_what_was_given():
    again = ["--resume=never", *["--out_dir", "runs/a", "--resume", "auto"]]
    config = parse_run(again).config
    assert how_to_go_on(config, Path("runs/a")) == "run again to go on"
