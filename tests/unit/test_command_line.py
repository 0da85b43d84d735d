"""The command line: recipes, overrides, and what is said about mistakes."""

import argparse
import re
from pathlib import Path

import pytest
import yaml

from tests.helpers.memory_store import MemoryStore
from torchrec_hilomoe.command_line import (
    check_flags,
    DEFAULT_RECIPE,
    parse_run,
    recipe_names,
    UsageError,
)
from torchrec_hilomoe.config import InjectionConfig, RunConfig
from torchrec_hilomoe.runtime.paths import path_manager
from torchrec_hilomoe.training.stages import Stage


def write(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_are_known_by_name_and_parse(name):
    parsed = parse_run(["--config", name])
    assert parsed.recipe == name
    assert parsed == parse_run([f"--config={name}"])


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
    assert parse_run(["--model.hilomoe", "null"]).config.model.hilomoe is None
    recipe = parse_run([]).config.model.hilomoe
    changed = parse_run(["--model.hilomoe.num_layers", "2"]).config.model.hilomoe
    assert recipe is not None
    assert changed is not None
    assert (recipe.num_layers, changed.num_layers) == (3, 2)
    assert changed.rank == recipe.rank  # the recipe's, not the default
    sites = parse_run(["--model.hilomoe.sites", "[ffn, '*.key']"]).config.model.hilomoe
    assert sites is not None
    assert sites.sites == ("ffn", "*.key")


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
        (["--config", "zzz"], f"no recipe 'zzz'. There are {', '.join(recipe_names())}"),
        (["--config", "no/such.yaml"], "there is no file no/such.yaml. The recipes that are sh"),
        (["--config"], "--config needs a YAML file or the name of a recipe"),
        (["stray"], "unrecognized arguments: stray"),
        (["--train.max_steps", "five"], "train.max_steps: Expected a int. Got value: five"),
        (["--train.max_steps"], "argument --train.max_steps: expected one argument"),
        (["--seed", "1.5"], "seed: Expected a int. Got value: 1.5"),
        (["--data.world", "flat"], "data.world: Expected one of 'composed', 'tree', 'smooth'. Go"),
        (["--dry_run", "maybe"], "dry_run: Expected a bool. Got value: maybe"),
        (["--model.head", "[8, wide]"], "model.head: Expected a int. Got value: wide"),
        (["--model.head", "8"], "model.head: Expected a tuple. Got value: 8. Write a list, even"),
        (["--model.hilomoe.route_by", "[a]"], "Write a list of lists: '[[a], [b, c]]'."),
        (
            ["--model.hilomoe.sites", "head"],
            "model.hilomoe.sites: Expected a tuple. Got value: head. Write a list, even of one",
        ),
        (
            ["--model.hilomoe.num_layers", "two"],
            "model.hilomoe.num_layers: Expected a int. Got value: two",
        ),
        (["--train.batch_size", "0"], "train.batch_size must be at least 1, got 0"),
        (["--model.hilomoe.top_k", "9"], "HiLoMoEConfig.top_k = 9 is larger than num_experts = 8"),
        (
            ["--train.stages", "[{name: a, stps: 3}]"],
            "train.stages: Problem with given class_path 'torchrec_hilomoe.Stage': "
            "Option 'stps' is not accepted. Did you mean 'steps'?",
        ),
        (["--train.max_steps", "1e2"], "train.max_steps: Expected a int. Got value: 100.0"),
        (
            ["--model.hilomoe", "{rnk: 3}"],
            "model.hilomoe: Problem with given class_path 'torchrec_hilomoe.config.InjectionConfig'"
            ": Option 'rnk' is not accepted. Did you mean 'rank'? Got value: {'rnk': 3}",
        ),
        (["--model.bst", "{num_heads: a}"], "model.bst.num_heads: Expected a int. Got value: a"),
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
        ("train: {max_steps: five}", "train.max_steps: Expected a int. Got value: five"),
        ("- 1", "mine.yaml is not a mapping of options to values"),
        ("", "mine.yaml is not a mapping of options to values"),
        ("a: [", "--config: cannot read "),
    ],
)
def test_a_mistake_in_a_recipe_is_told_too(tmp_path, text, message):
    with pytest.raises(UsageError, match=re.escape(message)) as told:
        parse_run(["--config", write(tmp_path, text)])
    assert "\n" not in str(told.value)


def test_a_recipe_in_a_store_of_the_users(monkeypatch):
    store = MemoryStore()
    store.objects["memory://runs/mine.yaml"] = b"seed: 7\n"
    monkeypatch.setitem(path_manager._path_handlers, "memory://", store)
    parsed = parse_run(["--config", "memory://runs/mine.yaml"])
    assert (parsed.recipe, parsed.config.seed) == ("mine", 7)
    with pytest.raises(UsageError, match=r"there is no file memory://runs/other\.yaml"):
        parse_run(["--config", "memory://runs/other.yaml"])


def test_flags_of_an_app_are_known_beside_those_of_a_run():
    parser = argparse.ArgumentParser()
    parser.add_argument("--world_size")
    check_flags(["--config", "x", "--seed=1", "--world_size=2", "value", "--data.lanes+=1"], parser)
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
