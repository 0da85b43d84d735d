"""No checkpoint holds a number that is none, and a bad one is passed over, not gone on with."""

import re
import shutil

import pytest
import torch
from torch.distributed import checkpoint as dcp

from tests.helpers.datasets import replace_column, toy_table, write_folder
from tests.helpers.faults import assert_same_run, run_with
from tests.helpers.runs import read_tensors
from torchrec_hilomoe.training import checkpoint
from torchrec_hilomoe.training.checkpoint.manifest import rewrite_manifest
from torchrec_hilomoe.training.checkpoint.storage import Store

DATA = ["--model.embedding_dim=4", "--train.stages=null", "--model.batch_norm=false"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_row_that_spoils_the_weights_spoils_no_checkpoint(tmp_path, ranks):
    """One finite number of 3e38: the loss is finite at its step, and the weights are not after."""
    table = toy_table(512)
    prices = [0.0] * 511 + [3e38]
    splits = {"train": [replace_column(table, "price", prices)]}
    splits |= {name: [toy_table(64)] for name in ("valid", "test")}
    data = write_folder(tmp_path / "data", splits)
    argv = [f"--data.path={data}", f"--out_dir={tmp_path / 'run'}", "--train.max_steps=16", *DATA]
    ended = run_with(None, argv, ranks=ranks)
    assert [rank.code for rank in ended] == [1] * ranks, ended[0].shown
    folder = tmp_path / "run" / "checkpoints"
    for path in folder.glob("step_*"):
        for name, tensor in read_tensors(path).items():
            assert tensor.isfinite().all(), (path, name)
    (line,) = [text for text in ended[0].shown.splitlines() if "error: " in text]
    assert "from before" in line


def test_a_run_of_one_step_at_an_absurd_rate_is_no_success(tmp_path):
    flags = ["--train.max_steps=1", "--train.learning_rate=1e30", "--train.stages=null"]
    (ended,) = run_with(None, [f"--out_dir={tmp_path}", *flags], ranks=1)
    assert ended.code == 1, ended.shown
    assert re.search("error: after step 1 .* no numbers", ended.shown)
    assert checkpoint.latest(tmp_path / "checkpoints") is None


def cut(path):
    shard = path / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-100])


def poison(path):
    """Put a NaN into one weight, as a version that did not look would have saved it."""
    tensors = read_tensors(path)
    name = next(name for name in tensors if name.endswith("head.output.weight"))
    tensors[name].view(-1)[0] = torch.nan
    old = path.rename(path.with_name("old"))
    with pytest.warns(UserWarning, match="single process"):
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(path), no_dist=True)
    for document in ("config.yaml", "schema.json", "plan.json", "plan.txt"):
        shutil.copy(old / document, path)
    store = Store()
    for file in list(path.iterdir()):
        content = file.read_bytes()
        with store.create_stream(file, "wb") as sink:
            sink.write(content)
    rewrite_manifest(str(old), str(path), store.checksums)
    shutil.rmtree(old)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (cut, "damaged"),
        (poison, "infinity or NaN in 1 t"),
    ],
)
@pytest.mark.slow
def test_resuming_passes_over_a_bad_checkpoint_and_says_so(finished, tmp_path, damage, why):
    for step in (5, 6):
        name = f"step_{step}"
        shutil.copytree(finished / "checkpoints" / name, tmp_path / "checkpoints" / name)
    shutil.copy(finished / "metrics.jsonl", tmp_path)
    shutil.copy(finished / "routing.jsonl", tmp_path)
    damage(tmp_path / "checkpoints" / "step_6")
    with_path = [f"--out_dir={tmp_path / 'other'}", f"--resume={tmp_path}/checkpoints/step_6"]
    (refused,) = run_with(None, with_path, ranks=1)
    assert refused.code == 2
    assert re.search(f"error: checkpoint .*step_6 .*{why}", refused.shown)
    (ended,) = run_with(None, [f"--out_dir={tmp_path}"], ranks=1)
    assert ended.code == 0, ended.shown
    assert re.search(f"passed over: checkpoint .*step_6 .*{why}", ended.shown)
    assert "step 5 of 8" in ended.shown
    assert_same_run(finished, tmp_path)


def test_nothing_is_gone_on_with_if_every_checkpoint_is_bad(finished, tmp_path):
    path = tmp_path / "checkpoints" / "step_5"
    shutil.copytree(finished / "checkpoints" / "step_5", path)
    cut(path)
    (ended,) = run_with(None, [f"--out_dir={tmp_path}"], ranks=1)
    assert ended.code == 2
    assert re.search("error: no checkpoint in .* can be gone on with: .*distcp", ended.shown)
