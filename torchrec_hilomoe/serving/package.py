"""A served model as machine code: an AOTInductor package for the CPU.

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
from torchrec_hilomoe.serving.model import ServedModel
from torchrec_hilomoe.serving.program import export_program, without_warnings
from torchrec_hilomoe.serving.sites import served_sites

__all__ = ["compile_package", "compile_program", "load_package"]

# With vectors also in what remains of a loop, the code that torch 2.13 writes for a padded tensor
# reads up to a vector beyond the end of a buffer: of no rows, or where memory ends, that ends the
# process. Without dynamic threads the code has the number of threads of the process that compiles.
OPTIONS = {"cpp.enable_loop_tail_vec": False, "cpp.dynamic_threads": True}


def compile_package(model: ServedModel, path: str) -> None:
    """Compile a model to a local file ``*.pt2``; takes from half a minute to some minutes.

    Its sites are those of :mod:`torchrec_hilomoe.serving.sites`.

    Raises:
        ValueError: If there is no C++ compiler.
    """
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        raise ValueError(
            "an AOTInductor package needs a C++ compiler: install g++ or set CXX, or export "
            "without --package."
        )
    with served_sites(model):
        program = export_program(model)
    compile_program(program, path)


def compile_program(program: ExportedProgram, path: str) -> None:
    """Compile a program to a local file ``*.pt2``, by code that stays within its tensors."""
    with without_warnings():
        torch._inductor.aoti_compile_and_package(
            program, package_path=path, inductor_configs=OPTIONS
        )


def load_package(artifact: Artifact) -> Callable[..., Tensor]:
    """Load the machine code of an artifact; ``torch.set_num_threads`` acts on it.

    Raises:
        ArtifactError: If it has none.
    """
    path = artifact.file(PACKAGE_FILE)
    if path is None:
        raise ArtifactError(
            f"artifact {artifact.path} has no {PACKAGE_FILE}. Export the checkpoint again with "
            "--package, or score without it."
        )
    with without_warnings():
        package = torch._inductor.aoti_load_package(path)

    def run(*arguments: Tensor | tuple[Tensor, ...]) -> Tensor:
        # OpenMP keeps a number of threads for each thread. PyTorch sets it when it is asked, and
        # before its own loops, but not before those of a package.
        torch.get_num_threads()
        return package(*arguments)

    return run
