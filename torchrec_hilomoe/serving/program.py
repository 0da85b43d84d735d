"""A served model as a program of ``torch.export``, with every size of a request free."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.export import Dim, ExportedProgram
from torch.export.passes import move_to_device_pass
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from torchrec_hilomoe.serving.archive import ArtifactError, check_archive
from torchrec_hilomoe.serving.model import ServedModel, ServedRequest

__all__ = [
    "export_program",
    "load_program",
    "load_request",
    "save_program",
    "save_request",
    "without_warnings",
]


def export_program(model: ServedModel | ServedRequest) -> ExportedProgram:
    """Export a model; rows, ids of each column and the longest history are free."""
    assert not model.training
    example = model.layout.example()
    with torch.no_grad(), without_warnings():
        program = torch.export.export(
            model, example.arguments, dynamic_shapes=_dims(example.free), strict=False
        )
    _check_free(program, model)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # names folders of this machine
    return program


def save_program(program: ExportedProgram, path: str) -> None:
    """Write a program to a local file."""
    torch.export.save(program, path)


def load_program(path: str, device: torch.device | None = None) -> torch.nn.Module:
    """Read what `save_program` wrote, without running any code of the file.

    Args:
        path: A local file.
        device: Where the program computes; None is the CPU, for which it was exported.

    Raises:
        ArtifactError: If the file holds anything else than a program of known operators.
    """
    check_archive(path)
    with without_warnings():
        program = torch.export.load(path)
        if device is not None and device.type != "cpu":
            program = move_to_device_pass(program, device)
        return program.module()


def save_request(program: ExportedProgram, path: str) -> None:
    """Write a program of a request to a local file, without the weights: the model's has them."""
    for name, weight in program.state_dict.items():
        # One number stands for all, so that the shape is kept.
        hollow = weight.detach().new_zeros(()).expand(weight.shape)
        if isinstance(weight, torch.nn.Parameter):
            hollow = torch.nn.Parameter(hollow, requires_grad=weight.requires_grad)
        program.state_dict[name] = hollow
    with without_warnings():
        save_program(program, path)


def load_request(path: str, model: torch.nn.Module) -> torch.nn.Module:
    """Read what `save_request` wrote, as `load_program` does; weights are those of ``model``.

    Args:
        path: A local file.
        model: The program of the same model, which goes on sharing them.

    Raises:
        ArtifactError: As `load_program`; also if the weights are not those of this model.
    """
    request = load_program(path)
    weights = {f"served.{name}": weight for name, weight in model.state_dict().items()}
    try:
        request.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise ArtifactError(f"{path} is of another model. Export the checkpoint again.") from error
    return request


def _dims(free: Any) -> Any:
    """The dimensions that differ from request to request, in the order of the arguments."""
    if isinstance(free, tuple):
        return tuple(map(_dims, free))
    return None if free is None else {free: Dim.AUTO}


def _check_free(program: ExportedProgram, model: ServedModel | ServedRequest) -> None:
    """A size that became a number, or two that became one, would fail in some request."""
    names = [str(name) for name in program.graph_signature.user_inputs]
    values: dict[str, Any] = {
        node.name: node.meta["val"] for node in program.graph.nodes if node.name in names
    }
    # Of the first argument, ids of one a row, rows are the second dimension.
    sizes = [values[names[at]].shape[0 if at else 1] for at in model.layout.independent]
    assert not any(map(is_concrete_int, sizes)), sizes
    assert len({str(size) for size in sizes}) == len(sizes), sizes


@contextmanager
def without_warnings() -> Iterator[None]:
    """Leave out what PyTorch warns of itself, or of what no program needs."""
    with warnings.catch_warnings():
        for message, category in (
            (r"_check_is_size will be removed", FutureWarning),  # FBGEMM's shape functions
            # Of what a router's hooks keep for the time of a pass, which no program needs.
            (r"The tensor attributes? .* assigned during export", UserWarning),
            # Of weights that are one number in every place, which `save_request` leaves.
            (r"No complete tensor found in the group", UserWarning),
            # Torch 2.11 and 2.12 read weights as views of bytes, which nothing writes to.
            (r"The given buffer is not writable", UserWarning),
            (r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning),  # PyTorch's own
        ):
            warnings.filterwarnings("ignore", message=message, category=category)
        yield
