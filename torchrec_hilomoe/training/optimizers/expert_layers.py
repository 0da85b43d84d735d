"""Expert layers that learn one by one, though a site keeps them in one parameter."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn, Tensor

from torchrec_hilomoe.training.stages import Stage

__all__ = ["ExpertLayers"]

# One slice a layer, as design names them; the query projection belongs to all layers.
STACKED = ("expert_in", "expert_out", "expert_keys")


@dataclass(frozen=True)
class _Slice:
    """One learner's share of an expert parameter: a layer of it, or all of it."""

    key: str
    parameter: nn.Parameter
    layer: int | None

    def of(self, tensor: Tensor) -> Tensor:
        return tensor if self.layer is None else tensor[self.layer - 1]


class ExpertLayers:
    """Views of the experts' parameters, one a layer, so that each layer learns on its own.

    A site stacks its layers in one parameter, which is fast. An optimizer, though, keeps one
    state a parameter: a layer that joins late would inherit the step count of the first, and a
    frozen one would drift on its momentum. Each view here is a parameter of its own to the
    optimizer, shares its memory with the stack, and is given a gradient only while it learns.

    Args:
        parameters: The experts' parameters by name, as
            :func:`torchrec_hilomoe.hilomoe.sites.expert_parameters` finds them.

    Attributes:
        views: What the optimizer is built on: ``NAME.LAYER`` (from 1) to a view, and
            parameters without layers under their own name.
        learning: Layers that learn now, counted from 1.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.learning: frozenset[int] = frozenset()
        self._slices = [piece for item in parameters.items() for piece in _slices(*item)]
        self.views: dict[str, Tensor] = {
            piece.key: piece.of(piece.parameter.detach()).requires_grad_() for piece in self._slices
        }

    def learn(self, stage: Stage) -> None:
        """Let the layers of a stage learn."""
        layers = {piece.layer for piece in self._slices if piece.layer is not None}
        active = len(layers) if stage.active_layers is None else stage.active_layers
        chosen = range(1, active + 1) if stage.learning_layers is None else stage.learning_layers
        self.learning = frozenset(chosen)

    def give_gradients(self) -> None:
        """Hand each learning layer its slice of the gradient; before the step."""
        for piece in self._slices:
            learns = bool(self.learning) if piece.layer is None else piece.layer in self.learning
            gradient = piece.parameter.grad
            given = piece.of(gradient) if learns and gradient is not None else None
            self.views[piece.key].grad = given

    def drop_gradients(self) -> None:
        """Forget the gradients; after the step."""
        for piece in self._slices:
            piece.parameter.grad = None
            self.views[piece.key].grad = None


def _slices(name: str, parameter: nn.Parameter) -> list[_Slice]:
    if name.rpartition(".")[2] not in STACKED:
        return [_Slice(name, parameter, None)]
    layers = range(1, parameter.shape[0] + 1)
    return [_Slice(f"{name}.{layer}", parameter, layer) for layer in layers]
