"""A checkpoint belongs to its columns: another schema is refused, with what differs."""

import re
from dataclasses import replace

import pytest

from tests.helpers.checkpoints import save
from tests.helpers.datasets import SCHEMA
from torchrec_hilomoe.training import checkpoint
from torchrec_hilomoe.training.checkpoint import CheckpointError

pytestmark = pytest.mark.usefixtures("alone")


def test_the_same_schema_is_taken_whatever_its_name(tmp_path):
    path = save(tmp_path, documents={"schema.json": SCHEMA.to_json()})
    checkpoint.open(path).check_schema(SCHEMA)
    checkpoint.open(path).check_schema(replace(SCHEMA, dataset="another name"))


def test_another_schema_is_refused_and_every_difference_is_listed(tmp_path):
    path = save(tmp_path, documents={"schema.json": SCHEMA.to_json()})
    views = replace(SCHEMA.sequences[1], max_length=9)
    other = replace(
        SCHEMA,
        tables={**SCHEMA.tables, "item": 21},
        sequences=(SCHEMA.sequences[0], views),
        dense=("price",),
    )
    message = (
        "(here) and the data (there) have different schemas: 3 differences.\n"
        "  dense: ['price', 'age'] here, ['price'] there\n"
        "  sequences['views']['max_length']: 3 here, 9 there\n"
        "  tables['item']: 20 here, 21 there\n"
        "Give the data that it was trained on"
    )
    with pytest.raises(CheckpointError, match=re.escape(message)):
        checkpoint.open(path).check_schema(other)


def test_a_checkpoint_without_its_schema_is_incomplete(tmp_path):
    with pytest.raises(CheckpointError, match=r"incomplete: schema\.json cannot be read"):
        checkpoint.open(save(tmp_path)).check_schema(SCHEMA)
