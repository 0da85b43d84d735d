"""The command line: recipes, overrides, and what is said about mistakes."""

import argparse
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.memory_store import MemoryStore
from torchrec_hilomoe.command_line import (
    check_flags,
    DEFAULT_RECIPE,
    parse_run,
    parse_saved,
    recipe_names,
    UsageError,
)
from torchrec_hilomoe.config import BSTConfig, InjectionConfig, RunConfig, TrainConfig
from torchrec_hilomoe.options import RENAMED
from torchrec_hilomoe.runtime.paths import path_manager
from torchrec_hilomoe.training.stages import Decay, Stage


def write(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text)
    return str(path)


def test_a_recipe_is_known_by_its_name():
    parsed = parse_run(["--config", "din-movielens"])
    assert parsed.recipe == "din-movielens"
    assert parsed == parse_run(["--config=din-movielens"])


def test_without_arguments_it_is_the_default_recipe():
    assert parse_run([]) == parse_run(["--config", DEFAULT_RECIPE])
    assert parse_run([]).config.data.path is None


def test_a_recipe_of_ones_own(tmp_path):
    path = write(tmp_path, "seed: 7\nmodel: {head: [9], hilomoe: {num_layers: 2}}\n")
    parsed = parse_run(["--config", path])
    assert parsed.recipe == "mine"
    assert parsed.config.seed == 7
    assert parsed.config.model.head == (9,)
    assert parsed.config.model.hilomoe == InjectionConfig(num_layers=2)
    assert parsed.config.train == RunConfig().train  # what it leaves out keeps its default


@pytest.mark.parametrize("first", [True, False])
def test_overrides_win_wherever_they_stand(first):
    recipe, overrides = ["--config", "bst-movielens"], ["--train.epochs", "5", "--seed=3"]
    parsed = parse_run(overrides + recipe if first else recipe + overrides)
    assert (parsed.config.train.epochs, parsed.config.seed) == (5, 3)
    assert parsed.config.model == parse_run(recipe).config.model


def test_the_last_of_two_overrides_wins():
    assert parse_run(["--seed", "3", "--seed", "4"]).config.seed == 4


def test_hilomoe_can_be_switched_off_and_changed_in_part():
    for switched_off in (["--model.hilomoe", "null"], ["--model.hilomoe=null"]):
        assert not parse_run(switched_off).config.model.hilomoe.enabled
    recipe = parse_run([]).config.model.hilomoe
    changed = parse_run(["--model.hilomoe.num_layers", "2"]).config.model.hilomoe
    assert (recipe.num_layers, changed.num_layers) == (3, 2)
    assert changed.rank == recipe.rank  # the recipe's, not the default
    sites = parse_run(["--model.hilomoe.sites", "[ffn, '*.key']"]).config.model.hilomoe
    assert sites.sites == ("ffn", "*.key")


@pytest.mark.parametrize(
    "argv",
    [
        ["--model.hilomoe", "null"],
        ["--model.hilomoe=null"],
        ["--model", "{hilomoe: null}"],
        ["--model={hilomoe: null}"],
    ],
)
def test_null_for_the_experts_is_the_plain_backbone(argv):
    recipe, plain = parse_run([]).config.model, parse_run(argv).config.model
    assert recipe.hilomoe.enabled
    assert not plain.hilomoe.enabled
    assert plain.bst == recipe.bst


@pytest.mark.parametrize(
    ("argv", "dry"),
    [
        (["--dry_run"], True),
        (["--dry_run", "--seed", "1"], True),
        (["--seed", "1", "--dry_run"], True),
        (["--dry_run", "true"], True),
        (["--dry_run", "false"], False),
        (["--dry_run=true"], True),
        ([], False),
    ],
)
def test_dry_run_needs_no_value(argv, dry):
    assert parse_run(argv).config.dry_run is dry


def test_stages_of_ones_own(tmp_path):
    stages = (Stage(name="a", steps=3, active_layers=0), Stage(name="b", learning_layers=(1, 2)))
    text = "[{name: a, steps: 3, active_layers: 0}, {name: b, learning_layers: [1, 2]}]"
    assert parse_run(["--train.stages", text]).config.train.stages == stages
    path = write(tmp_path, f"train: {{stages: {text}}}")
    assert parse_run(["--config", path]).config.train.stages == stages


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--config", "bst-movielens", "--model.hilomoe", "null", "--data.path", "some/where"],
        ["--train.stages", "[{name: a, share: 0.5}, {name: b}]", "--model.head", "[]"],
        ["--train.learning_rate", "1e-4", "--resume", "never", "--out_dir", "x: y"],
    ],
)
def test_what_is_saved_with_a_run_gives_the_same_run(tmp_path, argv):
    parsed = parse_run(argv)
    again = parse_run(["--config", write(tmp_path, parsed.resolved)])
    assert again.config == parsed.config
    assert again.resolved == parsed.resolved


def test_the_saved_configuration_names_every_option():
    saved = yaml.safe_load(parse_run([]).resolved)
    assert list(saved) == list(RunConfig.__dataclass_fields__)
    assert list(saved["train"]) == list(type(RunConfig().train).__dataclass_fields__)
    assert list(saved["model"]["hilomoe"]) == list(InjectionConfig.__dataclass_fields__)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--train.max_stps", "5"],
            "there is no option --train.max_stps. Did you mean 'train.max_steps'?",
        ),
        (["--max_steps=5"], "there is no option --max_steps. Did you mean 'train.max_steps'?"),
        (["--seeed", "3"], "there is no option --seeed. Did you mean 'seed'?"),
        (
            ["--model.hilomoe.num_layrs", "2"],
            "no option --model.hilomoe.num_layrs. Did you mean 'model.hilomoe.num_layers'?",
        ),
        (["--zzz"], "there is no option --zzz. See --help for all of them."),
        (["--config", "bst-syntetic"], "no recipe 'bst-syntetic'. Did you mean 'bst-synthetic'?"),
        (["--config", "bst-parquet"], "no recipe 'bst-parquet'. Data of your own need none: give"),
        (["--config", "zzz"], f"no recipe 'zzz'. There are {', '.join(recipe_names())}"),
        (["--config", "no/such.yaml"], "there is no file no/such.yaml. The recipes that are sh"),
        (["--config"], "--config needs a YAML file or the name of a recipe"),
        (["stray"], "unrecognized arguments: stray"),
        (["--train.max_steps", "five"], "train.max_steps: Expected an integer. Got value: five"),
        (["--train.max_steps"], "argument --train.max_steps: expected one argument"),
        (["--seed", "1.5"], "seed: Expected an integer. Got value: 1.5"),
        (
            ["--data.synthetic", "flat"],
            "data.synthetic: Expected one of 'composed', 'tree', 'smooth'. Go",
        ),
        (["--dry_run", "maybe"], "dry_run: Expected true or false. Got value: maybe"),
        (["--model.head", "[8, wide]"], "model.head: Expected an integer. Got value: wide"),
        (["--model.head", "8"], "model.head: Expected a list. Got value: 8. Write a list, even"),
        (["--model.hilomoe.route_by", "[a]"], "Write a list of lists: '[[a], [b, c]]'."),
        (
            ["--model.hilomoe.sites", "head"],
            "model.hilomoe.sites: Expected a list. Got value: head. Write a list, even of one",
        ),
        (
            ["--model.hilomoe.num_layers", "two"],
            "model.hilomoe.num_layers: Expected an integer. Got value: two",
        ),
        (["--train.batch_size", "0"], "train.batch_size must be at least 1, got 0"),
        (["--model.hilomoe.top_k", "9"], "HiLoMoEConfig.top_k = 9 is larger than num_experts = 8"),
        (
            ["--train.stages", "[{name: a, stps: 3}]"],
            "there is no option --train.stages.stps. Did you mean 'train.stages.steps'?",
        ),
        (
            ["--train.stages", "[{name: a, decay: {kind: x}}]"],
            "train.stages: decay: kind: Expected one of 'constant', 'linear', 'cosine', 'step'",
        ),
        (["--train.max_steps", "1e2"], "train.max_steps: Expected an integer. Got value: 100.0"),
        (
            ["--model.hilomoe", "{rnk: 3}"],
            "there is no option --model.hilomoe.rnk. Did you mean 'model.hilomoe.rank'?",
        ),
        (["--model.bst", "{num_heads: a}"], "model.bst.num_heads: Expected an integer. Got val"),
        (["--train.stages", "[{name: a, steps: -3}]"], "Stage 'a': steps must be at least 0, got"),
    ],
)
def test_a_mistake_is_told_with_what_would_be_right(argv, message):
    with pytest.raises(UsageError, match=re.escape(message)) as told:
        parse_run(argv)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modell: {}", "mine.yaml: there is no option 'modell'. Did you mean 'model'?"),
        ("model: {backbon: bst}", "no option 'model.backbon'. Did you mean 'model.backbone'?"),
        (
            "model: {hilomoe: {num_experts: 2, rnak: 3}}",
            "no option 'model.hilomoe.rnak'. Did you mean 'model.hilomoe.rank'?",
        ),
        (
            "train: {stages: [{name: a, stps: 3}]}",
            "no option 'train.stages.stps'. Did you mean 'train.stages.steps'?",
        ),
        ("train: {max_steps: five}", "train.max_steps: Expected an integer. Got value: five"),
        ("- 1", "mine.yaml is a list, and must be a mapping of names to values. It must map opt"),
        ("", "mine.yaml is empty"),
        ("train: " + "[" * 5000, "mine.yaml is nested more than 50 deep"),
        ("train: &a [*a]", "mine.yaml is nested more than 50 deep"),
        ("seed: 2020-01-01", "mine.yaml: Object of type date is not JSON serializable"),
        ("a: [", "--config: cannot read "),
        ("notes: {command: a}", "mine.yaml: in notes, test_auc is missing."),
        ("notes: {command: a, test_auc: [high]}", "in notes, test_auc[0] is 'high', and must be"),
    ],
)
def test_a_mistake_in_a_recipe_is_told_too(tmp_path, text, message):
    with pytest.raises(UsageError, match=re.escape(message)) as told:
        parse_run(["--config", write(tmp_path, text)])
    assert "\n" not in str(told.value)


NOTES = "notes: {command: python apps/train.py --config mine, test_auc: [0.7, 0.8]}\n"


def test_notes_of_a_recipe_are_for_the_run_that_they_are_of(tmp_path):
    mine = ["--config", write(tmp_path, NOTES + "train: {max_steps: 5}")]
    notes = parse_run([*mine, "--seed", "1", "--out_dir=runs/a"]).notes
    assert notes is not None
    recorded = notes.of_seed(1)
    assert recorded is not None
    assert recorded.test_auc == 0.8
    assert recorded.command == "python apps/train.py --config mine --seed 1"
    assert notes.of_seed(2) is None
    for another in ("--train.max_steps=6", "--model.hilomoe=null", "--data.path=some/where"):
        assert parse_run([*mine, another]).notes is None
    assert "notes" not in yaml.safe_load(parse_run(mine).resolved)


def test_the_default_recipe_is_compared_with_its_plain_model():
    notes = parse_run([]).notes
    assert notes is not None
    plain = parse_run(shlex.split(notes.command)[2:]).config
    model = parse_run([]).config.model
    assert plain == replace(
        parse_run([]).config, model=replace(model, hilomoe=replace(model.hilomoe, enabled=False))
    )


OLD = [f"{group}.{old}" for group, renamed in RENAMED.items() for old in renamed]


@pytest.mark.parametrize("old", OLD)
def test_an_old_name_is_told_with_the_new_one(tmp_path, old):
    group, _, name = old.rpartition(".")
    told = f"there is no option {{}}{old}{{}}. It is '{group}.{RENAMED[group][name]}' now."
    if group == "train.stages":
        flag, value = "--train.stages", f"[{{name: a, {name}: 1}}]"
        nested: Any = {"train": {"stages": [{"name": "a", name: 1}]}}
    else:
        flag, value, nested = f"--{old}", "1", {name: 1}
        for part in reversed(group.split(".")):
            nested = {part: nested}
    with pytest.raises(UsageError, match=re.escape(told.format("--", ""))):
        parse_run([flag, value])
    with pytest.raises(UsageError, match=re.escape(told.format("'", "'"))):
        parse_run(["--config", write(tmp_path, yaml.safe_dump(nested))])


def test_all_old_names_of_a_recipe_are_told_at_once(tmp_path):
    path = write(tmp_path, "data: {world: tree}\ntrain: {accumulate: 2, stages: [{rate: 1}]}\n")
    with pytest.raises(UsageError) as told:
        parse_run(["--config", path])
    assert str(told.value).count(" now.") == 3


@pytest.mark.parametrize("group", ["train", "train.stages"])
def test_a_decay_that_was_a_word_is_told(tmp_path, group):
    decay = {"decay": "linear", "name": "a"}
    train = {"stages": [decay]} if group == "train.stages" else {"decay": "linear"}
    told = f"{group}.decay is a group of options now; 'linear' is {group}.decay.kind."
    with pytest.raises(UsageError, match=re.escape(told)):
        parse_run(["--config", write(tmp_path, yaml.safe_dump({"train": train}))])
    value = "[{name: a, decay: linear}]" if group == "train.stages" else "linear"
    flag = f"--train.stages={value}" if group == "train.stages" else f"--train.decay={value}"
    with pytest.raises(UsageError, match=re.escape(told)):
        parse_run([flag])


def test_what_the_last_release_saved_with_a_run_gives_the_same_run():
    """As that release wrote it: every option is there, those of a stage too."""
    saved = """
data: {path: null, world: tree, lanes: 24}
model: {backbone: bst, bst: {num_layers: 2, positions: false}, hilomoe: null}
train:
  accumulate: 2
  clip_norm: 10.0
  decay: step
  decay_every: 5
  decay_factor: 0.5
  decay_floor: 0.1
  expert_rate: 2.0
  stages:
  - {name: a, share: 0.5, rate: 0.5, expert_rate: 3.0, decay: linear, decay_every: null,
     decay_factor: 0.1, decay_floor: 0.2}
  - {name: b, rate: 1.0, decay: null, decay_every: null, decay_factor: 0.1, decay_floor: 0.0}
"""
    config = parse_saved(saved, ["--seed", "4"]).config
    assert config.seed == 4
    assert (config.data.synthetic, config.data.num_canonical_shards) == ("tree", 24)
    assert config.model.bst == BSTConfig(num_layers=2, position_dim=0)
    assert not config.model.hilomoe.enabled
    assert config.train == TrainConfig(
        gradient_accumulation_steps=2,
        max_grad_norm=10.0,
        decay=Decay(kind="step", every=5, factor=0.5, floor=0.1),
        expert_lr_scale=2.0,
        stages=(
            Stage(
                name="a",
                share=0.5,
                lr_scale=0.5,
                expert_lr_scale=3.0,
                decay=Decay(kind="linear", floor=0.2),
            ),
            Stage(name="b"),
        ),
    )


def test_a_recipe_in_a_store_of_the_users(monkeypatch):
    store = MemoryStore()
    store.objects["memory://runs/mine.yaml"] = b"seed: 7\n"
    monkeypatch.setitem(path_manager._path_handlers, "memory://", store)
    parsed = parse_run(["--config", "memory://runs/mine.yaml"])
    assert (parsed.recipe, parsed.config.seed) == ("mine", 7)
    with pytest.raises(UsageError, match=r"there is no file memory://runs/other\.yaml"):
        parse_run(["--config", "memory://runs/other.yaml"])


@pytest.mark.parametrize(
    ("given", "old", "new"),
    [
        ("clip_norm", "train.clip_norm", "train.max_grad_norm"),
        ("data.accumulate", "train.accumulate", "train.gradient_accumulation_steps"),
        ("train.rate", "train.stages.rate", "train.stages.lr_scale"),
        ("model.dien.positions", "model.bst.positions", "model.bst.position_dim"),
        ("train.world", "data.world", "data.synthetic"),
    ],
)
def test_an_old_name_in_another_group_is_told_too(given, old, new):
    told = re.escape(f"--{given}. It was {old!r}, which is {new!r} now.")
    with pytest.raises(UsageError, match=told):
        parse_run([f"--{given}=1"])


def test_flags_of_an_app_are_known_beside_those_of_a_run():
    parser = argparse.ArgumentParser()
    parser.add_argument("--world_size")
    check_flags(
        ["--config", "x", "--seed=1", "--world_size=2", "value", "--data.num_canonical_shards+=1"],
        parser,
    )
    for mistyped, meant in (("wrold_size", "world_size"), ("train.max_stps", "train.max_steps")):
        told = f"there is no option --{mistyped}. Did you mean '{meant}'?"
        with pytest.raises(UsageError, match=re.escape(told)):
            check_flags([f"--{mistyped}", "3"], parser)


def test_a_recipe_that_is_no_text_is_told(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="cannot read"):
        parse_run(["--config", str(path)])


def test_a_recipe_may_describe_its_data(tmp_path):
    text = """
data:
  data_schema:
    dataset: mine
    tables: {item: 10}
    candidate: [{name: item, table: item}]
    sequences: [{name: h, fields: [{name: items, table: item}], max_length: 5}]
"""
    schema = parse_run(["--config", write(tmp_path, text)]).config.data.data_schema
    assert schema is not None
    assert schema.tables == {"item": 10}
    assert schema.sequences[0].fields[0].table == "item"
    with pytest.raises(UsageError, match=r"'data.data_schema.sequences.fields.tabel'. Did you me"):
        parse_run(["--config", write(tmp_path, text.replace("items, table", "items, tabel"))])
