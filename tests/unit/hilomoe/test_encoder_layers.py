"""Subclasses of PyTorch's encoder layer, whose fast path would skip experts."""

import pytest
import torch
from torch import nn

from tests.helpers.towers import CONFIG
from torchrec_hilomoe.hilomoe import inject_hilomoe, sites_of


class Encoded(nn.Module):
    """A ranker with one of PyTorch's encoder layers."""

    def __init__(self, kind: type[nn.TransformerEncoderLayer]) -> None:
        super().__init__()
        self.block = kind(8, 2, 12, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(x).mean(dim=1))


class Unchanged(nn.TransformerEncoderLayer):
    pass


class Shortened(nn.TransformerEncoderLayer):
    def forward(self, src, *args, **kwargs):
        return super().forward(src)


class Renamed(nn.TransformerEncoderLayer):
    def forward(self, src, *args, **kwargs):
        return self.layer(src)

    def layer(self, src):
        return nn.TransformerEncoderLayer.forward(self, src)


def logged(function):
    def run(*args, **kwargs):
        return function(*args, **kwargs)

    return run


class Decorated(nn.TransformerEncoderLayer):
    forward = logged(nn.TransformerEncoderLayer.forward)


class Delegating(Shortened):
    def forward(self, src, *args, **kwargs):
        return super().forward(src) + 0


class Written(nn.TransformerEncoderLayer):
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.scale = 2.0

    def forward(self, src, *args, **kwargs):
        x = self.norm1(src + self.self_attn(src, src, src)[0])
        return self.norm2(x + self.linear2(self.linear1(x).relu()) * self.scale)


@pytest.mark.parametrize("kind", [Shortened, Renamed, Decorated, Delegating, Unchanged])
def test_a_subclass_that_may_take_the_fast_path_is_refused(kind):
    model = Encoded(kind)
    with pytest.raises(ValueError, match=rf"\(a {kind.__name__}\), whose fast path .*\(False\)"):
        inject_hilomoe(model, CONFIG, ["block.linear*"])
    assert not sites_of(model)


def test_a_forward_on_the_instance_is_not_trusted():
    model = Encoded(Written)
    model.block.forward = model.block.forward
    with pytest.raises(ValueError, match="whose fast path"):
        inject_hilomoe(model, CONFIG, ["block.linear*"])


def test_a_subclass_with_a_forward_of_its_own_computes_its_experts():
    model = Encoded(Written)
    inject_hilomoe(model, CONFIG, ["block.linear*"])
    for site in sites_of(model).values():
        nn.init.normal_(site.expert_out)
    x = torch.randn(3, 5, 8)
    want = model.eval()(x)
    with torch.no_grad():
        assert torch.equal(model(x), want)
