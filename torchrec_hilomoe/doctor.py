"""Can this environment train?  ``python -m torchrec_hilomoe.doctor``.

torch, fbgemm and torchrec fit together only within one release of TorchRec, and CPU and CUDA
builds do not mix. A wrong set shows as an undefined symbol or a missing CUDA library, deep inside
an import; here it shows as a sentence and the command that mends it.

Only the standard library is imported at the top, so that this runs where torch does not.
"""

import argparse
import importlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata

__all__ = ["RELEASES", "Finding", "Release", "diagnose", "explain_import", "main"]

FBGEMM = {"cpu": "fbgemm-gpu-cpu", "cuda": "fbgemm-gpu"}  # both install the module fbgemm_gpu
DISTRIBUTIONS = ("torch", *FBGEMM.values(), "torchrec")
# Each of the first three needs the ones before it.
MODULES = ("torch", "fbgemm_gpu", "torchrec", "iopath", "jsonargparse", "pyarrow", "tqdm", "yaml")
INSTALL_PAGE = "https://pytorch.org/get-started/locally"


@dataclass(frozen=True, kw_only=True)
class Release:
    """Versions that belong together.

    Attributes:
        torch: The first version of torch's minor series.
        fbgemm: The fbgemm-gpu or fbgemm-gpu-cpu built against that series.
        torchrec: The torchrec written for both.
    """

    torch: str
    fbgemm: str
    torchrec: str

    def pip_line(self, device: str) -> str:
        """Say how to install this release for ``"cpu"`` or ``"cuda"``.

        CUDA itself comes as dependencies of torch, so only a CPU host goes without them.
        """
        others = f"{FBGEMM[device]}=={self.fbgemm} torchrec=={self.torchrec}"
        if device == "cpu":
            return f"pip install --no-deps torch=={self.torch} {others}"
        return f"pip install torch=={self.torch} && pip install --no-deps {others}"


RELEASES = (
    Release(torch="2.11.0", fbgemm="1.6.0", torchrec="1.6.1"),
    Release(torch="2.12.0", fbgemm="1.7.0", torchrec="1.7.0"),
    Release(torch="2.13.0", fbgemm="1.8.0", torchrec="1.8.0"),
    Release(torch="2.14.0", fbgemm="1.9.0", torchrec="1.9.0"),
)
PINNED = RELEASES[2]  # the one in requirements/


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that keeps this environment from training.

    Attributes:
        problem: What is wrong, with what was found.
        remedy: What mends it, as commands.
    """

    problem: str
    remedy: str


def diagnose(installed: Mapping[str, str]) -> tuple[Finding, ...]:
    """Compare versions with the releases that are known to work.

    Args:
        installed: Name to version, for each of ``DISTRIBUTIONS`` that is installed.

    Returns:
        What is wrong; empty if nothing is.

    Example:
        >>> diagnose({"torch": "2.13.0", "fbgemm-gpu-cpu": "1.8.0", "torchrec": "1.8.0"})
        ()
        >>> diagnose({"torch": "2.13.0", "fbgemm-gpu-cpu": "1.7.0"})[0].problem
        'torch 2.13.0 needs fbgemm-gpu-cpu 1.8 (found 1.7.0) and torchrec 1.8 (found none).'
    """
    torch = installed.get("torch", "")
    device = _device(installed)
    release = next((r for r in RELEASES if _series(r.torch) == _series(torch)), None)
    if release is None:
        known = f"{_series(RELEASES[0].torch)} to {_series(RELEASES[-1].torch)}"
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
    return tuple(findings)


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
        remedy = f"pip install --no-deps -r requirements/{device}.txt"
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
    quiet = parser.parse_args(argv).quiet

    installed = _installed()
    findings = diagnose(installed) or _import_all(installed)
    lines = [f"{name:14s} {installed.get(name, '-')}" for name in DISTRIBUTIONS]
    for finding in findings:
        remedy = finding.remedy.replace("\n", "\n         ")
        lines += ["", f"problem: {finding.problem}", f"remedy:  {remedy}"]
    if not findings:
        lines += ["", "These belong together and can be imported."]
    if findings or not quiet:
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
