"""DIEN against FuxiCTR's: the same weights in, the same logits and gradients out.

Where there is Dice, histories are of full length: FuxiCTR lets padding into its statistics.
"""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn, Tensor
from torch.nn import functional as F

from tests.helpers.fuxictr import build_fuxictr
from tests.helpers.fuxictr_dien import dien_weights
from tests.helpers.rounding import assert_within, float64_rounding
from torchrec_hilomoe.backbones.dien import Attention, DIEN
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
    return ours.double(), theirs.double()


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
        max_seqlen=max(lengths),
    )


@pytest.mark.usefixtures("float64")
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
        for mine, other, as_ours in dien_weights(ours, theirs):
            mine.copy_(as_ours(other))
    assert len(list(dien_weights(ours, theirs))) == len(ours.state_dict())
    layers = theirs.embedding_layer.embedding_layer.embedding_layers
    tables = {n: layers[n].weight.detach().clone().requires_grad_() for n in (*ITEM, *CONTEXT)}

    # The last of each row's items is its target; id 0 is padding.
    items = {name: torch.randint(1, size, (ROWS, LENGTH + 1)) for name, size in ITEM.items()}
    users = {name: torch.randint(1, size, (ROWS,)) for name, size in CONTEXT.items()}
    mask = (torch.arange(LENGTH) < torch.tensor(lengths)[:, None]).double()
    for ids in items.values():
        ids[:, :-1] *= mask.long()
    got = ours.train(training)(make_features(items, users, lengths, tables))
    flat_items = {name: ids.flatten() for name, ids in items.items()}
    want = theirs.train(training)((users, flat_items, mask))["y_pred"][:, 0]
    rounding = float64_rounding(ours, tables, want)
    assert_within(got, want, rounding)

    labels = torch.randint(2, (ROWS,)).double()
    for logits in (got, want):
        F.binary_cross_entropy_with_logits(logits, labels).backward()
    for mine, other, as_ours in dien_weights(ours, theirs):
        if isinstance(mine, nn.Parameter):
            assert mine.grad is not None
            assert other.grad is not None
            assert_within(mine.grad, as_ours(other.grad), rounding)
        else:  # running statistics
            assert_within(mine.double(), other.double(), rounding)
    for name, table in tables.items():
        assert table.grad is not None
        assert_within(table.grad, layers[name].weight.grad, rounding)
