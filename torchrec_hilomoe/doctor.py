"""Can this environment train?  ``python -m torchrec_hilomoe.doctor --train``.

torch, fbgemm and torchrec fit together only within one release of TorchRec, and CPU and CUDA
builds do not mix. A wrong set shows as an undefined symbol or a missing CUDA library, deep inside
an import; here it shows as a sentence and the command that mends it. With ``--train`` a small
sharded model takes a few steps, so that what fits has been seen and not looked up.

Only the standard library is imported at the top, so that this runs where torch does not.
"""

import argparse
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

__all__ = [
    "PINNED",
    "RELEASES",
    "Finding",
    "Release",
    "diagnose",
    "explain_import",
    "explain_trial",
    "has_gpu",
    "main",
]

FBGEMM = {"cpu": "fbgemm-gpu-cpu", "cuda": "fbgemm-gpu"}  # both install the module fbgemm_gpu
DISTRIBUTIONS = ("torch", *FBGEMM.values(), "torchrec")
# Each of the first three needs the ones before it.
MODULES = ("torch", "fbgemm_gpu", "torchrec", "iopath", "jsonargparse", "pyarrow", "tqdm", "yaml")
UNRELEASED = re.compile(r"(a|b|rc|\.dev)\d")  # as PEP 440 has it
INSTALL_PAGE = "https://pytorch.org/get-started/locally"
TRIAL = "torchrec_hilomoe.training.trial"
TRIAL_SECONDS = 600


@dataclass(frozen=True, kw_only=True)
class Release:
    """Versions that belong together.

    Attributes:
        torch: The first version of torch's minor series.
        fbgemm: The fbgemm-gpu or fbgemm-gpu-cpu built against that series.
        torchrec: The torchrec written for both.
        python: Where ``make matrix`` has trained with it and run the tests; empty: never tried.
    """

    torch: str
    fbgemm: str
    torchrec: str
    python: tuple[str, ...] = ()

    @property
    def series(self) -> str:
        """``2.13`` of torch 2.13.0."""
        return _series(self.torch)

    def requirements(self, device: str) -> str:
        """Name the file of its pinned set for ``"cpu"`` or ``"cuda"``."""
        return f"requirements/{device}{'' if self == PINNED else f'-{self.series}'}.txt"

    def pip_line(self, device: str) -> str:
        """Say how to install this release for ``"cpu"`` or ``"cuda"``.

        CUDA itself comes as dependencies of torch, so only a CPU host goes without them.
        """
        others = f"{FBGEMM[device]}=={self.fbgemm} torchrec=={self.torchrec}"
        if device == "cpu":
            return f"pip install --no-deps torch=={self.torch} {others}"
        return f"pip install torch=={self.torch} && pip install --no-deps {others}"


RELEASES = (
    Release(torch="2.11.0", fbgemm="1.6.0", torchrec="1.6.1", python=("3.12",)),
    Release(torch="2.12.0", fbgemm="1.7.0", torchrec="1.7.0", python=("3.12",)),
    Release(torch="2.13.0", fbgemm="1.8.0", torchrec="1.8.0", python=("3.11", "3.12")),
    Release(torch="2.14.0", fbgemm="1.9.0", torchrec="1.9.0", python=("3.12",)),
)
PINNED = RELEASES[2]  # the one that `make` installs


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that keeps this environment from training.

    Attributes:
        problem: Fault that was found.
        remedy: Commands that mend it.
    """

    problem: str
    remedy: str


def diagnose(
    installed: Mapping[str, str],
    *,
    gpu: bool | None = None,
    python: str | None = None,
    releases: Sequence[Release] = RELEASES,
) -> tuple[Finding, ...]:
    """Compare versions with the releases that are known to work.

    Args:
        installed: Name to version, for each of ``DISTRIBUTIONS`` that is installed.
        gpu: Whether this host has a GPU, as `has_gpu` finds; None does not ask.
        python: Version of Python, such as ``3.11``; None does not ask.
        releases: Those that belong together.

    Returns:
        What is wrong; empty if nothing is.

    Example:
        >>> diagnose({"torch": "2.13.0", "fbgemm-gpu-cpu": "1.8.0", "torchrec": "1.8.0"})
        ()
        >>> diagnose({"torch": "2.13.0", "fbgemm-gpu-cpu": "1.7.0"})[0].problem
        'torch 2.13.0 needs fbgemm-gpu-cpu 1.8 (found 1.7.0) and torchrec 1.8 (found none).'
    """
    torch = installed.get("torch", "")
    device = "cpu" if gpu is False else _device(installed)
    if python is not None and (found := _python(python, device, releases)):
        return (found,)
    if odd := _odd_builds(installed, gpu):
        return odd
    device = _device(installed)
    release = next((r for r in releases if r.series == _series(torch)), None)
    if release is None:
        known = f"{releases[0].series} to {releases[-1].series}"
        found = f"torch {torch} is not among those" if torch else "torch is not installed"
        problem = f"{found}; TorchRec is known to work with torch {known}."
        return (Finding(problem=problem, remedy=PINNED.pip_line(device)),)

    findings = []
    stray = FBGEMM["cuda" if device == "cpu" else "cpu"]
    if stray in installed:
        problem = f"{stray} is not for {device}; it and {FBGEMM[device]} share their files."
        uninstall = f"pip uninstall --yes {' '.join(FBGEMM.values())}"
        findings.append(
            Finding(problem=problem, remedy=f"{uninstall} && {release.pip_line(device)}")
        )
    wanted = {FBGEMM[device]: release.fbgemm, "torchrec": release.torchrec}
    wrong = [
        f"{name} {_series(version)} (found {installed.get(name, 'none')})"
        for name, version in wanted.items()
        if _series(installed.get(name, "")) != _series(version)
    ]
    if wrong:
        problem = f"torch {torch} needs {' and '.join(wrong)}."
        findings.append(Finding(problem=problem, remedy=release.pip_line(device)))
    if not findings and not release.python:
        problem = f"torch {torch} is listed with its fbgemm and torchrec, and was never tried."
        findings.append(Finding(problem=problem, remedy=PINNED.pip_line(device)))
    if not findings and gpu is not None and gpu != (device == "cuda"):
        findings.append(_other_device(release, device))
    return tuple(findings)


def _python(python: str, device: str, releases: Sequence[Release]) -> Finding | None:
    """Refuse a Python on which no release was tried."""
    tried = {it for release in releases for it in release.python}
    if python in tried or not tried:
        return None
    listed = sorted(tried, key=lambda it: tuple(map(int, it.split("."))))
    problem = f"this is Python {python}, and the package was tried on Python {', '.join(listed)}."
    best = max(PINNED.python, default=listed[-1])
    environment = f"python{best} -m venv .venv && source .venv/bin/activate"
    return Finding(problem=problem, remedy=f"{environment} && {PINNED.pip_line(device)}")


def _odd_builds(installed: Mapping[str, str], gpu: bool | None) -> tuple[Finding, ...]:
    """What is none of the builds that belong to a release, whatever its number says."""
    torch = installed.get("torch", "")
    build = torch.partition("+")[2]
    device = "cpu" if gpu is False else _device(installed)
    release = next((r for r in RELEASES if r.series == _series(torch)), PINNED)
    early = [f"{name} {it}" for name, it in installed.items() if UNRELEASED.search(_public(it))]
    problem = ""
    if early:
        are = "is a nightly or development build" if len(early) == 1 else "are nightly builds"
        problem = f"{' and '.join(early)} {are}, and only releases belong together."
    elif build.startswith("cu") and gpu is False:
        problem = f"torch {torch} is a CUDA build, and this host shows no NVIDIA GPU."
    elif build and not build.startswith(("cpu", "cu")):
        problem = f"torch {torch} is a build neither for the CPU nor for NVIDIA GPUs."
    if not problem:
        return ()
    # pip takes any build of a version for that version, so what is there must go first.
    remove = " ".join(name for name in DISTRIBUTIONS if name in installed)
    remedy = f"pip uninstall --yes {remove} && {release.pip_line(device)}"
    return (Finding(problem=problem, remedy=remedy),)


def has_gpu(devices: Path = Path("/dev"), environ: Mapping[str, str] = os.environ) -> bool:
    """Say whether an NVIDIA GPU is here and not hidden by ``CUDA_VISIBLE_DEVICES``.

    torch cannot be asked: its build for the CPU sees none.
    """
    hidden = environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return not hidden and any(devices.glob("nvidia[0-9]*"))


def explain_trial(returncode: int | None, stderr: str) -> Finding:
    r"""Turn a trial that failed, in a set that fits and can be imported, into what to do about it.

    Args:
        returncode: Its exit status; negative for a signal; None if it did not end in time.
        stderr: What it said.

    Example:
        >>> explain_trial(1, "Traceback ...\nAttributeError: use_mtia\n").problem
        'training a small model fails: AttributeError: use_mtia'
    """
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    said = lines[-1] if lines else "nothing was said"
    if returncode is None:
        problem = f"training a small model did not end within {TRIAL_SECONDS} seconds; last: {said}"
    elif returncode < 0:
        problem = f"training a small model was ended by signal {-returncode}; last: {said}"
    else:
        problem = f"training a small model fails: {said}"
    return Finding(problem=problem, remedy=f"see all of it with: python -m {TRIAL}")


def explain_import(module: str, error: Exception, installed: Mapping[str, str]) -> Finding:
    """Turn a failed import of one of ``MODULES``, in a set that fits, into what to do about it.

    Example:
        >>> error = OSError("libcudnn.so.9: cannot open shared object file")
        >>> explain_import("torch", error, {"torch": "2.13.0"}).problem
        'import torch fails: libcudnn.so.9: cannot open shared object file'
    """
    reason = (str(error).strip() or repr(error)).splitlines()[0]
    device = _device(installed)
    if isinstance(error, ModuleNotFoundError):
        series = _series(installed.get("torch", ""))
        release = next((r for r in RELEASES if r.series == series), PINNED)
        remedy = f"pip install --no-deps -r {release.requirements(device)}"
    elif module == "torch":
        # A package index's plain torch is a CUDA build, whose libraries --no-deps leaves out.
        pin = f"torch=={_public(installed['torch'])}"
        remedy = (
            "without a GPU: make train TORCH_INDEX=URL, or\n"
            f"pip install --no-deps --force-reinstall --index-url URL {pin}\n"
            f"where URL is the CPU index named at {INSTALL_PAGE};\n"
            f"with one: pip install --force-reinstall {pin}"
        )
    else:
        pins = " ".join(f"{name}=={found}" for name, found in installed.items() if name != "torch")
        remedy = f"pip install --no-deps --force-reinstall {pins}"
    return Finding(problem=f"import {module} fails: {reason}", remedy=remedy)


def main(argv: Sequence[str] | None = None) -> int:
    """Report on this environment; return 0 if it can train, 1 if not."""
    parser = argparse.ArgumentParser(
        prog="python -m torchrec_hilomoe.doctor",
        description="Check that torch, fbgemm and torchrec fit together and can be imported.",
    )
    parser.add_argument("--quiet", action="store_true", help="say nothing when all is well")
    parser.add_argument("--train", action="store_true", help="also train a small model for 4 steps")
    args = parser.parse_args(argv)

    installed = _installed()
    python = ".".join(map(str, sys.version_info[:2]))
    findings = diagnose(installed, gpu=has_gpu(), python=python) or _import_all(installed)
    if args.train and not findings:
        findings = _train()
    lines = [f"{name:14s} {installed.get(name, '-')}" for name in DISTRIBUTIONS]
    for finding in findings:
        remedy = finding.remedy.replace("\n", "\n         ")
        lines += ["", f"problem: {finding.problem}", f"remedy:  {remedy}"]
    if not findings:
        seen = "can be imported, and a small model was trained" if args.train else "can be imported"
        lines += ["", f"These belong together and {seen}."]
    if findings or not args.quiet:
        sys.stdout.write("\n".join(lines) + "\n")
    return 1 if findings else 0


def _installed() -> dict[str, str]:
    versions = {}
    for name in DISTRIBUTIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _import_all(installed: Mapping[str, str]) -> tuple[Finding, ...]:
    """Import ``MODULES`` in order, up to the first that fails."""
    for module in MODULES:
        try:
            importlib.import_module(module)
        except (ImportError, OSError, AttributeError, RuntimeError) as error:
            return (explain_import(module, error, installed),)
    return ()


def _train() -> tuple[Finding, ...]:
    """Train a small model in a process of its own, alone whatever job this is part of."""
    job = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {name: value for name, value in os.environ.items() if name not in job}
    package = str(Path(__file__).resolve().parents[1])
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [package, env.get("PYTHONPATH")]))
    command = [sys.executable, "-m", TRIAL]
    try:
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=TRIAL_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        return (explain_trial(None, (error.stderr or b"").decode(errors="replace")),)
    return () if done.returncode == 0 else (explain_trial(done.returncode, done.stderr),)


def _other_device(release: Release, device: str) -> Finding:
    """What fits, for a CPU where there is a GPU, or for a GPU where there is none."""
    build = FBGEMM[device]
    if device == "cpu":
        problem = f"this host has an NVIDIA GPU, and {build} computes on the CPU only."
        remedy = f"pip uninstall --yes {build} && {release.pip_line('cuda')}"
        hide = "or leave the GPU alone: export CUDA_VISIBLE_DEVICES="
        return Finding(problem=problem, remedy=f"{remedy}\n{hide}")
    problem = f"{build} is the CUDA build, and this host shows no NVIDIA GPU."
    remedy = f"pip uninstall --yes {build} && {release.pip_line('cpu')}"
    return Finding(problem=problem, remedy=remedy)


def _device(installed: Mapping[str, str]) -> str:
    """What the set is for: torch's build says it, where its version has one; else the fbgemm."""
    build = installed.get("torch", "").partition("+")[2]
    if build:
        return "cuda" if build.startswith("cu") else "cpu"
    return "cuda" if FBGEMM["cuda"] in installed and FBGEMM["cpu"] not in installed else "cpu"


def _public(version: str) -> str:
    """``2.13.0`` of ``2.13.0+cpu``."""
    return version.partition("+")[0]


def _series(version: str) -> str:
    """``2.13`` of ``2.13.0+cpu``."""
    return ".".join(_public(version).split(".")[:2])


if __name__ == "__main__":
    sys.exit(main())
