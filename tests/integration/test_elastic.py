"""A job of two nodes loses one: it goes on with the other, or waits, and trains every row once."""

import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.helpers.datasets import toy_table, USERS, write_folder
from tests.helpers.nodes import (
    ElasticJob,
    free_port,
    kill_tree,
    listens,
    Node,
    started,
    wait_for,
)
from tests.helpers.processes import ROOT
from tests.helpers.rounding import assert_within, of_sums
from tests.helpers.runs import read_tensors, train
from tests.helpers.torchx_jobs import render
from torchrec_hilomoe.training import checkpoint

ROWS, STEPS = 640, 40
# No dropout: ranks draw their own random numbers, so another number of them would draw others.
OPTIONS = (
    f"--train.batch_size={ROWS // STEPS}",
    "--train.max_steps=null",
    "--train.epochs=1",
    "--train.optimizer=sgd",
    "--train.warmup_steps=0",
    "--train.stages=[{name: backbone, steps: 6, active_layers: 0}, {name: finetune}]",
    "--model.dropout=0",
    "--model.batch_norm=false",
    "--model.embedding_dim=4",
    "--model.hilomoe.num_layers=1",
    "--model.hilomoe.routing=row",
    "--model.hilomoe.route_by=null",
    "--checkpoint.every_steps=4",
    "--checkpoint.keep=20",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Rows that are numbered by the column ``user``, so that each has a table's row of its own."""
    tables = {"train": [toy_table(ROWS)], "valid": [toy_table(20)], "test": [toy_table(20)]}
    return write_folder(tmp_path_factory.mktemp("data"), tables)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """What a run on two ranks that nothing happens to ends with."""
    out = tmp_path_factory.mktemp("whole")
    train(out, f"--data.path={data}", *OPTIONS, ranks=2)
    return read_tensors(out / "checkpoints" / f"step_{STEPS}")


@pytest.fixture
def job(data, tmp_path):
    """A job of two nodes that needs so many of them."""

    def of(fewest):
        argv = (f"--out_dir={tmp_path / 'out'}", f"--data.path={data}", *OPTIONS)
        return ElasticJob(
            names=("first", "second"),
            fewest=fewest,
            port=free_port(),
            argv=argv,
            logs=tmp_path / "logs",
        )

    return of


def lose_one(nodes, checkpoints):
    """Lose the second node, which does not hold the rendezvous, in the middle of the run."""
    wait_for((checkpoints / "step_8").exists, 60, lambda: "\n".join(n.shown for n in nodes))
    nodes[1].lose()


def end_of(out):
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == STEPS
    return summary["world_size"], read_tensors(out / "checkpoints" / f"step_{STEPS}")


def assert_trained_alike(tensors, whole):
    """Equal but for the order in which ranks have added up, at each step anew."""
    longest = max(max(tensor.shape, default=1) for tensor in whole.values())
    for name, tensor in tensors.items():
        largest = whole[name].abs().max().item() if tensor.is_floating_point() else 0.0
        unit = STEPS * of_sums(longest) * torch.finfo(torch.float32).eps
        assert_within(tensor, whole[name], unit * largest, name)


@pytest.mark.slow
def test_the_rest_goes_on_and_every_row_is_trained_once(job, whole, tmp_path):
    out = tmp_path / "out"
    with started(job(1)) as nodes:
        lose_one(nodes, out / "checkpoints")
        assert nodes[0].end(60) == 0, nodes[0].shown
    world_size, tensors = end_of(out)
    assert world_size == 1
    assert "2 ranks on cpu" in nodes[0].shown
    assert f"of {STEPS}\n" in nodes[0].shown.partition("resumed ")[2]
    # Row-wise Adagrad adds up squared gradients: nothing for a row that was never trained, about
    # twice as much for one that was trained twice.
    (name,) = [name for name in tensors if "user" in name and "momentum" in name]
    trained = tensors[name].flatten()
    assert trained.numel() == USERS
    assert torch.equal(trained > 0, torch.arange(USERS) < ROWS)
    once = whole[name].flatten()[:ROWS]
    assert torch.equal((trained[:ROWS] / once).round(), torch.ones(ROWS))
    assert_trained_alike(tensors, whole)


@pytest.mark.slow
def test_all_wait_for_a_node_to_return_and_end_with_the_same_bits(job, whole, tmp_path):
    out, needs_two = tmp_path / "out", job(2)
    with started(needs_two) as nodes:
        lose_one(nodes, out / "checkpoints")
        wait_for(lambda: not nodes[0].workers, 60, lambda: nodes[0].shown)
        newest = checkpoint.latest(out / "checkpoints")
        time.sleep(9)  # longer than a node that may go on alone waits for another
        assert nodes[0].process.is_alive(), nodes[0].shown
        assert not nodes[0].workers
        assert checkpoint.latest(out / "checkpoints") == newest
        nodes.append(Node(needs_two, "second again"))
        for node in (nodes[0], nodes[2]):
            assert node.end(60) == 0, node.shown
    world_size, tensors = end_of(out)
    assert world_size == 2
    assert [name for name in whole if not torch.equal(tensors[name], whole[name])] == []


@contextmanager
def command_running(command, environment, log):
    """A command and all that it starts, of which nothing is left over."""
    with log.open("w") as sink:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=sink, stderr=subprocess.STDOUT
        )
    with process:
        try:
            yield process
        finally:
            if process.poll() is None:
                kill_tree(process.pid)


@pytest.mark.slow
def test_what_the_train_component_starts_goes_on_too(data, whole, tmp_path):
    """Its command for every host, run by torchrun as on a cluster; here the hosts are this one."""
    out, port = tmp_path / "out", free_port()
    patience = "keep_alive_interval=1,keep_alive_max_attempt=5,last_call_timeout=20"
    flags = ["-j", "1:2x1", "--rdzv_port", str(port), "--rdzv_conf", patience]
    argv = [f"--data.path={data}", f"--out_dir={out}", *OPTIONS]
    host = render("local_cwd", "train", *flags, "--", *argv)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # as when activated
    environment = {**os.environ, **host.environment, "PATH": path, "OMP_NUM_THREADS": "1"}
    logs = [tmp_path / "first", tmp_path / "second"]

    def shown():
        return "\n".join(log.read_text() for log in logs)

    with command_running(host.command, environment, logs[0]) as first:
        wait_for(lambda: listens(port), 60, logs[0].read_text)
        with command_running(host.command, environment, logs[1]):
            wait_for((out / "checkpoints" / "step_8").exists, 120, shown)
        assert first.wait(180) == 0, shown()
    world_size, tensors = end_of(out)
    assert world_size == 1
    assert "2 ranks on cpu" in shown()
    assert_trained_alike(tensors, whole)
