"""FuxiCTR's DIEN and ours, tensor by tensor."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn, Tensor

from torchrec_hilomoe.backbones.dien import DIEN
from torchrec_hilomoe.backbones.layers.gru import GRU

__all__ = ["dien_weights"]


def _turned(gates: Tensor) -> Tensor:
    """``nn.GRU`` has reset, keep, new; ours is update, which is what it does not keep."""
    reset, keep, new = gates.chunk(3)
    return torch.cat([-keep, reset, new])


def _layers_of(modules: Sequence[nn.Module]) -> list[nn.Module]:
    return [module for module in modules if list(module.state_dict())]


def dien_weights(ours: DIEN, theirs: Any) -> Iterator[tuple[nn.Parameter | Tensor, Tensor, Any]]:
    """Every tensor of ours outside the tables, theirs, and how theirs becomes ours."""
    width = theirs.item_info_dim

    def same(tensor: Tensor) -> Tensor:
        return tensor

    def sliced(head: Tensor) -> Tensor:
        """Theirs reads the context first, ours the candidate."""
        sizes = [head.shape[-1] - 2 * width, width, width]
        context, candidate, evolved = head.split(sizes, dim=-1)
        return torch.cat([candidate, context, evolved], dim=-1)

    interest = ours.get_submodule("interests.0")
    extraction, evolution = (getattr(interest, name) for name in ("extraction", "evolution"))
    assert isinstance(extraction, GRU)
    assert isinstance(evolution, GRU)
    gru, cell = theirs.extraction_modules[0], theirs.evolving_modules[0].gru_cell
    yield extraction.input.weight, gru.weight_ih_l0, _turned
    yield extraction.input.bias, gru.bias_ih_l0, _turned
    yield extraction.hidden_weight, gru.weight_hh_l0, _turned
    yield extraction.hidden_bias, gru.bias_hh_l0, _turned
    yield evolution.input.weight, cell.x2h.weight, same
    yield evolution.input.bias, cell.x2h.bias, same
    yield evolution.hidden_weight, cell.h2h.weight, same
    yield evolution.hidden_bias, cell.h2h.bias, same
    attention, their_attention = interest.get_submodule("attention"), theirs.attention_modules[0]
    if their_attention.attention_type == "bilinear_attention":
        yield attention.get_parameter("hidden.weight"), their_attention.W_kernel, torch.t
    mlps: list[tuple[Any, Any]] = [(ours.head, theirs.dnn)]
    if their_attention.attention_type == "din_attention":
        mlps.append((attention.get_submodule("mlp"), their_attention.attn_mlp))
    for mine, other in mlps:
        mine_layers = _layers_of([*mine.hidden.children(), mine.output])
        for layer, their_layer in zip(mine_layers, _layers_of(list(other.mlp)), strict=True):
            theirs_by_name: Mapping[str, Tensor] = their_layer.state_dict(keep_vars=True)
            for name, tensor in layer.state_dict(keep_vars=True).items():
                first = layer is ours.head.hidden[0] and name == "weight"
                yield tensor, theirs_by_name[name], sliced if first else same
