"""Checkpoints from before a shared router was the model's: told of, converted, resumed."""

import json
import pickle
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from tests.helpers.processes import ROOT
from tests.helpers.runs import load, read_lines, read_tensors, train
from torchrec_hilomoe.convert import convert_checkpoint
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
    old.mkdir()
    files = read_manifest(new).files
    for name in files:
        (old / name).write_bytes((new / name).read_bytes())
    with (new / ".metadata").open("rb") as source:
        metadata = IndexUnpickler(source).load()
    own = {name.removeprefix("model.model.backbone.") for name in metadata.state_dict_metadata}
    sites = sorted(n.removesuffix(".expert_in") for n in own if n.endswith(".expert_in"))

    def names(name: str) -> list[str]:
        if name.startswith("choices."):
            return [name.replace("hilomoe_router", site) for site in sites]
        return [name.replace("hilomoe_router", f"{sites[0]}.router")]

    def of(entries):
        return {to: entry for name, entry in entries.items() for to in names(name)}

    was = replace(
        metadata,
        state_dict_metadata=of(metadata.state_dict_metadata),
        planner_data={name: (name,) for name in of(metadata.planner_data)},
        storage_data={
            replace(index, fqn=to): place
            for index, place in metadata.storage_data.items()
            for to in names(index.fqn)
        },
    )
    assert len(sites) > 1
    assert f"model.model.backbone.{sites[0]}.router.expert_keys" in was.state_dict_metadata
    assert f"choices.model.backbone.{sites[1]}.rank0" in was.state_dict_metadata
    store = Store()
    with store.create_stream(old / ".metadata", "wb") as sink:
        sink.write(pickle.dumps(was))
    rewrite_manifest(str(new), str(old), {**files, ".metadata": store.checksums[".metadata"]})
    return old


def test_loading_says_how_to_convert(old):
    with pytest.raises(Exception, match=r"hilomoe_router\. Convert it: python -m .*convert .*old"):
        load(old, *SHARED, ranks=1)


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
