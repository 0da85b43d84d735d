"""TransAct against FuxiCTR's: the same weights in, the same logits and gradients out.

Both hide padding wherever it could be seen, so they agree on histories of any length, empty ones
included. FuxiCTR pads on the left.
"""

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn, Tensor

from tests.helpers.datasets import AMAZON
from tests.helpers.fuxictr import build_fuxictr
from tests.helpers.rounding import assert_as_exact_as
from torchrec_hilomoe.backbones.transact import TransAct
from torchrec_hilomoe.config import InjectionConfig, ModelConfig
from torchrec_hilomoe.embeddings.features import (
    FeatureWidths,
    History,
    HistoryWidths,
    SequenceFeatures,
)
from torchrec_hilomoe.models.build import build_task

ROWS, LENGTH, DIM = 7, 5, 4
ITEM, CONTEXT = {"item": 31, "category": 6}, {"user": 11, "place": 4}
EVENT = DIM * len(ITEM)
FULL = (LENGTH,) * ROWS
SOME = (0, 5, 1, 3, 0, 4, 2)
WIDTHS = FeatureWidths(
    candidate=EVENT,
    context=DIM * len(CONTEXT),
    histories=(HistoryWidths(event=EVENT, max_length=LENGTH),),
    embedding=DIM,
)
TABLES = "embedding_layer.embedding_layer.embedding_layers"


@dataclass(frozen=True, kw_only=True)
class Case:
    """Options of a TransAct."""

    num_layers: int
    num_heads: int
    latest: int
    cross_layers: int

    def theirs(self) -> nn.Module:
        with warnings.catch_warnings(action="ignore"):  # PyTorch's, of a fast path it does not take
            model = build_fuxictr(
                "TransAct",
                ITEM,
                CONTEXT,
                DIM,
                transformer_layers=self.num_layers,
                num_heads=self.num_heads,
                first_k_cols=self.latest,
                dcn_cross_layers=self.cross_layers,
                dim_feedforward=6,
                dcn_hidden_units=[9, 5],
            )
        model.mlp.mlp[-1] = nn.Identity()  # in place of the sigmoid: logits out, as ours
        with torch.no_grad():
            for name, parameter in model.named_parameters():  # shifts that start at 0 hide errors
                parameter.add_(0.3 * torch.randn_like(parameter))
                if name in (f"{TABLES}.item.weight", f"{TABLES}.category.weight"):
                    parameter[0] = 0.0  # padding
        return model

    def ours(self) -> TransAct:
        return TransAct(
            WIDTHS,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            ffn_width=6,
            latest=self.latest,
            cross_layers=self.cross_layers,
            head=(9, 5),
        )

    def columns(self) -> Tensor:
        """The head's inputs in our order: theirs reads the context first, ours the candidate."""
        summary = (self.latest + 1) * 2 * EVENT
        sizes = [WIDTHS.context, WIDTHS.candidate, summary]
        context, candidate, rest = torch.arange(sum(sizes)).split(sizes)
        return torch.cat([candidate, context, rest])

    def renamed(self, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Their parameters, or the gradients of those, under our names; and the tables'."""
        tensors = {}
        columns = self.columns()
        for layer in range(self.num_layers):
            old = f"transformer_encoders.transformer_encoder.layers.{layer}"
            new = f"encoders.0.layers.{layer}"
            for kind in ("weight", "bias"):
                # They keep the three maps into the attention as one.
                parts = theirs[f"{old}.self_attn.in_proj_{kind}"].chunk(3)
                names = ("query", "key", "value")
                for name, part in zip(names, parts, strict=True):
                    tensors[f"{new}.attention.{name}.{kind}"] = part
                for ours, name in (
                    ("attention.output", "self_attn.out_proj"),
                    ("ffn_in", "linear1"),
                    ("ffn_out", "linear2"),
                    ("norm_attention", "norm1"),
                    ("norm_ffn", "norm2"),
                ):
                    tensors[f"{new}.{ours}.{kind}"] = theirs[f"{old}.{name}.{kind}"]
        for kind in ("weight", "bias"):
            tensors[f"encoders.0.pool.{kind}"] = theirs[f"transformer_encoders.out_linear.{kind}"]
            tensors[f"head.hidden.2.{kind}"] = theirs[f"parallel_dnn.mlp.2.{kind}"]
        for layer in range(self.cross_layers):
            old, new = f"crossnet.cross_layers.{layer}", f"head.cross.layers.{layer}"
            tensors[f"{new}.weight"] = theirs[f"{old}.weight"][columns][:, columns]
            tensors[f"{new}.bias"] = theirs[f"{old}.bias"][columns]
        tensors["head.hidden.0.weight"] = theirs["parallel_dnn.mlp.0.weight"][:, columns]
        tensors["head.hidden.0.bias"] = theirs["parallel_dnn.mlp.0.bias"]
        crossed, deep = theirs["mlp.mlp.0.weight"].split([len(columns), 5], dim=1)
        tensors["head.output.weight"] = torch.cat([crossed[:, columns], deep], dim=1)
        tensors["head.output.bias"] = theirs["mlp.mlp.0.bias"]
        tensors |= {name: theirs[f"{TABLES}.{name}.weight"] for name in (*ITEM, *CONTEXT)}
        return tensors


@dataclass(frozen=True, kw_only=True)
class Ids:
    """What a batch looks up.

    Attributes:
        items: ``(ROWS, LENGTH + 1)`` of each field: padding, events, and last the target.
        context: ``(ROWS,)`` of each field.
        present: ``(ROWS, LENGTH)``, 1 where there is an event.
    """

    items: dict[str, Tensor]
    context: dict[str, Tensor]
    present: Tensor


def make_ids(lengths: tuple[int, ...]) -> Ids:
    present = torch.arange(LENGTH) >= LENGTH - torch.tensor(lengths).unsqueeze(1)
    items = {}
    for name, size in ITEM.items():
        ids = torch.randint(1, size, (ROWS, LENGTH + 1))
        ids[:, :-1] *= present
        items[name] = ids
    context = {name: torch.randint(1, size, (ROWS,)) for name, size in CONTEXT.items()}
    return Ids(items=items, context=context, present=present.long())


def run_theirs(case: Case, model: Any, ids: Ids, cotangent: Tensor, dtype: torch.dtype):
    """Return logits ``y`` and every gradient, by our names."""
    model = copy.deepcopy(model).to(dtype)
    items = {name: of_one.flatten() for name, of_one in ids.items.items()}
    # It writes into what it is given.
    y = model((dict(ids.context), items, ids.present.clone()))["y_pred"][:, 0]
    y.backward(cotangent.to(dtype))
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"y": y.detach(), **case.renamed(grads)}


def run_ours(model: TransAct, tables: Mapping[str, Tensor], ids: Ids, cotangent: Tensor):
    """The same of ours, behind lookups in the same tables."""
    leaves = {name: table.detach().clone().requires_grad_() for name, table in tables.items()}
    present = ids.present.bool()
    vectors = {name: leaves[name][of_one] for name, of_one in ids.items.items()}
    target = torch.cat([of_one[:, -1] for of_one in vectors.values()], dim=1)
    history = History(
        events=torch.cat([of_one[:, :-1][present] for of_one in vectors.values()], dim=1),
        lengths=ids.present.sum(dim=1),
        target=target,
    )
    context = torch.cat([leaves[name][of_one] for name, of_one in ids.context.items()], dim=1)
    y = model(SequenceFeatures(target, context, (history,), max(1, int(history.lengths.max()))))
    y.backward(cotangent)
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"y": y.detach(), **found, **{name: leaf.grad for name, leaf in leaves.items()}}


@pytest.mark.parametrize("lengths", [FULL, SOME], ids=["full", "some empty"])
@pytest.mark.parametrize(
    "case",
    [
        Case(num_layers=1, num_heads=1, latest=1, cross_layers=3),
        Case(num_layers=2, num_heads=2, latest=3, cross_layers=1),
    ],
    ids=str,
)
def test_transact(case: Case, lengths: tuple[int, ...]):
    theirs, ours, ids = case.theirs(), case.ours(), make_ids(lengths)
    weights = case.renamed(dict(theirs.named_parameters()))
    tables = {name: weights.pop(name) for name in (*ITEM, *CONTEXT)}
    ours.load_state_dict(weights)
    cotangent = torch.randn(ROWS)
    exact, plain = (
        run_theirs(case, theirs, ids, cotangent, dtype) for dtype in (torch.float64, torch.float32)
    )
    found = run_ours(ours, tables, ids, cotangent)
    assert found.keys() == exact.keys()
    terms = ROWS * LENGTH * ours.head.output.in_features
    assert_as_exact_as(found, plain, exact, torch.float32, terms)


def test_parameters_on_amazon_electronics():
    """What it takes with BARS's vocabularies, widths and three cross layers, tables included."""
    item = {"item": 63_003, "category": 803}
    with warnings.catch_warnings(action="ignore"):
        theirs = build_fuxictr(
            "TransAct", item, {}, 64, dim_feedforward=512, dcn_hidden_units=[1024, 512, 256]
        )
    config = ModelConfig(
        backbone="transact",
        embedding_dim=64,
        head=(1024, 512, 256),
        hilomoe=InjectionConfig(enabled=False),
    )
    ours = build_task(config, AMAZON)
    counts = [sum(p.numel() for p in model.parameters()) for model in (ours, theirs)]
    assert counts == [7_220_609, 7_220_609]
