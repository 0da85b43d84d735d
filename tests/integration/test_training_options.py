"""Training's options through the app: together, by stage, from a plain model, and refused."""

import json
import re
from pathlib import Path

import pytest

from tests.helpers.faults import assert_same_run, run_with
from tests.helpers.runs import run_app

TOGETHER = (
    "--train.gradient_accumulation_steps=2",
    "--train.max_grad_norm=1.0",
    "--train.precision=bf16",
    "--train.pipeline=base",
    "--train.optimizer=adamw",
    "--train.weight_decay=0.01",
    "--train.decay.kind=step",
    "--train.decay.every=6",
    "--sharding.tables={item: {type: table_wise, ranks: [0]}}",
    "--sharding.ddr=4GB",
)
STAGES = (
    "[{name: a, share: 0.6, active_layers: 0, plateau: {metric: auc, patience: 1, min_delta: 1}}, "
    "{name: b, epochs: 0.05, active_layers: 1, train_backbone: false, optimizer: sgd}, {name: c}]"
)


def run(out: Path, *flags: str) -> tuple[str, list[dict]]:
    (ended,) = run_app(f"--out_dir={out}", *flags)
    assert ended.code == 0, ended.shown
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return ended.shown, [json.loads(line) for line in lines]


def test_options_go_together(tmp_path):
    shown, lines = run(tmp_path / "run", *TOGETHER)
    assert lines[-1]["split"] == "test"
    assert re.search(r"unpooled.item +[\d,]+ +16 .* table_wise +fused +0 ", shown)
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    (item,) = [table for table in plan["tables"] if table["table"] == "item"]
    assert (item["type"], item["ranks"]) == ("table_wise", [0])
    assert "item" in (tmp_path / "run" / "plan.txt").read_text()
    newest = tmp_path / "run" / "checkpoints" / "step_18"
    assert (newest / "plan.json").read_text() == (tmp_path / "run" / "plan.json").read_text()


@pytest.mark.slow
def test_a_plateau_ends_a_stage_and_no_line_carries_the_name_of_another(tmp_path):
    shown, lines = run(tmp_path / "run", f"--train.stages={STAGES}", "--train.evaluate_every=3")
    assert "stage a: a plateau, it ends at step 6" in shown
    train = {line["step"]: line["stage"] for line in lines if line["split"] == "train"}
    # A line every 4 steps, and at the end of each stage: after 6 steps, and 3 of 64 an epoch.
    assert train == {4: "a", 6: "a", 8: "b", 9: "b", 12: "c", 16: "c", 18: "c"}
    stages = json.loads((tmp_path / "run" / "summary.json").read_text())["stages"]
    assert [(it["name"], it["start"], it["stop"]) for it in stages] == [
        ("a", 0, 6),
        ("b", 6, 9),
        ("c", 9, 18),
    ]


@pytest.mark.slow
def test_a_plain_model_gets_experts(tmp_path):
    run(tmp_path / "plain", "--model.hilomoe=null")
    path = tmp_path / "plain" / "checkpoints" / "step_18"
    shown, lines = run(tmp_path / "warm", f"--init_from={path}", "--train.optimizer=adam")
    assert f"started from {path}: " in shown
    assert "fresh: model.backbone.head.hidden.0.expert_in, " in shown
    assert [line["stage"] for line in lines][0] == "expert_warmup[1]"
    # It goes on by itself: a run that is resumed does not start again.
    shown, _ = run(tmp_path / "warm", f"--init_from={path}", "--train.max_steps=20")
    assert "started from" not in shown
    assert "resumed" in shown
    # Keys that nothing learns are no parameters; and what else differs can be named.
    options = (f"--init_from={path}", "--model.hilomoe.routing=random", "--model.head=[8, 4]")
    (refused,) = run_app(f"--out_dir={tmp_path / 'other'}", *options)
    assert refused.code == 2
    assert "name what may differ with --allow_missing" in refused.shown
    named = "--allow_missing=[model.*.head.*, optimizer.*.head.*]"
    shown, _ = run(tmp_path / "other", *options, named)
    assert re.search(r"fresh: .*head\.hidden\.0\.expert_keys, .*head\.hidden\.0\.weight", shown)


@pytest.mark.slow
def test_debugging_trains_to_the_same_bits(tmp_path):
    """Without a pipeline, on two ranks, over validations and stages."""
    for name, flag in {"piped": "false", "plain": "true"}.items():
        flags = [f"--out_dir={tmp_path / name}", f"--train.debug={flag}"]
        ended = run_with(None, [*flags, "--train.evaluate_every=3"], ranks=2)
        assert ended[0].code == 0, ended[0].shown
    assert_same_run(tmp_path / "plain", tmp_path / "piped")


def test_what_a_cpu_cannot_do_is_told_before_anything_is_made(tmp_path):
    out = tmp_path / "run"
    (ended,) = run_app(f"--out_dir={out}", "--train.pipeline=semi_sync", "--train.device=cpu")
    assert ended.code == 2
    assert "error: train.pipeline is 'semi_sync', which looks tables up on a stream" in ended.shown
    assert not out.exists()
