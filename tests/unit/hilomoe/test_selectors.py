"""Sites that are named by pattern, type or predicate, and what is left out."""

import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torchrec.modules.mlp import MLP

from tests.helpers.hosts import HOSTS, plain
from tests.helpers.towers import CONFIG
from torchrec_hilomoe import inject_hilomoe, inject_shared_router, InteractionProbe
from torchrec_hilomoe.hilomoe import sites_of
from torchrec_hilomoe.hilomoe.probe.checks import match_sites


def wide(name: str, module: Any) -> bool:
    return module.out_features > 1


def fails(name: str, module: Any) -> bool:
    raise OSError("no list of names")


class Host(nn.Module):
    """Two towers of TorchRec's and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Identity()
        self.user, self.item = MLP(4, [6, 5]), MLP(4, [5])
        self.head = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 1))

    def forward(self, x):
        x = self.query(x)
        return self.head(self.user(x) + self.item(x))


USER = ["user._mlp.0._linear", "user._mlp.1._linear"]
ITEM, HEAD = ["item._mlp.0._linear"], ["head.0", "head.1"]


@pytest.mark.parametrize(
    ("sites", "exclude", "names"),
    [
        ([MLP], [], USER + ITEM),
        ([MLP], ["item*"], USER),
        ([MLP, "head.0"], [], [*USER, *ITEM, "head.0"]),
        ([nn.Linear], [MLP], HEAD),
        ([wide], [], [*USER, *ITEM, "head.0"]),
        (["*"], [lambda name, module: not wide(name, module)], [*USER, *ITEM, "head.0"]),
        ([nn.Sequential], ["*1*", "item*"], ["head.0"]),
        ([Host], [MLP, "head.1"], ["head.0"]),
    ],
    ids=range(8),
)
def test_each_means_its_maps(sites, exclude, names):
    if names == ["head.0"] and nn.Sequential in sites:
        names = ["user._mlp.0._linear", "head.0"]  # torchrec's MLP holds an nn.Sequential
    model, shared = Host(), Host()
    assert inject_hilomoe(model, CONFIG, sites, exclude=exclude) == names
    assert inject_shared_router(shared, CONFIG, sites, "query", 4, exclude=exclude) == names
    assert model(torch.randn(3, 4)).shape == (3, 1)


def test_a_probe_takes_them_too():
    assert list(match_sites(Host(), [MLP, wide])) == [*USER, *ITEM, "head.0"]
    features = {"a": range(0, 2), "b": range(2, 4)}
    with pytest.raises(ValueError, match="sites pattern Conv1d matches none"):
        InteractionProbe(Host(), CONFIG, [nn.Conv1d], "query", features)


def test_names_with_brackets_mean_themselves():
    model = nn.ModuleDict({"a[0]": nn.Linear(2, 2), "a0": nn.Linear(2, 2)})
    assert inject_hilomoe(model, CONFIG, ["a[0]"], exclude=["a0"]) == ["a[0]"]


def test_what_carries_experts_already_may_be_left_out():
    model = Host()
    inject_hilomoe(model, CONFIG, ["head.0"])
    assert inject_hilomoe(model, CONFIG, ["*"], exclude=["head.0"]) == [*USER, *ITEM, "head.1"]


def test_a_map_of_another_type_that_is_left_out_is_not_told():
    model = Host()
    parametrizations.weight_norm(model.get_submodule("head.0"))
    assert inject_hilomoe(model, CONFIG, ["head*"], exclude=["head.0"]) == ["head.1"]


@pytest.mark.parametrize(
    ("sites", "exclude", "message"),
    [
        ([nn.Conv1d], [], "sites Conv1d matches none of the model's nn.Linear: user."),
        ([lambda name, module: False], [], "<lambda> matches none of"),
        (["head*"], ["heads*"], "exclude 'heads*' leaves out none of what sites match: head.0, h"),
        (["head*"], ["head*"], "exclude leaves out all that sites match: head.0, head.1. Drop"),
        ([MLP, wide], [], "'user._mlp.0._linear' is matched twice, by MLP and by wide. Drop"),
        (MLP, [], "sites must be a list of at least one name pattern, type or predicate, got <cl"),
        (["head*"], "head.0", "exclude must be a list of name pattern, type or predicate, got 'h"),
        ([3], [], "predicates of name and module, got 3. Give a pattern"),
        ([nn.ReLU()], [], "predicates of name and module, got ReLU()"),
        ([dict], [], "predicates of name and module, got <class 'dict'>"),
        ([fails], [], "predicate fails fails at 'user._mlp.0._linear', a Linear: OSError: no list"),
        (["*"], [fails], "predicate fails fails at 'user._mlp.0._linear', a Linear: OSError: no"),
        (
            [lambda name: True],
            [],
            "at 'user._mlp.0._linear', a Linear: TypeError: <lambda>() takes",
        ),
        ([lambda name, module: module.weight > 0], [], "Boolean value of Tensor with more than"),
    ],
    ids=range(14),
)
def test_what_means_nothing_is_refused_and_all_stays(sites, exclude, message):
    model = Host()
    with pytest.raises(ValueError, match=re.escape(message)):
        inject_hilomoe(model, CONFIG, sites, exclude=exclude)
    assert not sites_of(model)


def test_torchrec_s_own_parts_are_types():
    model = plain(HOSTS["DLRM"])
    over = type(model.get_submodule("over_arch"))
    assert all(name.startswith("over_arch") for name in inject_hilomoe(model, CONFIG, [over]))
