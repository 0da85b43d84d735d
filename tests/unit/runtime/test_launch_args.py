"""drop_launcher_residue: every shape in which TorchX hands the arguments over."""

import pytest

from torchrec_hilomoe.runtime.launch_args import drop_launcher_residue


@pytest.fixture
def script(tmp_path, monkeypatch):
    """A checkout's root as working directory, and the absolute path of its apps/train.py."""
    (tmp_path / "apps").mkdir()
    script = tmp_path / "apps" / "train.py"
    script.touch()
    monkeypatch.chdir(tmp_path)
    return str(script)


@pytest.mark.parametrize(
    ("argv", "meant"),
    [
        ([], []),
        (["apps/train.py"], []),
        (["apps/train.py", "--seed", "3"], ["--seed", "3"]),
        (["apps/train.py", "--", "--seed", "3"], ["--seed", "3"]),
        (["./apps/train.py", "--"], []),
        (["--", "--seed", "3"], ["--seed", "3"]),
        (["--seed", "3"], ["--seed", "3"]),
    ],
)
def test_only_what_the_user_meant_is_left(script, argv, meant):
    assert drop_launcher_residue(argv, script) == meant


def test_the_absolute_path_is_the_same_script(script):
    assert drop_launcher_residue([script, "--seed", "3"], "apps/train.py") == ["--seed", "3"]


@pytest.mark.parametrize(
    "argv",
    [
        ["apps/other.py", "--seed", "3"],
        ["--config", "apps/train.py"],
        ["--seed", "3", "--", "apps/train.py"],
    ],
)
def test_what_is_not_residue_stays_to_be_refused_by_the_parser(script, argv):
    assert drop_launcher_residue(argv, script) == argv


def test_the_argument_list_itself_is_not_changed(script):
    argv = ["apps/train.py", "--", "--seed", "3"]
    drop_launcher_residue(argv, script)
    assert argv == ["apps/train.py", "--", "--seed", "3"]
