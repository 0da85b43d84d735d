"""What an exported model says of the batches that another one learns from."""

import inspect
import json
import re
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.helpers.datasets import SCHEMA, toy_table
from tests.helpers.rounding import assert_within, rounding_of
from tests.helpers.serving import batch_of, ranker
from torchrec_hilomoe.data.batch import CTRBatch
from torchrec_hilomoe.data.schema import VocabularyRule
from torchrec_hilomoe.embeddings.features import ModelInputs
from torchrec_hilomoe.serving import export_model
from torchrec_hilomoe.serving.archive import ArtifactError
from torchrec_hilomoe.serving.export import origin_of
from torchrec_hilomoe.serving.teacher import Teacher
from torchrec_hilomoe.training.checkpoint.manifest import own_checksum

CPU = torch.device("cpu")
COUNTED = replace(
    SCHEMA, vocabularies={"item": VocabularyRule(kind="counted", file="item.parquet")}
)


def batches(*sizes: int) -> Generator[CTRBatch, None, None]:
    yield from [batch_of(toy_table(size, seed=size)) for size in sizes]


def vocabulary(*values: str) -> pa.Table:
    ids = pa.array(range(1, 1 + len(values)), pa.int64())
    return pa.table({"value": pa.array(values), "id": ids})


def test_batches_get_the_logits_of_evaluation_and_keep_the_rest(tmp_path):
    torch.manual_seed(0)
    task = ranker("din", "view")
    export_model(task.model, tmp_path / "teacher")
    given = list(batches(0, 1, 64))
    source = (batch for batch in given)
    taught = list(Teacher(str(tmp_path / "teacher"), SCHEMA, None).teach(source, CPU))
    whole = ModelInputs.of(given[-1])
    with torch.no_grad():
        rounding = rounding_of(task.model, whole)
        for batch, before in zip(taught, given, strict=True):
            assert replace(batch, teacher_logits=None) == before
            want = task.model(ModelInputs.of(before))
            assert batch.teacher_logits is not None
            assert_within(batch.teacher_logits, want, rounding, f"{len(want)} rows")


def test_a_loss_has_gradients_through_what_it_says(artifact):
    """Tensors of inference mode could not be kept for the backward pass."""
    task = ranker().train()
    task.teacher_weight = 1.0
    (batch,) = Teacher(str(artifact), SCHEMA, None).teach(batches(8), CPU)
    task(batch)[0].backward()
    assert all(parameter.grad is not None for parameter in task.parameters())


def test_closing_it_closes_the_loader(artifact):
    source = batches(2, 2)
    taught = Teacher(str(artifact), SCHEMA, None).teach(source, CPU)
    next(taught)
    taught.close()
    assert inspect.getgeneratorstate(source) == inspect.GEN_CLOSED


def test_what_is_no_artifact_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match=re.escape(f"there is no artifact at {tmp_path}")):
        Teacher(str(tmp_path), SCHEMA, None)


def test_other_columns_are_refused_by_name(artifact):
    tables = {**SCHEMA.tables, "item": SCHEMA.tables["item"] + 1}
    with pytest.raises(ValueError, match=r"train\.teacher .* different schemas: 1 diff[\s\S]*item"):
        Teacher(str(artifact), replace(SCHEMA, tables=tables), None)


def test_generated_data_of_another_world_is_refused(artifact):
    """Its columns are the same, and its map is another."""
    world = replace(SCHEMA, dataset="another world")
    with pytest.raises(
        ValueError, match=r"train\.teacher .*different schemas: 1 diff[\s\S]*dataset"
    ):
        Teacher(str(artifact), world, None, 0)
    Teacher(str(artifact), world, "a folder, which may have another name")


@pytest.mark.parametrize(("taught_on", "refused"), [(None, False), (7, False), (8, True)])
def test_generated_data_of_another_seed_is_refused(tmp_path, taught_on, refused):
    task = ranker("din", "plain")
    origin = origin_of(task.model, checkpoint="none", step=0, stage="none")
    origin = replace(origin, data_seed=taught_on)
    export_model(task.model, tmp_path / "teacher", origin=origin)
    if refused:
        with pytest.raises(ValueError, match=r"generated with seed 8, and this data with seed 7"):
            Teacher(str(tmp_path / "teacher"), SCHEMA, None, 7)
    else:
        Teacher(str(tmp_path / "teacher"), SCHEMA, None, 7)
    Teacher(str(tmp_path / "teacher"), SCHEMA, "a folder, whose seed shuffles rows", 7)


def test_an_artifact_that_says_no_seed_teaches(artifact):
    """One of before there was a seed in its manifest."""
    path = artifact / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["origin"]["data_seed"], manifest["crc32"]
    path.write_text(json.dumps({**manifest, "crc32": own_checksum(manifest)}))
    assert Teacher(str(artifact), SCHEMA, None, 7).description["data_seed"] is None


@pytest.mark.parametrize(("here", "refused"), [(("a", "b"), False), (("b", "a"), True)])
def test_ids_that_mean_other_values_are_refused(
    here: tuple[str, ...], refused: bool, tmp_path: Path
):
    task = ranker("din", "plain", COUNTED)
    export_model(task.model, tmp_path / "teacher", vocabularies={"item": vocabulary("a", "b")})
    data = tmp_path / "data"
    data.mkdir()
    pq.write_table(vocabulary(*here), data / "item.parquet")
    if not refused:
        Teacher(str(tmp_path / "teacher"), COUNTED, str(data))
        return
    with pytest.raises(ValueError, match="another vocabulary of table 'item'"):
        Teacher(str(tmp_path / "teacher"), COUNTED, str(data))
    pq.write_table(vocabulary(*here).select(["id"]), data / "item.parquet")
    with pytest.raises(ValueError, match=r"item.parquet cannot be read as a vocabulary, with"):
        Teacher(str(tmp_path / "teacher"), COUNTED, str(data))
