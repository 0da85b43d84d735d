"""What was tuned is what the compared runs get, whatever the options are called."""

from benchmarks.experiments.evidence import chosen, TUNED_VARIANT, tuning_cases
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
