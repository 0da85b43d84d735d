"""The doctor: which sets pass, and what it says of each kind that does not."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from torchrec_hilomoe import doctor
from torchrec_hilomoe.doctor import (
    diagnose,
    explain_import,
    explain_trial,
    has_gpu,
    PINNED,
    RELEASES,
)

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


def test_a_release_that_is_listed_and_was_never_tried_is_refused():
    untried = replace(PINNED, torch="2.14.0", fbgemm="1.9.0", torchrec="1.9.0", python=())
    installed = {"torch": "2.14.0+cpu", "fbgemm-gpu-cpu": "1.9.0", "torchrec": "1.9.0"}
    (finding,) = diagnose(installed, releases=(PINNED, untried))
    assert finding.problem == (
        "torch 2.14.0+cpu is listed with its fbgemm and torchrec, and was never tried."
    )
    assert finding.remedy == PINNED.pip_line("cpu")


def test_a_gpu_without_the_cuda_build_is_one_sentence_and_the_line():
    assert diagnose(CPU, gpu=False) == ()
    (finding,) = diagnose(CPU, gpu=True)
    assert finding.problem == (
        "this host has an NVIDIA GPU, and fbgemm-gpu-cpu computes on the CPU only."
    )
    mend, hide = finding.remedy.splitlines()
    assert mend == (
        "pip uninstall --yes fbgemm-gpu-cpu && pip install torch==2.13.0 && "
        "pip install --no-deps fbgemm-gpu==1.8.0 torchrec==1.8.0"
    )
    assert hide == "or leave the GPU alone: export CUDA_VISIBLE_DEVICES="


def test_a_cuda_build_without_a_gpu_is_one_sentence_and_the_line():
    assert diagnose(CUDA, gpu=True) == ()
    (finding,) = diagnose({**CUDA, "torch": "2.13.0"}, gpu=False)
    assert finding.problem == "fbgemm-gpu is the CUDA build, and this host shows no NVIDIA GPU."
    assert finding.remedy == (
        "pip uninstall --yes fbgemm-gpu && "
        "pip install --no-deps torch==2.13.0 fbgemm-gpu-cpu==1.8.0 torchrec==1.8.0"
    )


@pytest.mark.parametrize("python", ["3.10", "3.13", "3.14", "4.0"])
@pytest.mark.parametrize("installed", [CPU, CUDA, {}])
def test_a_python_that_was_never_tried_is_refused_with_the_line(installed, python):
    (finding,) = diagnose(installed, gpu=False, python=python)
    assert finding.problem == (
        f"this is Python {python}, and the package was tried on Python 3.11, 3.12."
    )
    assert finding.remedy == (
        "python3.12 -m venv .venv && source .venv/bin/activate && "
        "pip install --no-deps torch==2.13.0 fbgemm-gpu-cpu==1.8.0 torchrec==1.8.0"
    )


@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_a_python_that_was_tried_passes(python):
    assert diagnose(CPU, python=python) == ()


LINE = "pip install --no-deps torch==2.13.0 fbgemm-gpu-cpu==1.8.0 torchrec==1.8.0"


@pytest.mark.parametrize("torch", ["2.13.0+cu126", "2.13.1+cu130"])
@pytest.mark.parametrize("fbgemm", ["fbgemm-gpu", "fbgemm-gpu-cpu"])
def test_a_cuda_torch_without_a_gpu_is_replaced_and_not_completed(torch, fbgemm):
    installed = {"torch": torch, fbgemm: "1.8.0", "torchrec": "1.8.0"}
    (finding,) = diagnose(installed, gpu=False)
    assert finding.problem == f"torch {torch} is a CUDA build, and this host shows no NVIDIA GPU."
    assert finding.remedy == f"pip uninstall --yes torch {fbgemm} torchrec && {LINE}"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"torch": "2.13.0.dev20260301+cpu"}, "torch 2.13.0.dev20260301+cpu is a nightly"),
        ({"torch": "2.13.0a0+gitabc123"}, "torch 2.13.0a0+gitabc123 is a nightly"),
        ({"torch": "2.13.0rc2"}, "torch 2.13.0rc2 is a nightly"),
        ({"torchrec": "1.8.0.dev20260301"}, "torchrec 1.8.0.dev20260301 is a nightly"),
        ({"fbgemm-gpu-cpu": "1.8.0rc1"}, "fbgemm-gpu-cpu 1.8.0rc1 is a nightly"),
        ({"torch": "2.13.0+rocm6.4"}, "torch 2.13.0+rocm6.4 is a build neither for the CPU nor"),
        ({"torch": "2.13.0+gitabc123"}, "torch 2.13.0+gitabc123 is a build neither"),
    ],
)
@pytest.mark.parametrize("gpu", [None, False])
def test_a_build_of_no_release_is_refused_with_the_line(change, named, gpu):
    (finding,) = diagnose({**CPU, **change}, gpu=gpu)
    assert finding.problem.startswith(named)
    assert finding.remedy == f"pip uninstall --yes torch fbgemm-gpu-cpu torchrec && {LINE}"


def test_what_does_not_fit_is_told_before_the_gpu():
    (finding,) = diagnose({**CPU, "torchrec": "1.6.1"}, gpu=True)
    assert "needs torchrec 1.8" in finding.problem


def test_a_gpu_is_a_device_file_that_is_not_hidden(tmp_path):
    (tmp_path / "nvidiactl").touch()
    assert not has_gpu(tmp_path, {})
    (tmp_path / "nvidia0").touch()
    assert has_gpu(tmp_path, {})
    assert has_gpu(tmp_path, {"CUDA_VISIBLE_DEVICES": "0"})
    assert not has_gpu(tmp_path, {"CUDA_VISIBLE_DEVICES": ""})
    assert not has_gpu(tmp_path, {"CUDA_VISIBLE_DEVICES": "-1"})


@pytest.mark.parametrize(
    ("returncode", "stderr", "problem"),
    [
        (1, "Traceback\n\nKeyError: 'x'\n\n", "training a small model fails: KeyError: 'x'"),
        (1, "", "training a small model fails: nothing was said"),
        (-11, "step 1\n", "training a small model was ended by signal 11; last: step 1"),
        (None, "a\nb", "training a small model did not end within 600 seconds; last: b"),
    ],
)
def test_a_trial_that_fails_is_told_by_its_last_line(returncode, stderr, problem):
    finding = explain_trial(returncode, stderr)
    assert finding.problem == problem
    assert finding.remedy == "see all of it with: python -m torchrec_hilomoe.training.trial"


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


def test_the_whole_set_asked_for_is_that_of_the_release():
    error = ModuleNotFoundError("No module named 'tensordict'", name="tensordict")
    finding = explain_import("torchrec", error, {**CPU, "torch": "2.14.0"})
    assert finding.remedy == "pip install --no-deps -r requirements/cpu-2.14.txt"


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


def run_doctor(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torchrec_hilomoe.doctor", *arguments]
    return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True)


@pytest.mark.slow
def test_it_trains_here_alone_also_as_a_rank_of_a_job():
    result = run_doctor("--train", RANK="1", WORLD_SIZE="2", MASTER_ADDR="192.0.2.1")
    assert result.returncode == 0, result.stdout
    assert "can be imported, and a small model was trained." in result.stdout


@pytest.mark.slow
def test_training_that_fails_is_a_problem_and_no_traceback(tmp_path):
    """A part that only training reads: a temporary folder that cannot be written to."""
    (tmp_path / "sitecustomize.py").write_text(
        "import tempfile, sys\n"
        "if any('trial' in word for word in sys.orig_argv):\n"
        "    tempfile.tempdir = '/nowhere'\n"
    )
    result = run_doctor("--train", PYTHONPATH=str(tmp_path))
    assert result.returncode == 1
    assert "problem: training a small model fails: FileNotFoundError" in result.stdout
    assert "Traceback" not in result.stdout + result.stderr


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
