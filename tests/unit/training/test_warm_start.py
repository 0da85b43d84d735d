"""A start from a plain model's checkpoint: taken over, fresh, refused."""

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers.datasets import SCHEMA
from tests.helpers.models import batches, MODEL
from tests.helpers.sharded import parts
from torchrec_hilomoe.config import (
    DataConfig,
    InjectionConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
)
from torchrec_hilomoe.data.batch import LoaderState
from torchrec_hilomoe.data.schema import FrozenTable, Schema
from torchrec_hilomoe.models.build import build_task
from torchrec_hilomoe.runtime.distributed import DistributedContext
from torchrec_hilomoe.training.assemble import assemble, Assembly
from torchrec_hilomoe.training.checkpoint import CheckpointError, Progress, Saver
from torchrec_hilomoe.training.pipelines.pipeline import Pipeline
from torchrec_hilomoe.training.stages import Stage
from torchrec_hilomoe.training.stages.staging import enter_stage
from torchrec_hilomoe.training.trainer import training_state
from torchrec_hilomoe.training.warm_start import warm_start

PLAIN = replace(MODEL, hilomoe=InjectionConfig(enabled=False))
ALL = Stage(name="all")
GIVEN = "model.model.sparse.given."
VECTORS = replace(SCHEMA, frozen={"kind": FrozenTable(width=8, file="kind.npy")})


def assembled(
    context: DistributedContext,
    model: ModelConfig,
    schema: Schema = SCHEMA,
    folder: Path | None = None,
    **train,
) -> Assembly:
    data = DataConfig(path=None if folder is None else str(folder))
    config = RunConfig(data=data, model=model, train=TrainConfig(**train))
    return assemble(config, build_task(model, schema), context)


def save(assembly: Assembly, folder: Path, schema: Schema = SCHEMA) -> str:
    """Save a checkpoint of step 2 and return its path."""
    progress = Progress(
        step=2,
        stage="all",
        position=LoaderState(epoch=1, lane_rows=0, num_canonical_shards=1),
        total_steps=2,
    )
    saver = Saver(folder, documents={"schema.json": schema.to_json()})
    saver.save(training_state(assembly.model, assembly.optimizers), progress)
    return f"{saver.folder}/step_2"


def held(assembly: Assembly) -> dict[str, Tensor]:
    state = training_state(assembly.model, assembly.optimizers)
    return {name: part.values for name, found in parts(state).items() for part in found}


@pytest.fixture
def trained(alone: DistributedContext, tmp_path: Path) -> tuple[str, dict[str, Tensor]]:
    """A plain model's checkpoint after two steps, and what is in it."""
    assembly = assembled(alone, PLAIN)
    model = enter_stage(assembly.model, ALL)
    assembly.optimizers.enter(ALL)
    pipeline = Pipeline(model, assembly.optimizers.stage_optimizer, model.device)
    source = batches(32, 16)
    for _ in range(2):
        pipeline.step(source)
    pipeline.detach()
    return save(assembly, tmp_path / "checkpoints"), held(assembly)


def test_everything_but_the_experts_is_taken_over_to_the_bit(alone, trained):
    path, saved = trained
    assembly = assembled(alone, MODEL)
    before, random = held(assembly), torch.get_rng_state()
    began = warm_start(path, assembly.model, assembly.optimizers, with_optimizer=True)
    after = held(assembly)
    for name, tensor in saved.items():
        assert torch.equal(after[name], tensor), name
    fresh = after.keys() - saved.keys()
    assert {f"model.{name}" for name in began.fresh} == {n for n in fresh if n[:6] == "model."}
    assert all("expert" in name or "query_proj" in name for name in fresh)
    for name in fresh:
        assert torch.equal(after[name], before[name]), name
    assert len(began.model) + len(began.optimizer) == len(saved)
    assert any(name.startswith("state.tables.") for name in began.optimizer)
    assert torch.equal(torch.get_rng_state(), random)
    assert re.match(rf"started from {path}: \d+ tensors of the model and \d+ of its", began.text())


def test_outputs_are_those_of_the_plain_model(alone, trained):
    path, _ = trained
    plain, warm = assembled(alone, PLAIN), assembled(alone, MODEL)
    warm_start(path, plain.model, plain.optimizers, with_optimizer=True)
    warm_start(path, warm.model, warm.optimizers, with_optimizer=True)
    with torch.no_grad():
        for batch in batches(16, 16):
            want = plain.model.eval()(batch)[1].logits
            assert torch.equal(warm.model.eval()(batch)[1].logits, want)


def test_optimizers_start_afresh_when_asked(alone, trained):
    path, saved = trained
    assembly = assembled(alone, MODEL, optimizer="sgd")
    with pytest.raises(
        CheckpointError, match=r"exp_avg: in the checkpoint only(?s:.)*--train.init"
    ):
        warm_start(path, assembly.model, assembly.optimizers, with_optimizer=True)
    began = warm_start(path, assembly.model, assembly.optimizers, with_optimizer=False)
    assert not began.optimizer
    after = held(assembly)
    assert all(torch.equal(after[n], saved[n]) for n in saved if n.startswith("model."))
    assert not any(after[name].any() for name in after if name.startswith("optimizer."))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            replace(MODEL, head=(8, 7)),
            r"head.hidden.2.weight: \(6, 8\) in the checkpoint, \(7, 8\)",
        ),
        (replace(MODEL, head=(8,)), "head.hidden.2.weight: in the checkpoint only"),
        (replace(MODEL, head=(8, 6, 4)), "head.hidden.4.weight: missing from the checkpoint"),
        (replace(MODEL, embedding_dim=8), r"positions.0: \(5, 4\) in the checkpoint, \(5, 8\)"),
    ],
    ids=["reshaped", "unexpected", "missing", "another width"],
)
def test_what_differs_beside_the_experts_is_refused(alone, trained, model, message):
    path, _ = trained
    assembly = assembled(alone, model)
    with pytest.raises(CheckpointError, match=f"{message}(?s:.)*init_from wants a model that is"):
        warm_start(path, assembly.model, assembly.optimizers, with_optimizer=True)


@pytest.mark.parametrize(
    "experts",
    [
        replace(MODEL.hilomoe, routing="random"),
        replace(MODEL.hilomoe, routing="random", query_dim=None, route_by=(("item",), ("tags",))),
        replace(MODEL.hilomoe, routing="sample"),
    ],
    ids=["random", "random by feature", "sample"],
)
def test_routers_of_every_kind_are_fresh(alone, trained, experts):
    """Keys that are fixed are no parameters, and a plain checkpoint does not have them either."""
    path, saved = trained
    assembly = assembled(alone, replace(MODEL, hilomoe=experts))
    before = held(assembly)
    began = warm_start(path, assembly.model, assembly.optimizers, with_optimizer=True)
    after = held(assembly)
    assert any(name.endswith("expert_keys") for name in began.fresh)
    assert all(torch.equal(after[name], tensor) for name, tensor in saved.items())
    assert {f"model.{name}" for name in began.fresh} == {
        name for name in after.keys() - saved.keys() if name.startswith("model.")
    }
    assert all(torch.equal(after[name], before[name]) for name in after.keys() - saved.keys())


OF_THE_HEAD = ("head.hidden.2.*", "head.output.*")


def everywhere(patterns: Sequence[str]) -> list[str]:
    return [f"*{pattern}" for pattern in patterns]


def test_what_may_differ_can_be_named(alone, trained):
    path, saved = trained
    assembly = assembled(alone, replace(MODEL, head=(8, 7)))
    before = held(assembly)
    with pytest.raises(CheckpointError, match=r"name what may differ with --allow_missing '\["):
        warm_start(path, assembly.model, assembly.optimizers, with_optimizer=True)
    began = warm_start(
        path,
        assembly.model,
        assembly.optimizers,
        with_optimizer=True,
        allow_missing=everywhere(OF_THE_HEAD),
    )
    after = held(assembly)
    reshaped = {name for name in saved if saved[name].shape != after[name].shape}
    assert any("head.hidden.2.weight" in name for name in reshaped)
    for name in reshaped:
        assert torch.equal(after[name], before[name]), name
    assert {name for name in reshaped if name.startswith("model.")} <= {
        f"model.{name}" for name in began.fresh
    }
    # Of the same size, and taken over as everything else is.
    assert all(torch.equal(after[name], saved[name]) for name in saved.keys() - reshaped)


def written(folder: Path, seed: int) -> Path:
    """A folder with the vectors that come with some data."""
    folder.mkdir()
    vectors = np.random.default_rng(seed).normal(size=(VECTORS.tables["kind"], 8))
    np.save(folder / "kind.npy", vectors.astype(np.float32))
    return folder


@pytest.mark.parametrize("with_optimizer", [True, False])
def test_vectors_that_come_with_the_data_are_the_data_s(alone, tmp_path, with_optimizer):
    theirs, ours = written(tmp_path / "theirs", 1), written(tmp_path / "ours", 2)
    first = assembled(alone, PLAIN, VECTORS, theirs)
    path, saved = save(first, tmp_path / "checkpoints", VECTORS), held(first)
    second = assembled(alone, MODEL, VECTORS, ours)
    before = held(second)
    given = [name for name in before if name.startswith(GIVEN)]
    assert len(given) == 1, given
    began = warm_start(path, second.model, second.optimizers, with_optimizer=with_optimizer)
    after = held(second)
    assert torch.equal(after[given[0]], before[given[0]])
    assert not torch.equal(after[given[0]], saved[given[0]])
    model = [name for name in saved if name.startswith("model.") and name not in given]
    assert all(torch.equal(after[name], saved[name]) for name in model)
    assert began.given == (given[0].removeprefix("model."),)
    assert began.given[0] not in (*began.model, *began.fresh)
    assert f"; as the data has them: {began.given[0]}" in began.text()


def test_other_columns_are_told(alone, tmp_path, caplog):
    """Numbers in another order are other numbers, which no tensor's size tells."""
    path = save(assembled(alone, PLAIN), tmp_path / "checkpoints")
    for dense, told in ((("price", "age"), False), (("age", "price"), True)):
        other = replace(SCHEMA, dataset="another name", dense=dense)
        second = assembled(alone, MODEL, other)
        caplog.clear()
        warm_start(path, second.model, second.optimizers, with_optimizer=True)
        warnings = [it.getMessage() for it in caplog.records if it.levelno == logging.WARNING]
        found = [text for text in warnings if "different schemas" in text]
        assert len(found) == told
        for text in found:
            assert "dense: ['price', 'age'] here, ['age', 'price'] there" in text


def test_a_checkpoint_that_has_experts_gives_them_too(alone, trained, tmp_path):
    path, _ = trained
    first = assembled(alone, MODEL)
    began = warm_start(path, first.model, first.optimizers, with_optimizer=True)
    assert not began.experts
    again = save(first, tmp_path / "again")
    second = assembled(alone, MODEL)
    began = warm_start(again, second.model, second.optimizers, with_optimizer=True)
    assert not began.fresh
    assert "nothing is fresh" in began.text()
    assert set(began.experts) == {
        name for name in began.model if "expert" in name or "query_proj" in name
    }
    assert f"taken over, {len(began.experts)} of them those of trained experts" in began.text()
    ours, theirs = held(first), held(second)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_there_must_be_a_checkpoint(alone, tmp_path):
    assembly = assembled(alone, replace(MODEL, hilomoe=InjectionConfig(num_layers=1)))
    with pytest.raises(CheckpointError, match="there is no checkpoint at"):
        warm_start(str(tmp_path), assembly.model, assembly.optimizers, with_optimizer=True)
