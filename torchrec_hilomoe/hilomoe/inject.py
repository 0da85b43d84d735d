"""Put experts on the linear maps of an existing model, ask them, and set them."""

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from types import MappingProxyType

import torch
from torch import distributed as dist
from torch import nn, Tensor

from torchrec_hilomoe.hilomoe.config import HiLoMoEConfig
from torchrec_hilomoe.hilomoe.host_checks import (
    carry_over,
    check_arguments,
    check_maps,
    match_maps,
    refuse_wrapped,
    say_passed_over,
)
from torchrec_hilomoe.hilomoe.host_watch import HostWatch
from torchrec_hilomoe.hilomoe.linear import HiLoMoELinear, is_of_experts
from torchrec_hilomoe.hilomoe.losses import attached_losses
from torchrec_hilomoe.hilomoe.module_names import check_module
from torchrec_hilomoe.hilomoe.random_stream import own_random_numbers
from torchrec_hilomoe.hilomoe.ranks import RankGroup
from torchrec_hilomoe.hilomoe.router import SampleRouter
from torchrec_hilomoe.hilomoe.selectors import names_match, Selector

__all__ = [
    "auxiliary_loss",
    "expert_names",
    "expert_parameters",
    "group_of",
    "inject_hilomoe",
    "inject_shared_router",
    "routers_of",
    "set_auxiliary_loss_scale",
    "set_process_group",
    "sites_of",
]


def inject_hilomoe(
    model: nn.Module,
    config: HiLoMoEConfig,
    sites: Sequence[Selector] = ("*head*",),
    *,
    exclude: Sequence[Selector] = (),
    process_group: dist.ProcessGroup | None = None,
    seed: int | None = None,
) -> list[str]:
    """Replace linear maps by sites, in place; outputs stay bit-identical until training.

    The base parameters are kept, objects and names, so checkpoints of the plain model load with
    `load_base_checkpoint`. Inject before the model is wrapped
    for distributed training and before its optimizer is built.

    Args:
        model: Any model that is not yet wrapped for distributed training.
        config: Options of all sites.
        sites: Shell patterns over qualified names, such as ``"over_arch.*"``; types of modules,
            such as ``MLP``, which mean every map inside of one; or predicates, which are given a
            map's name and module.
        exclude: The same, of maps that ``sites`` mean and that get no experts.
        process_group: Ranks that train the model, where these are not all of the job; see
            `set_process_group`.
        seed: Of the experts' start. None starts them by where PyTorch's random numbers stand, so
            ``torch.manual_seed`` before injection decides. Either way these stay as they are: a
            host draws what it would draw without experts.

    Returns:
        The names of the replaced maps.

    What hangs on a map, such as buffers and attributes, hangs on its site afterwards. Maps that a
    pattern matches and that are reparametrized or of another type get no experts; a warning names
    them. The model's first passes are listened to: a site that does not run, or experts that the
    optimizer does not move, are a warning, too.

    Raises:
        ValueError: If the model is wrapped; if there is no pattern, or one matches no
            ``nn.Linear``; if ``exclude`` leaves out nothing, or all; if a map is matched twice,
            carries experts already, is shared, tied, or has hooks; if its parent reads its weight
            instead of calling it; if earlier sites are of other ranks. The model is then as it was.

    Example:
        >>> tower = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> inject_hilomoe(tower, HiLoMoEConfig(num_experts=4), sites=["0"])
        ['0']
    """
    check_arguments("inject_hilomoe", model, config)
    group = RankGroup.of(process_group, "inject_hilomoe")
    with torch.inference_mode(False), own_random_numbers(model, seed):
        names = _inject(model, config, sites, exclude, None, group)
    _share_scale(model, 1.0)
    return names


def _inject(
    model: nn.Module,
    config: HiLoMoEConfig,
    sites: Sequence[Selector],
    exclude: Sequence[Selector],
    router: SampleRouter | None,
    group: RankGroup | None,
) -> list[str]:
    refuse_wrapped(model)
    if sites_of(model) and group_of(model) != group:
        raise ValueError(
            f"inject_hilomoe: the model's sites add up over {group_of(model) or 'all ranks'}, and "
            f"these would over {group or 'all ranks'}. Give all sites of a model the same "
            "process_group, or call set_process_group(model, group) before this."
        )
    # A map that is used in two places is listed under both names, so that either is refused.
    modules = model.named_modules(remove_duplicate=False)
    linears = {name: m for name, m in modules if type(m) is nn.Linear and name}
    chosen = match_maps(model, linears, sites, exclude, sites_of(model))
    check_maps(model, chosen)
    fresh, built = nn.Linear(1, 1, device="meta"), {}
    for name in chosen:  # all of them before the first is put in its place: one may be refused
        site = HiLoMoELinear.from_linear(linears[name], config, router)
        site.group = group
        carry_over(linears[name], site, fresh, name)
        built[name] = site
    say_passed_over(model, sites, exclude)
    for name, site in built.items():
        model.set_submodule(name, site)
    HostWatch(built).attach(model)
    return chosen


def inject_shared_router(
    model: nn.Module,
    config: HiLoMoEConfig,
    sites: Sequence[Selector],
    query_module: str,
    query_width: int,
    tokens: Mapping[str, str] = MappingProxyType({}),
    views: Sequence[Sequence[range]] | None = None,
    name: str = "hilomoe_router",
    query_entry: str | int | None = None,
    process_group: dist.ProcessGroup | None = None,
    seed: int | None = None,
    exclude: Sequence[Selector] = (),
) -> list[str]:
    """Inject sites that share one router, which decides once per sample.

    As `inject_hilomoe`, but every token of every one of these sites uses the gates that the router
    finds for its sample, so the sites' inputs must be ``(samples, ..., D)``, or the tokens of all
    samples in one list, ``(N, D)``, of which ``tokens`` says whose they are. The router is a module
    of the model, ``model.hilomoe_router``, whatever the sites. It reads outputs of other modules
    through hooks; FX, with which TorchRec traces models, runs none on the modules of ``torch.nn``
    itself.

    Args:
        model: As for `inject_hilomoe`.
        config: Options of the sites and of their router.
        sites: As for `inject_hilomoe`.
        query_module: Qualified name of the module whose output, ``(samples, ...)``, routes the
            samples; it must run before the sites.
        query_width: Width of that output, flattened to ``(samples, query_width)``.
        tokens: For sites that see jagged tokens: name pattern to the module whose output,
            ``(samples + 1,)``, says where each sample's tokens begin.
        views: For each expert layer, the ranges of the query's columns that it reads, such as
            those of one feature; see :class:`SampleRouter`. None lets every layer read all.
        name: Of the router in the model; to be given where a model has several.
        query_entry: Where that module returns a dict or a tuple: the key or place of the query in
            it. A ``KeyedTensor`` is read as its ``values()``.
        process_group: As for `inject_hilomoe`.
        seed: As for `inject_hilomoe`.
        exclude: As for `inject_hilomoe`.

    Returns:
        The names of the replaced maps.

    Raises:
        ValueError: As `inject_hilomoe`; also if there is no such module, the router's name is
            taken, keys are tied, or views are not as they must be.

    Example:
        >>> model = nn.ModuleDict({"user": nn.Linear(8, 6), "up": nn.Linear(6, 6)})
        >>> inject_shared_router(model, HiLoMoEConfig(), ["up"], "user", query_width=6)
        ['up']
        >>> model.hilomoe_router.expert_keys.shape
        torch.Size([3, 8, 6])
    """
    check_arguments("inject_shared_router", model, config)
    modules = dict(model.named_modules())
    given = [("query_module", query_module), *(("tokens", module) for module in tokens.values())]
    for option, module in given:
        check_module(f"inject_shared_router: {option}", module, modules)
    if isinstance(model, nn.Sequential):
        raise ValueError(
            "inject_shared_router: the model is an nn.Sequential, which would run the router as "
            "its last layer. Make it a child of a module of your own, and inject into that."
        )
    children = dict(model.named_children())
    if not name or "." in name or (name in dir(model) and name not in children):
        raise ValueError(
            f"inject_shared_router: name {name!r} cannot be that of a module of the model: it must "
            "be a name without dots that the model does not have. Use name='hilomoe_router'."
        )
    if name in children:
        raise ValueError(
            f"inject_shared_router: the model has a {name!r} already. Give this router another "
            "name, such as name='hilomoe_router_2'."
        )
    # Without memory, and so without random numbers, until nothing is left to be refused.
    router = SampleRouter(query_width, config, device="meta", views=views)
    router.group = RankGroup.of(process_group, "inject_shared_router")
    with torch.inference_mode(False), own_random_numbers(model, seed):
        names = _inject(model, config, sites, exclude, router, router.group)
        chosen = [sites_of(model)[site] for site in names]
        weight = chosen[0].weight
        model.add_module(name, router.to_empty(device=weight.device).to(weight.dtype))
        router.reset_parameters()
    for site_name, site in zip(names, chosen, strict=True):
        found = (module for pattern, module in tokens.items() if names_match(site_name, pattern))
        site.tokens = next(found, None)
    router.query_entry = query_entry
    # By name: the query may itself have been replaced by a site.
    router.attach(model, query_module, tokens.values())
    _share_scale(model, 1.0)
    return names


def sites_of(model: nn.Module) -> dict[str, HiLoMoELinear]:
    """The model's sites by qualified name, in the model's order.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 1))
        >>> _ = inject_hilomoe(model, HiLoMoEConfig(num_layers=2), sites=["0"])
        >>> {name: site.active_layers for name, site in sites_of(model).items()}
        {'0': 2}
    """
    return {name: m for name, m in model.named_modules() if isinstance(m, HiLoMoELinear)}


def routers_of(model: nn.Module) -> dict[str, HiLoMoELinear | SampleRouter]:
    """What routes, by qualified name: sites that route their own rows, and shared routers once.

    Example:
        >>> model = nn.ModuleDict({"user": nn.Linear(8, 6), "up": nn.Linear(6, 6)})
        >>> _ = inject_shared_router(model, HiLoMoEConfig(), ["up"], "user", query_width=6)
        >>> list(routers_of(model))
        ['hilomoe_router']
    """
    return {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, SampleRouter) or (isinstance(m, HiLoMoELinear) and m.router is None)
    }


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter that the experts brought, shared routers' too, by qualified name.

    To train only them for a while, take ``StageDriver``. By hand, freeze the rest before the model
    is wrapped for data-parallel training, and wrap it anew before anything is unfrozen; tables with
    a fused optimizer are not frozen by ``requires_grad``.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> _ = inject_hilomoe(model, HiLoMoEConfig(), sites=["0"])
        >>> list(expert_parameters(model))
        ['0.expert_in', '0.expert_out', '0.expert_keys']
    """
    found: dict[str, nn.Parameter] = {}
    for module_name, module in model.named_modules():
        if isinstance(module, HiLoMoELinear):
            own = module.expert_parameters()
        elif isinstance(module, SampleRouter):
            own = dict(module.named_parameters())
        else:
            continue
        found |= {f"{module_name}.{name}" if module_name else name: p for name, p in own.items()}
    return found


def expert_names(model: nn.Module) -> set[str]:
    """Names in the model's state of all that the experts brought, which a plain model has not.

    They are those of `expert_parameters` and of the buffers in which `fix_random_routing` keeps
    keys and query projections.

    Example:
        >>> from torchrec_hilomoe.hilomoe import fix_random_routing
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> _ = inject_hilomoe(model, HiLoMoEConfig(), sites=["0"])
        >>> fix_random_routing(model, seed=0)
        >>> sorted(expert_names(model))
        ['0.expert_in', '0.expert_keys', '0.expert_out']
    """
    names = set()
    for module_name, module in model.named_modules():
        if isinstance(module, HiLoMoELinear):
            own = [name for name in module.state_dict() if is_of_experts(name)]
        elif isinstance(module, SampleRouter):
            own = module.state_dict().keys()
        else:
            continue
        names |= {f"{module_name}.{name}" if module_name else name for name in own}
    return names


def auxiliary_loss(model: nn.Module) -> Tensor:
    """The auxiliary loss of the last training forward: the mean over sites, weighted, detached.

    Attached losses of other parts of the model are added to it.

    Under data-parallel training it is this rank's part: the average over ranks is the loss of the
    global batch, as with the host's own loss. It is unscaled, and 0 where no site has computed one.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> _ = inject_hilomoe(model, HiLoMoEConfig(), sites=["0"])
        >>> _ = model(torch.randn(32, 8))
        >>> auxiliary_loss(model) > 0
        tensor(True)
    """
    total, sites = torch.zeros(()), sites_of(model).values()
    for site in sites:
        if site.routing_record is not None:
            part = site.routing_record.losses()
            loss_L = site.config.balance_weight * part.balance_L + site.config.z_weight * part.z_L
            total = total.to(loss_L.device) + loss_L.mean() / len(sites)
    for attached in attached_losses(model).values():
        if attached.value is not None:
            total = total.to(attached.value.device) + attached.weight * attached.value
    return total


def set_auxiliary_loss_scale(model: nn.Module, scale: float) -> None:
    """Say by what the host multiplies its loss before ``backward``; 1 unless told otherwise.

    ``1 / K`` for a host that divides its loss by ``K`` accumulated micro-batches,
    ``scaler.get_scale()`` before each step for one that uses a ``GradScaler``, and their product
    for both. The model's loss is the mean over its sites, so call it also after adding sites by
    hand; ``inject_hilomoe`` does. It also says that the strength is meant: a warning tells of
    several backward passes a step, or of a ``GradScaler``, while it was never called.

    Raises:
        ValueError: If it is no finite number.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> _ = inject_hilomoe(model, HiLoMoEConfig(), sites=["0"])
        >>> set_auxiliary_loss_scale(model, 1 / 4)  # the host adds up 4 micro-batches
    """
    number = isinstance(scale, Real) and math.isfinite(scale)
    if not number and not isinstance(scale, Tensor):  # a tensor's value would have to be waited for
        raise ValueError(
            f"set_auxiliary_loss_scale: scale must be a finite number, got {scale!r}. Give what "
            "the loss is multiplied by, such as 1 / 4 or scaler.get_scale()."
        )
    for site in sites_of(model).values():
        site.scale_is_told = True
    _share_scale(model, scale)


def _share_scale(model: nn.Module, scale: float) -> None:
    """Give each site its part: the model's loss is the mean over its sites."""
    sites = sites_of(model).values()
    routers = [site.router for site in sites if site.router is not None]
    for router in routers:
        router.auxiliary_scale = scale * routers.count(router) / len(sites)
    for site in sites:
        site.auxiliary_scale = scale / len(sites)
    for attached in attached_losses(model).values():
        attached.scale = scale


def set_process_group(model: nn.Module, process_group: dist.ProcessGroup | None) -> None:
    """Say which ranks train the model; None, as it is at first, are all of the job.

    Over them the auxiliary losses and what is said of routers are added up, so that ranks outside
    need not take part. Injection takes the group, too. Where DDP, or TorchRec's
    ``DistributedModelParallel``, is given a group, it must be this one. A copy of the model keeps
    the group, and so does a pickle of it, which looks for a group of that name and those ranks
    where it trains.

    Args:
        model: With sites, wrapped or not.
        process_group: What ``torch.distributed.new_group`` returned; this rank is in it.

    Raises:
        ValueError: If it is no process group, or this rank is not in it.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> _ = inject_hilomoe(model, HiLoMoEConfig(), sites=["0"])
        >>> set_process_group(model, None)
    """
    group = RankGroup.of(process_group, "set_process_group")
    for holder in (
        *sites_of(model).values(),
        *routers_of(model).values(),
        *attached_losses(model).values(),
    ):
        holder.group = group


def group_of(model: nn.Module) -> RankGroup | None:
    """The ranks that train the model; None are all of the job.

    Raises:
        ValueError: If its sites are of several groups.
    """
    found = {site.group: name for name, site in sites_of(model).items()}
    if len(found) > 1:
        listed = "; ".join(f"{name!r}: {group or 'all ranks'}" for group, name in found.items())
        raise ValueError(
            f"The model's sites are of several process groups: {listed}. Call "
            "set_process_group(model, group)."
        )
    return next(iter(found), None)
