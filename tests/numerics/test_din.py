"""DIN and its parts against FuxiCTR's: the same weights in, the same numbers and gradients out.

Histories are of full length, because FuxiCTR lets padding into the statistics of Dice.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn, Tensor
from torch.nn import functional as F
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tests.helpers.features import flat, unflat
from tests.helpers.fuxictr import build_fuxictr, fuxictr_layers
from tests.helpers.models import in_memory
from tests.helpers.rounding import assert_within, float64_rounding, of_sums
from torchrec_hilomoe.backbones.layers.jagged import layout_of
from torchrec_hilomoe.backbones.layers.mlp import Activation, Dice, MLP
from torchrec_hilomoe.backbones.layers.target_attention import TargetAttention
from torchrec_hilomoe.config import DINConfig, InjectionConfig, ModelConfig
from torchrec_hilomoe.data.schema import IdFeature, PooledFeature, Schema, SequenceGroup
from torchrec_hilomoe.embeddings.features import History, ModelInputs, SequenceFeatures
from torchrec_hilomoe.models.train_task import CTRModel

ROWS, LENGTH, DIM = 13, 7, 4
ITEM, CONTEXT = {"item": 31, "category": 5}, {"user": 11}
WIDTH = DIM * len(ITEM)
SCHEMA = Schema(
    dataset="parity",
    tables={**ITEM, **CONTEXT},
    candidate=tuple(IdFeature(name=name, table=name) for name in ITEM),
    pooled=tuple(PooledFeature(name=name, table=name, max_length=1) for name in CONTEXT),
    sequences=(
        SequenceGroup(
            name="history",
            fields=tuple(IdFeature(name=f"{name}s", table=name) for name in ITEM),
            max_length=LENGTH,
        ),
    ),
)


def close(got: Tensor | None, want: Tensor | None, *of: Any) -> None:
    """Equal but for the order of sums in float64, over what both were computed from."""
    assert got is not None
    assert want is not None
    assert_within(got, want, float64_rounding(want, *of))


def randomise(module: nn.Module) -> None:
    """Slopes and shifts that start at zero, and vectors near it, would hide errors."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))


def layers_of(modules: Sequence[nn.Module]) -> list[nn.Module]:
    return [module for module in modules if list(module.state_dict())]


def mlp_pairs(ours: MLP, theirs: Any) -> list[tuple[nn.Module, nn.Module]]:
    """Layer by layer: both are linear, norm, activation, in this order."""
    mine = layers_of([*ours.hidden, ours.output])
    return list(zip(mine, layers_of(theirs.mlp), strict=True))


def copy_weights(pairs: Sequence[tuple[nn.Module, nn.Module]]) -> None:
    for ours, theirs in pairs:
        ours.load_state_dict(theirs.state_dict())


def compare(pairs: Sequence[tuple[nn.Module, nn.Module]], *of: Any) -> None:
    """Gradients and running statistics."""
    for ours, theirs in pairs:
        other = dict(theirs.named_parameters())
        for name, parameter in ours.named_parameters():
            close(parameter.grad, other[name].grad, *of)
        for name, value in ours.named_buffers():
            close(value.double(), dict(theirs.named_buffers())[name].double(), *of)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("training", [True, False])
def test_dice(training):
    theirs = fuxictr_layers().Dice(5).double()
    randomise(theirs)
    theirs(
        torch.randn(ROWS, 5).double() + 1
    )  # so that the running statistics are not those of the start
    ours = Dice(5).double()
    copy_weights([(ours, theirs)])
    x = 2 * torch.randn(ROWS, 5).double()
    mine, other = (x.clone().requires_grad_() for _ in range(2))
    got, want = ours.train(training)(mine), theirs.train(training)(other)
    cotangent = torch.randn(ROWS, 5).double()
    got.backward(cotangent)
    want.backward(cotangent)
    close(got, want, ours, x)
    close(mine.grad, other.grad, ours, x, cotangent)
    compare([(ours, theirs)], ours, x, cotangent)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ["relu", "dice"])
def test_mlp(activation: Activation, training: bool):
    layers = fuxictr_layers()
    names = {"relu": "ReLU", "dice": [layers.Dice(6), layers.Dice(3)]}
    theirs = layers.MLP_Block(
        5, [6, 3], names[activation], output_dim=1, batch_norm=True, output_activation=None
    ).double()
    randomise(theirs)
    ours = MLP(5, (6, 3), activation=activation, batch_norm=True).double()
    copy_weights(mlp_pairs(ours, theirs))
    x, cotangent = torch.randn(ROWS, 5).double(), torch.randn(ROWS).double()
    mine, other = (x.clone().requires_grad_() for _ in range(2))
    got, want = ours.train(training)(mine), theirs.train(training)(other)[:, 0]
    got.backward(cotangent)
    want.backward(cotangent)
    close(got, want, ours, x)
    close(mine.grad, other.grad, ours, x, cotangent)
    compare(mlp_pairs(ours, theirs), ours, x, cotangent)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("activation", ["relu", "dice"])
def test_attention(activation: Activation, softmax: bool, training: bool):
    name = {"relu": "ReLU", "dice": "Dice"}[activation]
    theirs = (
        fuxictr_layers()
        .DIN_Attention(WIDTH, attention_units=[6, 3], hidden_activations=name, use_softmax=softmax)
        .double()
    )
    randomise(theirs)
    ours = TargetAttention(WIDTH, (6, 3), activation=activation, softmax=softmax).double()
    pairs = mlp_pairs(ours.mlp, theirs.attention_layer)
    copy_weights(pairs)
    events = torch.randn(ROWS, LENGTH, WIDTH).double()
    target = torch.randn(ROWS, WIDTH).double()
    leaves = [x.clone().requires_grad_() for x in (events, target, events, target)]
    lengths = torch.full((ROWS,), LENGTH)
    history = History(events=leaves[0].flatten(0, 1), lengths=lengths, target=leaves[1])
    got = ours.train(training)(history.target, history.events, layout_of(history))
    want = theirs.train(training)(leaves[3], leaves[2], torch.ones(ROWS, LENGTH))
    cotangent = torch.randn(ROWS, WIDTH).double()
    got.backward(cotangent)
    want.backward(cotangent)
    of = ours, leaves, cotangent
    close(got, want, *of)
    close(leaves[0].grad, leaves[2].grad, *of)
    close(leaves[1].grad, leaves[3].grad, *of)
    compare(pairs, *of)


def model_pair(din: DINConfig, batch_norm: bool) -> tuple[CTRModel, Any]:
    names = {"relu": "ReLU", "dice": "Dice"}
    theirs = build_fuxictr(
        "DIN",
        ITEM,
        CONTEXT,
        DIM,
        dnn_hidden_units=[9, 5],
        dnn_activations=names[din.head_activation],
        attention_hidden_units=list(din.attention_units),
        attention_hidden_activations=names[din.attention_activation],
        din_use_softmax=din.softmax,
        batch_norm=batch_norm,
    )
    theirs.dnn.mlp[-1] = nn.Identity()  # in place of the sigmoid: logits out, as ours
    randomise(theirs)
    config = ModelConfig(
        backbone="din",
        embedding_dim=DIM,
        head=(9, 5),
        batch_norm=batch_norm,
        din=din,
        hilomoe=InjectionConfig(enabled=False),
    )
    ours = in_memory(config, SCHEMA).model.double()
    # TorchRec's lookups give float32, whatever their tables are; so tables hold no other numbers.
    ours.sparse.register_forward_hook(in_float64)
    return ours, theirs.float().double()


def in_float64(module: nn.Module, args: Any, found: SequenceFeatures) -> SequenceFeatures:
    return unflat({name: vectors.double() for name, vectors in flat(found).items()}, found)


def head_columns() -> Tensor:
    """Theirs read the context first, ours the candidate."""
    columns = torch.arange(DIM * (len(CONTEXT) + 2 * len(ITEM)))
    context, candidate, pooled = columns.split([DIM * len(CONTEXT), WIDTH, WIDTH])
    return torch.cat([candidate, context, pooled])


def tables(ours: CTRModel, theirs: Any) -> list[tuple[Tensor, Tensor]]:
    layers = theirs.embedding_layer.embedding_layer.embedding_layers
    unpooled, pooled = ours.sparse.unpooled, ours.sparse.pooled
    assert unpooled is not None
    assert pooled is not None
    mine = {name: unpooled.embeddings[name].get_parameter("weight") for name in ITEM}
    mine |= {name: pooled.embedding_bags[name].get_parameter("weight") for name in CONTEXT}
    return [(mine[name], layers[name].weight) for name in mine]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("din", "batch_norm"),
    [
        (DINConfig(attention_units=(6, 3), softmax=True, head_activation="dice"), True),
        (DINConfig(attention_units=(6,), attention_activation="relu"), False),
    ],
    ids=["amazon", "taobao"],
)
def test_din(din: DINConfig, batch_norm: bool, training: bool):
    ours, theirs = model_pair(din, batch_norm)
    (attention,) = ours.backbone.get_submodule("attentions").children()
    attention_mlp, head = attention.get_submodule("mlp"), ours.backbone.get_submodule("head")
    assert isinstance(attention_mlp, MLP)
    assert isinstance(head, MLP)
    attention_pairs = mlp_pairs(attention_mlp, theirs.attention_layers.attention_layer)
    (first, their_first), *head_pairs = mlp_pairs(head, theirs.dnn)
    columns = head_columns()
    copy_weights([*attention_pairs, *head_pairs])
    with torch.no_grad():
        first.get_parameter("weight").copy_(their_first.get_parameter("weight")[:, columns])
        first.get_parameter("bias").copy_(their_first.get_parameter("bias"))
        for mine, other in tables(ours, theirs):
            mine.copy_(other)

    # The last of each row's items is its target; id 0 is padding.
    items = {name: torch.randint(1, size, (ROWS, LENGTH + 1)) for name, size in ITEM.items()}
    users = {name: torch.randint(1, size, (ROWS,)) for name, size in CONTEXT.items()}
    lengths = {SCHEMA.sequences[0].fields[i].name: LENGTH for i in range(len(ITEM))}
    unpooled = {name: ids[:, -1] for name, ids in items.items()}
    unpooled |= {f"{name}s": ids[:, :-1].flatten() for name, ids in items.items()}
    keys = list(SCHEMA.unpooled_keys)
    given = ModelInputs(
        pooled=KeyedJaggedTensor.from_lengths_sync(
            list(SCHEMA.pooled_keys),
            torch.cat(list(users.values())),
            torch.ones(ROWS, dtype=torch.int64),
        ),
        unpooled=KeyedJaggedTensor.from_lengths_sync(
            keys,
            torch.cat([unpooled[key] for key in keys]),
            torch.cat([torch.full((ROWS,), lengths.get(key, 1)) for key in keys]),
        ),
        dense=torch.zeros(ROWS, 0).double(),
        max_seqlen=LENGTH,
    )
    got = ours.train(training)(given)
    flat_items = {name: ids.flatten() for name, ids in items.items()}
    theirs.train(training)
    want = theirs((users, flat_items, torch.ones(ROWS, LENGTH)))["y_pred"][:, 0]
    close(got, want, ours)

    labels = torch.randint(2, (ROWS,)).double()
    for logits in (got, want):
        F.binary_cross_entropy_with_logits(logits, labels).backward()
    compare([*attention_pairs, *head_pairs], ours)
    their_weight = their_first.get_parameter("weight")
    assert their_weight.grad is not None
    close(first.get_parameter("weight").grad, their_weight.grad[:, columns], ours)
    # A table's gradient has a term a lookup, each of which was float32 on its way back.
    unit = of_sums(ROWS * (LENGTH + 1)) * torch.finfo(torch.float32).eps
    for mine, other in tables(ours, theirs):
        assert mine.grad is not None
        assert other.grad is not None
        assert_within(mine.grad, other.grad, unit * other.grad.abs().max())
