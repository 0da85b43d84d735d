"""What the components refuse, in a sentence and without a traceback, as TorchX's own checks do."""

import sys

import pytest
from torchx.specs.finder import ComponentValidationException

from tests.helpers.processes import run_command
from tests.helpers.torchx_jobs import render
from torchrec_hilomoe.runtime import torchx_jobs


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["-j", "2by8"], r"-j is \[MIN:\]HOSTSxPROCESSES, as in 2x8 or 1:2x8, got '2by8'"),
        (["-j", "3:2x1"], r"MIN at most HOSTS, got '3:2x1'"),
        (["-j", "1x0"], r"needs at least one host, at least one process"),
        (["-j", "1x8", "--gpu", "4"], r"8 processes on each host, but a host has 4 GPUs"),
    ],
)
def test_a_shape_that_cannot_be(arguments, told):
    with pytest.raises(ComponentValidationException, match=told):
        render("slurm", "train", *arguments)


@pytest.mark.parametrize("grid", ["seed", "seed=", "=1,2", "seed=0,,1", "sites=[head"])
def test_a_grid_that_is_none(grid):
    with pytest.raises(ComponentValidationException, match="--grid is 'OPTION=VALUE,VALUE"):
        render("slurm", "sweep", "--grid", grid)


def test_a_grid_of_an_option_that_is_none():
    told = "--grid: there is no option 'train.learning_rat'. Did you mean 'train.learning_rate'"
    with pytest.raises(ComponentValidationException, match=told):
        render("slurm", "sweep", "--grid", "seed=0 train.learning_rat=1,2")


def test_a_grid_of_nothing():
    with pytest.raises(ComponentValidationException, match="--grid names no option"):
        render("slurm", "sweep", "--grid", " ")


def run_of(scheduler, *flags):
    return ["torchx", "run", "-s", scheduler, *flags, "specs/train.py:train", "-j", "1x1"]


@pytest.mark.parametrize(
    ("scheduler", "extra"), [("kubernetes", "kubernetes"), ("kubernetes_mcad", "kubernetes")]
)
def test_a_missing_extra_is_named(monkeypatch, scheduler, extra):
    monkeypatch.setitem(torchx_jobs.EXTRAS, scheduler, "a_package.that_is_missing")
    monkeypatch.setattr(sys, "argv", run_of(scheduler, "--dryrun"))
    told = rf"-s {scheduler} needs the package 'a_package', .* pip install 'torchx\[{extra}\]'"
    with pytest.raises(ComponentValidationException, match=told):
        render("slurm", "train")


def test_a_dry_run_of_aws_batch_needs_no_extra_but_a_job_does(monkeypatch):
    monkeypatch.setitem(torchx_jobs.EXTRAS, "aws_batch", "a_package_that_is_missing")
    monkeypatch.setattr(sys, "argv", run_of("aws_batch", "--dryrun"))
    render("aws_batch", "train")
    monkeypatch.setattr(sys, "argv", run_of("aws_batch"))
    with pytest.raises(ComponentValidationException, match=r"pip install 'torchx\[aws_batch\]'"):
        render("aws_batch", "train")


def test_a_comma_that_slurm_would_cut_at(monkeypatch):
    monkeypatch.setattr(sys, "argv", run_of("slurm"))
    told = "--env NCCL_SOCKET_IFNAME=eth0,eth1: Slurm ends a variable at a comma. Export it before"
    with pytest.raises(ComponentValidationException, match=told):
        render("slurm", "train", "--env", "NCCL_SOCKET_IFNAME=eth0,eth1,NCCL_DEBUG=INFO")


def test_the_command_line_shows_the_sentence_alone():
    code = "from torchx.cli.main import main; main()"
    arguments = ["run", "-s", "slurm", "--dryrun", "specs/train.py:train", "-j", "2by8"]
    result = run_command([sys.executable, "-c", code, *arguments])
    assert result.returncode == 1
    assert "got '2by8'" in result.stderr
    assert "Traceback" not in result.stderr
