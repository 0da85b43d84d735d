"""A start from a plain model's checkpoint: taken over, fresh, refused."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.helpers.datasets import SCHEMA
from tests.helpers.models import batches, MODEL
from tests.helpers.sharded import parts
from torchrec_hilomoe.config import InjectionConfig, ModelConfig, RunConfig, TrainConfig
from torchrec_hilomoe.data.batch import LoaderState
from torchrec_hilomoe.models.build import build_task
from torchrec_hilomoe.runtime.distributed import DistributedContext
from torchrec_hilomoe.training import checkpoint
from torchrec_hilomoe.training.assemble import assemble, Assembly
from torchrec_hilomoe.training.checkpoint import CheckpointError, Progress, Saver
from torchrec_hilomoe.training.pipelines.pipeline import Pipeline
from torchrec_hilomoe.training.stages import Stage
from torchrec_hilomoe.training.stages.staging import enter_stage
from torchrec_hilomoe.training.trainer import training_state
from torchrec_hilomoe.training.warm_start import warm_start

PLAIN = replace(MODEL, hilomoe=InjectionConfig(enabled=False))
ALL = Stage(name="all")


def assembled(context: DistributedContext, model: ModelConfig, **train) -> Assembly:
    return assemble(
        RunConfig(model=model, train=TrainConfig(**train)), build_task(model, SCHEMA), context
    )


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
    progress = Progress(
        step=2,
        stage="all",
        position=LoaderState(epoch=1, lane_rows=0, num_canonical_shards=1),
        total_steps=2,
    )
    saver = Saver(tmp_path / "checkpoints")
    saver.save(training_state(model, assembly.optimizers), progress)
    return saver.path_of(2), held(assembly)


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


def test_a_checkpoint_that_has_experts_gives_them_too(alone, trained, tmp_path):
    path, _ = trained
    first = assembled(alone, MODEL)
    warm_start(path, first.model, first.optimizers, with_optimizer=True)
    saver = Saver(tmp_path / "again")
    progress = replace(checkpoint.open(path).progress, step=3)
    saver.save(training_state(first.model, first.optimizers), progress)
    second = assembled(alone, MODEL)
    began = warm_start(saver.path_of(3), second.model, second.optimizers, with_optimizer=True)
    assert not began.fresh
    assert "nothing is fresh" in began.text()
    ours, theirs = held(first), held(second)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_there_must_be_a_checkpoint(alone, tmp_path):
    assembly = assembled(alone, replace(MODEL, hilomoe=InjectionConfig(num_layers=1)))
    with pytest.raises(CheckpointError, match="there is no checkpoint at"):
        warm_start(str(tmp_path), assembly.model, assembly.optimizers, with_optimizer=True)
