"""What a run reads: a recipe's schema against the folder's, and the command for a missing one."""

from dataclasses import replace

import pytest

from tests.helpers.datasets import SCHEMA, toy_table, write_folder
from torchrec_hilomoe.config import DataConfig, RunConfig
from torchrec_hilomoe.data.schema import Schema, SCHEMA_FILE, VocabularyRule
from torchrec_hilomoe.training.inputs import schema_of


def config(path, schema: Schema | None) -> RunConfig:
    return RunConfig(data=DataConfig(path=str(path), data_schema=schema))


def test_a_recipe_for_another_folder_lists_the_differences(tmp_path):
    write_folder(tmp_path / "d", {"train": [toy_table(9)]})
    assert schema_of(config(tmp_path / "d", SCHEMA)) == SCHEMA
    other = replace(SCHEMA, tables={**SCHEMA.tables, "item": 21}, dense=("price",))
    want = (
        r"in 2 places \(here is the recipe.*\n"
        r"  dense: \['price'\] here, \['price', 'age'\] there\n"
        r"  tables\['item'\]: 21 here, 20 there\n"
        r"Set data\.data_schema to null"
    )
    with pytest.raises(ValueError, match=want):
        schema_of(config(tmp_path / "d", other))


def test_counted_tables_have_the_sizes_that_their_rows_decide(tmp_path):
    """A recipe's are of one preparation: other shares of held-out rows count other values."""
    write_folder(tmp_path / "d", {"train": [toy_table(9)]})
    counted = {"item": VocabularyRule(kind="counted")}
    folder = replace(SCHEMA, vocabularies=counted)
    folder.save(str(tmp_path / "d" / SCHEMA_FILE))
    other = replace(folder, tables={**SCHEMA.tables, "item": 21})
    assert schema_of(config(tmp_path / "d", other)) == folder
    other = replace(folder, tables={**SCHEMA.tables, "item": 21, "kind": 6})
    with pytest.raises(ValueError, match=r"in 1 places .*\n  tables\['kind'\]: 6 here, 5 there"):
        schema_of(config(tmp_path / "d", other))


@pytest.mark.parametrize(
    ("dataset", "command"),
    [
        ("kuaivideo", "kuaivideo --raw RAW"),
        ("movielens-1m", "movielens --raw RAW"),
        ("amazon-Beauty", "amazon-sequences --raw RAW --out DIR --name Beauty"),
        ("my-shop", "parquet --raw RAW --out DIR --schema FILE"),
        (None, "NAME --raw RAW --out DIR; without arguments it lists the names"),
    ],
)
def test_a_missing_folder_is_answered_with_its_own_command(tmp_path, dataset, command):
    schema = None if dataset is None else replace(SCHEMA, dataset=dataset)
    with pytest.raises(ValueError, match=rf"no data folder .*torchrec_hilomoe prepare {command}"):
        schema_of(config(tmp_path / "nowhere", schema))
