"""A named place in a model where others can hear a tensor pass."""

from torch import nn, Tensor

__all__ = ["Tap"]


class Tap(nn.Module):
    """Passes its input on.

    Unlike ``nn.Identity`` it is heard while FX traces, too: the tracer does not enter the modules
    of ``torch.nn``, nor run their hooks.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x``."""
        return x
