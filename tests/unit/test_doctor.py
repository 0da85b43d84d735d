"""The doctor: which sets pass, and what it says of each kind that does not."""

import subprocess
import sys

import pytest

from torchrec_hilomoe import doctor
from torchrec_hilomoe.doctor import diagnose, explain_import, RELEASES

CPU = {"torch": "2.13.0+cpu", "fbgemm-gpu-cpu": "1.8.0", "torchrec": "1.8.0"}
CUDA = {"torch": "2.13.0+cu130", "fbgemm-gpu": "1.8.0", "torchrec": "1.8.0"}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.torch)
def test_every_known_release_passes(release, device):
    fbgemm = {"cpu": "fbgemm-gpu-cpu", "cuda": "fbgemm-gpu"}[device]
    installed = {"torch": release.torch, fbgemm: release.fbgemm, "torchrec": release.torchrec}
    assert diagnose(installed) == ()


@pytest.mark.parametrize(
    "installed",
    [
        CPU,
        CUDA,
        {**CPU, "torchrec": "1.8.3"},
        {"torch": "2.14.1", "fbgemm-gpu": "1.9.0", "torchrec": "1.9.2"},
    ],
)
def test_patch_releases_and_build_tags_pass(installed):
    assert diagnose(installed) == ()


@pytest.mark.parametrize("torch", ["2.10.0", "2.15.0", "2.15.0+cpu"])
def test_unknown_torch_is_named_with_the_known_range(torch):
    (finding,) = diagnose({**CPU, "torch": torch})
    assert torch in finding.problem
    assert "torch 2.11 to 2.14" in finding.problem
    assert "torch==2.13.0 fbgemm-gpu-cpu==1.8.0 torchrec==1.8.0" in finding.remedy


def test_empty_environment_gets_the_pinned_line():
    (finding,) = diagnose({})
    assert finding.problem.startswith("torch is not installed")
    assert finding.remedy == (
        "pip install --no-deps torch==2.13.0 fbgemm-gpu-cpu==1.8.0 torchrec==1.8.0"
    )


def test_mismatch_names_what_is_wanted_and_what_was_found():
    (finding,) = diagnose({**CPU, "fbgemm-gpu-cpu": "1.6.0", "torchrec": "1.6.1"})
    assert finding.problem == (
        "torch 2.13.0+cpu needs fbgemm-gpu-cpu 1.8 (found 1.6.0) and torchrec 1.8 (found 1.6.1)."
    )


def test_the_remedy_follows_the_torch_that_is_installed():
    (finding,) = diagnose({"torch": "2.12.1", "fbgemm-gpu-cpu": "1.8.0", "torchrec": "1.8.0"})
    assert "fbgemm-gpu-cpu==1.7.0 torchrec==1.7.0" in finding.remedy


def test_cuda_remedy_takes_torch_with_its_dependencies():
    (finding,) = diagnose({**CUDA, "torchrec": "1.6.1"})
    assert finding.remedy == (
        "pip install torch==2.13.0 && pip install --no-deps fbgemm-gpu==1.8.0 torchrec==1.8.0"
    )


def test_both_fbgemms_are_refused_because_they_share_their_files():
    (finding,) = diagnose({**CPU, "fbgemm-gpu": "1.8.0"})
    assert "fbgemm-gpu is not for cpu" in finding.problem
    assert finding.remedy.startswith("pip uninstall --yes fbgemm-gpu-cpu fbgemm-gpu && ")


def test_cpu_fbgemm_beside_a_cuda_torch_is_refused():
    stray, missing = diagnose({**CPU, "torch": "2.13.0+cu130"})
    assert "fbgemm-gpu-cpu is not for cuda" in stray.problem
    assert "needs fbgemm-gpu 1.8 (found none)" in missing.problem


def test_cuda_torch_without_its_libraries_is_told_both_ways_out():
    error = ImportError("libcudnn.so.9: cannot open shared object file", name="_C")
    finding = explain_import("torch", error, {**CPU, "torch": "2.13.0"})
    assert "libcudnn.so.9" in finding.problem
    assert "TORCH_INDEX=URL" in finding.remedy
    assert "https://pytorch.org/get-started/locally" in finding.remedy
    assert "with one: pip install --force-reinstall torch==2.13.0" in finding.remedy


def test_a_missing_dependency_asks_for_the_whole_pinned_set():
    error = ModuleNotFoundError("No module named 'tensordict'", name="tensordict")
    finding = explain_import("torchrec", error, CUDA)
    assert "No module named 'tensordict'" in finding.problem
    assert "-r requirements/cuda.txt" in finding.remedy


def test_a_broken_library_is_reinstalled():
    error = OSError("Could not load this library: fbgemm_gpu_tbe_utils.so\nundefined symbol")
    finding = explain_import("fbgemm_gpu", error, CPU)
    assert finding.problem.endswith("fbgemm_gpu_tbe_utils.so")
    assert finding.remedy == (
        "pip install --no-deps --force-reinstall fbgemm-gpu-cpu==1.8.0 torchrec==1.8.0"
    )


def test_this_environment_passes(capsys):
    assert doctor.main([]) == 0
    assert "can be imported" in capsys.readouterr().out
    assert doctor.main(["--quiet"]) == 0
    assert capsys.readouterr().out == ""


def test_a_torch_that_cannot_be_imported_is_no_traceback(tmp_path):
    """The command itself, before a torch that fails as a CUDA build does on a CPU host."""
    (tmp_path / "torch.py").write_text('raise ImportError("libcudnn.so.9: cannot open")\n')
    result = subprocess.run(
        [sys.executable, "-m", "torchrec_hilomoe.doctor", "--quiet"],
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert "problem: import torch fails: libcudnn.so.9" in result.stdout
    assert "Traceback" not in result.stderr
