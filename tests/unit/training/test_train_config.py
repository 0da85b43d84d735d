"""Options of training: what is out of range is refused when it is given."""

import re

import pytest

from torchrec_hilomoe.command_line import parse_run, UsageError
from torchrec_hilomoe.config import TableSharding, TrainConfig
from torchrec_hilomoe.training.stages import Decay, PlateauConfig, Stage


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"gradient_accumulation_steps": 0},
            "gradient_accumulation_steps must be at least 1, got 0",
        ),
        ({"max_grad_norm": 0.0}, "train.max_grad_norm must be above 0, got 0.0"),
        ({"max_grad_norm": float("nan")}, "train.max_grad_norm must be above 0, got nan"),
        ({"weight_decay": -0.1}, "train.weight_decay must be a number of at least 0, got -0.1"),
        (
            {"table_weight_decay": float("inf")},
            "train.table_weight_decay must be a number of at le",
        ),
        ({"momentum": -1.0}, "train.momentum must be a number of at least 0, got -1.0"),
    ],
)
def test_what_is_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TrainConfig(**options)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (
            "--train.pipeline=spars_dist",
            "train.pipeline: Expected one of 'auto', 'base', 'sparse_d",
        ),
        ("--train.precision=int8", "train.precision: Expected one of 'fp32', 'bf16', 'fp16'"),
        (
            "--train.optimizer=lion",
            "train.optimizer: Expected one of 'adam', 'adamw', 'sgd', 'adag",
        ),
        ("--sharding.tables={item: {tpye: row_wise}}", "'sharding.tables.type'"),
        ("--train.max_grad_nrm=2", "Did you mean 'train.max_grad_norm'?"),
    ],
)
def test_what_is_mistyped_is_told(flag, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        parse_run([flag])


def test_nested_options_are_read_from_the_command_line_and_come_back(tmp_path):
    argv = [
        "--train.stages",
        "[{name: a, epochs: 0.5, plateau: {metric: logloss, patience: 3}, optimizer: sgd}, "
        "{name: b, decay: {kind: step, every: 10}}]",
        "--sharding.tables",
        "{item: {type: column_wise, ranks: [1, 0]}, user: {kernel: fused}}",
    ]
    parsed = parse_run(argv)
    plateau = PlateauConfig(metric="logloss", patience=3)
    assert parsed.config.train.stages == (
        Stage(name="a", epochs=0.5, plateau=plateau, optimizer="sgd"),
        Stage(name="b", decay=Decay(kind="step", every=10)),
    )
    assert parsed.config.sharding.tables == {
        "item": TableSharding(type="column_wise", ranks=(1, 0)),
        "user": TableSharding(kernel="fused"),
    }
    path = tmp_path / "again.yaml"
    path.write_text(parsed.resolved)
    assert parse_run(["--config", str(path)]).config == parsed.config
