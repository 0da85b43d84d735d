"""Is a file a program, and nothing but a program?  Asked before ``torch.export`` reads it.

``torch.export.load`` unpickles what an archive declares to be pickled, evaluates the expressions of
sizes, runs guards as Python, and takes an operator's name for a path into the module ``torch``. A
stranger's file could run anything. Programs that this package writes need little of that, so what
they do not need is refused: the archive is opened as the zip file that it is, and read as JSON.
"""

import io
import json
import pickle
import re
import zipfile
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["ArtifactError", "check_archive"]

OPERATORS = re.compile(
    r"torch\.ops\.(aten|fbgemm|torchrec_hilomoe|prims)\.\w+\.\w+"
    r"|torch\.ops\.higher_order\.(wrap_with_autocast|wrap_with_set_grad_enabled)"
    r"|_operator\.(add|sub|mul|floordiv|mod|neg|getitem|eq|ne|lt|le|gt|ge|and_|or_|pow|truediv)"
    r"|torch\.sym_(max|min|not|int|float|sum|ite)|math\.(ceil|floor|trunc)"
)
# A size's expression is a call of these, of numbers and of symbols such as 's16'.
WORDS = re.compile(
    "Add|Mul|Pow|Integer|Rational|Symbol|Max|Min|Mod|PythonMod|FloorDiv|CleanDiv|CeilDiv|Eq|Ne|Lt"
    "|Le|Gt|Ge|Equality|Unequality|StrictLessThan|LessThan|StrictGreaterThan|GreaterThan|And|Or|Not"
    "|Piecewise|positive|nonnegative|integer|real|[Tt]rue|[Ff]alse|int_oo|IntInfinity"
    r"|'[su]\d+'|[su]\d+"
)
WORD = re.compile(r"'?[A-Za-z_]\w*'?")
EXPRESSION = re.compile(r"[\w\s'(),=+*/<>!-]*")
# A guard is arithmetic of sizes of inputs.
SIZE = re.compile(r"L\['\w+'\](\[\d+\])*\.size\(\)\[\d+\]")
ARITHMETIC = re.compile(r"([\d\s(),=+*/%<>!-]|\b(min|max|and|or|not)\b)*")
PARTS = re.compile(
    r"data/weights/(weight_\d+|model_weights_config\.json)"
    r"|data/constants/(tensor_\d+|model_constants_config\.json)|data/sample_inputs/model\.pt"
    r"|models/model\.json|archive_format|archive_version|byteorder"
    r"|\.data/(version|serialization_id)|\.format_version|\.storage_alignment"
)
CONFIGS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")


class ArtifactError(ValueError):
    """An artifact is missing, damaged, of another release, or not what this package wrote."""


def check_archive(path: str) -> None:
    """Refuse an archive whose reading could run code.

    Args:
        path: A local file.

    Raises:
        ArtifactError: Saying what it holds that no program of this package does.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            problem = next(_problems(archive), None)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, RecursionError) as error:
        raise ArtifactError(f"{path} is no program ({' '.join(str(error).split())}).") from error
    if problem is not None:
        raise ArtifactError(
            f"{path} {problem}, which no program of this package does: it could run code while it "
            "is loaded. Export the checkpoint again."
        )


def _problems(archive: zipfile.ZipFile) -> Iterator[str]:
    names = archive.namelist()
    root = names[0].partition("/")[0]
    if strange := [name for name in names if not PARTS.fullmatch(name.removeprefix(f"{root}/"))]:
        yield f"holds {strange[0]!r}"
    for name in CONFIGS:
        config = json.loads(archive.read(f"{root}/{name}"))["config"]
        if pickled := [key for key, entry in config.items() if entry["use_pickle"] is not False]:
            yield f"holds {pickled[0]!r} pickled"
    try:
        example = io.BytesIO(archive.read(f"{root}/data/sample_inputs/model.pt"))
        torch.load(example, weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError):
        yield "holds sample inputs that are no tensors"
    program = json.loads(archive.read(f"{root}/models/model.json"))
    for guard in program.get("guards_code", []):
        if not ARITHMETIC.fullmatch(SIZE.sub("0", guard)):
            yield f"holds the guard {guard[:60]!r}"
    yield from _of_graph(program)


def _of_graph(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        target, expression = value.get("target"), value.get("expr_str")
        if isinstance(target, str) and "inputs" in value and not OPERATORS.fullmatch(target):
            yield f"calls {target!r}"
        if expression is not None and not _is_size(expression):
            yield f"holds the expression {str(expression)[:60]!r}"
        for part in value.values():
            yield from _of_graph(part)
    elif isinstance(value, list):
        for part in value:
            yield from _of_graph(part)


def _is_size(expression: Any) -> bool:
    return (
        isinstance(expression, str)
        and EXPRESSION.fullmatch(expression) is not None
        and all(WORDS.fullmatch(word) for word in WORD.findall(expression))
    )
