"""A program that could run code while it is loaded is refused before it is read."""

import io
import json
import os
import pickle
import zipfile

import pytest
import torch

from torchrec_hilomoe.serving.archive import ArtifactError, check_archive
from torchrec_hilomoe.serving.program import load_program

CONFIG = "data/constants/model_constants_config.json"
PROGRAM = "models/model.json"
SAMPLE = "data/sample_inputs/model.pt"


class Command:
    """Runs one when it is unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def rewritten(path, changes):
    """Write the archive anew, with parts changed or added."""
    with zipfile.ZipFile(path) as source:
        root = source.namelist()[0].partition("/")[0]
        parts = {name.removeprefix(f"{root}/"): source.read(name) for name in source.namelist()}
    parts |= {name: change(parts.get(name, b"")) for name, change in changes.items()}
    with zipfile.ZipFile(path, "w") as sink:
        for name, content in parts.items():
            sink.writestr(f"{root}/{name}", content)


def in_json(change):
    def changed(content):
        value = json.loads(content)
        change(value)
        return json.dumps(value).encode()

    return changed


def pickled(value):
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()


def change_first(value, key, text):
    """Change the first text inside ``value`` that stands under ``key``."""
    found = first(value, key)
    assert found is not None
    found[key] = text


def first(value, key):
    """The first mapping inside ``value`` that has a text under ``key``."""
    if isinstance(value, dict):
        if isinstance(value.get(key), str) and (key != "target" or "inputs" in value):
            return value
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            if (found := first(part, key)) is not None:
                return found
    return None


def attacks(marker):
    """What a stranger could write, each with what is told of it."""
    run, command = f"__import__('os').system('touch {marker}')", Command(f"touch {marker}")
    constant = {"evil": {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True}}

    def target(name):
        return {PROGRAM: in_json(lambda it: change_first(it, "target", name))}

    def expression(text):
        return {PROGRAM: in_json(lambda it: change_first(it, "expr_str", text))}

    return {
        "a pickled constant": (
            {
                CONFIG: in_json(lambda it: it["config"].update(constant)),
                "data/constants/opaque_obj_0": lambda _: pickle.dumps(command),
            },
            "opaque_obj_0",
        ),
        "a constant that is said to be pickled": (
            {CONFIG: in_json(lambda it: it["config"].update(constant))},
            "'evil' pickled",
        ),
        "sample inputs": ({SAMPLE: lambda _: pickled(command)}, "sample inputs"),
        "an expression": (expression(run), "the expression"),
        "an expression of lambdas": (expression("(lambda: 1)()"), "the expression"),
        "a dunder": (expression("Integer.__class__"), "the expression"),
        "a guard": ({PROGRAM: in_json(lambda it: it["guards_code"].append(run))}, "the guard"),
        "an operator": (target("torch.hub.load"), "calls 'torch.hub.load'"),
        "an operator's module": (target("torch.ops.load_library"), "calls"),
        "a library": ({"data/aotinductor/model/model.so": lambda _: b"\x7fELF"}, "aotinductor"),
        "another program": ({"models/other.json": lambda _: b"{}"}, "models/other.json"),
    }


NAMES = list(attacks(""))


@pytest.mark.parametrize("name", NAMES)
def test_a_program_that_could_run_code_is_refused_and_runs_none(artifact, tmp_path, name):
    marker, path = tmp_path / "ran", artifact / "program.pt2"
    changes, told = attacks(marker)[name]
    rewritten(path, changes)
    with pytest.raises(ArtifactError, match="it could run code while it is loaded") as error:
        load_program(str(path))
    assert told in str(error.value)
    assert not marker.exists()


@pytest.mark.filterwarnings("ignore")
def test_such_a_program_would_run_code_if_it_were_read(artifact, tmp_path):
    """Else nothing above would be shown."""
    marker, path = tmp_path / "ran", artifact / "program.pt2"
    rewritten(path, attacks(marker)["an expression"][0])
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever PyTorch makes of the result
        torch.export.load(path)
    assert marker.exists()


@pytest.mark.parametrize("content", [b"", b"PK", b"no zip file at all" * 100])
def test_what_is_no_program_is_told(tmp_path, content):
    path = tmp_path / "program.pt2"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"program\.pt2 is no program"):
        check_archive(str(path))


def test_an_archive_without_its_parts_is_told(artifact):
    path = artifact / "program.pt2"
    with zipfile.ZipFile(path, "w") as sink:
        sink.writestr("program/archive_format", "pt2")
    with pytest.raises(ArtifactError, match="is no program"):
        check_archive(str(path))


def test_the_program_itself_is_accepted(artifact):
    check_archive(str(artifact / "program.pt2"))
