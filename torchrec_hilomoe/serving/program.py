"""A served model as a program of ``torch.export``, with every size of a request free."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from torchrec_hilomoe.serving.archive import check_archive
from torchrec_hilomoe.serving.inputs import ProgramInputs
from torchrec_hilomoe.serving.model import ServedModel

__all__ = ["export_program", "load_program", "save_program", "without_warnings"]


def export_program(model: ServedModel) -> ExportedProgram:
    """Export a model; rows, ids of each column and the longest history are free."""
    assert not model.training
    example = model.layout.example()
    with torch.no_grad(), without_warnings():
        program = torch.export.export(
            model, example.arguments, dynamic_shapes=_free(example), strict=False
        )
    _check_free(program, model)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # names folders of this machine
    return program


def save_program(program: ExportedProgram, path: str) -> None:
    """Write a program to a local file."""
    torch.export.save(program, path)


def load_program(path: str) -> torch.nn.Module:
    """Read what `save_program` wrote, without running any code of the file.

    Raises:
        ArtifactError: If the file holds anything else than a program of known operators.
    """
    check_archive(path)
    with without_warnings():
        return torch.export.load(path).module()


def _free(example: ProgramInputs) -> tuple:
    """The dimensions that differ from request to request, in the order of the arguments."""
    first, second = {0: Dim.AUTO}, {1: Dim.AUTO}
    return (second, tuple(first for _ in example.lists), second, first, first, first)


def _check_free(program: ExportedProgram, model: ServedModel) -> None:
    """A size that became a number, or two that became one, would fail in some request."""
    names = program.graph_signature.user_inputs
    values = {node.name: node.meta["val"] for node in program.graph.nodes if node.name in names}
    singles, *lists, _, _, longest, steps = (values[name].shape for name in names)
    firsts, at = [], 0
    for parallel in model.layout.columns.lists:  # whose columns have one size
        firsts.append(lists[at][0])
        at += len(parallel.ids)
    free = [singles[1], *firsts, longest[0], steps[0]]
    assert not any(map(is_concrete_int, free)), free
    assert len({str(size) for size in free}) == len(free), free


@contextmanager
def without_warnings() -> Iterator[None]:
    """Leave out what PyTorch warns of itself, or of what no program needs."""
    with warnings.catch_warnings():
        for message, category in (
            (r"_check_is_size will be removed", FutureWarning),  # FBGEMM's shape functions
            # Of what a router's hooks keep for the time of a pass, which no program needs.
            (r"The tensor attributes? .* assigned during export", UserWarning),
            (r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning),  # PyTorch's own
        ):
            warnings.filterwarnings("ignore", message=message, category=category)
        yield
