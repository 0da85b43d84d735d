"""What TorchRec's own unit tests ask of its models, asked of them with sites in every linear map.

They ask for the shape of logits of features that share a table, of one feature alone and of rows
without ids, by names of arguments too; for a trace; for a script; for the losses of the wrapper
that trains. Here the numbers are the plain model's, to the bit.
"""

from collections.abc import Iterator
from typing import cast

import pytest
import torch
from torch import nn, Tensor
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.datasets.utils import Batch
from torchrec.fx import symbolic_trace
from torchrec.models.dlrm import DLRM, DLRMTrain

from tests.helpers.hosts import DENSE, HOSTS, WIDTH
from tests.helpers.rounding import assert_same
from tests.helpers.towers import CONFIG
from torchrec_hilomoe import inject_hilomoe
from torchrec_hilomoe.hilomoe import sites_of

MODELS = ["DLRM", "DLRM_DCN", "DLRM_Projection", "DLRM_Transformer", "SimpleDeepFMNN"]
every_model = pytest.mark.parametrize("name", MODELS)
TABLES = {"shared and own tables": {"t1": ["f1", "f3"], "t2": ["f2"]}, "one feature": {"t": ["f2"]}}
ROWS = 3

pytestmark = pytest.mark.filterwarnings(  # DLRM_Transformer's own
    "ignore:enable_nested_tensor is True:UserWarning"
)


@pytest.fixture(autouse=True)
def slow_encoders() -> Iterator[None]:
    """PyTorch's encoder layer calls its maps only without its fast path."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(fast)


def pair(name: str, tables: dict[str, list[str]], grown: bool = False) -> list[nn.Module]:
    """The plain model, and the same with sites in every linear map that can carry experts."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        configs = [
            EmbeddingBagConfig(
                name=table, embedding_dim=WIDTH, num_embeddings=20, feature_names=features
            )
            for table, features in tables.items()
        ]
        models.append(HOSTS[name].build(EmbeddingBagCollection(tables=configs)).eval())
    plain, model = models
    attention = ["*out_proj"] if name == "DLRM_Transformer" else []  # read, never called
    linears = [n for n, m in plain.named_modules() if type(m) is nn.Linear]
    assert inject_hilomoe(model, CONFIG, ["*"], exclude=attention) == linears
    for site in sites_of(model).values() if grown else ():
        nn.init.normal_(site.expert_out)
    return [plain, model]


def batch(tables: dict[str, list[str]], lengths: list[int]) -> dict[str, object]:
    keys = [feature for features in tables.values() for feature in features]
    counts = torch.tensor((lengths * len(keys))[: ROWS * len(keys)])
    ids = torch.arange(int(counts.sum())) % 20
    dense = torch.rand(ROWS, DENSE, generator=torch.Generator().manual_seed(1))
    features = KeyedJaggedTensor.from_lengths_sync(keys, ids, counts)
    return {"dense_features": dense, "sparse_features": features}


@every_model
@pytest.mark.parametrize("lengths", [[1, 2, 0], [0, 0, 0], [4, 1, 1]], ids=str)
@pytest.mark.parametrize("tables", TABLES.values(), ids=TABLES)
def test_logits(name, tables, lengths):
    plain, model = pair(name, tables)
    given = batch(tables, lengths)
    for mode in (False, True):
        logits = []
        for it in (plain, model):
            torch.manual_seed(2)  # of dropout
            logits.append(it.train(mode)(**given))
        assert logits[1].shape == (ROWS, 1)
        assert_same(logits[1], logits[0])


@every_model
@pytest.mark.parametrize("tables", TABLES.values(), ids=TABLES)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:FutureWarning")  # 2.14's
def test_a_trace_computes_the_same_and_cannot_be_scripted(name, tables):
    _, model = pair(name, tables, grown=True)
    given = batch(tables, [1, 2, 0])
    traced = symbolic_trace(model)
    assert_same(traced(**given), model(**given))
    with pytest.raises(Exception, match=r"torch.jit.script or torch.jit.trace. Export the model"):
        torch.jit.script(model)


@every_model
def test_the_wrapper_that_trains(name):
    tables = TABLES["shared and own tables"]
    plain, model = pair(name, tables)
    given = batch(tables, [1, 2, 0])
    dense, features = given.values()
    assert isinstance(dense, Tensor)
    assert isinstance(features, KeyedJaggedTensor)
    rows = Batch(dense, features, torch.tensor([1, 0, 1]))
    losses = []
    for it in (plain, model):
        loss, (detached, logits, labels) = DLRMTrain(cast(DLRM, it))(rows)
        assert (loss.shape, logits.shape, labels.shape) == ((), (ROWS,), (ROWS,))
        assert_same(detached, loss)
        losses.append(loss)
    assert_same(losses[1], losses[0])
    losses[1].backward()
    without = [n for n, site in sites_of(model).items() if site.expert_out.grad is None]
    assert not without
