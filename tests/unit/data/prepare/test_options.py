"""What every command takes: said twice, as keyword arguments and complete, and alike."""

import re
from dataclasses import fields

import pytest

from torchrec_hilomoe.data.prepare.options import Common, Options


def test_keyword_arguments_are_the_options():
    assert list(Common.__annotations__) == [field.name for field in fields(Options)]


def test_the_help_names_the_defaults():
    said = re.findall(
        r"^        (\w+): (?:[^:]|\n)*?(\d+) by default\.", Common.__doc__ or "", re.M
    )
    numbers = {f.name: f.default for f in fields(Options) if type(f.default) is int}
    assert {name: int(value) for name, value in said} == numbers


@pytest.mark.parametrize(("name", "least"), [("seed", 0), ("workers", 1), ("max_bad_rows", 0)])
def test_numbers_that_are_too_small_are_named(name, least):
    values = {name: least}
    assert getattr(Options(out="x", **values), name) == least
    values[name] -= 1
    with pytest.raises(ValueError, match=rf"--{name} must be at least {least}, got {least - 1}"):
        Options(out="x", **values)
