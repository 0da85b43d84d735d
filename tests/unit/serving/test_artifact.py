"""An artifact is whole or absent, and refused in one sentence where it is anything else."""

import json
import os

import pytest

from torchrec_hilomoe.runtime.process import versions
from torchrec_hilomoe.serving import Scorer
from torchrec_hilomoe.serving.archive import ArtifactError
from torchrec_hilomoe.serving.artifact import Artifact, artifact_folder
from torchrec_hilomoe.training.checkpoint.manifest import own_checksum

FILES = ["manifest.json", "program.pt2", "request.pt2", "schema.json"]


def rewrite(artifact, **changes):
    """Change a manifest, and its own checksum with it."""
    path = artifact / "manifest.json"
    raw = json.loads(path.read_text()) | changes
    del raw["crc32"]
    path.write_text(json.dumps({**raw, "crc32": own_checksum(raw)}))


def test_an_artifact_says_what_it_is_of(artifact):
    assert sorted(os.listdir(artifact)) == FILES
    origin = Artifact(artifact).origin
    assert (origin.backbone, origin.expert_layers, origin.tables) == ("DIN", 2, "fp32")
    assert json.loads((artifact / "manifest.json").read_text())["versions"] == versions()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["missing", "cut", "flipped"])
def test_a_damaged_file_is_named(artifact, name, how):
    path = artifact / name
    content = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content[: len(content) // 3] if how == "cut" else content)
    with pytest.raises(ArtifactError, match=name) as told:
        Scorer(artifact)
    assert "\n" not in str(told.value)
    assert "xport" in str(told.value)  # the remedy


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"format": 9}, "has format 9, this package reads 1"),
        ({"versions": {**versions(), "torch": "2.99.1"}}, "with torch 2.99.1, and this is 2"),
        ({"versions": {}}, "with torch none, and this is"),
        ({"files": {}}, "does not name program.pt2"),
        ({"files": {"../x": {"bytes": 1, "crc32": 1}}}, "its manifest names '../x'"),
        ({"origin": {"step": "1"}}, r"manifest.json: origin\."),
    ],
)
def test_another_release_and_other_manifests_are_refused_with_the_reason(
    artifact, changes, problem
):
    rewrite(artifact, **changes)
    with pytest.raises(ArtifactError, match=problem):
        Artifact(artifact)


def test_a_patch_release_of_torch_is_the_same_release(artifact):
    torch_version = versions()["torch"].partition("+")[0].rpartition(".")[0] + ".99"
    rewrite(artifact, versions={**versions(), "torch": torch_version})
    assert Artifact(artifact).origin.backbone == "DIN"


def test_a_folder_that_is_left_by_an_error_is_removed_and_one_that_is_there_is_kept(tmp_path):
    def fail():
        with artifact_folder(str(tmp_path / "new")) as folder:
            (tmp_path / folder / "part").touch()
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert os.listdir(tmp_path) == []
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "mine").touch()
    with (
        pytest.raises(ValueError, match=r"--out .*new exists already; name a new folder"),
        artifact_folder(str(tmp_path / "new")),
    ):
        pass
    assert os.listdir(tmp_path / "new") == ["mine"]


def test_there_is_no_package_where_none_was_asked_for(artifact):
    with pytest.raises(ArtifactError, match=r"has no package\.pt2\. .* --package"):
        Scorer(artifact, compiled=True)
