"""HiLoMoELinear against the float64 loops: values and every gradient, over sizes and options."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call

from tests.helpers.rounding import assert_same, assert_within, of_sums, value_and_grads
from tests.helpers.site_cases import check, chosen_by, config_of, make_case, OPTIONS
from torchrec_hilomoe.hilomoe import reference
from torchrec_hilomoe.hilomoe.execution import execution_for

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
# Where the arithmetic of a type is that of the first test, too.
FEWER = [torch.float32, *(pytest.param(it, marks=pytest.mark.slow) for it in DTYPES[::2])]
# Odd and degenerate sizes first: they find the off-by-ones that 64 and 128 hide.
SIZES = [(1, 1, 1, 1, 1), (3, 5, 2, 2, 4), (5, 4, 9, 1, 3), (17, 33, 7, 3, 5)]  # N, D, O, L, E


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: "N{}-D{}-O{}-L{}-E{}".format(*s))
def test_matches_float64_reference(sizes, options, dtype):
    check(sizes, config_of(*sizes[3:], **options), dtype)


@pytest.mark.parametrize("dtype", FEWER, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_gathered_experts_match_float64_reference(options, dtype):
    """The same where rows use few of many wide vectors, which are gathered."""
    sizes = (7, 129, 6, 2, 32 if "top_k" in options else 9)
    config = config_of(*sizes[3:], **options)
    assert execution_for(config, width=129).experts == "gathered"
    check(sizes, config, dtype)


@pytest.mark.parametrize("dtype", FEWER, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_moved_queries_match_float64_reference(options, dtype):
    """The same where many experts share a narrow query, which is moved instead of its scores."""
    sizes = (5, 6, 4, 3, 64 if options.get("top_k") == 4 else 33)
    config = config_of(*sizes[3:], **options)
    assert execution_for(config, width=6).space == "queries"
    check(sizes, config, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("active_layers", [0, 1, 2, 3])
def test_active_layers_match_the_reference(active_layers, dtype):
    check((9, 6, 7, 3, 4), config_of(3, 4), dtype, active_layers=active_layers)


def test_without_bias():
    check((9, 6, 7, 3, 4), config_of(3, 4), torch.float64, bias=False)


@given(
    sizes=st.tuples(*[st.integers(1, high) for high in (6, 9, 9, 4, 6)]),
    options=st.sampled_from(list(OPTIONS.values())),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=25, deadline=None)
def test_matches_over_random_sizes(sizes, options, seed):
    check(sizes, config_of(*sizes[3:], **options), torch.float64, seed)


# A stopped gradient is not the derivative; the reference tests it.
@pytest.mark.parametrize("name", [n for n, o in OPTIONS.items() if "stop_gradient" not in o])
def test_gradcheck(name):
    options = OPTIONS[name]
    config = config_of(2, 4, **{**options, "balance_weight": 0.0, "z_weight": 0.0})
    site, tensors, _ = make_case((4, 5, 3, 2, 4), config, torch.float64)

    def fn(*values):
        named = dict(zip(tensors, values, strict=True))
        return functional_call(site, {n: t for n, t in named.items() if n != "x"}, named["x"])

    assert torch.autograd.gradcheck(fn, [t.requires_grad_() for t in tensors.values()])


def test_inactive_layers_are_not_read():
    config = config_of(3, 4)
    site, tensors, cotangent = make_case((9, 6, 7, 3, 4), config, torch.float64)
    site.active_layers = 2
    params = {name: t for name, t in tensors.items() if name != "x"}
    want = functional_call(site, params, tensors["x"])
    for name in ("expert_in", "expert_out", "expert_keys"):
        tensors[name][2] = torch.nan

    def fn(x, **params):
        return functional_call(site, params, (x,)), None

    got = value_and_grads(fn, tensors, cotangent)
    assert torch.equal(got["y"], want)
    for name in ("expert_in", "expert_out", "expert_keys"):
        assert got[name].isfinite().all()
        assert torch.count_nonzero(got[name][2]) == 0


@pytest.mark.parametrize("k", [1, 2, 3])
def test_ties_go_to_the_first(k):
    config = config_of(2, 4, top_k=k)
    site, tensors, _ = make_case((5, 6, 7, 2, 4), config, torch.float64)
    tensors["expert_keys"][:] = tensors["expert_keys"][:, :1]  # all experts of a layer alike
    chosen_NLE = chosen_by(site, tensors)
    assert chosen_NLE[:, :, :k].all()
    assert not chosen_NLE[:, :, k:].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_near_ties_choose_a_best_expert(dtype):
    config = config_of(3, 6, top_k=2)
    site, tensors, _ = make_case((31, 6, 7, 3, 6), config, dtype)
    nudge = torch.randn(tensors["expert_keys"].shape) * torch.finfo(dtype).eps
    tensors["expert_keys"] = (tensors["expert_keys"][:, :1] * (1 + nudge)).to(dtype)
    chosen_by(site, tensors)  # checks the choice


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("top_k", [1, 3])
def test_saturated_softmax(dtype, top_k):
    config = config_of(2, 4, top_k=top_k)
    site, tensors, cotangent = make_case((7, 6, 5, 2, 4), config, dtype)
    tensors["expert_keys"] *= 1e3  # scores of one and of exactly zero

    def fn(x, **params):
        return functional_call(site, params, (x,)), None

    got = value_and_grads(fn, tensors, cotangent)
    assert all(t.isfinite().all() for t in got.values())
    check_site, _, _ = make_case((7, 6, 5, 2, 4), config, dtype)
    chosen_NLE = chosen_by(check_site, tensors)
    params = {n: t.double() for n, t in tensors.items() if n != "x"}
    out = reference.hilomoe_linear(tensors["x"].double(), params, config, None, chosen_NLE)
    # Scores are exact, so that outputs are sums of products: the base map's and the layers'.
    largest = out.y_NO.abs().max().item()
    assert_within(got["y"], out.y_NO, of_sums(6 + 2 * 4) * torch.finfo(dtype).eps * largest)


@pytest.mark.parametrize("sizes", [(9, 6, 7, 3, 5), (7, 129, 6, 2, 32), (5, 6, 4, 3, 64)], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_reads_no_uninitialised_memory(options, sizes):
    """With ``torch.empty`` full of NaN, results stay as they are, whatever the execution."""
    config = config_of(*sizes[3:], **options)
    site, tensors, cotangent = make_case(sizes, config, torch.float32)

    def fn(x, **params):
        return functional_call(site, params, (x,)), None

    want = value_and_grads(fn, tensors, cotangent)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    try:
        assert torch.empty(3).isnan().all()
        got = value_and_grads(fn, tensors, cotangent)
    finally:
        torch.use_deterministic_algorithms(before)
    assert_same(got, want)


def test_non_finite_input_propagates():
    config = config_of(2, 3)
    site, tensors, _ = make_case((4, 6, 5, 2, 3), config, torch.float32)
    x = tensors["x"]
    x[1, 2], x[3, 0] = torch.nan, torch.inf
    y = functional_call(site, {n: t for n, t in tensors.items() if n != "x"}, x)
    assert y[[1, 3]].isnan().all()
    assert y[[0, 2]].isfinite().all()
