"""What was tuned is what the compared runs get, whatever the options are called."""

import json
from argparse import Namespace
from collections import defaultdict
from threading import Lock

from benchmarks.experiments.evidence import (
    chosen,
    grid,
    probe_one,
    tuned,
    TUNED_VARIANT,
    tuning_cases,
)
from benchmarks.experiments.report import Line


def line_of(case, auc: float) -> Line:
    return {
        "data": case.data,
        "backbone": case.backbone,
        "variant": case.variant,
        "seed": case.seed,
        "options": case.options,
        "valid": {"auc": auc},
    }


def test_every_option_that_was_tuned_is_chosen():
    *_, plain = tuning_cases([], "composed", "din", {})
    lines = [line_of(plain, 0.8)]
    experts = [case for case in tuning_cases(lines, "composed", "din", {}) if case != plain]
    experts = [case for case in experts if case.variant == TUNED_VARIANT]
    assert len(experts) > 1
    for best in experts:
        found = chosen(
            [line_of(case, 0.9 if case is best else 0.7) for case in experts],
            "composed",
            "din",
            TUNED_VARIANT,
        )
        tuned = {k: v for k, v in best.options.items() if not k.startswith("model.")}
        assert found == tuned
        assert "train.expert_lr_scale" in tuned
    assert chosen(lines, "composed", "din", TUNED_VARIANT) is None


def test_experts_are_those_that_were_tuned_beside_the_plain_models_best():
    late, early, *_ = tuning_cases([], "composed", "din", {})
    lines = [line_of(early, 0.8)]
    beside = [it for it in tuning_cases(lines, "composed", "din", {}) if it.variant != "plain"]
    lines += [line_of(case, 0.9) for case in beside]
    plain, experts = tuned(lines, "composed", "din")
    assert plain.items() <= experts.items()
    assert "train.expert_lr_scale" in experts
    lines.append(line_of(late, 0.85))
    plain, experts = tuned(lines, "composed", "din")
    assert plain == experts == {k: v for k, v in late.options.items() if k.startswith("train.")}


def asked(**options) -> Namespace:
    return Namespace(
        options={name.replace("__", "."): value for name, value in options.items()},
        seeds=[0],
        data=["composed"],
        backbones=["din"],
        variants=["plain", "head rank 4, probed"],
    )


def test_what_is_given_by_hand_beats_what_was_tuned_and_never_the_variant():
    *_, plain = tuning_cases([], "composed", "din", {})
    rate, of_plain = "train.learning_rate", {"model.hilomoe": "null"}
    for case in grid([line_of(plain, 0.8)], asked()):
        assert case.options[rate] == plain.options[rate]
    given = asked(train__learning_rate="0.5", model__hilomoe="anything")
    first, second = grid([line_of(plain, 0.8)], given)
    assert (first.options[rate], second.options[rate]) == ("0.5", "0.5")
    assert {**first.options, **of_plain} == first.options


def test_a_probe_of_other_options_is_not_taken(tmp_path):
    args = asked(data__train_rows="256000")
    args.probes, args.probing = tmp_path / "probes.jsonl", defaultdict(Lock)
    line = {"data": "composed", "backbone": "din", "seed": 0, "verdict": ""}
    wanted = {**line, "given": {"data.train_rows": "256000"}}
    lines = [line, {**line, "given": {"data.train_rows": "1"}}, wanted]
    args.probes.write_text("\n".join(json.dumps(it) for it in lines) + "\n")
    (case, _) = grid([], args)
    assert probe_one(case, args) == wanted
