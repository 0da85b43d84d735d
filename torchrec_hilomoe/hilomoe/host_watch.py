"""What an injected model's first passes show, said once: sites that do not run or do not learn."""

import warnings
import weakref
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Self

import torch
from torch import distributed as dist
from torch import nn
from torch.fx._symbolic_trace import is_fx_tracing
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from torchrec_hilomoe.hilomoe.linear import HiLoMoELinear
from torchrec_hilomoe.hilomoe.ranks import process_group_of
from torchrec_hilomoe.hilomoe.router import SampleRouter
from torchrec_hilomoe.hilomoe.strength_watch import StrengthWatch

__all__ = ["HostWatch", "stop_watching", "trust_optimizer"]

LEARNING, SCORING = (True, True), (False, False)


class HostWatch:
    """Listens to a host's passes until it has seen what it must, then goes.

    It says so, once, if a site did not run in the first training forward, or in the first of
    evaluation under ``no_grad``; and if the optimizers that step have none of the experts, or not
    all. PyTorch's optimizers say what they have; one of another kind is known by the tensors'
    version counters, if it moves a site's base map. `StrengthWatch` is asked about the auxiliary
    losses' strength.

    Args:
        sites: Those of one injection, by name.

    Example:
        >>> from torchrec_hilomoe.hilomoe import HiLoMoEConfig, inject_hilomoe
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> _ = inject_hilomoe(model, HiLoMoEConfig(), sites=["0"])  # attaches one
        >>> model[0] = nn.Linear(8, 4)  # no site any more: nothing to say
        >>> _ = model(torch.randn(3, 8))
    """

    def __init__(self, sites: Mapping[str, HiLoMoELinear]) -> None:
        self._sites = dict(sites)
        self._seen: set[tuple[bool, bool]] = set()
        self._moves = 0
        self._settled = False
        self._versions: dict[str, _Versions] = {}
        self._handles: list[RemovableHandle] = []
        self._stepped: set[Hashable] = set()  # storages that optimizers that have stepped write to
        self._steps = self._passes = 0
        self._strength = StrengthWatch(sites)

    def __getstate__(self) -> dict:
        """Copies and pickles listen to optimizers of their own."""
        return {**vars(self), "_stepped": set(), "_steps": 0}

    def attach(self, model: nn.Module) -> None:
        """Listen to the passes of the model that was injected into."""
        self._handles = [
            model.register_forward_pre_hook(self.before),
            model.register_forward_hook(self.after),
        ]

    def detach(self) -> None:
        """Stop to listen."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._strength.judged = True
        self.settle()

    def before(self, model: nn.Module, args: Any) -> None:
        """Forward pre-hook of the model."""
        if _is_traced():
            return
        sites = self._present(model)
        for site in sites.values():
            site.has_run = False
        if (model.training, torch.is_grad_enabled()) == LEARNING:
            _refuse_under_ddp(sites)
            if LEARNING not in self._seen:
                _refuse_apart(model, sites)
            self._strength.before()
            if not self._settled:
                self._look_at_optimizers(model, sites)
            if not (self._settled and self._strength.judged):
                _LISTENING.add(self)
                _listen_to_optimizers()

    def after(self, model: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of the model."""
        if _is_traced():
            return
        mode = (model.training, torch.is_grad_enabled())
        if mode == LEARNING:
            self._strength.after(output)
        if mode in (LEARNING, SCORING) and mode not in self._seen:
            self._seen.add(mode)
            idle = [name for name, site in self._present(model).items() if not site.has_run]
            if idle:
                kind = "training" if mode == LEARNING else "evaluation"
                warnings.warn(
                    f"HiLoMoE sites that did not run in the model's first forward in {kind}: "
                    f"{', '.join(idle)}. If a parent reads their weight instead of calling them, "
                    "their experts are skipped: call them there, or choose other sites.",
                    stacklevel=2,
                )
        if self._settled and self._strength.judged and len(self._seen) == 2:
            self.detach()

    def _present(self, model: nn.Module) -> dict[str, HiLoMoELinear]:
        """The sites that are still there."""
        modules = set(model.modules())
        return {name: site for name, site in self._sites.items() if site in modules}

    def settle(self) -> None:
        """Ask no longer whether an optimizer has the experts."""
        self._settled = True
        if self._strength.judged:
            _LISTENING.discard(self)

    def stepped(self, optimizer: torch.optim.Optimizer) -> None:
        """Hook of all optimizers, after a step."""
        held = {_storage_of(p) for group in optimizer.param_groups for p in group["params"]}
        if not self._settled:
            self._stepped.update(held)
            self._steps += 1
        own = (p for site in self._sites.values() for p in site.parameters())
        if not self._strength.judged and not held.isdisjoint(map(_storage_of, own)):
            self._strength.stepped()
        if self._settled and self._strength.judged:
            _LISTENING.discard(self)

    def _look_at_optimizers(self, model: nn.Module, sites: Mapping[str, HiLoMoELinear]) -> None:
        """Two passes after which optimizers of the model's have stepped without experts tell."""
        experts = _learning(model, sites)
        if not experts:
            return
        if self._stepped.isdisjoint(map(_storage_of, model.parameters())):
            self._look_at_steps(sites)
            return
        missing = [name for name, p in experts.items() if _storage_of(p) not in self._stepped]
        if not missing:
            self.settle()
            return
        self._passes, self._steps = self._passes + bool(self._steps), 0
        if self._passes >= 2:
            self._warn(missing)

    def _warn(self, missing: Sequence[str]) -> None:
        self.settle()  # it never will be, but that has been said now
        warnings.warn(
            "The optimizer moves parameters of the model, but not their experts: "
            f"{', '.join(missing)}. It seems to have been built before injection, or of other "
            "parameters. Build it afterwards, or call optimizer.add_param_group({'params': "
            "list(expert_parameters(model).values())}), of those that it lacks; freeze with "
            "requires_grad_(False) what must not learn.",
            stacklevel=4,
        )

    def _look_at_steps(self, sites: Mapping[str, HiLoMoELinear]) -> None:
        """Two steps that move a site's base map and leave its up-vectors at zero are no accident.

        One may be a checkpoint that was loaded.
        """
        computing = {
            name: site
            for name, site in sites.items()
            if site.active_layers > 0 and site.expert_out.requires_grad
        }
        versions = {name: _Versions.of(site) for name, site in computing.items()}
        before, self._versions = self._versions, versions
        known = {name: before[name] for name in versions if name in before}
        moved = [name for name, then in known.items() if versions[name].base > then.base]
        if any(versions[name].experts > then.experts for name, then in known.items()):
            self.settle()
            return
        self._moves += bool(moved)
        still = [name for name in moved if not sites[name].expert_out.detach().any()]
        if self._moves >= 2 and still:
            self._warn(still)


def _learning(model: nn.Module, sites: Mapping[str, HiLoMoELinear]) -> dict[str, nn.Parameter]:
    """Parameters of experts and routers that compute and are not frozen, by name."""
    computing = {name: site for name, site in sites.items() if site.active_layers > 0}
    found = {
        f"{name}.{own}": parameter
        for name, site in computing.items()
        for own, parameter in site.expert_parameters().items()
    }
    routers = {site.router for site in computing.values()}
    for name, module in model.named_modules():
        if isinstance(module, SampleRouter) and module in routers:
            found |= {f"{name}.{own}": p for own, p in module.named_parameters()}
    return {name: p for name, p in found.items() if p.requires_grad}


def _storage_of(parameter: torch.Tensor) -> Hashable:
    """Tell a parameter by its memory: an optimizer may hold views of it, one a layer of experts."""
    try:
        return StorageWeakRef(parameter.untyped_storage())
    except (NotImplementedError, RuntimeError):  # a subclass that wraps others
        return id(parameter)


_LISTENING: weakref.WeakSet[HostWatch] = weakref.WeakSet()


@cache
def _listen_to_optimizers() -> None:
    """Once a process and for good: a hook that goes while another's step calls them breaks it."""
    register_optimizer_step_post_hook(_stepped)


def _stepped(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for watch in list(_LISTENING):
        watch.stepped(optimizer)


def stop_watching(model: nn.Module) -> None:
    """Detach what listens to the passes of a model whose sites are gone."""
    for watch in _watches_of(model):
        watch.detach()


def trust_optimizer(model: nn.Module) -> None:
    """Say nothing of optimizers: it is known that one has all experts."""
    for watch in _watches_of(model):
        watch.settle()


def _watches_of(model: nn.Module) -> list[HostWatch]:
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    owners = [getattr(hook, "__self__", None) for hook in hooks]
    return [owner for owner in owners if isinstance(owner, HostWatch)]


def _is_traced() -> bool:
    """Whether this pass makes a graph, in which parameters may be proxies."""
    return torch.compiler.is_compiling() or is_fx_tracing()


@dataclass(frozen=True, kw_only=True)
class _Versions:
    """How often a site's parameters have been written in place."""

    base: int
    experts: int

    @classmethod
    def of(cls, site: HiLoMoELinear) -> Self:
        experts = site.expert_parameters()
        base = [p for name, p in site.named_parameters() if name not in experts]
        return cls(
            base=sum(p._version for p in base),
            experts=sum(p._version for p in experts.values()),
        )


def _refuse_under_ddp(sites: Mapping[str, HiLoMoELinear]) -> None:
    """DDP waits for the gradients of all parameters that it was given, and for its own ranks."""
    ddp = DistributedDataParallel._get_active_ddp_module()
    if ddp is None:
        return
    _refuse_other_ranks(sites, ddp.process_group)
    if not (ddp.find_unused_parameters or ddp.static_graph):
        _refuse_unused(sites)


def _refuse_apart(model: nn.Module, sites: Mapping[str, HiLoMoELinear]) -> None:
    """A router outside of what averages its sites' gradients learns from its own rank's rows."""
    sharing = {name: site for name, site in _named(model, sites).items() if site.router is not None}
    routers = {module: name for name, module in model.named_modules()}
    wrappers = [(n, m) for n, m in model.named_modules() if isinstance(m, DistributedDataParallel)]
    for name, site in sharing.items():
        router = site.router
        if router is None or router not in routers or not _learns(router):
            continue
        for wrapper_name, wrapper in wrappers:
            inside = set(wrapper.modules())
            if site in inside and router not in inside:
                raise ValueError(
                    f"Site {name!r} is in the DistributedDataParallel {wrapper_name!r}, but the "
                    f"router {routers[router]!r} that it shares is not: its gradients would be "
                    "averaged over no ranks. Wrap the model as a whole, or inject sites that route "
                    "their own rows (inject_hilomoe)."
                )


def _named(model: nn.Module, sites: Mapping[str, HiLoMoELinear]) -> dict[str, HiLoMoELinear]:
    """The sites by the names that they have now."""
    watched = set(sites.values())
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, HiLoMoELinear) and module in watched
    }


def _learns(router: SampleRouter) -> bool:
    return router.active_layers > 0 and any(p.requires_grad for p in router.parameters())


def _refuse_other_ranks(sites: Mapping[str, HiLoMoELinear], group: Any) -> None:
    """What is averaged over some ranks, and adds up over others, waits for them or is no mean."""
    ranks = dist.get_process_group_ranks(group)
    for name, site in sites.items():
        if site.active_layers == 0 or site.config.balance_weight == site.config.z_weight == 0:
            continue
        own = dist.get_process_group_ranks(process_group_of(site.group))
        if sorted(own) != sorted(ranks):
            raise ValueError(
                f"The auxiliary losses of {name!r} add up over ranks {own}, but "
                f"DistributedDataParallel averages gradients over ranks {ranks}. Call "
                "set_process_group(model, group) with DDP's process_group, or give it to injection."
            )


def _refuse_unused(sites: Mapping[str, HiLoMoELinear]) -> None:
    """No backward brings gradients of experts that do not compute."""
    idle = [
        name
        for name, site in sites.items()
        if site.active_layers == 0 and site.expert_out.requires_grad
    ]
    if idle:
        raise ValueError(
            f"HiLoMoELinear.active_layers is 0 at {', '.join(idle)}, whose experts have "
            "requires_grad = True: DistributedDataParallel waits for gradients that no backward "
            "brings. Call requires_grad_(False) on expert_parameters(model).values() before the "
            "model is wrapped, and wrap it anew when they start to learn; or wrap it with "
            "find_unused_parameters=True."
        )
