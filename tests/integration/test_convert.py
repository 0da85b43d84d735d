"""Checkpoints whose names have changed since: told of, converted, resumed."""

import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata

from tests.helpers.processes import ROOT
from tests.helpers.raw_logs import criteo_rows, write_criteo
from tests.helpers.runs import load, read_lines, read_tensors, train
from torchrec_hilomoe.convert import convert_checkpoint
from torchrec_hilomoe.data.prepare.criteo import prepare_criteo
from torchrec_hilomoe.training import checkpoint
from torchrec_hilomoe.training.checkpoint.manifest import read_manifest, rewrite_manifest
from torchrec_hilomoe.training.checkpoint.storage import IndexUnpickler, Store
from torchrec_hilomoe.training.log.reading import METRICS_FILE, ROUTING_FILE

SHARED = ("--model.hilomoe.routing=sample", "--model.hilomoe.sites=[all]")
STEP, LAST = 10, 18  # inside an expert layer's stage, two steps after a line of the log


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A whole run."""
    out = tmp_path_factory.mktemp("run")
    train(out, *SHARED, f"--checkpoint.every_steps={STEP}")
    return out


@pytest.fixture(scope="module")
def old(run, tmp_path_factory):
    """A checkpoint of it, as the names were: in the first site, and counted once a site."""
    new, old = run / "checkpoints" / f"step_{STEP}", tmp_path_factory.mktemp("old") / "step_10"
    own = {name.removeprefix("model.model.backbone.") for name in index_of(new).state_dict_metadata}
    sites = sorted(n.removesuffix(".expert_in") for n in own if n.endswith(".expert_in"))

    def names(name: str) -> list[str]:
        if name.startswith("choices."):
            return [name.replace("hilomoe_router", site) for site in sites]
        return [name.replace("hilomoe_router", f"{sites[0]}.router")]

    write_renamed(new, old, names)
    was = index_of(old).state_dict_metadata
    assert len(sites) > 1
    assert f"model.model.backbone.{sites[0]}.router.expert_keys" in was
    assert f"choices.model.backbone.{sites[1]}.rank0" in was
    return old


def index_of(path: Path) -> Metadata:
    with (path / ".metadata").open("rb") as source:
        return IndexUnpickler(source).load()


def write_renamed(path: Path, to: Path, names: Callable[[str], list[str]]) -> None:
    """Write a checkpoint under other names, of which an entry may have several."""
    to.mkdir()
    files = read_manifest(str(path)).files
    for name in files:
        (to / name).write_bytes((path / name).read_bytes())
    metadata = index_of(path)

    def of(entries: Mapping[str, Any]) -> dict[str, Any]:
        return {new: entry for name, entry in entries.items() for new in names(name)}

    was = replace(
        metadata,
        state_dict_metadata=of(metadata.state_dict_metadata),
        planner_data={name: (name,) for name in of(metadata.planner_data)},
        storage_data={
            replace(index, fqn=new): place
            for index, place in metadata.storage_data.items()
            for new in names(index.fqn)
        },
    )
    store = Store()
    with store.create_stream(to / ".metadata", "wb") as sink:
        sink.write(pickle.dumps(was))
    rewrite_manifest(str(path), str(to), {**files, ".metadata": store.checksums[".metadata"]})


@pytest.mark.slow
def test_loading_says_how_to_convert(old):
    with pytest.raises(Exception, match=r"first site\. Convert it: python -m .*convert .*old"):
        load(old, *SHARED, ranks=1)


@pytest.mark.slow
def test_a_converted_checkpoint_resumes_to_the_bits_of_an_uninterrupted_run(run, old, tmp_path):
    new = tmp_path / "checkpoints" / f"step_{STEP}"
    command = [sys.executable, "-m", "torchrec_hilomoe.convert", str(old), str(new)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert ".router.expert_keys -> model.model.backbone.hilomoe_router.expert_keys" in done.stdout
    wanted = read_tensors(run / "checkpoints" / f"step_{STEP}")
    found = read_tensors(new)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in found)
    train(tmp_path, *SHARED)
    ours, theirs = (read_tensors(out / "checkpoints" / f"step_{LAST}") for out in (run, tmp_path))
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]
    for name in (METRICS_FILE, ROUTING_FILE):
        before, after = (read_lines(out / name) for out in (run, tmp_path))
        assert after == [line for line in before if line["step"] > STEP]


def test_refuses_what_it_cannot_convert(run, old, tmp_path):
    now = str(run / "checkpoints" / f"step_{STEP}")
    with pytest.raises(checkpoint.CheckpointError, match="no name that changed, so it can be load"):
        convert_checkpoint(now, str(tmp_path / "a"))
    with pytest.raises(checkpoint.CheckpointError, match="exists already. Give the path of a fold"):
        convert_checkpoint(str(old), now)
    with pytest.raises(checkpoint.CheckpointError, match="there is no checkpoint at"):
        convert_checkpoint(str(tmp_path), str(tmp_path / "a"))
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in old.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    data = next(broken.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-1] + b"?")
    with pytest.raises(checkpoint.CheckpointError, match="is not what was written. Convert an old"):
        convert_checkpoint(str(broken), str(tmp_path / "b"))
    assert not (tmp_path / "b" / "progress.json").exists()
    assert json.loads((old / "progress.json").read_text())["step"] == STEP


@pytest.mark.slow
def test_without_histories_the_candidate_was_apart(tmp_path):
    (tmp_path / "raw").mkdir()
    write_criteo(tmp_path / "raw" / "train.txt", criteo_rows(600))
    prepare_criteo(raw=str(tmp_path / "raw"), out=str(tmp_path / "data"))
    options = (f"--data.path={tmp_path}/data", "--model.backbone=dlrm", "--train.batch_size=64")
    train(tmp_path / "run", *options, "--train.max_steps=4")
    now = tmp_path / "run" / "checkpoints" / "step_4"
    apart, pooled = ".unpooled.embeddings.C1.", ".pooled.embedding_bags.C1."
    write_renamed(now, tmp_path / "old", lambda name: [name.replace(pooled, apart)])
    assert any(apart in name for name in index_of(tmp_path / "old").state_dict_metadata)
    with pytest.raises(
        Exception, match=r"apart from others\. Convert it: python -m .*convert .*old"
    ):
        load(tmp_path / "old", *options, ranks=1)
    renamed = convert_checkpoint(str(tmp_path / "old"), str(tmp_path / "new"))
    assert {to: name for name, to in renamed.items()} == {
        name: name.replace(pooled, apart) for name in read_tensors(now) if pooled in name
    }
    wanted, found = read_tensors(now), read_tensors(tmp_path / "new")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in found)
    twice = tmp_path / "twice"
    write_renamed(now, twice, lambda name: list({name, name.replace(pooled, apart)}))
    with pytest.raises(checkpoint.CheckpointError, match=r"tables twice.*C1.*Train anew"):
        convert_checkpoint(str(twice), str(tmp_path / "never"))
