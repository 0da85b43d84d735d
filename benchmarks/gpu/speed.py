"""A site against ``nn.Linear``: each backend, forward and forward with backward, time and memory.

Every contender's rows are checked against the float64 loops before it is timed. Times are of calls
one behind the other, as a model's step makes them, and of the same kernels replayed from a CUDA
graph, which leaves out what the host takes to launch them. Inputs take turns, so that no call
finds its rows in the cache.
"""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import nn, Tensor

from benchmarks.bench_hilomoe import BASELINE, build, CHECKED_ROWS
from benchmarks.bench_hilomoe import Case as Shape
from benchmarks.gpu.cases import Case, Setting
from benchmarks.gpu.events import graph_of, time_in_turns, Times
from benchmarks.harness import peak_bytes
from tests.helpers.rounding import assert_as_exact_as
from torchrec_hilomoe.hilomoe import HiLoMoELinear, reference

__all__ = ["cases", "warm"]

BACKENDS = ("eager", "compiled", "triton")
INPUTS = 3  # that take turns
PASSES = ("forward", "forward_backward")
WARM_LANES = 4
SECONDS = 0.5  # for all contenders of a pass


def shapes(setting: Setting) -> list[Shape]:
    """What decides first: bfloat16, 8 experts; then 64, then the other dtypes."""
    if setting.rehearsal:
        return [Shape(rows=64, width=32, experts=4)]

    def shape(width: int, experts: int = 8, dtype: str = "bfloat16") -> Shape:
        return Shape(rows=65536, width=width, experts=experts, dtype=dtype)

    return [
        *[shape(width) for width in (256, 512, 1024, 64)],
        *[shape(width, 64) for width in (256, 1024, 512, 64)],
        *[shape(width, dtype="float32") for width in (256, 1024)],
        *[shape(width, dtype="float16") for width in (256, 1024)],
        *[shape(width, 64, "float32") for width in (256,)],
    ]


def cases(setting: Setting) -> list[Case]:
    """One case a shape."""
    return [
        Case(name=_name(shape), run=partial(_measure, shape, setting), seconds=_limit(setting))
        for shape in shapes(setting)
    ]


def warm(setting: Setting) -> list[Case]:
    """Compile each shape's code into the caches on disk, in several processes at once."""
    return [
        Case(
            name=f"compile for {_name(shape)}",
            run=partial(_compile, shape, setting),
            lane=f"warm {index % WARM_LANES}",
            seconds=_limit(setting),
        )
        for index, shape in enumerate(shapes(setting))
    ]


def _limit(setting: Setting) -> float:
    """Seconds of a case; on a CPU, C++ is compiled."""
    return 400 if setting.rehearsal else 150


def _name(shape: Shape) -> str:
    return f"D {shape.width} E {shape.experts} {shape.dtype}"


def _compile(shape: Shape, setting: Setting) -> Mapping[str, Any]:
    backends = ["compiled"] if setting.device == "cpu" else ["compiled", "triton"]
    torch.compiler.reset()
    modules = build(shape, setting.device, backends, dense=False)
    inputs = _inputs(shape, setting.device)[:1]
    for name, module in modules.items():
        for part in PASSES:
            if name != BASELINE:
                _call(module, inputs, part)()
    return {"say": "in the caches"}


def _measure(shape: Shape, setting: Setting) -> Mapping[str, Any]:
    torch.manual_seed(0)
    torch.compiler.reset()
    device = setting.device
    backends: list[str] = list(BACKENDS)
    if device == "cpu":
        backends.remove("triton")  # the interpreter's time says nothing
    modules = build(shape, device, backends, dense=False)
    if shape.dtype != "bfloat16":  # which embedding bags do not have there
        modules["hilomoe_eager gathered"] = _gathering(modules["hilomoe_eager"])
    inputs = _inputs(shape, device)
    failed: dict[str, str] = {}
    for name in list(modules)[1:]:
        site = modules[name]
        assert isinstance(site, HiLoMoELinear)
        try:
            _check(site, inputs[0])
        except (AssertionError, RuntimeError) as error:  # the others are timed all the same
            failed[name] = f"{type(error).__name__}: {error}"[:300]
            del modules[name]
    found: dict[str, Any] = {}
    for part in PASSES:
        fns = {name: _call(module, inputs, part) for name, module in modules.items()}
        times = {"calls": time_in_turns(fns, calls=INPUTS, seconds=SECONDS, device=device)}
        once = {name: _call(module, inputs[:1], part) for name, module in modules.items()}
        peaks = {name: peak_bytes(fn, device) for name, fn in once.items()}
        if device == "cuda":
            graphs = {}
            for name, fn in fns.items():
                try:
                    graphs[name] = graph_of(fn)
                except RuntimeError as error:  # the others are timed all the same
                    failed[f"{name} {part} in a graph"] = f"{type(error).__name__}: {error}"[:300]
            if BASELINE in graphs:
                times["graph"] = time_in_turns(graphs, calls=INPUTS, seconds=SECONDS, device=device)
            del graphs
        found[part] = {
            **{how: {name: asdict(of) for name, of in own.items()} for how, own in times.items()},
            "peak_bytes": peaks,
        }
        found[f"say_{part}"] = "; ".join(_say(how, of) for how, of in times.items())
    say = " | ".join(f"{part}: {found[f'say_{part}']}" for part in PASSES)
    if failed:
        say = f"{'; '.join(f'{name}: {why}'[:120] for name, why in failed.items())} | {say}"
    return {"say": say, "failed": failed, **asdict(shape), **found}


def _gathering(site: nn.Module) -> HiLoMoELinear:
    """The same site, by the other way to meet experts."""
    assert isinstance(site, HiLoMoELinear)
    other = deepcopy(site)
    other.execution = replace(site.execution, experts="gathered", gpu_experts="gathered")
    return other


def _say(how: str, times: Mapping[str, Times]) -> str:
    base = f"{how} linear {times[BASELINE].us:.0f} us"
    rest = [
        f"{name.removeprefix('hilomoe_')} x{of.ratio:.2f}"
        for name, of in times.items()
        if name != BASELINE
    ]
    return " ".join([base, *rest])


def _inputs(shape: Shape, device: str) -> list[Tensor]:
    dtype = getattr(torch, shape.dtype)
    size = (shape.rows, shape.width)
    return [
        torch.randn(size, device=device, dtype=dtype, requires_grad=True) for _ in range(INPUTS)
    ]


def _call(module: nn.Module, inputs: list[Tensor], part: str) -> Callable[[], object]:
    """Call the module on each of the inputs once.

    Gradients are returned and not accumulated: what accumulates belongs to the stream on which it
    was first used, and could not be captured on another.
    """
    grad_NO = torch.randn_like(inputs[0])
    wanted = list(module.parameters())

    def forward() -> None:
        with torch.no_grad():
            for x_ND in inputs:
                module(x_ND)

    def forward_backward() -> None:
        for x_ND in inputs:
            torch.autograd.grad(module(x_ND), [x_ND, *wanted], grad_NO)

    return forward if part == "forward" else forward_backward


def _check(site: HiLoMoELinear, x_ND: Tensor) -> None:
    """Refuse to time a wrong answer: a few rows of the very call that is timed."""
    with torch.no_grad():
        out = site.compute(x_ND)
    few_ND = x_ND[:CHECKED_ROWS].detach().cpu()
    chosen_LEN = torch.zeros_like(out.routing.scores_LEN, dtype=torch.bool)
    chosen_NLE = chosen_LEN.scatter(1, out.routing.chosen_LkN, True).permute(2, 0, 1)
    chosen_NLE = chosen_NLE[:CHECKED_ROWS].cpu()
    params = {name: p.detach().cpu() for name, p in site.named_parameters()}

    def loops(dtype: torch.dtype) -> Mapping[str, Tensor]:
        cast = {name: p.to(dtype) for name, p in params.items()}
        return {
            "y": reference.hilomoe_linear(
                few_ND.to(dtype), cast, site.config, None, chosen_NLE
            ).y_NO
        }

    terms = site.in_features + site.config.num_layers * site.config.num_experts
    got = {"y": out.y[:CHECKED_ROWS].cpu()}
    assert_as_exact_as(got, loops(x_ND.dtype), loops(torch.float64), x_ND.dtype, terms)
