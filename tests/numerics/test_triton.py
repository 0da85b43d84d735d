"""The Triton kernels against the float64 loops: by Triton's interpreter where there is no GPU."""

import os
import sys
from importlib.metadata import version

import pytest
import torch
from packaging.version import Version

from tests.helpers.processes import run_command
from tests.helpers.site_cases import check, config_of, make_case, OPTIONS
from torchrec_hilomoe.hilomoe import HiLoMoEConfig, HiLoMoELinear
from torchrec_hilomoe.hilomoe.router import SampleRouter

# Beyond a tile in every direction, and odd; degenerate; narrow.
SIZES = [(70, 67, 71, 3, 5), (1, 1, 1, 1, 1), (3, 5, 2, 2, 4)]  # N, D, O, L, E
SIZES_TO_CHECK = [*(pytest.param(it, marks=pytest.mark.slow) for it in SIZES[:2]), SIZES[2]]
# The interpreter multiplies bfloat16 as if it were integers.
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16
DTYPES = [torch.float32, pytest.param(HALF, marks=pytest.mark.slow)]
# Seen: "only 0-dimensional arrays can be converted to Python scalars" at every kernel.
INTERPRETED = pytest.mark.skipif(
    not torch.cuda.is_available()
    and Version(version("triton")) < Version("3.7")
    and Version(version("numpy")) >= Version("2.4"),
    reason="the interpreter of triton before 3.7 (torch 2.11) does not run with numpy from 2.4 on",
)


@INTERPRETED
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("sizes", SIZES_TO_CHECK, ids=lambda s: "N{}-D{}-O{}-L{}-E{}".format(*s))
def test_matches_float64_reference(sizes, options, dtype):
    check(sizes, config_of(*sizes[3:], backend="triton", **options), dtype)


@INTERPRETED
@pytest.mark.parametrize("active_layers", [0, 1, 2])
def test_active_layers_match_the_reference(active_layers):
    config = config_of(3, 4, backend="triton")
    check((9, 6, 7, 3, 4), config, torch.float32, active_layers=active_layers)


@INTERPRETED
def test_half_precision_matches_float64_reference():
    check(SIZES[0], config_of(*SIZES[0][3:], backend="triton"), HALF)


@INTERPRETED
def test_without_bias():
    check((9, 6, 7, 3, 4), config_of(3, 4, backend="triton"), torch.float32, bias=False)


def test_no_rows():
    site = HiLoMoELinear(6, 5, HiLoMoEConfig(backend="triton"))
    x = torch.empty(0, 6, requires_grad=True)
    site(x).sum().backward()
    assert x.grad is not None
    assert site.expert_keys.grad is not None


@INTERPRETED
# numpy's, on which the interpreter runs
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_a_row_that_is_not_finite_stays_alone():
    config = config_of(2, 3, backend="triton")
    site, tensors, _ = make_case((4, 6, 5, 2, 3), config, torch.float32)
    x = tensors["x"]
    x[1, 2], x[3, 0] = torch.nan, torch.inf
    y = site(x)
    assert y[[1, 3]].isnan().all()
    assert y[[0, 2]].isfinite().all()


def test_refuses_what_the_kernels_cannot_do():
    with pytest.raises(ValueError, match=r"'triton' computes in float32 and below, got float64"):
        HiLoMoELinear(4, 3, HiLoMoEConfig(backend="triton"), dtype=torch.float64)(
            torch.randn(2, 4, dtype=torch.float64)
        )
    with pytest.raises(ValueError, match=r"num_layers x num_experts x rank is 384, .* than 256"):
        HiLoMoELinear(4, 3, HiLoMoEConfig(backend="triton", num_experts=128))
    with pytest.raises(ValueError, match=r"'triton' routes and computes in one kernel, so it can"):
        SampleRouter(4, HiLoMoEConfig(backend="triton"))


def test_refuses_without_a_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "TRITON_INTERPRET" not in os.environ
    with pytest.raises(ValueError, match=r"backend = 'triton' cannot .* there is no CUDA device"):
        HiLoMoELinear(8, 4, HiLoMoEConfig(backend="triton"))


@pytest.mark.slow
def test_compiles_for_a_gpu_that_is_not_there():
    """The interpreter accepts what the compiler refuses, such as a variable that changes shape."""
    command = [sys.executable, "-m", "tests.helpers.triton_compile"]
    done = run_command(command, env={"TRITON_INTERPRET": "0"})
    assert done.returncode == 0, done.stderr
