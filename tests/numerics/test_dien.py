"""DIEN against FuxiCTR's: the same weights in, the same logits and gradients out.

Where there is Dice, histories are of full length: FuxiCTR lets padding into its statistics.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import nn, Tensor
from torch.nn import functional as F

from tests.helpers.fuxictr import build_fuxictr
from torchrec_hilomoe.backbones.dien import Attention, DIEN
from torchrec_hilomoe.backbones.layers.gru import GRU
from torchrec_hilomoe.backbones.layers.mlp import Activation
from torchrec_hilomoe.embeddings.features import (
    FeatureWidths,
    History,
    HistoryWidths,
    SequenceFeatures,
)

ROWS, LENGTH, DIM = 13, 7, 4
ITEM, CONTEXT = {"item": 31, "category": 5}, {"user": 11, "place": 6}
WIDTH = DIM * len(ITEM)
WIDTHS = FeatureWidths(
    candidate=WIDTH,
    context=DIM * len(CONTEXT),
    histories=(HistoryWidths(event=WIDTH, max_length=LENGTH),),
    embedding=DIM,
)
NAMES = {"relu": "ReLU", "dice": "Dice"}
FULL = (LENGTH,) * ROWS
JAGGED = (3, 7, 0, 1, 5, 0, 2, 7, 4, 1, 6, 3, 2)


def build_pair(
    attention: Attention, activation: Activation, head_activation: Activation, batch_norm: bool
) -> tuple[DIEN, Any]:
    theirs = build_fuxictr(
        "DIEN",
        ITEM,
        CONTEXT,
        DIM,
        dnn_hidden_units=[9, 5],
        dnn_activations=NAMES[head_activation],
        attention_type={"mlp": "din"}.get(attention, attention) + "_attention",
        attention_hidden_units=[6, 3],
        attention_activation=NAMES[activation],
        use_attention_softmax=True,
        batch_norm=batch_norm,
    )
    theirs.dnn.mlp[-1] = nn.Identity()  # in place of the sigmoid: logits out, as ours
    with torch.no_grad():
        for parameter in theirs.parameters():  # slopes of zero and small vectors hide errors
            parameter.add_(0.3 * torch.randn_like(parameter))
    ours = DIEN(
        WIDTHS,
        attention=attention,
        attention_units=(6, 3),
        attention_activation=activation,
        head=(9, 5),
        head_activation=head_activation,
        batch_norm=batch_norm,
    )
    return ours, theirs


def turned(gates: Tensor) -> Tensor:
    """``nn.GRU`` has reset, keep, new; ours is update, which is what it does not keep."""
    reset, keep, new = gates.chunk(3)
    return torch.cat([-keep, reset, new])


def sliced(head: Tensor) -> Tensor:
    """Theirs reads the context first, ours the candidate."""
    context, candidate, evolved = head.split([DIM * len(CONTEXT), WIDTH, WIDTH], dim=-1)
    return torch.cat([candidate, context, evolved], dim=-1)


def layers_of(modules: Sequence[nn.Module]) -> list[nn.Module]:
    return [module for module in modules if list(module.state_dict())]


def pairs(ours: DIEN, theirs: Any) -> Iterator[tuple[nn.Parameter | Tensor, Tensor, Any]]:
    """Every tensor of ours, theirs, and how theirs becomes ours."""

    def same(tensor: Tensor) -> Tensor:
        return tensor

    interest = ours.get_submodule("interests.0")
    extraction, evolution = (getattr(interest, name) for name in ("extraction", "evolution"))
    assert isinstance(extraction, GRU)
    assert isinstance(evolution, GRU)
    gru, cell = theirs.extraction_modules[0], theirs.evolving_modules[0].gru_cell
    yield extraction.input.weight, gru.weight_ih_l0, turned
    yield extraction.input.bias, gru.bias_ih_l0, turned
    yield extraction.hidden_weight, gru.weight_hh_l0, turned
    yield extraction.hidden_bias, gru.bias_hh_l0, turned
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
        mine_layers = layers_of([*mine.hidden.children(), mine.output])
        for layer, their_layer in zip(mine_layers, layers_of(list(other.mlp)), strict=True):
            theirs_by_name: Mapping[str, Tensor] = their_layer.state_dict(keep_vars=True)
            for name, tensor in layer.state_dict(keep_vars=True).items():
                first = layer is ours.head.hidden[0] and name == "weight"
                yield tensor, theirs_by_name[name], sliced if first else same


def make_features(
    items: Mapping[str, Tensor],
    users: Mapping[str, Tensor],
    lengths: tuple[int, ...],
    tables: Mapping[str, Tensor],
) -> SequenceFeatures:
    valid = torch.arange(LENGTH) < torch.tensor(lengths)[:, None]
    events = torch.cat([tables[name][ids[:, :-1][valid]] for name, ids in items.items()], dim=1)
    target = torch.cat([tables[name][ids[:, -1]] for name, ids in items.items()], dim=1)
    return SequenceFeatures(
        candidate=target,
        context=torch.cat([tables[name][ids] for name, ids in users.items()], dim=1),
        histories=(History(events=events, lengths=torch.tensor(lengths), target=target),),
        longest=max(lengths),
    )


def close(got: Tensor, want: Tensor) -> None:
    """Equal to float32's rounding: of the largest element, or of what cancels to nothing."""
    atol = 2e-5 * want.abs().max().item() + 1e-6
    torch.testing.assert_close(got, want, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("attention", "activation", "head_activation", "batch_norm", "lengths"),
    [
        ("mlp", "dice", "relu", True, FULL),
        ("mlp", "dice", "dice", False, FULL),
        ("mlp", "relu", "relu", False, JAGGED),
        ("bilinear", "relu", "relu", True, JAGGED),
        ("dot", "relu", "relu", False, JAGGED),
    ],
    ids=["amazon", "dice", "jagged", "bilinear", "dot"],
)
def test_dien(
    attention: Attention,
    activation: Activation,
    head_activation: Activation,
    batch_norm: bool,
    lengths: tuple[int, ...],
    training: bool,
):
    ours, theirs = build_pair(attention, activation, head_activation, batch_norm)
    with torch.no_grad():
        for mine, other, as_ours in pairs(ours, theirs):
            mine.copy_(as_ours(other))
    assert len(list(pairs(ours, theirs))) == len(ours.state_dict())
    layers = theirs.embedding_layer.embedding_layer.embedding_layers
    tables = {n: layers[n].weight.detach().clone().requires_grad_() for n in (*ITEM, *CONTEXT)}

    # The last of each row's items is its target; id 0 is padding.
    items = {name: torch.randint(1, size, (ROWS, LENGTH + 1)) for name, size in ITEM.items()}
    users = {name: torch.randint(1, size, (ROWS,)) for name, size in CONTEXT.items()}
    mask = (torch.arange(LENGTH) < torch.tensor(lengths)[:, None]).float()
    for ids in items.values():
        ids[:, :-1] *= mask.long()
    got = ours.train(training)(make_features(items, users, lengths, tables))
    flat_items = {name: ids.flatten() for name, ids in items.items()}
    want = theirs.train(training)((users, flat_items, mask))["y_pred"][:, 0]
    close(got, want)

    labels = torch.randint(2, (ROWS,)).float()
    for logits in (got, want):
        F.binary_cross_entropy_with_logits(logits, labels).backward()
    for mine, other, as_ours in pairs(ours, theirs):
        if isinstance(mine, nn.Parameter):
            assert mine.grad is not None
            assert other.grad is not None
            close(mine.grad, as_ours(other.grad))
        else:  # running statistics
            close(mine.float(), other.float())
    for name, table in tables.items():
        assert table.grad is not None
        close(table.grad, layers[name].weight.grad)
