"""A program as machine code: an AOTInductor package for the CPU.

A package holds a shared library, which the process that loads it runs: load what you have made.
"""

import os
import shutil
from collections.abc import Callable

import torch
from torch import Tensor
from torch.export import ExportedProgram

from torchrec_hilomoe.serving.archive import ArtifactError
from torchrec_hilomoe.serving.artifact import Artifact, PACKAGE_FILE

__all__ = ["compile_package", "load_package"]


def compile_package(program: ExportedProgram, path: str) -> None:
    """Compile a program to a local file; takes from half a minute to some minutes.

    Raises:
        ValueError: If there is no C++ compiler.
    """
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        raise ValueError(
            "an AOTInductor package needs a C++ compiler; install g++, set CXX, or export without "
            "--package."
        )
    torch._inductor.aoti_compile_and_package(program, package_path=path)


def load_package(artifact: Artifact) -> Callable[..., Tensor]:
    """Load the machine code of an artifact.

    Raises:
        ArtifactError: If it has none.
    """
    path = artifact.file(PACKAGE_FILE)
    if path is None:
        raise ArtifactError(
            f"artifact {artifact.path} has no {PACKAGE_FILE}. Export the checkpoint again with "
            "--package, or score without it."
        )
    return torch._inductor.aoti_load_package(path)
