"""The head: which layers, in which order."""

import pytest
import torch
from torch import nn

from torchrec_hilomoe.backbones.layers.mlp import MLP


def test_each_hidden_layer_is_linear_norm_activation_dropout():
    mlp = MLP(6, (5, 4), dropout=0.1, batch_norm=True)
    once = [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Dropout]
    assert [type(layer) for layer in mlp.hidden] == once * 2
    assert [type(layer) for layer in MLP(6, (5,)).hidden] == [nn.Linear, nn.ReLU]


@pytest.mark.parametrize("hidden", [(), (5,), (5, 4)])
def test_computes_one_number_a_row(hidden):
    mlp, x = MLP(6, hidden), torch.randn(9, 6)
    want = x
    for layer in mlp.hidden:
        if isinstance(layer, nn.Linear):
            want = (want @ layer.weight.T + layer.bias).clamp(min=0)
    want = (want @ mlp.output.weight.T + mlp.output.bias)[:, 0]
    torch.testing.assert_close(mlp(x), want)
