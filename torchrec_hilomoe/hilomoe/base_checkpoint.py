"""An old plain checkpoint into a model with experts, and nothing lost on the way."""

import difflib
from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from torch import nn, Tensor
from torch.nn.parameter import is_lazy

from torchrec_hilomoe.hilomoe.host_checks import refuse_wrapped
from torchrec_hilomoe.hilomoe.inject import expert_names

__all__ = ["load_base_checkpoint"]


def load_base_checkpoint(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Load a plain model's checkpoint into the injected model; the experts stay as they are.

    ``load_state_dict(state, strict=False)`` does so, too, but it also passes over a name that has
    changed, and the map of that name starts from random numbers without a word. Here every base
    parameter and buffer must be in the checkpoint, with its shape, and nothing else may be. Load
    before the model is wrapped for distributed training.

    Args:
        model: With sites.
        state: What ``state_dict()`` of the plain model returned.

    Raises:
        TypeError: If the state is no mapping of names, or has something else where the model has a
            tensor.
        ValueError: If the model is wrapped, on the ``meta`` device or not initialized, or the
            checkpoint holds experts, lacks a name, has one too many, or a tensor of another shape
            or kind. The messages list all of them; nothing has been loaded then.

    Example:
        >>> import torch
        >>> from torchrec_hilomoe.hilomoe import HiLoMoEConfig, inject_hilomoe
        >>> old, model = nn.Sequential(nn.Linear(8, 1)), nn.Sequential(nn.Linear(8, 1))
        >>> _ = inject_hilomoe(model, HiLoMoEConfig(), sites=["0"])
        >>> load_base_checkpoint(model, old.state_dict())
        >>> x = torch.randn(3, 8)
        >>> torch.equal(model(x), old(x))
        True
    """
    refuse_wrapped(model)
    _refuse_no_state(state)
    own = model.state_dict()
    experts = expert_names(model)
    carried = sorted(experts & state.keys())
    if carried:
        raise ValueError(
            f"load_base_checkpoint: the checkpoint holds experts: {', '.join(carried)}. It is no "
            "plain model's. Load it with model.load_state_dict(state)."
        )
    base = {name: value for name, value in own.items() if name not in experts}
    _refuse_no_values(base)
    missing = [name for name in base if name not in state]
    unexpected = [name for name in state if name not in base]
    reshaped = [
        f"{name} is {tuple(t.shape)} in the checkpoint and {tuple(base[name].shape)} in the model"
        for name, t in state.items()
        if isinstance(t, Tensor) and isinstance(base.get(name), Tensor) and not is_lazy(t)
        if t.shape != base[name].shape
    ]
    if missing or unexpected or reshaped:
        found = [
            f"{kind}: {'; '.join(names)}"
            for kind, names in (
                ("missing", missing),
                ("unexpected", unexpected),
                ("reshaped", reshaped),
            )
            if names
        ]
        raise ValueError(
            f"load_base_checkpoint: the checkpoint is not of this model. {'. '.join(found)}."
            f"{_renamed(missing, unexpected)}{_deeper(base, state)} Rename or drop "
            "them in the state, so that it has exactly the base parameters and buffers of the "
            "model."
        )
    _refuse_other_kinds(base, state)
    model.load_state_dict(state, strict=False)


def _refuse_no_state(state: Any) -> None:
    """A state is a mapping of names."""
    if not isinstance(state, Mapping):
        remedy = "Give what state_dict() of the plain model returned."
        if isinstance(state, str | PathLike):
            remedy = f"Read it first: torch.load({str(state)!r}, weights_only=True)."
        elif isinstance(state, nn.Module):
            remedy = "Give its state_dict()."
        raise TypeError(
            f"load_base_checkpoint: state must be a mapping of names to tensors, got a "
            f"{type(state).__name__}. {remedy}"
        )
    keys = [repr(key) for key in state if not isinstance(key, str)]
    if keys:
        raise TypeError(
            f"load_base_checkpoint: the names of a state must be text, got {', '.join(keys)}. "
            "Rename or drop them in the state."
        )


def _refuse_no_values(base: Mapping[str, Any]) -> None:
    """A model that has no memory yet keeps nothing of what is loaded."""
    tensors = {name: t for name, t in base.items() if isinstance(t, Tensor)}
    lazy = [name for name, t in tensors.items() if is_lazy(t)]
    if lazy:
        raise ValueError(
            f"load_base_checkpoint: {', '.join(lazy)} of the model are not initialized, so their "
            "shapes are unknown. Run the model once before it is injected into and loaded."
        )
    nowhere = [name for name, t in tensors.items() if t.is_meta]
    if nowhere:
        raise ValueError(
            f"load_base_checkpoint: {', '.join(nowhere)} of the model are on the meta device, "
            "which keeps no values. Build the model on the device of its own, and load before it "
            "is wrapped."
        )


def _refuse_other_kinds(base: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """What cannot be copied, or would lose its meaning: PyTorch finds out half way."""
    tensors = {name: t for name, t in base.items() if isinstance(t, Tensor)}
    others = [
        f"{name} is a {type(state[name]).__name__} in the checkpoint and a tensor in the model"
        for name in tensors
        if not isinstance(state[name], Tensor)
    ]
    if others:
        raise TypeError(
            f"load_base_checkpoint: {'; '.join(others)}. Make them tensors in the state, for "
            "example with torch.as_tensor."
        )
    found = {name: _against(state[name], tensor) for name, tensor in tensors.items()}
    against = [f"{name} {reason}" for name, reason in found.items() if reason]
    if against:
        raise ValueError(
            f"load_base_checkpoint: {'; '.join(against)}. Convert them in the state to plain "
            "tensors of the model's kind (to_dense(), dequantize(), full_tensor(), to(dtype)), or "
            "save the plain model again from a device that keeps values."
        )


def _against(found: Tensor, wanted: Tensor) -> str | None:
    """Why a value of the checkpoint cannot be the model's; None if it can."""
    if is_lazy(found) or found.is_meta:
        return f"has no values in the checkpoint ({type(found).__name__} on {found.device})"
    if found.is_quantized or found.layout != wanted.layout:
        return (
            f"is {found.layout}, {found.dtype} in the checkpoint and {wanted.layout}, "
            f"{wanted.dtype} in the model"
        )
    if _kind(found) != _kind(wanted):
        return f"is {found.dtype} in the checkpoint and {wanted.dtype} in the model"
    some = slice(1) if wanted.dim() else ...  # a row tells of a tensor what its type does not
    try:
        with torch.no_grad():
            torch.empty_like(wanted[some]).copy_(found[some])
    except (AssertionError, RuntimeError, TypeError) as error:
        said = str(error).partition("\n")[0]
        return f"is a {type(found).__name__}, of which no copy can be made ({said})"
    return None


def _kind(tensor: Tensor) -> str:
    if tensor.dtype == torch.bool:
        return "bool"
    return (
        "complex" if tensor.is_complex() else "float" if tensor.is_floating_point() else "integer"
    )


def _renamed(missing: list[str], unexpected: list[str]) -> str:
    """Say which names look like others of the model's."""
    pairs = [
        (near[0], name)
        for name in missing
        if (near := difflib.get_close_matches(name, unexpected, n=1))
    ]
    listed = ", ".join(f"{old} as {new}" for old, new in pairs)
    return f" The state seems to hold {listed}." if pairs else ""


def _deeper(base: Mapping[str, Any], state: Mapping[str, Any]) -> str:
    """Say which entry looks like the state."""
    inside = [
        key for key, value in state.items() if isinstance(value, Mapping) and {*base} & {*value}
    ]
    return f" It seems to be state[{inside[0]!r}]." if inside else ""
