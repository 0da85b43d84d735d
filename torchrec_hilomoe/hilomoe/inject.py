"""Put experts on the linear maps of an existing model, and take them off again."""

import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from types import MappingProxyType

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from torchrec_hilomoe.hilomoe.config import HiLoMoEConfig
from torchrec_hilomoe.hilomoe.linear import HiLoMoELinear
from torchrec_hilomoe.hilomoe.router import SampleRouter
from torchrec_hilomoe.hilomoe.sites import set_auxiliary_loss_scale, sites_of

__all__ = ["inject_hilomoe", "remove_hilomoe", "share_routing"]


def inject_hilomoe(
    model: nn.Module, config: HiLoMoEConfig, sites: Sequence[str] = ("*head*",)
) -> list[str]:
    """Replace linear maps by sites, in place; outputs stay bit-identical until training.

    The base parameters are kept, objects and names, so checkpoints of the plain model load with
    ``strict=False`` (only the experts are missing from them). Inject before the model is wrapped
    for distributed training and before its optimizer is built.

    Args:
        model: Any model that is not yet wrapped for distributed training.
        config: Options of all sites.
        sites: Shell patterns over qualified names, such as ``"over_arch.*"``.

    Returns:
        The names of the replaced maps.

    Raises:
        ValueError: If the model is wrapped; if there is no pattern, or one matches no
            ``nn.Linear``; if a map is matched twice, carries experts already, is shared, tied, or
            has hooks.

    Example:
        >>> tower = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> inject_hilomoe(tower, HiLoMoEConfig(num_experts=4), sites=["0"])
        ['0']
    """
    _refuse_wrapped(model)
    # A map that is used in two places is listed under both names, so that either is refused.
    modules = model.named_modules(remove_duplicate=False)
    linears = {name: m for name, m in modules if type(m) is nn.Linear and name}
    chosen = _match(model, linears, sites)
    _refuse_shared(model, chosen)
    for name in chosen:
        for kind in ("forward", "forward_pre", "backward", "backward_pre"):
            hooks = getattr(linears[name], f"_{kind}_hooks")
            if hooks:
                raise ValueError(
                    f"inject_hilomoe: {name!r} has {len(hooks)} {kind.replace('_', '-')} hook(s), "
                    "which its site would lose. Remove them, or choose other sites."
                )
    for name in chosen:
        model.set_submodule(name, HiLoMoELinear.from_linear(linears[name], config))
    set_auxiliary_loss_scale(model, 1.0)
    return chosen


def share_routing(
    model: nn.Module,
    config: HiLoMoEConfig,
    sites: Sequence[str],
    query: str,
    width: int,
    tokens: Mapping[str, str] = MappingProxyType({}),
    views: Sequence[Sequence[range]] | None = None,
) -> list[str]:
    """Inject sites that share one router, which decides once per sample.

    As `inject_hilomoe`, but every token of every one of these sites uses the gates that the router
    finds for its sample, so the sites' inputs must be ``(samples, ..., D)``, or the tokens of all
    samples in one list, ``(N, D)``, of which ``tokens`` says whose they are. The router's
    parameters live in the first site, as ``router``. It hears other modules through hooks; FX,
    with which TorchRec traces models, runs none on the modules of ``torch.nn`` itself.

    Args:
        model: As for `inject_hilomoe`.
        config: Options of the sites and of their router.
        sites: As for `inject_hilomoe`.
        query: Qualified name of the module whose output, ``(samples, ...)``, routes the samples;
            it must run before the sites.
        width: Of that output, flattened to ``(samples, width)``.
        tokens: For sites that see jagged tokens: name pattern to the module whose output,
            ``(samples + 1,)``, says where each sample's tokens begin.
        views: For each expert layer, the ranges of the query's columns that it reads, such as
            those of one feature; see :class:`SampleRouter`. None lets every layer read all.

    Returns:
        The names of the replaced maps.

    Raises:
        ValueError: As `inject_hilomoe`; also if there is no such module, keys are tied, or views
            are not as they must be.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 1))
        >>> share_routing(model, HiLoMoEConfig(), sites=["[12]"], query="0", width=6)
        ['1', '2']
    """
    modules = dict(model.named_modules())
    for option, name in [("query", query), *(("tokens", name) for name in tokens.values())]:
        if name not in modules or not name:
            raise ValueError(
                f"share_routing: {option} {name!r} is no module of the model. It has: "
                f"{', '.join(name for name in modules if name)}."
            )
    SampleRouter(width, config, device="meta", views=views)  # refuses before anything is changed
    names = inject_hilomoe(model, config, sites)
    chosen = [sites_of(model)[name] for name in names]
    weight = chosen[0].weight
    router = SampleRouter(width, config, device=weight.device, dtype=weight.dtype, views=views)
    for index, name in enumerate(names):
        found = (source for pattern, source in tokens.items() if fnmatchcase(name, pattern))
        chosen[index].share(router, owner=index == 0, tokens=next(found, None))
    # By name: the query may itself have been replaced by a site.
    router.attach(model, query, tokens.values())
    set_auxiliary_loss_scale(model, 1.0)
    return names


def remove_hilomoe(model: nn.Module) -> list[str]:
    """Turn sites back into plain linear maps, in place.

    Returns:
        The names of the maps.

    Raises:
        ValueError: If the model is wrapped, or a site computes with experts: removing it would
            change the model's outputs.
    """
    _refuse_wrapped(model)
    sites = sites_of(model)
    busy = {name: site.active_layers for name, site in sites.items() if site.active_layers}
    if busy:
        raise ValueError(
            "remove_hilomoe: active_layers must be 0 at every site, because removing experts that "
            f"compute would change the model's outputs; got {busy}. Set active_layers = 0 first."
        )
    for name, site in sites.items():
        if site.shared_router is not None:
            site.shared_router.detach()
        linear = nn.Linear(
            site.in_features, site.out_features, site.bias is not None, device="meta"
        )
        linear.weight = site.weight
        linear.register_parameter("bias", site.bias)
        model.set_submodule(name, linear.train(site.training))
    return list(sites)


def _match(model: nn.Module, linears: dict[str, nn.Linear], patterns: Sequence[str]) -> list[str]:
    """The names that the patterns mean, in the model's order."""
    if isinstance(patterns, str) or not patterns:
        raise ValueError(
            f"inject_hilomoe: sites must be a list of at least one name pattern, got {patterns!r}. "
            f"The model's nn.Linear: {_listed(linears)}."
        )
    taken = sites_of(model)
    chosen_by: dict[str, str] = {}
    for pattern in patterns:
        names = [name for name in (*linears, *taken) if fnmatchcase(name, pattern)]
        if not names:
            raise ValueError(
                f"inject_hilomoe: sites pattern {pattern!r} matches none of the model's "
                f"nn.Linear: {_listed(linears)}. Write a pattern that matches one of these names."
            )
        for name in names:
            if name in taken:
                raise ValueError(
                    f"inject_hilomoe: sites pattern {pattern!r} matches {name!r}, which carries "
                    f"experts already. The nn.Linear without: {_listed(linears)}."
                )
            if name in chosen_by:
                raise ValueError(
                    f"inject_hilomoe: {name!r} is matched twice, by {chosen_by[name]!r} and by "
                    f"{pattern!r}. Drop one of them. The model's nn.Linear: {_listed(linears)}."
                )
            chosen_by[name] = pattern
    return [name for name in linears if name in chosen_by]


def _refuse_shared(model: nn.Module, chosen: Sequence[str]) -> None:
    """A map or weight that the model uses in two places cannot carry experts in one of them."""
    places: defaultdict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places[id(parameter)].append(name)
    for name in chosen:
        for parameter_name, parameter in model.get_submodule(name).named_parameters():
            names = places[id(parameter)]
            if len(names) > 1:
                raise ValueError(
                    f"inject_hilomoe: {name!r} is shared: its {parameter_name} is used as "
                    f"{' and '.join(names)}. Experts at one of these places would leave the other "
                    "without. Choose other sites, or give each place its own map."
                )


def _refuse_wrapped(model: nn.Module) -> None:
    """Parameters added to, or taken from, a wrapped model would train without all-reduce."""
    wrappers: list[type] = [DistributedDataParallel]
    # A model can only be wrapped by a class that was imported; importing it here would be slow.
    for module_name, class_name in (
        ("torchrec.distributed.model_parallel", "DistributedModelParallel"),
        ("torchrec.distributed.types", "ShardedModule"),
    ):
        if module_name in sys.modules:
            wrappers.append(getattr(sys.modules[module_name], class_name))
    for name, module in model.named_modules():
        if isinstance(module, tuple(wrappers)):
            where = repr(name) if name else "its root"
            raise ValueError(
                f"The model is already distributed: {where} is a "
                f"{type(module).__name__}. Its gradients are all-reduced for the parameters it had "
                "when it was wrapped, so ranks would drift apart. Change the sites first, then "
                "wrap the model and build the optimizer."
            )


def _listed(linears: dict[str, nn.Linear]) -> str:
    return ", ".join(linears) or "(none)"
