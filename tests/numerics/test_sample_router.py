"""Sites that share a router: against the loops, with every gradient, and as parts of a model."""

import copy
import re
from dataclasses import replace

import pytest
import torch
from packaging.version import Version
from torch import nn
from torch.func import functional_call
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.models.dlrm import DLRM

from tests.helpers.rounding import (
    assert_as_exact_as,
    assert_within,
    float64_rounding,
    rounded,
    value_and_grads,
)
from torchrec_hilomoe.backbones.base import HookPoint
from torchrec_hilomoe.hilomoe import (
    auxiliary_loss,
    expert_parameters,
    HiLoMoEConfig,
    inject_shared_router,
    record_routing,
    reference,
    remove_hilomoe,
    routing_report,
    sites_of,
)

SAMPLES, TOKENS, USER, WIDTH = 4, 3, 5, 6
# Of different widths; one range is read by two layers, two overlap, one is a single column.
APART = [[range(2)], [range(4, 5), range(2)], [range(2, 5)]]
OPTIONS = {
    "default": {},
    "top_2": {"top_k": 2, "rank": 2},
    "query": {"query_dim": 3, "query_norm": True, "query_update": "selected"},
    "stop_query": {"stop_gradient": "query"},
}


class TwoTowers(nn.Module):
    """A user's tower routes two maps over the tokens of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Linear(USER, USER)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, user_BU: torch.Tensor, tokens_BTW: torch.Tensor) -> torch.Tensor:
        user_BU = self.user(user_BU)  # before the sites that it routes
        return self.down(self.up(tokens_BTW).tanh()) + user_BU.sum()


def build(dtype=torch.float64, views=None, **options) -> TwoTowers:
    torch.manual_seed(0)
    model = TwoTowers().to(dtype)
    config = HiLoMoEConfig(num_layers=3, num_experts=4, balance_weight=0.7, z_weight=0.3, **options)
    names = inject_shared_router(model, config, ["up", "down"], "user", USER, views=views)
    assert names == ["up", "down"]
    for site in sites_of(model).values():
        nn.init.normal_(site.expert_out)
    return model


def inputs(dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    user = torch.randn(SAMPLES, USER, generator=generator).to(dtype)
    return user, torch.randn(SAMPLES, TOKENS, WIDTH, generator=generator).to(dtype)


def read_apart(source_ND, keys_LEV, views):
    """What routes each row, and keys that are zero but for what their layer reads."""
    parts = list(dict.fromkeys(part for view in views for part in view))
    rows = [[source_D[part.start : part.stop] for part in parts] for source_D in source_ND]
    rows = [[reference.rms_norm(p) if len(p) > 1 else p for p in row] for row in rows]
    layers = []
    for keys_EV, view in zip(keys_LEV, views, strict=True):
        given, start = {}, 0
        for part in view:
            given[part] = keys_EV[:, start : start + len(part)]
            start += len(part)
        zeros = {part: keys_EV.new_zeros(len(keys_EV), len(part)) for part in parts}
        layers.append(torch.cat([given.get(part, zeros[part]) for part in parts], dim=1))
    return torch.stack([torch.cat(row) for row in rows]), torch.stack(layers)


@pytest.mark.parametrize(
    ("options", "views"),
    [
        *((options, None) for options in OPTIONS.values()),
        *((options, APART) for options in OPTIONS.values() if "query_dim" not in options),
        ({"query_norm": True, "query_update": "selected"}, APART),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_matches_float64_reference(options, views, dtype):
    model = build(dtype, views, **options)
    config = sites_of(model)["up"].config
    user, tokens = inputs(dtype)
    tensors = {"user": user, "tokens": tokens, **dict(model.named_parameters())}

    def fast(user, tokens, **params):
        return functional_call(model, params, (user, tokens)), None

    def slow(user, tokens, **params):
        source = user @ params["user.weight"].t() + params["user.bias"]
        router = {n.removeprefix("hilomoe_router."): p for n, p in params.items() if "router" in n}
        read, given = source, config
        if views is not None:
            read, keys = read_apart(source, router["expert_keys"], views)
            router, given = {"expert_keys": keys}, replace(config, query_norm=False)

        def site(name, x):
            own = {n.removeprefix(f"{name}."): p for n, p in params.items() if n.startswith(name)}
            repeated = read.repeat_interleave(TOKENS, dim=0)
            rows = x.reshape(-1, x.shape[-1])
            out = reference.hilomoe_linear(rows, {**own, **router}, given, source_NC=repeated)
            return out, out.y_NO.reshape(SAMPLES, TOKENS, -1)

        out, hidden = site("up", tokens)
        _, y = site("down", hidden.tanh())
        # Tokens of a sample are routed alike, so the means over tokens are those over samples.
        return y + source.sum(), reference.losses(out, config).total

    exact = {name: t.detach().double() for name, t in tensors.items()}
    plain = {name: t.detach().float() for name, t in tensors.items()}
    cotangent = torch.randn(SAMPLES, TOKENS, WIDTH, dtype=dtype)
    want = value_and_grads(slow, exact, cotangent.double())
    near = value_and_grads(slow, plain, cotangent.float())
    assert_as_exact_as(value_and_grads(fast, tensors, cotangent), near, want, dtype, 64)


def test_a_layer_reads_its_view_alone():
    """Where views have nothing in common; and a fresh router's choices are already theirs."""
    model = build(views=[[range(1)], [range(1, 3)], [range(3, 5)]])
    router = sites_of(model)["up"].router
    assert router is not None
    query = torch.randn(SAMPLES, USER, dtype=torch.float64)
    before = router(query).scores_LEN
    for column, reader in enumerate([0, 1, 1, 2, 2]):
        other = query.clone()
        other[:, column] += 1
        moved = (router(other).scores_LEN - before).abs().amax(dim=(1, 2)) > 0
        assert moved.tolist() == [layer == reader for layer in range(3)]


def test_features_of_dlrm_route_a_layer_each():
    """What its sparse part puts out, ``(samples, features, width)``, is read flat."""
    tables = [
        EmbeddingBagConfig(name=name, embedding_dim=8, num_embeddings=9, feature_names=[name])
        for name in ("item", "hour")
    ]
    model = DLRM(EmbeddingBagCollection(tables=tables), 4, [16, 8], [32, 16, 1])
    config, views = HiLoMoEConfig(num_layers=2, num_experts=4), [[range(8)], [range(8, 16)]]
    (*_, last) = inject_shared_router(
        model, config, ["over_arch*.0.*"], "sparse_arch", 16, views=views
    )
    router = sites_of(model)[last].router
    assert router is not None

    def scores(item: int, hour: int) -> torch.Tensor:
        ids = KeyedJaggedTensor.from_lengths_sync(
            ["item", "hour"], torch.tensor([item, hour]), torch.ones(2, dtype=torch.int64)
        )
        model(torch.zeros(1, 4), ids)
        return router.routing().scores_LEN

    by_item, by_hour = scores(1, 2)
    assert torch.equal(scores(1, 3)[0], by_item)
    assert not torch.equal(scores(1, 3)[1], by_hour)
    assert torch.equal(scores(4, 2)[1], by_hour)
    assert not torch.equal(scores(4, 2)[0], by_item)


def test_the_loss_read_is_the_router_s_own():
    model = build()
    model(*inputs()).sum().backward()
    with record_routing(model):
        model(*inputs())
    report = routing_report(model)
    (router,) = report.routers
    assert (router.name, router.rows) == ("hilomoe_router", SAMPLES)
    assert {(site.name, site.router) for site in report.sites} == {
        ("up", "hilomoe_router"),
        ("down", "hilomoe_router"),
    }
    assert all(site.output_ratio > 0 for site in report.sites)
    layers = router.layers
    want = sum(0.7 * layer.balance_loss + 0.3 * layer.z_loss for layer in layers) / len(layers)
    # The report's are of float64; the loss that is read is of the same numbers.
    assert auxiliary_loss(model).item() == rounded(want, terms=SAMPLES * len(layers))


def test_parameters_live_once_and_copies_are_independent():
    model = build()
    keys = [name for name in model.state_dict() if "keys" in name]
    assert keys == ["hilomoe_router.expert_keys"]
    assert "hilomoe_router.expert_keys" in expert_parameters(model)
    model(*inputs())
    twin = copy.deepcopy(model)
    want = model(*inputs())
    with torch.no_grad():
        model.get_parameter("hilomoe_router.expert_keys").normal_()
    assert torch.equal(twin(*inputs()), want)
    assert not torch.equal(model(*inputs()), want)


def test_active_layers_and_removal():
    model = build()
    for layers in (2, 0):
        for site in sites_of(model).values():
            site.active_layers = layers
        y = model(*inputs())
    assert remove_hilomoe(model) == ["up", "down"]
    assert torch.equal(model(*inputs()), y)
    assert not model._forward_pre_hooks
    assert not model.user._forward_hooks


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.12"),
    reason="torch 2.11 loses a site's gradients in a graph",
)
# Dynamo instantiates an autograd.Function while it traces its backward. Goes when it does not.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("views", [None, APART], ids=["all", "apart"])
@pytest.mark.parametrize("training", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_compiles_without_graph_breaks(training, views):
    model = build(views=views).train(training)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    given = inputs()
    assert_within(compiled(*given), model(*given), float64_rounding(model, given))


class Jagged(nn.Module):
    """The same over the tokens of all samples in one list; a third map sees a row a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.user, self.rows = nn.Linear(USER, USER), HookPoint(), HookPoint()
        self.up, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(USER, WIDTH)

    def forward(
        self, user_BU: torch.Tensor, tokens_NW: torch.Tensor, offsets: torch.Tensor
    ) -> torch.Tensor:
        user_BU, offsets = self.user(self.linear(user_BU)), self.rows(offsets)
        return torch.cat([self.up(tokens_NW), self.last(user_BU)])


def build_jagged(**options) -> Jagged:
    torch.manual_seed(0)
    model = Jagged().double()
    config = HiLoMoEConfig(num_layers=3, num_experts=4, **options)
    inject_shared_router(model, config, ["up", "last"], "user", USER, tokens={"u*": "rows"})
    for site in sites_of(model).values():
        nn.init.normal_(site.expert_out)
    return model


def jagged_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    offsets = torch.tensor([0, 3, 3, 4, 9])  # one sample has no token
    return inputs()[0], torch.randn(9, WIDTH, dtype=torch.float64), offsets


# One sample has no token; and as many tokens as samples, but not one each.
@pytest.mark.parametrize("starts", [[0, 3, 3, 4, 9], [0, 2, 2, 3, SAMPLES]])
def test_jagged_tokens_are_routed_as_each_sample_alone(starts):
    model, (user, _), offsets = build_jagged(), inputs(), torch.tensor(starts)
    tokens = torch.randn(starts[-1], WIDTH, dtype=torch.float64)
    together = model(user, tokens, offsets)
    rounding = float64_rounding(model, user, tokens, together)
    for b in range(SAMPLES):
        own = tokens[offsets[b] : offsets[b + 1]]
        alone = model(user[b : b + 1], own, torch.tensor([0, len(own)]))
        assert_within(alone[: len(own)], together[offsets[b] : offsets[b + 1]], rounding)
        assert_within(alone[-1], together[len(tokens) + b], rounding)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_jagged_tokens_have_the_gradients_of_gates_repeated(options):
    """Against as many tokens for every sample, where the gates are repeated by shape alone."""
    model, twin = build_jagged(**options), build_jagged(**options)
    user, tokens = inputs()
    flat = tokens.flatten(0, 1)
    offsets = torch.arange(SAMPLES + 1) * TOKENS
    cotangent = torch.randn(len(flat) + SAMPLES, WIDTH, dtype=torch.float64)
    model(user, flat, offsets).backward(cotangent)
    user_BU = twin.user(twin.linear(user))
    together = torch.cat([twin.up(tokens).flatten(0, 1), twin.last(user_BU)])
    together.backward(cotangent)
    for (name, got), want in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert got.grad is not None, name
        assert want.grad is not None, name
        rounding = float64_rounding(model, user, tokens, cotangent, want.grad)
        assert_within(got.grad, want.grad, rounding, name)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_is_fx_traceable(options, training):
    """TorchRec's pipelines trace models, hooks and all."""
    model = build_jagged(**options).train(training)
    traced = torch.fx.symbolic_trace(model)
    given = jagged_inputs()
    assert torch.equal(traced(*given), model(*given))


@pytest.mark.parametrize(
    ("views", "message"),
    [
        ([[range(2)]], "must be one for each expert layer, got 1 for num_layers = 2"),
        ([[range(2)], []], "layer 2 reads [], which must be one or more different"),
        ([[range(2)], [range(3, 3)]], "layer 2 reads [range(3, 3)], which must be"),
        ([[range(4, 6)], [range(2)]], "ranges of step 1 within the query's 5 columns"),
        ([[range(0, 4, 2)], [range(2)]], "layer 1 reads [range(0, 4, 2)]"),
        ([[range(2), range(2)], [range(2)]], "layer 1 reads [range(0, 2), range(0, 2)]"),
    ],
    ids=str,
)
def test_refuses_views_that_no_layer_can_have(views, message):
    model = TwoTowers()
    with pytest.raises(ValueError, match=re.escape(message)):
        inject_shared_router(model, HiLoMoEConfig(num_layers=2), ["up"], "user", USER, views=views)
    config = HiLoMoEConfig(num_layers=1, query_dim=3)
    with pytest.raises(ValueError, match=r"views need query_dim = None, got query_dim = 3: a"):
        inject_shared_router(model, config, ["up"], "user", USER, views=[[range(2)]])
    assert not sites_of(model)


def test_refuses_what_it_cannot_route():
    model = build()
    user, tokens = inputs()
    with pytest.raises(ValueError, match=r"4 samples were routed, .* \(12, 6\); its first dimens"):
        model(user, tokens.flatten(0, 1))
    with pytest.raises(ValueError, match=r"a site ran before the module whose output routes it"):
        sites_of(build())["up"](tokens)
    with pytest.raises(ValueError, match=r"query_module 'usr' is no module.*Did you mean 'user'\?"):
        inject_shared_router(TwoTowers(), HiLoMoEConfig(), ["up"], "usr", USER)
    with pytest.raises(ValueError, match=r"tokens 'row' is no module.*Did you mean 'rows'\?"):
        inject_shared_router(Jagged(), HiLoMoEConfig(), ["up"], "user", USER, tokens={"up": "row"})
    config = HiLoMoEConfig(tie_keys=True)
    with pytest.raises(ValueError, match=r"tie_keys = True needs a router for each site"):
        inject_shared_router(TwoTowers(), config, ["up"], "user", USER)
    config = HiLoMoEConfig(backend="compiled")
    with pytest.raises(ValueError, match=r"'compiled' compiles routing and experts as one, so it"):
        inject_shared_router(TwoTowers(), config, ["up"], "user", USER)
    model = TwoTowers()
    inject_shared_router(model, HiLoMoEConfig(), ["up"], "user", USER + 1)
    with pytest.raises(ValueError, match=r"width is 6, but the query's shape is \(4, 5\)"):
        model(user.float(), tokens.float())
