"""The file of a space: lists and ranges, and what is wrong with one."""

import pytest

from torchrec_hilomoe.sweep.space import Dimension, read_space


def test_lists_and_ranges(tmp_path):
    file = tmp_path / "space.yaml"
    file.write_text(
        "train.learning_rate: {low: 1.0e-4, high: 0.1, log: true}\n"
        "model.hilomoe.num_experts: {low: 4, high: 32, step: 4}\n"
        "model.hilomoe.sites: [[head], [head, ffn]]\n"
    )
    rate, experts, sites = read_space(file)
    assert rate == Dimension(option="train.learning_rate", low=1e-4, high=0.1, log=True)
    assert not rate.is_integer
    assert experts.is_integer
    assert sites.choices == (["head"], ["head", "ffn"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("- 1", "is a list, and must be a mapping"),
        ("{}", "names no option"),
        ("[" * 5000, "is nested more than 50 deep"),
        ("[1", "cannot read"),
        (
            "train.learning_rat: [1]",
            "there is no option 'train.learning_rat'. Did you mean 'train.learning_rate'",
        ),
        ("train.learning_rate: 3", "must be a list of values, or numbers low and high"),
        ("train.learning_rate: []", "must be a list of values"),
        ("train.learning_rate: {low: 1}", "must be a list of values"),
        ("train.learning_rate: {low: 1e-4, high: 1}", "YAML reads 1e-3 as a text; write 1.0e-3"),
        ("train.learning_rate: {low: 1, high: 1}", "wants low below high, got 1 and 1"),
        ("train.warmup_steps: {low: 8, high: 17, step: 0.5}", "whole numbers.*whole step.*got 0.5"),
        ("train.warmup_steps: {low: 8, high: 17, step: 0}", "step must be above 0, got 0"),
        ("train.learning_rate: {low: 0, high: 1, log: true}", "low must be above 0.*got low 0"),
    ],
)
def test_what_is_wrong_is_told(tmp_path, text, message):
    file = tmp_path / "space.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_space(file)
