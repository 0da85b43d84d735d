"""How a site's autograd functions and kernels are called.

Plain eager calls reach a kernel at once, because an operator costs a site of few rows a tenth more.
Inside ``torch.func`` transforms, and where something such as ``FlopCounterMode`` listens, kernels
are called as the operators of `operators`. A graph of ``torch.compile`` or ``torch.export`` gets
the kernels themselves, because what is opaque cannot be fused.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any, cast, NoReturn

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from torchrec_hilomoe.hilomoe import operators
from torchrec_hilomoe.hilomoe.config import HiLoMoEConfig
from torchrec_hilomoe.hilomoe.execution import Execution

__all__ = [
    "apply_function",
    "apply_under_autocast",
    "call_backward",
    "call_kernel",
    "differentiable_once",
    "in_a_transform",
    "refuse_torchscript",
    "without_autocast",
]


def apply_under_autocast(function: type, tensors: tuple[Tensor | None, ...], *others: Any) -> Any:
    """Run a function on tensors of the type that autocast asks for."""
    device = cast(Tensor, tensors[0]).device.type
    # Of a device that has none, such as meta, PyTorch will not be asked.
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return apply_function(function, *tensors, *others)
    low = torch.get_autocast_dtype(device)
    with without_autocast(device):
        return apply_function(
            function, *(None if t is None else t.to(low) for t in tensors), *others
        )


def without_autocast(device: str) -> AbstractContextManager:
    """Keep autocast from what runs inside, on a device of this type."""
    if torch.amp.is_autocast_available(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def apply_function(function: type, *args: Any) -> Any:
    """Run an autograd function; forward mode is refused by name."""
    # Dynamo refuses a function that has a forward-mode derivative, were it only to refuse it.
    if not torch.compiler.is_compiling():
        function = _refusing_forward_mode(function, in_a_transform())
    return function.apply(*args)


def in_a_transform() -> bool:
    """Whether this runs inside ``torch.func.grad``, ``torch.vmap`` and the like."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


@cache
def _refusing_forward_mode(function: type, transformed: bool) -> type:
    own: dict[str, Any] = {"jvp": staticmethod(_no_forward_mode)}
    if not transformed:
        # PyTorch binds the arguments of a function with a `setup_context`, and calls it apart:
        # 25 us more, a tenth of a forward pass of one row.
        own |= {"forward": staticmethod(partial(_forward_and_setup, function))}
        own |= {"setup_context": torch.autograd.Function.setup_context}
    return type(function.__name__, (function,), own)


def _forward_and_setup(function: type, ctx: Any, *args: Any) -> Any:
    output = function.forward(*args)
    function.setup_context(ctx, args, output)
    ctx.set_materialize_grads(False)  # of all but the first output, which have none
    return output


def _no_forward_mode(ctx: Any, *_: Any) -> NoReturn:
    raise NotImplementedError(
        "HiLoMoELinear has no forward-mode derivative, which torch.func.jvp, jacfwd, hessian and "
        "torch.autograd.forward_ad ask for. Use reverse mode: torch.func.grad, vjp or jacrev."
    )


def refuse_torchscript() -> NoReturn:
    """A script cannot hold what a site runs, and a trace would hold one batch's choices."""
    raise NotImplementedError(
        "HiLoMoELinear cannot be compiled by torch.jit.script or torch.jit.trace. Export the model "
        "with torch.export.export, whose dynamic_shapes leave the batch free."
    )


def call_kernel(
    kernel: Callable, config: HiLoMoEConfig, execution: Execution, *args: Any
) -> Sequence[Tensor]:
    """Run a kernel: by its operator where something listens to operators, else at once.

    PyTorch calls an operator in 5 us, but what that runs takes a tenth longer than called at once.
    """
    if torch.compiler.is_compiling():
        if execution.backend != "triton":
            return kernel(config, execution, *args)
    elif in_a_transform() or torch._C._len_torch_dispatch_stack() > 0:
        return operators.operator(kernel)(operators.options_of(config, execution), *args)
    return operators.implementation(kernel, config, execution)(*args)


def differentiable_once(backward: Callable) -> Callable:
    """PyTorch's own decorator, but where somebody may differentiate the result.

    A second derivative through what that decorates is missing without a word: its error stands
    apart from the graph, where only a ``backward`` through everything meets it.
    """
    once = once_differentiable(backward)

    def run(ctx: Any, *grads: Any) -> Any:
        if grads[0] is None:  # nothing depends on the output
            return (None,) * len(ctx.needs_input_grad)
        return backward(ctx, *grads) if _is_recorded() else once(ctx, *grads)

    return run


def call_backward(
    kernel: Callable, config: HiLoMoEConfig, execution: Execution, *args: Any
) -> Sequence[Tensor]:
    """Run a backward kernel, whose result is differentiated nowhere."""
    if _is_recorded():
        grad, saved, *others = args
        return _Gradients.apply(kernel, config, execution, others, grad, *saved)
    return call_kernel(kernel, config, execution, *args)


def _is_recorded() -> bool:
    """Whether this backward is recorded: in a transform, or with ``create_graph=True``."""
    return in_a_transform() or (torch.is_grad_enabled() and not torch.compiler.is_compiling())


class _Gradients(torch.autograd.Function):
    """What a backward kernel returns, where somebody might differentiate it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args):
        kernel, config, execution, others, grad, *saved = args
        return tuple(call_kernel(kernel, config, execution, grad, saved, *others))

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError(
            "HiLoMoELinear can be differentiated once, not twice. Keep second derivatives, such as "
            "torch.func.hessian or the gradient of what create_graph=True returned, to parts of "
            "the model without sites, or set active_layers = 0."
        )
