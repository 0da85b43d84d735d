"""What injection refuses: hosts in which experts would be wrong, before anything is changed."""

import sys
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from types import CodeType

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils.parametrize import is_parametrized

from torchrec_hilomoe.hilomoe.config import HiLoMoEConfig
from torchrec_hilomoe.hilomoe.selectors import matcher, Selector, shown

__all__ = [
    "carry_over",
    "check_arguments",
    "check_maps",
    "match_maps",
    "refuse_changed",
    "refuse_folding",
    "refuse_wrapped",
    "say_passed_over",
]

# A model can only be wrapped by a class that was imported; importing these here would be slow.
WRAPPERS = (
    ("torchrec.distributed.model_parallel", "DistributedModelParallel"),
    ("torchrec.distributed.types", "ShardedModule"),
    ("torch.distributed.fsdp", "FSDPModule"),
    ("torch.distributed.fsdp", "FullyShardedDataParallel"),
)

# What a method that reaches PyTorch's encoder layer, or reads a map's weight, must name.
FAST = {"forward", "__call__", "weight", "getattr", "_transformer_encoder_layer_fwd"}


def check_arguments(caller: str, model: object, config: object) -> None:
    """Refuse what is no model, or no configuration.

    Raises:
        ValueError: If it is so.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"{caller}: model must be an nn.Module, got a {type(model).__name__}. Give the model "
            "that has the maps."
        )
    if not isinstance(config, HiLoMoEConfig):
        raise ValueError(
            f"{caller}: config must be a HiLoMoEConfig, got a {type(config).__name__}. Write "
            "HiLoMoEConfig(num_layers=3, num_experts=8)."
        )


def refuse_wrapped(model: nn.Module) -> None:
    """Parameters added to, or taken from, a wrapped model would train without all-reduce."""
    wrappers: list[type] = [DistributedDataParallel, DataParallel]
    for module_name, class_name in WRAPPERS:
        if module_name in sys.modules:
            wrappers.append(getattr(sys.modules[module_name], class_name))
    for name, module in model.named_modules():
        if isinstance(module, tuple(wrappers)):
            where = repr(name) if name else "its root"
            raise ValueError(
                f"The model is already distributed: {where} is a {type(module).__name__}, which "
                "knows only the parameters it had when it was wrapped: ranks would drift apart. "
                "Change the sites first, then wrap the model and build the optimizer."
            )


def match_maps(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    sites: Sequence[Selector],
    exclude: Sequence[Selector],
    taken: Mapping[str, nn.Module],
) -> list[str]:
    """The names that are meant, in the model's order."""
    if not _is_list(sites) or not sites or not _is_list(exclude):
        option, got = ("exclude", exclude) if _is_list(sites) and sites else ("sites", sites)
        least = "" if option == "exclude" else "at least one "
        raise ValueError(
            f"inject_hilomoe: {option} must be a list of {least}name pattern, type or predicate, "
            f"got {got!r}. The model's nn.Linear: {_listed(linears)}."
        )
    maps = {**linears, **taken}
    left_out = _excluded(model, maps, sites, exclude)
    chosen_by: dict[str, str] = {}
    for selector in sites:
        means, own = matcher(model, selector), shown(selector)
        names = [name for name, module in maps.items() if means(name, module)]
        if not names:
            found = _not_plain(model, [selector], ()).items()
            passed_over = [f"{n!r} {why}" for n, why in found]
            but = f", only {'; '.join(passed_over)}" if passed_over else ""
            raise ValueError(
                f"inject_hilomoe: sites {own} matches none of the model's nn.Linear: "
                f"{_listed(linears)}{but}. Write a pattern that matches one of these names."
            )
        for name in (name for name in names if name not in left_out):
            if name in taken:
                raise ValueError(
                    f"inject_hilomoe: sites {own} matches {name!r}, which carries experts already. "
                    f"The nn.Linear without: {_listed(linears)}."
                )
            if name in chosen_by:
                raise ValueError(
                    f"inject_hilomoe: {name!r} is matched twice, by {chosen_by[name]} and by "
                    f"{own}. Drop one of them. The model's nn.Linear: {_listed(linears)}."
                )
            chosen_by[name] = own
    if not chosen_by:
        raise ValueError(
            f"inject_hilomoe: exclude leaves out all that sites match: {_listed(left_out)}. Drop "
            "one of its entries."
        )
    return [name for name in linears if name in chosen_by]


def _is_list(selectors: object) -> bool:
    return isinstance(selectors, Sequence) and not isinstance(selectors, str)


def _excluded(
    model: nn.Module,
    maps: Mapping[str, nn.Module],
    sites: Sequence[Selector],
    exclude: Sequence[Selector],
) -> list[str]:
    """The names that sites match and that are to be left out."""
    wanted = [matcher(model, selector) for selector in sites]
    met = [name for name, module in maps.items() if any(means(name, module) for means in wanted)]
    others = {name: model.get_submodule(name) for name in _not_plain(model, sites, ())}
    left_out = []
    for selector in exclude:
        means = matcher(model, selector)
        names = [name for name in met if means(name, maps[name])]
        if not names and not any(means(name, module) for name, module in others.items()):
            raise ValueError(
                f"inject_hilomoe: exclude {shown(selector)} leaves out none of what sites match: "
                f"{_listed(met)}. Drop it, or write one that does."
            )
        left_out += names
    return left_out


def _listed(linears: Iterable[str]) -> str:
    return ", ".join(linears) or "(none)"


def check_maps(model: nn.Module, chosen: Sequence[str]) -> None:
    """Refuse maps that cannot become sites.

    Raises:
        ValueError: If a map is shared or tied, has hooks or a forward of its own, is sharded, or
            has a parent that reads its weight instead of calling it.
    """
    _refuse_shared(model, chosen)
    for name in chosen:
        linear = model.get_submodule(name)
        refuse_changed(name, linear, "inject_hilomoe", "injection")
        _refuse_read(model, name)


def say_passed_over(
    model: nn.Module, sites: Sequence[Selector], exclude: Sequence[Selector]
) -> None:
    """Warn of the maps that are meant and that are no plain ``nn.Linear``."""
    passed_over = _not_plain(model, sites, exclude)
    if passed_over:
        listed = "; ".join(f"{name!r} {reason}" for name, reason in passed_over.items())
        warnings.warn(
            f"inject_hilomoe: sites [{', '.join(map(shown, sites))}] also match maps that get no "
            f"experts: {listed}. Inject first and reparametrize afterwards, or leave them out "
            "(exclude).",
            stacklevel=4,
        )


def _not_plain(
    model: nn.Module, sites: Sequence[Selector], exclude: Sequence[Selector]
) -> dict[str, str]:
    """Linear maps of other types than ``nn.Linear`` that are meant, and what they are."""
    wanted, unwanted = ([matcher(model, it) for it in found] for found in (sites, exclude))
    found = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or type(module) is nn.Linear:
            continue
        meant = any(means(name, module) for means in wanted)
        if meant and not any(means(name, module) for means in unwanted):
            parent = model.get_submodule(name.rpartition(".")[0])
            reads = isinstance(parent, nn.MultiheadAttention)
            found[name] = (
                "(nn.MultiheadAttention reads its weight and never calls it)"
                if reads
                else f"(a {type(module).__name__})"
            )
    return found


def _places_of(model: nn.Module) -> Mapping[int, list[str]]:
    """Names of each parameter, by its identity."""
    places: defaultdict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places[id(parameter)].append(name)
    return places


def refuse_folding(model: nn.Module, computing: Mapping[str, nn.Module]) -> None:
    """A weight that is used elsewhere, or has no memory, cannot take up what experts add.

    Args:
        model: Has the sites.
        computing: Those that compute with experts, by name.

    Raises:
        ValueError: If there is such.
    """
    places = _places_of(model)
    for name, site in computing.items():
        weight = site.get_parameter("weight")
        if weight.is_meta:
            raise ValueError(
                f"remove_hilomoe: {name!r} is on meta, where experts cannot become part of its "
                "weight. Set active_layers = 0 first, or load the model."
            )
        own = [
            place
            for place in places[id(weight)]
            if model.get_submodule(place.rpartition(".")[0]) is not site
        ]
        if own:
            raise ValueError(
                f"remove_hilomoe: the weight of {name!r} is tied: {' and '.join(own)} would get "
                "what its experts add, too. Give it a weight of its own, or set active_layers = 0 "
                "first."
            )


def _refuse_shared(model: nn.Module, chosen: Sequence[str]) -> None:
    """A map or weight that the model uses in two places cannot carry experts in one of them."""
    places = _places_of(model)
    for name in chosen:
        for parameter_name, parameter in model.get_submodule(name).named_parameters():
            names = places[id(parameter)]
            if len(names) > 1:
                raise ValueError(
                    f"inject_hilomoe: {name!r} is shared: its {parameter_name} is used as "
                    f"{' and '.join(names)}. Experts at one of these places would leave the other "
                    "without. Choose other sites, or give each place its own map."
                )


def refuse_changed(name: str, module: nn.Module, caller: str, act: str) -> None:
    """What was hung on a map would be lost, and what was put in place of its forward ignored.

    Args:
        name: Of the map or site.
        module: That is to be replaced.
        caller: The function that replaces it, for the message.
        act: What that does.
    """
    for parameter_name, parameter in module.named_parameters():
        if _is_sharded(parameter):
            raise ValueError(
                f"{caller}: {name!r} is already distributed: its {parameter_name} is a "
                f"{type(parameter.data).__name__}. Change the sites first, then shard the model."
            )
    if is_parametrized(module):
        made = ", ".join(
            name for name, _ in module.get_submodule("parametrizations").named_children()
        )
        raise ValueError(
            f"{caller}: {name!r} is reparametrized: its {made} would lose what makes it. Call "
            "torch.nn.utils.parametrize.remove_parametrizations on it, and parametrize the new map "
            f"after {act}."
        )
    for kind, hooks in vars(module).items():
        if kind.endswith("_hooks") and hooks:
            shown = kind.strip("_").removesuffix("_hooks").replace("_", "-")
            of = ", ".join(sorted({type(hook).__name__ for hook in hooks.values()}))
            raise ValueError(
                f"{caller}: {name!r} has {len(hooks)} {shown} hook(s) ({of}), which would be lost. "
                "Remove them (weight_norm and prune hang on such hooks: apply them after "
                f"{act}), or leave it as it is."
            )
    if "forward" in vars(module):
        raise ValueError(
            f"{caller}: {name!r} has a forward of its own, set on the instance, which would not "
            "run. Take it off, or leave it as it is."
        )
    for own in ("weight", "bias"):
        if not isinstance(getattr(module, own), nn.Parameter | None):
            raise ValueError(
                f"{caller}: {name!r} has a {type(getattr(module, own)).__name__} as its {own}, "
                "where an nn.Parameter must be. Make it one, or leave it as it is."
            )


def _is_sharded(parameter: nn.Parameter) -> bool:
    tensors = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and isinstance(parameter.data, tensors.DTensor)


def _refuse_read(model: nn.Module, name: str) -> None:
    """A parent that reads a map's weight instead of calling it computes without the experts."""
    parent_name, _, own_name = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    if isinstance(parent, nn.MultiheadAttention):
        raise ValueError(
            f"inject_hilomoe: {name!r} belongs to the nn.MultiheadAttention {parent_name!r}, which "
            "reads its weight and never calls it: experts there would not compute. Choose other "
            "sites, or write the attention with linear maps of its own and "
            "scaled_dot_product_attention."
        )
    fast = isinstance(parent, nn.TransformerEncoderLayer) and _may_take_fast_path(parent)
    if fast and own_name in ("linear1", "linear2") and torch.backends.mha.get_fastpath_enabled():
        raise ValueError(
            f"inject_hilomoe: {name!r} belongs to the nn.TransformerEncoderLayer {parent_name!r} "
            f"(a {type(parent).__name__}), whose fast path in evaluation reads its weight instead "
            "of calling it: experts would be skipped. Call "
            "torch.backends.mha.set_fastpath_enabled(False) before injection, also where the "
            "trained model is loaded, or choose other sites."
        )


def _may_take_fast_path(layer: nn.TransformerEncoderLayer) -> bool:
    """Whether a layer may run ``nn.TransformerEncoderLayer.forward``, or read weights itself.

    One of a subclass does not if that has a plain forward of its own, and no method of it names
    what would lead there.
    """
    kinds = type(layer).__mro__
    own = kinds[: kinds.index(nn.TransformerEncoderLayer)]
    if "forward" in vars(layer) or not any("forward" in vars(kind) for kind in own):
        return True
    written = [value for kind in own for value in vars(kind).values() if callable(value)]
    codes = [getattr(value, "__code__", None) for value in written]
    return any(code is None or _leads_to_fast_path(code) for code in codes)


def _leads_to_fast_path(code: CodeType) -> bool:
    wrapped = {*code.co_freevars} - {"__class__"}  # as a decorator has the function that it calls
    inner = [const for const in code.co_consts if isinstance(const, CodeType)]
    return bool(wrapped or FAST & {*code.co_names}) or any(map(_leads_to_fast_path, inner))


def carry_over(source: nn.Module, target: nn.Module, fresh: nn.Module, name: str) -> None:
    """Give a map's successor what its host has hung on it: attributes, buffers, modules.

    Args:
        source: The map that is replaced.
        target: Its successor.
        fresh: A map of the type of ``source`` on which nothing hangs.
        name: Of the map, for the message.

    Raises:
        ValueError: If the successor has something of that name.
    """
    known, taken = {*dir(fresh)}, {*dir(target)}
    attributes = {key: value for key, value in vars(source).items() if key not in known}
    buffers = {k: b for k, b in source.named_buffers(recurse=False) if k not in known}
    parameters = {k: p for k, p in source.named_parameters(recurse=False) if k not in known}
    modules = {k: module for k, module in source.named_children() if k not in known}
    clashing = sorted(taken & {*attributes, *buffers, *parameters, *modules})
    if clashing:
        raise ValueError(
            f"inject_hilomoe: {name!r} has {', '.join(clashing)}, which its site needs for itself. "
            "Rename it, or choose other sites."
        )
    for key, value in attributes.items():
        setattr(target, key, value)
    for key, buffer in buffers.items():
        persistent = key in source.state_dict()
        target.register_buffer(key, buffer, persistent=persistent)
    for key, parameter in parameters.items():
        target.register_parameter(key, parameter)
    for key, module in modules.items():
        target.add_module(key, module)
