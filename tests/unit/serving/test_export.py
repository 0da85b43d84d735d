"""A checkpoint becomes an artifact of the model that its stage computes, or is refused."""

import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.helpers.datasets import SCHEMA, toy_table, write_folder
from tests.helpers.rounding import assert_same, assert_within, rounding_of
from tests.helpers.serving import batch_of, ranker, Routing, save_ranker
from torchrec_hilomoe.data.schema import VocabularyRule
from torchrec_hilomoe.embeddings.features import ModelInputs
from torchrec_hilomoe.hilomoe import sites_of
from torchrec_hilomoe.runtime.distributed import init_distributed
from torchrec_hilomoe.serving import export_model, ExportOptions, Scorer
from torchrec_hilomoe.serving.export import export_checkpoint, load_checkpoint
from torchrec_hilomoe.training.checkpoint import RoutingDecision
from torchrec_hilomoe.training.checkpoint.manifest import CheckpointError

pytestmark = pytest.mark.usefixtures("alone")
OPTIONS = ("--model.backbone=din", "--model.embedding_dim=4", "--model.head=[8,6]")
OPTIONS += ("--model.batch_norm=true", "--model.hilomoe.sites=[all]")
OPTIONS += (
    "--model.hilomoe.num_layers=2",
    "--model.hilomoe.num_experts=3",
    "--model.hilomoe.rank=1",
)
AUTO = ("--model.hilomoe.routing=sample", "--model.hilomoe.route_by=auto")
NOTHING = RoutingDecision(step=2, route_by=None, gains=(), verdict="none stands out")
FOUND = replace(NOTHING, route_by=(("item",), ("views_item",)), gains=(1.0, 1.0))


@pytest.fixture(scope="module")
def alone():
    with init_distributed("cpu") as context:
        yield context


def loaded(
    folder, *options, stage="finetune", decision=None, routing: Routing = "row", plain=False
):
    """A ranker, saved as of a stage, and what loading makes of it."""
    torch.manual_seed(0)
    task = ranker("din", routing)
    path = save_ranker(folder, task, *OPTIONS, *options, stage=stage, decision=decision)
    return task, load_checkpoint(path, plain=plain)


def logits_of(task):
    with torch.no_grad():
        return task.model(ModelInputs.of(batch_of(toy_table(20))))


@pytest.mark.parametrize(
    ("options", "decision", "routing"),
    [((), None, "row"), (AUTO, FOUND, "view"), (("--model.hilomoe.enabled=false",), None, "plain")],
)
def test_what_is_loaded_is_what_was_saved(tmp_path, options, decision, routing):
    stage = "train" if routing == "plain" else "finetune"
    task, found = loaded(tmp_path, *options, stage=stage, decision=decision, routing=routing)
    assert_same(found.task.state_dict(), task.state_dict())
    assert_same(logits_of(found.task), logits_of(task))
    assert found.origin.expert_layers == (0 if routing == "plain" else 2)


def test_experts_that_never_vary_become_part_of_the_maps(tmp_path):
    torch.manual_seed(0)
    task = ranker("din", "row", experts=1)
    path = save_ranker(tmp_path, task, *OPTIONS, "--model.hilomoe.num_experts=1")
    found = load_checkpoint(path)
    assert not sites_of(found.task)
    assert found.origin.expert_layers == 2
    with torch.no_grad():
        rounding = rounding_of(task.model, ModelInputs.of(batch_of(toy_table(20))))
        assert_within(logits_of(found.task), logits_of(task), rounding)


def test_the_layers_of_the_stage_compute(tmp_path):
    task, found = loaded(tmp_path, stage="expert_warmup[1]")
    assert found.origin.expert_layers == 1
    for site in sites_of(task).values():
        site.active_layers = 1
    assert_same(logits_of(found.task), logits_of(task))


def test_a_checkpoint_from_before_the_experts_is_refused_unless_it_is_to_be_plain(tmp_path):
    with pytest.raises(ValueError, match=r"of stage 'backbone_warmup', before .*: --plain$"):
        loaded(tmp_path / "one", stage="backbone_warmup")
    task, found = loaded(tmp_path / "two", stage="backbone_warmup", plain=True)
    assert not sites_of(found.task)
    assert found.origin.expert_layers == 0
    for site in sites_of(task).values():
        site.active_layers = 0
    assert_same(logits_of(found.task), logits_of(task))


def test_so_is_one_from_before_routing_was_decided(tmp_path):
    with pytest.raises(ValueError, match=r"before the experts' first one"):
        loaded(tmp_path / "one", *AUTO, stage="backbone_warmup", routing="plain")
    _, found = loaded(tmp_path / "two", *AUTO, stage="backbone_warmup", routing="plain", plain=True)
    assert found.origin.expert_layers == 0


def test_a_run_in_which_auto_found_nothing_is_plain(tmp_path):
    task, found = loaded(tmp_path, *AUTO, decision=NOTHING, routing="plain")
    assert found.origin.expert_layers == 0
    assert_same(logits_of(found.task), logits_of(task))


def test_experts_that_compute_are_not_left_out(tmp_path):
    with pytest.raises(ValueError, match=r"in which experts compute: .* Leave out --plain"):
        loaded(tmp_path, plain=True)


def test_a_checkpoint_of_another_model_or_a_damaged_one_is_told(tmp_path):
    torch.manual_seed(0)
    path = save_ranker(tmp_path, ranker("din", "row"), *OPTIONS, "--model.head=[8]")
    with pytest.raises(CheckpointError, match="does not fit this model"):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match="there is no checkpoint at"):
        load_checkpoint(str(tmp_path / "absent"))


@pytest.mark.slow
def test_metrics_of_a_split_go_into_the_manifest_with_those_of_whole_tables(tmp_path):
    torch.manual_seed(0)
    data = write_folder(tmp_path / "data", {"valid": [toy_table(50), toy_table(30, seed=1)]})
    path = save_ranker(tmp_path / "run", ranker("din", "row"), *OPTIONS, f"--data.path={data}")
    origin = export_checkpoint(path, str(tmp_path / "out"), (), ExportOptions(tables="int8"))
    assert origin.split == "valid"
    assert origin.metrics["rows"] == origin.fp32_metrics["rows"] == 80
    assert origin.metrics["logloss"] != origin.fp32_metrics["logloss"]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["origin"]["metrics"] == origin.metrics
    assert Scorer(tmp_path / "out").artifact.origin == origin
    with pytest.raises(ValueError, match="exists already"):
        export_checkpoint(path, str(tmp_path / "out"))


def test_data_of_another_schema_is_not_measured(tmp_path):
    """Dense columns that change places are the same shapes, and other numbers."""
    torch.manual_seed(0)
    data = write_folder(tmp_path / "data", {"valid": [toy_table(5)]})
    path = save_ranker(tmp_path / "run", ranker("din", "row"), *OPTIONS, f"--data.path={data}")
    replace(SCHEMA, dense=SCHEMA.dense[::-1]).save(str(data / "schema.json"))
    with pytest.raises(CheckpointError, match=r"different schemas: [\s\S]*dense[\s\S]*data\.path"):
        export_checkpoint(path, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("overrides", [(), ("--seed=4",)], ids=["as it was", "another seed"])
def test_the_seed_of_generated_data_is_kept(tmp_path, overrides):
    task = ranker("din", "row")
    path = save_ranker(tmp_path / "generated", task, *OPTIONS, "--seed=3")
    assert load_checkpoint(path, overrides).origin.data_seed == 3
    path = save_ranker(tmp_path / "prepared", task, *OPTIONS, "--seed=3", "--data.path=data")
    assert load_checkpoint(path, overrides).origin.data_seed is None


def test_a_vocabulary_that_is_not_there_is_told_with_the_remedy(tmp_path):
    torch.manual_seed(0)
    rule = VocabularyRule(kind="given", file="vocabularies/kind.parquet")
    schema = replace(SCHEMA, vocabularies={"kind": rule})
    path = save_ranker(tmp_path / "run", ranker("din", "row"), *OPTIONS, schema=schema)
    data = write_folder(tmp_path / "data", {"valid": [toy_table(5)]})
    with pytest.raises(ValueError, match=r"vocabulary of table 'kind' is not at .*data.path DIR"):
        export_checkpoint(path, str(tmp_path / "out"), (f"--data.path={data}",))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("ids", "fault"),
    [
        ([1, 2, 3], "3 values want 4 rows of table 'kind', schema says 5"),
        ([1, 2, 3, 5], "ids are not 1 to 4, each once"),
        (["a", "b", "c", "d"], "ids are string, not whole numbers"),
    ],
)
def test_a_vocabulary_of_another_folder_is_refused(tmp_path, ids, fault):
    torch.manual_seed(0)
    rule = VocabularyRule(kind="given", file="vocabularies/kind.parquet")
    schema = replace(SCHEMA, vocabularies={"kind": rule})
    path = save_ranker(tmp_path / "run", ranker("din", "row"), *OPTIONS, schema=schema)
    data = write_folder(tmp_path / "data", {"valid": [toy_table(5)]})
    (data / "vocabularies").mkdir()
    file = data / "vocabularies" / "kind.parquet"
    pq.write_table(pa.table({"value": list("abcd")[: len(ids)], "id": ids}), file)
    with pytest.raises(ValueError, match=r"is not the checkpoint's: .*data.path DIR$") as error:
        export_checkpoint(path, str(tmp_path / "out"), (f"--data.path={data}",))
    assert fault in str(error.value)
    assert not (tmp_path / "out").exists()
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"kind.parquet cannot be read as a vocabulary, with"):
        export_checkpoint(path, str(tmp_path / "out"), (f"--data.path={data}",))


def test_a_model_in_training_trains_on(tmp_path):
    model = ranker("din", "row").model.train()
    frozen = next(iter(model.backbone.children())).eval()
    before = {name: module.training for name, module in model.named_modules()}
    assert len(set(before.values())) == 2
    export_model(model, tmp_path / "out")
    assert {name: module.training for name, module in model.named_modules()} == before
    assert not frozen.training
    with pytest.raises(ValueError, match="exists already"):
        export_model(model, tmp_path / "out")
    assert {name: module.training for name, module in model.named_modules()} == before
