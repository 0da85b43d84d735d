"""Whatever is in a file that is believed, it is read as what it must be, or refused in one line."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

import pytest

from torchrec_hilomoe.runtime.documents import (
    build,
    DocumentError,
    misfit,
    parse_json,
    parse_yaml,
    read_lines,
    read_text,
)

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join(10 * [f'*a{n - 1}'])}]\n" for n in range(1, 10)
)
ODD = {
    "": "is empty",
    " \n": "is empty",
    "null": "is empty",
    "[]": "is a list, and must be a mapping of names to values",
    "5": "is 5, and must be a mapping of names to values",
    '"x"': "is 'x', and must be a mapping of names to values",
    '{"a": ': "is not ",
    "[" * 5000: "is nested more than 50 deep",
    '{"a": ' * 60 + "1" + "}" * 60: "is nested more than 50 deep",
}


@pytest.mark.parametrize("parse", [parse_json, parse_yaml])
@pytest.mark.parametrize(("text", "found"), ODD.items())
def test_odd_texts_are_refused_in_one_line(parse, text, found):
    with pytest.raises(DocumentError, match=f"^runs/x {found}") as caught:
        parse(text, "runs/x")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ['{"a": NaN}', '{"a": [-Infinity]}', '{"a": ' + "9" * 5000 + "}"])
def test_json_holds_numbers_only(text):
    with pytest.raises(DocumentError, match="^f is not JSON: "):
        parse_json(text, "f")


def test_aliases_do_not_blow_up_or_go_round():
    with pytest.raises(DocumentError, match="^f has more than 1,000,000 values"):
        parse_yaml(BOMB, "f")
    with pytest.raises(DocumentError, match="^f is nested more than 50 deep"):
        parse_yaml("a: &a [*a]", "f")
    assert parse_yaml("a: &a [1]\nb: *a", "f") == {"a": [1], "b": [1]}


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (os.mkfifo, "is a FIFO, and must be a plain file"),
        (os.mkdir, "is a folder, and must be a plain file"),
        (lambda file: os.symlink("/dev/zero", file), "is a device, and must be a plain file"),
        (lambda file: file.write_bytes(b"a: \xff"), "is no text: byte 3 is not UTF-8"),
    ],
)
def test_what_is_no_text_file_is_refused_at_once(tmp_path, make, found):
    file = tmp_path / "file"
    make(file)
    with pytest.raises(DocumentError, match=f"^{file} {found}"):
        read_text(file)


@dataclass(frozen=True, kw_only=True)
class Inner:
    value: float
    metric: str = "auc"


@dataclass(frozen=True, kw_only=True)
class Outer:
    step: int
    best: Inner | None = None
    ranks: tuple[int, ...] = ()
    tables: Mapping[str, int] | None = None


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        ({}, "step is missing"),
        ([], "it is a list, and must be a mapping of names to values"),
        ({"step": True}, "step is True, and must be a whole number"),
        ({"step": 1.0}, "step is 1.0, and must be a whole number"),
        ({"step": 2**63}, "step is 9223372036854775808, and must be a whole number"),
        ({"step": "x" * 99}, "step is '" + "x" * 39 + "..., and must be a whole number"),
        ({"step": 1, "stop": 2}, "stop is unknown"),
        ({"step": 1, "best": 5}, "best is 5, and must be a mapping of names to values"),
        ({"step": 1, "best": {"value": None}}, "best.value is null, and must be a number"),
        ({"step": 1, "best": {"value": float("inf")}}, "best.value is inf, and must be a number"),
        (
            {"step": 1, "best": {"value": 1, "metric": []}},
            "best.metric is a list, and must be text",
        ),
        ({"step": 1, "ranks": 3}, "ranks is 3, and must be a list"),
        ({"step": 1, "ranks": [0, None]}, "ranks[1] is null, and must be a whole number"),
        ({"step": 1, "tables": {"a": "b"}}, "tables.a is 'b', and must be a whole number"),
    ],
)
def test_a_misfit_is_told_by_its_place(raw, problem):
    assert misfit(raw, Outer) == problem
    with pytest.raises(DocumentError) as caught:
        build(Outer, raw)
    assert str(caught.value) == problem


def test_what_fits_is_built():
    assert build(Outer, {"step": 1, "ranks": [0], "best": None}).ranks == [0]
    assert misfit({"step": 1, "best": {"value": 1}, "tables": {"a": 1}}, Outer) == ""


def test_lines_are_read_up_to_one_that_is_being_written(tmp_path):
    file = tmp_path / "metrics.jsonl"
    assert read_lines(file, {"step": int}) == []
    file.write_text('{"step": 1, "auc": null}\n{"st')
    assert read_lines(file, {"step": int}, float | None) == [{"step": 1, "auc": None}]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("", "is empty"),
        ("[]", "is a list"),
        ('{"step": 1', "is not JSON"),
        ("{}", "is damaged: step is missing"),
        ('{"step": "1"}', "is damaged: step is '1', and must be a whole number"),
        ('{"step": 1, "auc": "x"}', "is damaged: auc is 'x', and must be a number"),
    ],
)
def test_a_line_that_is_none_is_named(tmp_path, line, found):
    file = tmp_path / "metrics.jsonl"
    file.write_text(f'{{"step": 1}}\n{line}\n')
    with pytest.raises(DocumentError, match=f"^{file}, line 2, {found}"):
        read_lines(file, {"step": int}, float | None)
