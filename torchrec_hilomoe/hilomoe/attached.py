"""A loss term of a part of the model, which joins in the host's backward by itself.

As the routers' losses (`torchrec_hilomoe.hilomoe.losses`) it asks nothing of the host: it hangs on
a tensor that the host's loss depends on, passes that tensor's gradient on, and starts its own.
Nothing is added where there is no backward. All ranks must run the same training forwards.
"""

import torch
from torch import nn, Tensor

from torchrec_hilomoe.hilomoe.losses import sum_over_ranks

__all__ = ["AttachedLoss", "attached_losses"]

# Opaque to FX: they ask for the process group.
for _name in ("attach", "mean_of_ranks"):
    torch.fx.wrap(_name)


class AttachedLoss(nn.Module):
    """The weighted mean, over the items of all ranks, of what a part of the model loses on each.

    Args:
        weight: Of this term beside the host's loss.

    Attributes:
        scale: Factor on the gradient; set for a whole model by ``set_auxiliary_loss_scale``.

    Example:
        >>> attached, x = AttachedLoss(0.5), torch.ones(2, requires_grad=True)
        >>> y = attached(x, lost=(3 * x).sum(), items=torch.tensor(2))
        >>> y.sum().backward()
        >>> x.grad, attached.value
        (tensor([1.7500, 1.7500]), tensor(3.))
    """

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight
        self.scale = 1.0
        self._value: Tensor | None = None

    @property
    def learns(self) -> bool:
        """Whether a forward now would have something to attach."""
        return self.training and torch.is_grad_enabled() and self.weight * self.scale != 0

    @property
    def value(self) -> Tensor | None:
        """This rank's part in the last training forward, unweighted and detached.

        The average over ranks is the mean over all items; None before there was a forward.
        """
        return self._value

    def forward(self, carrier: Tensor, lost: Tensor, items: Tensor) -> Tensor:
        """Return ``carrier``, with the loss hanging on it.

        Args:
            carrier: What the host's loss depends on.
            lost: ``()``, the sum over this rank's items.
            items: ``()``, how many there are.
        """
        if not self.learns:
            return carrier
        mean = mean_of_ranks(lost, items)
        if isinstance(mean, Tensor):  # an FX proxy is no value to keep
            self._value = mean.detach()
        return attach(carrier, mean, self.weight * self.scale)

    def extra_repr(self) -> str:
        """What it weighs."""
        return f"weight={self.weight}"

    def __getstate__(self) -> dict:
        """Copies and pickles start without the last pass's value."""
        return {**super().__getstate__(), "_value": None}


def attached_losses(model: nn.Module) -> dict[str, AttachedLoss]:
    """The model's attached losses by qualified name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, AttachedLoss)}


def mean_of_ranks(lost: Tensor, items: Tensor) -> Tensor:
    """Divide by the mean number of items a rank has, so that ranks' average is the mean of all."""
    items = items.detach().long()
    all_items, ranks = sum_over_ranks(torch.stack([items, torch.ones_like(items)])).unbind()
    return lost * ranks / all_items.clamp(min=1)


def attach(carrier: Tensor, loss: Tensor, weight: float) -> Tensor:
    """Return ``carrier``; its backward is also ``weight`` times that of ``loss``."""
    return _Attach.apply(carrier, loss, weight)


class _Attach(torch.autograd.Function):
    """See `attach`."""

    @staticmethod
    def forward(ctx, carrier, loss, weight):
        ctx.weight = weight
        ctx.save_for_backward(loss)
        return carrier.view_as(carrier)

    @staticmethod
    def backward(ctx, grad):
        (loss,) = ctx.saved_tensors
        return grad, torch.full_like(loss, ctx.weight), None
