"""A stage applied to a model: who computes, who may change, what is refused."""

import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.helpers.models import batches, dense_parameters, in_memory, MODEL, task_of
from torchrec_hilomoe.config import InjectionConfig
from torchrec_hilomoe.embeddings.features import ModelInputs
from torchrec_hilomoe.hilomoe.inject import expert_parameters, sites_of
from torchrec_hilomoe.training.stages import Stage
from torchrec_hilomoe.training.stages.staging import check_stages, enter_stage, set_training_mode

TABLES = Stage(name="tables alone", active_layers=0, train_backbone=False)
EXPERTS = Stage(name="experts alone", active_layers=1, train_backbone=False, train_tables=False)


@pytest.mark.parametrize(
    ("stage", "active", "backbone", "experts"),
    [
        (Stage(name="warm-up", active_layers=0), 0, True, False),
        (EXPERTS, 1, False, True),
        (Stage(name="all"), 2, True, True),
        (Stage(name="no expert learns", learning_layers=()), 2, True, False),
        (TABLES, 0, False, False),
    ],
    ids=lambda value: value.name if isinstance(value, Stage) else "",
)
def test_what_computes_and_what_may_change(assembly, stage, active, backbone, experts):
    task = task_of(enter_stage(assembly.model, stage))
    assert {site.active_layers for site in sites_of(task).values()} == {active}
    features = task.model.sparse(ModelInputs.of(next(batches(16, 16))))
    assert features.candidate.requires_grad == stage.train_tables
    expert = set(expert_parameters(task).values())
    for name, parameter in dense_parameters(task).items():
        assert parameter.requires_grad == (experts if parameter in expert else backbone), name


def test_tables_can_learn_alone(assembly):
    model = enter_stage(assembly.model, TABLES)
    before = {name: p.detach().clone() for name, p in dense_parameters(task_of(model)).items()}
    tables = [p.detach().clone() for p in model.parameters() if p.dim() == 2]
    loss, _ = model(next(batches(16, 16)))
    loss.backward()
    for name, parameter in dense_parameters(task_of(model)).items():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])
    assert not all(map(torch.equal, tables, [p for p in model.parameters() if p.dim() == 2]))


def test_a_boundary_keeps_parameters_and_tables_where_they_are(assembly):
    before = {name: tensor.data_ptr() for name, tensor in assembly.model.named_parameters()}
    model = enter_stage(enter_stage(assembly.model, EXPERTS), Stage(name="all"))
    assert {name: tensor.data_ptr() for name, tensor in model.named_parameters()} == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"active_layers": 3}, "active_layers names layer 3"),
        ({"learning_layers": (1, 4)}, "learning_layers names layer 4"),
    ],
)
def test_more_layers_than_a_site_has_are_refused(options, message):
    message = (
        f"Stage 'odd': {message}, but site 'model.backbone.head.hidden.0' has 2. "
        "Lower it or raise num_layers (model.hilomoe.num_layers)."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        check_stages(in_memory(), [Stage(name="fine"), Stage(name="odd", **options)])


def test_a_stage_of_experts_alone_is_refused_for_a_plain_model():
    plain = in_memory(replace(MODEL, hilomoe=InjectionConfig(enabled=False)))
    check_stages(plain, [TABLES])
    with pytest.raises(ValueError, match="Stage 'experts alone' trains experts alone, but the mod"):
        check_stages(plain, [EXPERTS])


def test_a_frozen_backbone_keeps_its_running_statistics():
    norm = nn.BatchNorm1d(3)
    task = nn.Sequential(norm, nn.Dropout(0.5))
    before = {name: tensor.clone() for name, tensor in task.state_dict().items()}
    set_training_mode(task, EXPERTS)
    task(torch.randn(8, 3))
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.state_dict().items())
    assert task[1].training  # but dropout goes on
    set_training_mode(task, Stage(name="all"))
    task(torch.randn(8, 3))
    assert not any(torch.equal(tensor, before[n]) for n, tensor in norm.named_buffers("0"))
