"""DHEN's ensemble; its numbers are proved with InterFormer's."""

import pytest
import torch

from tests.helpers.rounding import assert_within, float64_rounding, within
from torchrec_hilomoe.backbones.layers.dhen import DHENLayer, Interaction


@pytest.mark.parametrize("tokens", [2, 3, 7])
def test_each_pair_of_different_tokens_is_multiplied_once(tokens):
    layer, x = DHENLayer(tokens, 4).double(), torch.randn(3, tokens, 4).double()
    pairs = [(i, j) for i in range(tokens) for j in range(i + 1, tokens)]
    assert layer.pairs.tolist() == [i * tokens + j for i, j in pairs]
    seen: list[torch.Tensor] = []
    layer.dot.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    assert layer(x).shape == x.shape
    want = torch.stack([(x[:, i] * x[:, j]).sum(dim=1) for i, j in pairs], dim=1)
    assert_within(seen[0], want, float64_rounding(x, want))


def test_places_of_pairs_follow_the_module_and_stay_out_of_checkpoints():
    layer = DHENLayer(3, 4)
    assert "pairs" not in layer.state_dict()
    assert "pairs" in dict(layer.named_buffers())


def test_tokens_keep_their_number_and_see_the_summary():
    net = Interaction(3, 2, 4, num_layers=2, dropout=0.0).double()
    x, summary = torch.randn(5, 3, 4).double(), torch.randn(5, 2, 4).double()
    before = net(x, summary)
    assert before.shape == x.shape
    summary[2] += 1.0
    after = net(x, summary)
    others = [0, 1, 3, 4]
    rounding = float64_rounding(net, x, summary)
    assert_within(before[others], after[others], rounding)
    assert not within(before[2], after[2], rounding).all(dim=1).any()
