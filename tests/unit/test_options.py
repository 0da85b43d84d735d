"""The help of the options: every one is there, in words that stand alone, and in the document."""

import re
import signal

import pytest

from tests.helpers.processes import ROOT
from torchrec_hilomoe.__main__ import COMMANDS, main
from torchrec_hilomoe.apps import report
from torchrec_hilomoe.config import RunConfig
from torchrec_hilomoe.options import describe_options, help_text, markdown, option_names

OPTIONS = list(describe_options(RunConfig))


def test_the_help_names_every_option_with_those_of_experts_and_of_stages():
    plain = re.sub(r"\[\]|\.NAME", "", help_text())
    shown = set(re.findall(r"^(?:--)?([\w.]+)(?:  |: )", plain, re.MULTILINE))
    assert shown == set(option_names(RunConfig))
    assert {"model.hilomoe.rank", "train.stages.decay.kind", "data.data_schema.tables"} < shown


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_a_help_stands_alone(option):
    assert re.match(r"[A-Z0-9`].*\.$", option.help)
    assert not re.match(r"(Of|Its|Those|Which|Inside|The) ", option.help)


def test_the_document_is_what_the_options_say():
    told = "Write it again with: python -m torchrec_hilomoe.options > docs/config.md"
    assert (ROOT / "docs" / "config.md").read_text() == markdown(), told


@pytest.mark.parametrize(
    ("topic", "names"),
    [
        ("train.decay", ["decay", "decay.kind", "decay.every", "decay.factor", "decay.floor"]),
        ("train.compile", ["compile"]),
    ],
)
def test_a_part_of_the_help_can_be_asked_for(topic, names, capsys):
    assert main(["train", "--help", topic]) == 0
    shown = re.findall(r"^(?:--)?train\.([\w.]+)", capsys.readouterr().out, re.MULTILINE)
    assert shown == names


def test_help_about_nothing_is_told(capsys):
    assert main(["train", "--help", "train.max_stps"]) == 2
    told = "--help: there is no option 'train.max_stps'. Did you mean 'train.max_steps'?"
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_that_begins_with_an_example(command, capsys):
    if command in ("train", "prepare"):
        assert main([command, "--help"]) == 0
    else:
        with pytest.raises(SystemExit) as end:
            main([command, "--help"])
        assert end.value.code == 0
    first, example, *_ = capsys.readouterr().out.splitlines()
    assert first in ("Example:", "Examples:")
    assert re.match(r"    python .*\b" + command, example)


def test_commands_are_listed_and_a_mistyped_one_is_told(capsys):
    assert main([]) == 2
    assert main(["--help"]) == 0
    assert all(f"    {command} " in capsys.readouterr().out for command in list(COMMANDS)[:1])
    assert main(["trian"]) == 2
    assert "there is no command 'trian'. Did you mean 'train'?" in capsys.readouterr().err


def test_ctrl_c_is_no_traceback(monkeypatch, capsys):
    """Whatever the command is doing; only ``train`` has something to save first."""
    monkeypatch.setattr(report, "main", lambda rest: signal.raise_signal(signal.SIGINT))
    # TorchX has another handler in each process that imports its schedulers.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main(["report", "runs/mine"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "report: interrupted\n"
