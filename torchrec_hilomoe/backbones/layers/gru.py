r"""A gated recurrent unit over jagged rows; with an attention, DIEN's AUGRU.

Its step-by-step half, forward and backward, is written by hand:

.. math::
    u &= a \, \sigma(i_u + W_u h + b_u) \\
    r &= \sigma(i_r + W_r h + b_r) \\
    n &= \tanh(i_n + r (W_n h + b_n)) \\
    h &\leftarrow h + u (n - h)

It is `nn.GRU` with an update gate that says how much is new instead of how much is kept, and, with
an attention ``a``, the AUGRU of DIEN.

Rows are taken by falling length, so that a step is one product and a few pointwise passes over the
rows that still have an event; no step knows of padding. The inputs' own maps do not wait for the
step before, so they are not here: one product has made ``i`` for all events. The backward keeps the
gates of every step and adds up the weight's gradient as it goes.

As an operator of its own it is opaque to FX, ``torch.compile`` and ``torch.export``: how many steps
there are is data, which none of them could trace. (``nn.GRU`` with a ``PackedSequence`` cannot be
exported for that reason; its backward on CPU is several times slower, too.)

Shape legend:
    B  rows
    T  events of all rows together, row after row, oldest first
    W  width of a state
    G  gates, 3 W: update, reset, new
    M  what a step leaves for backward, 4 W: the gates and W_n h + b_n
    A  rows that still have an event at some step, the longest first
"""

import math
from dataclasses import dataclass

import torch
from torch import nn, Tensor
from torch.utils.flop_counter import register_flop_formula

__all__ = ["GRU", "States", "recur"]

_sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input
_tanh_backward = torch.ops.aten.tanh_backward.grad_input


@dataclass(frozen=True)
class States:
    """What a row's events have led to.

    Attributes:
        every: ``(T, W)``, the state after each event.
        last: ``(B, W)``, the state after each row's last; zero for a row without any.
    """

    every: Tensor
    last: Tensor


def recur(
    inputs_TG: Tensor,
    weight_GW: Tensor,
    bias_G: Tensor,
    attention_T: Tensor | None,
    offsets: Tensor,
) -> States:
    """Run the recurrence, each row from a state of zero; in 32 bits at least.

    Args:
        inputs_TG: The events' part of the gates, with a bias of its own.
        weight_GW: The state's part of the gates.
        bias_G: Is added to the latter.
        attention_T: Narrows each event's update gate; None does not.
        offsets: ``(B + 1,)`` int64, where each row's events begin.
    """
    dtype = torch.promote_types(inputs_TG.dtype, torch.float32)
    attention_T = None if attention_T is None else attention_T.to(dtype)
    every_TW, last_BW, _ = torch.ops.torchrec_hilomoe.gru(
        inputs_TG.to(dtype), weight_GW.to(dtype), bias_G.to(dtype), attention_T, offsets
    )
    return States(every=every_TW.to(inputs_TG.dtype), last=last_BW.to(inputs_TG.dtype))


@dataclass(frozen=True)
class _Schedule:
    """Which events a step takes.

    Attributes:
        order_B: The rows, the longest first.
        first_B: The first event of each, in that order.
        alive: How many rows have an event, at each step.
    """

    order_B: Tensor
    first_B: Tensor
    alive: list[int]

    @staticmethod
    def of(offsets: Tensor) -> "_Schedule":
        on_host = offsets.cpu()  # the one time that a GPU is waited for
        lengths_B = on_host.diff()
        order_B = torch.argsort(lengths_B, descending=True, stable=True)
        ended = torch.bincount(lengths_B).cumsum(0)[:-1]  # rows that are no longer than a step
        return _Schedule(
            order_B=order_B.to(offsets.device),
            first_B=on_host[order_B].to(offsets.device),
            alive=(len(lengths_B) - ended).tolist(),
        )

    def events_A(self, step: int) -> Tensor:
        return self.first_B[: self.alive[step]] + step


@torch.library.custom_op("torchrec_hilomoe::gru", mutates_args=())
def _gru(
    inputs_TG: Tensor,
    weight_GW: Tensor,
    bias_G: Tensor,
    attention_T: Tensor | None,
    offsets: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the states ``(T, W)``, the last ones ``(B, W)``, and a memory ``(T, M)``."""
    (T, G), W = inputs_TG.shape, weight_GW.shape[1]
    schedule, new = _Schedule.of(offsets), inputs_TG.new_empty
    B, stop = len(schedule.order_B), 0
    every_TW, last_BW, memory_TM = new(T, W), new(B, W), new(T, 4 * W)
    state_BW, x_BG, s_BG, u_BW = inputs_TG.new_zeros(B, W), new(B, G), new(B, G), new(B, W)
    for step, alive in enumerate(schedule.alive):
        start, stop = stop, stop + alive
        events_A = schedule.events_A(step)
        x_AG = torch.index_select(inputs_TG, 0, events_A, out=x_BG[:alive])
        state_AW = state_BW[:alive]
        s_AG = bias_G.expand(alive, G)  # of the first step's states, which are zero
        if step:
            s_AG = torch.addmm(bias_G, state_AW, weight_GW.t(), out=s_BG[:alive])
        update_AW, _, new_AW, hidden_AW = memory_TM[start:stop].split(W, dim=1)
        both_A2W = memory_TM[start:stop, : 2 * W]
        torch.add(x_AG[:, : 2 * W], s_AG[:, : 2 * W], out=both_A2W).sigmoid_()
        hidden_AW.copy_(s_AG[:, 2 * W :])
        torch.addcmul(x_AG[:, 2 * W :], both_A2W[:, W:], hidden_AW, out=new_AW).tanh_()
        if attention_T is not None:
            attention_A1 = attention_T[events_A].unsqueeze(1)
            update_AW = torch.mul(update_AW, attention_A1, out=u_BW[:alive])
        every_TW.index_copy_(0, events_A, state_AW.lerp_(new_AW, update_AW))
    last_BW.index_copy_(0, schedule.order_B, state_BW)
    return every_TW, last_BW, memory_TM


@torch.library.custom_op("torchrec_hilomoe::gru_backward", mutates_args=())
def _gru_backward(
    every_grad_TW: Tensor | None,
    last_grad_BW: Tensor | None,
    weight_GW: Tensor,
    attention_T: Tensor | None,
    offsets: Tensor,
    every_TW: Tensor,
    memory_TM: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of inputs, weight, bias and attention, which is empty without one."""
    (G, W), T = weight_GW.shape, len(every_TW)
    schedule, new = _Schedule.of(offsets), every_TW.new_empty
    B, start = len(schedule.order_B), T
    inputs_TG, attended_T = new(T, G), new(0 if attention_T is None else T)
    # A step's gradients stand in the order new (in the state's part), update, reset, new (in the
    # input's part), so that the first three and the last three are one matrix each.
    by_state_GW = torch.cat([weight_GW[2 * W :], weight_GW[: 2 * W]])
    weight_grad_GW, bias_grad_G = torch.zeros_like(weight_GW), weight_GW.new_zeros(G)
    gates_BM, kept_BW, work_BW = new(B, 4 * W), new(B, W), new(B, W)
    grad_BW = every_TW.new_zeros(B, W)
    if last_grad_BW is not None:
        torch.index_select(last_grad_BW, 0, schedule.order_B, out=grad_BW)
    for step in reversed(range(len(schedule.alive))):
        alive, events_A = schedule.alive[step], schedule.events_A(step)
        start, stop = start - alive, start
        grad_AW, kept_AW, work_AW = grad_BW[:alive], kept_BW[:alive], work_BW[:alive]
        if every_grad_TW is not None:
            grad_AW += torch.index_select(every_grad_TW, 0, events_A, out=work_AW)
        if step:
            torch.index_select(every_TW, 0, events_A - 1, out=kept_AW)
        else:
            kept_AW.zero_()
        update_AW, reset_AW, new_AW, hidden_AW = memory_TM[start:stop].split(W, dim=1)
        gates_AM = gates_BM[:alive]
        hidden_grad_AW, update_grad_AW, reset_grad_AW, new_grad_AW = gates_AM.split(W, dim=1)
        torch.sub(new_AW, kept_AW, out=work_AW).mul_(grad_AW)
        opened_AW = update_AW
        if attention_T is not None:
            attention_A1 = attention_T[events_A].unsqueeze(1)
            attended_T[events_A] = torch.linalg.vecdot(work_AW, update_AW)
            work_AW *= attention_A1
            opened_AW = update_AW * attention_A1
        _sigmoid_backward(work_AW, update_AW, grad_input=update_grad_AW)
        torch.mul(grad_AW, opened_AW, out=work_AW)
        grad_AW -= work_AW
        _tanh_backward(work_AW, new_AW, grad_input=new_grad_AW)
        torch.mul(new_grad_AW, reset_AW, out=hidden_grad_AW)
        torch.mul(new_grad_AW, hidden_AW, out=work_AW)
        _sigmoid_backward(work_AW, reset_AW, grad_input=reset_grad_AW)
        inputs_TG.index_copy_(0, events_A, gates_AM[:, W:])
        bias_grad_G += gates_AM[:, :G].sum(dim=0)
        if step:
            grad_AW.addmm_(gates_AM[:, :G], by_state_GW)
            weight_grad_GW.addmm_(gates_AM[:, :G].t(), kept_AW)
    weight_grad_GW, bias_grad_G = weight_grad_GW.roll(-W, 0), bias_grad_G.roll(-W, 0)
    return inputs_TG, weight_grad_GW, bias_grad_G, attended_T


@_gru.register_fake
def _(inputs_TG, weight_GW, bias_G, attention_T, offsets):
    T, W = inputs_TG.shape[0], weight_GW.shape[1]
    new = inputs_TG.new_empty
    return new(T, W), new(offsets.shape[0] - 1, W), new(T, 4 * W)


@_gru_backward.register_fake
def _(every_grad_TW, last_grad_BW, weight_GW, attention_T, offsets, every_TW, memory_TM):
    G, T = weight_GW.shape[0], every_TW.shape[0]
    new = every_TW.new_empty
    return new(T, G), new(weight_GW.shape), new(G), new(0 if attention_T is None else T)


def _keep(ctx, inputs, output):
    _, weight_GW, _, attention_T, offsets = inputs
    every_TW, _, memory_TM = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(weight_GW, attention_T, offsets, every_TW, memory_TM)


def _backward(ctx, every_grad_TW, last_grad_BW, _):
    inputs_TG, weight_GW, bias_G, attended_T = torch.ops.torchrec_hilomoe.gru_backward(
        every_grad_TW, last_grad_BW, *ctx.saved_tensors
    )
    return inputs_TG, weight_GW, bias_G, attended_T if ctx.needs_input_grad[3] else None, None


_gru.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.torchrec_hilomoe.gru)
def _forward_flops(inputs, weight, bias, attention, offsets, **_) -> int:
    """The first step's states are zero, which is one event a row where none is empty."""
    return 2 * max(inputs[0] - offsets[0] + 1, 0) * weight[0] * weight[1]


@register_flop_formula(torch.ops.torchrec_hilomoe.gru_backward)
def _backward_flops(every_grad, last_grad, weight, attention, offsets, every, memory, **_) -> int:
    return 2 * _forward_flops(every, weight, None, attention, offsets)


class GRU(nn.Module):
    """Each row's events move a state that starts at zero; see :func:`recur`.

    Args:
        width: ``W``.

    Attributes:
        input: The events' part of the gates, update, reset and new one below the other. It works
            on all events at once, so it can carry experts.
        hidden_weight: ``(3 W, W)``, the state's part. It works inside the recurrence, where a
            step waits for the one before, so it is a bare parameter and no place for experts.
        hidden_bias: ``(3 W,)``.

    Example:
        >>> gru = GRU(4)
        >>> states = gru(torch.randn(5, 4), torch.tensor([0, 2, 2, 5]))
        >>> states.every.shape, states.last[1]
        (torch.Size([5, 4]), tensor([0., 0., 0., 0.], grad_fn=<SelectBackward0>))
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.input = nn.Linear(width, 3 * width)
        self.hidden_weight = nn.Parameter(torch.empty(3 * width, width))
        self.hidden_bias = nn.Parameter(torch.empty(3 * width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start as `nn.GRU` does: all parameters uniform up to one over the root of the width."""
        bound = 1 / math.sqrt(self.hidden_weight.shape[1])
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(
        self, events_TW: Tensor, offsets: Tensor, attention_T: Tensor | None = None
    ) -> States:
        """Run over the rows.

        Args:
            events_TW: Row after row, oldest first.
            offsets: ``(B + 1,)``, where each row's events begin.
            attention_T: How much each event may move its row's state, 0 not at all; None lets
                each as much as its own gate does.
        """
        inputs_TG = self.input(events_TW)
        return recur(inputs_TG, self.hidden_weight, self.hidden_bias, attention_T, offsets)
