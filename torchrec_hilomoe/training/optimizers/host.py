"""A host's own optimizer, of any kind, in stages: experts apart from base, layer by layer."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn, Tensor
from torch.distributed.tensor import DTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from torchrec_hilomoe.embeddings.freezing import table_parameters
from torchrec_hilomoe.hilomoe.host_watch import trust_optimizer
from torchrec_hilomoe.hilomoe.inject import expert_parameters, sites_of
from torchrec_hilomoe.training.optimizers.dense import (
    begin_state,
    DenseOptimizer,
    ExpertLayers,
    routes,
)
from torchrec_hilomoe.training.optimizers.stage_optimizers import (
    groups_of,
    StageOptimizer,
    StageOptimizers,
    states_of,
)
from torchrec_hilomoe.training.stages import Stage, StageSpan
from torchrec_hilomoe.training.stages.wrapping import unwrapped

__all__ = ["Factory", "HostOptimizers", "ParameterGroups"]

Factory = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
ParameterGroups = Sequence[Mapping[str, Any]]


class HostOptimizers(StageOptimizers):
    """One optimizer of the host's for base and experts, beside those fused into the tables.

    It is built once, on the base's parameters and on views of the experts', one a layer, so that a
    layer that joins late has a state of its own and a frozen one does not drift on its momentum.
    What is frozen has no gradient, and so keeps its state. The rates that the host gave are what a
    stage's factors multiply.

    Args:
        model: In its wrapper, if it has one.
        factory: Builds the optimizer of groups, such as ``lambda groups: Adam(groups, lr=1e-3)``.
        parameter_groups: The host's, with options of their own; None is one of all that learns.
            Experts are taken out of them, with their group's options; those in none get a group.

    Attributes:
        learning: Every parameter that learns in some stage, by name.

    Raises:
        ValueError: If groups lack a parameter, hold one twice or a tensor that is none, or if the
            optimizer does not hold what it was given, or starts otherwise than from a state of
            zeros.
    """

    def __init__(
        self,
        model: nn.Module,
        factory: Factory,
        parameter_groups: ParameterGroups | None = None,
    ) -> None:
        module = unwrapped(model)
        sharded = isinstance(model, DistributedModelParallel)
        self._tables: KeyedOptimizer = model.fused_optimizer if sharded else CombinedOptimizer([])
        named = (model if sharded else module).named_parameters()
        self.learning = {
            name: parameter
            for name, parameter in in_backward_optimizer_filter(named)
            if parameter.requires_grad and parameter.numel()  # another rank has such a table
        }
        experts = {n: p for n, p in expert_parameters(module).items() if n in self.learning}
        self._layers = ExpertLayers(experts)
        given = [{"params": list(self.learning.values())}] if parameter_groups is None else []
        groups = _split(parameter_groups or given, self.learning, self._layers)
        optimizer = _built(factory, groups)
        _refuse_dampening(optimizer)
        base = {n: p for n, p in self.learning.items() if n not in experts}
        tables = table_parameters(module)
        self._module = module
        self._sites = {*sites_of(module).values()}
        self._loose_tables = [parameter for parameter in base.values() if parameter in tables]
        self._base = [parameter for parameter in base.values() if parameter not in tables]
        trust_optimizer(module)
        keyed = KeyedOptimizerWrapper({**base, **self._layers.views}, lambda _: optimizer)
        later = begin_state(keyed)
        # Of an optimizer whose state begins with its first step: what is saved in its place until
        # then, for DCP loads only what it is asked for. Only a count of steps tells it apart.
        counted = all("step" in state for state in later.values())
        self._later = later if counted else {}
        self._complete, self._begins_later = counted, bool(self._later)
        self._keyed: KeyedOptimizer = keyed
        self._rates = _rates_of(keyed)
        self._table_rates = [float(group["lr"]) for group in groups_of(self._tables)]
        self._combined = CombinedOptimizer([("tables", self._tables), ("dense", keyed)])
        self.stage_optimizer = StageOptimizer(self._tables, self._layers, [DenseOptimizer(keyed)])

    def check(self, stages: Iterable[Stage]) -> None:
        """Refuse stages that want of the host's optimizer what only its owner can change.

        Raises:
            ValueError: If a stage names an optimizer or a weight decay.
        """
        for stage in stages:
            for option in ("optimizer", "weight_decay"):
                if (value := getattr(stage, option)) is not None:
                    raise ValueError(
                        f"Stage {stage.name!r}: {option} = {value!r}, but StageDriver was given an "
                        "optimizer of your own, whose kind and options are yours. Leave it None, "
                        "and say it in parameter_groups or where the optimizer is built."
                    )

    def enter(self, stage: Stage) -> None:
        """Let the base and the expert layers of a stage learn, and nothing else.

        Raises:
            ValueError: If the model's parameters are others than the optimizer's.
        """
        self._refuse_replaced()
        self._layers.learn(stage)
        for parameter in self.learning.values():
            parameter.grad = None  # zero would be a gradient, which moves a frozen state
        self._layers.drop_gradients()
        self.stage_optimizer.frozen = [
            *(() if stage.train_backbone else self._base),
            *(() if stage.train_tables else self._loose_tables),
        ]

    def refuse_late_experts(self) -> None:
        """Refuse a model that was injected into since; no optimizer would move those experts.

        Raises:
            ValueError: If it was.
        """
        late = [name for name, site in sites_of(self._module).items() if site not in self._sites]
        if late:
            raise ValueError(
                f"StageDriver: {', '.join(late)} got experts after the driver was built, so that "
                "its optimizer moves none of them, and a wrapper averages none. Take the model out "
                "of its wrapper, inject, wrap it and build the driver anew; go_on_from(step, {}) "
                "lets that one go on."
            )

    def _refuse_replaced(self) -> None:
        """Look at what no wrapper replaces for a while, as FSDP does."""
        now, tables = set(self._module.parameters()), set(self._loose_tables)
        for name, parameter in self.learning.items():
            fixed = parameter not in tables and not isinstance(parameter, DTensor)
            if fixed and parameter not in now:
                raise ValueError(
                    f"StageDriver: {name} is not the parameter that the driver was built of and "
                    "moves. Build the driver after whatever replaces parameters "
                    "(load_state_dict with assign=True, injection, parametrizations)."
                )

    def set_rates(self, span: StageSpan, step: int, decay: float) -> None:
        """Multiply the host's rates by the stage's factors for ``step``."""
        held = self._keyed.state
        self._later = {n: s for n, s in self._later.items() if self._keyed.params[n] not in held}
        factor = decay * span.warmup(step)
        base, experts = span.stage.lr_scale * factor, span.stage.expert_lr_scale * factor
        for group, rate in zip(groups_of(self._keyed), self._rates, strict=True):
            keys = span.stage.key_lr_scale if group["routes"] else 1.0
            _set_rate(group, rate * (experts * keys if group["experts"] else base))
        for group, rate in zip(groups_of(self._tables), self._table_rates, strict=True):
            group["lr"] = rate * base
        self._tables.zero_grad()  # takes the rates over: the backward pass is the step of tables

    def state_dict(self) -> dict[str, Any]:
        """The state of every parameter, by ``tables.`` or ``dense.`` and its name: views."""
        later = {f"dense.{name}": state for name, state in self._later.items()}
        return {"optimizer": {"state": {**later, **states_of(self._combined)}}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave.

        Raises:
            ValueError: If it is the state of other parameters, or of another kind of optimizer.
        """
        states = state_dict["optimizer"]["state"]
        own = {name: {} for name in ("tables", "dense")}
        for key, state in states.items():
            kind, _, name = key.partition(".")
            own[kind][name] = state
        kept = self._kept()
        missing = sorted(kept.keys() - own["dense"].keys()) if self._complete else []
        unknown = sorted(own["dense"].keys() - self._keyed.params.keys())
        if missing or unknown:
            raise ValueError(
                f"StageDriver.load_state_dict: the state lacks {missing} and has {unknown}, which "
                "the model has not. Load it into the model, sites and optimizer that it is of."
            )
        if self._complete:
            _refuse_another_kind(own["dense"], kept)
        self._tables.load_state_dict({"state": own["tables"]})
        held = cast(dict[Any, Any], self._keyed.state)
        for name, parameter in self._keyed.params.items():
            held.pop(parameter, None)
            if name in own["dense"]:
                state = {
                    key: _placed(key, value, kept.get(name, {}), cast(Tensor, parameter))
                    for key, value in own["dense"][name].items()
                }
                if self._begins_later and not state["step"]:
                    self._later[name] = state
                else:
                    held[parameter] = state

    def _kept(self) -> dict[str, Mapping[str, Any]]:
        """The state that each parameter has, or will have."""
        held = self._keyed.state
        begun = {name: held[p] for name, p in self._keyed.params.items() if p in held}
        return {**self._later, **begun}


def _split(
    given: ParameterGroups, learning: Mapping[str, nn.Parameter], layers: ExpertLayers
) -> list[dict[str, Any]]:
    """The host's groups, experts apart from base and layer by layer."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in learning.items()}
    groups: list[dict[str, Any]] = []
    seen: set[Tensor] = set()
    for at, group in enumerate(given):
        params = [group["params"]] if isinstance(group["params"], Tensor) else group["params"]
        base: list[Tensor] = []
        views: dict[str, Tensor] = {}
        for parameter in params:
            if not parameter.numel():
                continue
            if parameter not in names or parameter in seen:
                what = f"{names[parameter]} again" if parameter in seen else "a tensor"
                raise ValueError(
                    f"StageDriver: parameter_groups[{at}] holds {what} of shape "
                    f"{tuple(parameter.shape)}, which is no parameter of the model that learns and "
                    "is in no group yet. Give each parameter that requires a gradient once, and "
                    "none with an optimizer fused into its backward pass."
                )
            seen.add(parameter)
            own = layers.views_of(parameter)
            views |= own
            base += [] if own else [parameter]
        groups += _alike({**group, "experts": False, "routes": False}, base)
        groups += _of_experts(group, views)
    left = [parameter for parameter in names if parameter not in seen]
    views = {name: view for it in left for name, view in layers.views_of(it).items()}
    groups += _of_experts({}, views)
    lost = [names[parameter] for parameter in left if not layers.views_of(parameter)]
    if lost:
        raise ValueError(
            f"StageDriver: parameter_groups lacks {', '.join(lost)}, which require gradients that "
            "no optimizer would use. Add them to a group, or call requires_grad_(False) on what "
            "must not learn."
        )
    return groups


def _of_experts(group: Mapping[str, Any], views: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Groups of experts, of what they compute with and of what routes."""
    found = []
    for routing in (False, True):
        own = [view for name, view in views.items() if routes(name) == routing]
        found += _alike({**group, "experts": True, "routes": routing}, own)
    return found


def _alike(group: Mapping[str, Any], params: Sequence[Tensor]) -> list[dict[str, Any]]:
    """Groups of tensors of one kind: no optimizer computes with sharded and plain ones at once."""
    sharded = [tensor for tensor in params if isinstance(tensor, DTensor)]
    plain = [tensor for tensor in params if not isinstance(tensor, DTensor)]
    return [{**group, "params": held} for held in (sharded, plain) if held]


def _refuse_another_kind(
    states: Mapping[str, Mapping[str, Any]], kept: Mapping[str, Mapping[str, Any]]
) -> None:
    """The state of another kind of optimizer would be kept, and used by none."""
    for name, state in states.items():
        given, wanted = sorted(state), sorted(kept.get(name, ()))
        if given != wanted:
            raise ValueError(
                f"StageDriver.load_state_dict: the state of {name} is {given}, but the optimizer "
                f"of this run keeps {wanted}. Build the optimizer, with the options, that it was "
                "saved with."
            )


def _built(factory: Factory, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    optimizer = factory(groups)
    wanted = {id(tensor) for group in groups for tensor in group["params"]}
    held = [group for group in optimizer.param_groups if "experts" in group]
    if wanted != {id(tensor) for group in held for tensor in group["params"]}:
        raise ValueError(
            f"StageDriver: optimizer has built {type(optimizer).__name__} of other groups than the "
            f"{len(groups)} that it was given, in which each expert layer is a tensor of its own. "
            "Build it of these, as lambda groups: torch.optim.Adam(groups, lr=1e-3) does."
        )
    return optimizer


def _refuse_dampening(optimizer: torch.optim.Optimizer) -> None:
    """Its first step dampens nothing, so it begins in no state that could be saved before."""
    for group in optimizer.param_groups:
        if group.get("momentum") and group.get("dampening"):
            raise ValueError(
                f"StageDriver: the optimizer has momentum = {group['momentum']} and dampening = "
                f"{group['dampening']}. A parameter's first step is not dampened, and no state "
                "tells whether it was made, so that stages and checkpoints would train otherwise. "
                "Use dampening=0 and the learning rate times (1 - dampening): the same steps but "
                "for each parameter's first."
            )


def _rates_of(optimizer: KeyedOptimizer) -> list[float]:
    for group in groups_of(optimizer):
        if "lr" not in group:
            raise ValueError(
                "StageDriver: a group of the optimizer has no lr, which stages multiply. Give it "
                "one, or an optimizer that has a learning rate."
            )
    return [float(group["lr"]) for group in groups_of(optimizer)]


def _set_rate(group: dict[str, Any], rate: float) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def _placed(name: str, value: Any, before: Mapping[str, Any], parameter: Tensor) -> Any:
    """A copy of a part of a parameter's state, where the optimizer wants it."""
    if not isinstance(value, Tensor):
        return value
    old = before.get(name)
    device = old.device if isinstance(old, Tensor) else parameter.device
    if old is None and name == "step":  # on the host, unless the optimizer says otherwise
        device = value.device
    return value.detach().clone().to(device)
