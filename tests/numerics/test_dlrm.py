"""DLRM and DCN-v2 against TorchRec's: the same weights in, the same logits and gradients out."""

from dataclasses import replace

import pytest
import torch
from torch import nn, Tensor
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.models.dlrm import DLRM, DLRM_DCN
from torchrec.modules.embedding_configs import PoolingType

from tests.helpers.datasets import SCHEMA, toy_source, without
from tests.helpers.models import in_memory, MODEL
from tests.helpers.rounding import assert_within, rounding_of
from torchrec_hilomoe.config import DCNConfig, DLRMConfig, InjectionConfig
from torchrec_hilomoe.data.batch import CTRBatch
from torchrec_hilomoe.data.loader import Loader
from torchrec_hilomoe.data.schema import Schema
from torchrec_hilomoe.embeddings.features import ModelInputs
from torchrec_hilomoe.models.train_task import TrainTask

ROWS, UNITS, RANK, CROSSES = 13, (9, 5), 3, 2
CONFIG = replace(
    MODEL,
    hilomoe=InjectionConfig(enabled=False),
    dlrm=DLRMConfig(dense_units=UNITS),
    dcn=DCNConfig(dense_units=UNITS, cross_layers=CROSSES, low_rank=RANK),
)


def theirs(name: str, schema: Schema) -> DLRM:
    """TorchRec's model, with a table of its own for each feature, in the order of ours."""
    features = (*schema.candidate, *schema.pooled, *schema.sequence_fields)
    tables = [
        EmbeddingBagConfig(
            name=feature.name,
            feature_names=[feature.name],
            embedding_dim=CONFIG.embedding_dim,
            num_embeddings=schema.tables[feature.table],
            pooling=PoolingType.MEAN,
        )
        for feature in features
    ]
    collection = EmbeddingBagCollection(tables=tables)
    dense, over = [*UNITS, CONFIG.embedding_dim], [*CONFIG.head, 1]
    if name == "dcn":
        return DLRM_DCN(collection, len(schema.dense), dense, over, CROSSES, RANK)
    return DLRM(collection, len(schema.dense), dense, over)


def counterparts(ours: TrainTask, model: DLRM, schema: Schema) -> dict[str, list[nn.Parameter]]:
    """For each of our parameters, theirs: several, where ours is a table that features share."""
    own = dict(ours.named_parameters())
    found: dict[str, list[nn.Parameter]] = {name: [] for name in own}
    pooled = set(schema.pooled_keys)
    bags = model.sparse_arch.embedding_bag_collection.embedding_bags
    for feature in schema.id_features:
        kind = "pooled.embedding_bags" if feature.name in pooled else "unpooled.embeddings"
        weight = bags[feature.name].weight
        assert isinstance(weight, nn.Parameter)
        found[f"model.sparse.{kind}.{feature.table}.weight"].append(weight)
    for name, parameter in model.named_parameters():
        if name.startswith("dense_arch."):
            found[f"model.backbone.fields.{name.replace('_arch', '', 1)}"].append(parameter)
        if name.startswith("over_arch.model.0._mlp."):
            layer, kind = name.split(".")[4], name.split(".")[-1]
            found[f"model.backbone.head.hidden.{2 * int(layer)}.{kind}"].append(parameter)
        if name.startswith("over_arch.model.1."):
            found[f"model.backbone.head.output.{name.split('.')[-1]}"].append(parameter)
        if name.startswith("inter_arch.crossnet."):
            kind, layer = name.split(".")[2:]
            place = {"V_kernels": "0.weight", "W_kernels": "1.weight", "bias": "1.bias"}[kind]
            found[f"model.backbone.cross.layers.{layer}.{place}"].append(parameter)
    return found


def gradients(logits: Tensor, parameters: dict[str, list[nn.Parameter]]) -> dict[str, Tensor]:
    """The logits, and the gradients of a loss by name, added up where a name has several."""
    found = {"logits": logits.detach()}
    loss = logits.sigmoid().square().sum()
    for name, parts in parameters.items():
        grads = torch.autograd.grad(loss, parts, retain_graph=True)
        found[name] = torch.stack(grads).sum(dim=0)
    return found


def run_ours(task: TrainTask, batch: CTRBatch) -> dict[str, Tensor]:
    parameters = {name: [parameter] for name, parameter in task.named_parameters()}
    return gradients(task.model(ModelInputs.of(batch)), parameters)


@pytest.mark.parametrize("histories", [False, True], ids=["no histories", "pooled histories"])
@pytest.mark.parametrize("name", ["dlrm", "dcn"])
def test_is_torchrecs(name, histories):
    schema = SCHEMA if histories else without(SCHEMA, "sequences")
    source = replace(toy_source(ROWS), meaning=schema)
    batch = next(iter(Loader(source, batch_size=ROWS, shuffle=False, prefetch=0)))
    ours = in_memory(replace(CONFIG, backbone=name), schema)
    model = theirs(name, schema)
    pairs = counterparts(ours, model, schema)
    with torch.no_grad():
        for own, others in pairs.items():
            for other in others:
                other.copy_(ours.get_parameter(own))
    assert sum(map(len, pairs.values())) == len(list(model.parameters()))
    ids = KeyedJaggedTensor.concat([batch.unpooled, batch.pooled])
    want = gradients(model(batch.dense, ids).squeeze(-1), pairs)
    assert_within(run_ours(ours, batch), want, rounding_of(run_ours, ours, batch))
