"""Compile the Triton kernels for a GPU that need not be there; run it as a module.

In a process of its own, because the interpreter, once asked for, is all that its process has.
"""

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from torchrec_hilomoe.hilomoe.fused import backward_kernel, forward_kernel

HOPPER = GPUTarget("cuda", 90, 32)
SIZES = {"L": 3, "E": 8, "R": 2, "K": 2, "EP": 16, "MP": 32, "HP": 64, "BN": 64, "BD": 64, "BO": 64}
WIDE = ("gram", "direct", "scores", "passed", "logsumexp", "gates", "loss_scores", "loss_z")
FORWARD = {"HAS_BIAS": True}
BACKWARD = {"HAS_LOSS": True, "STOP_SCORES": False, "NEEDS_X": True, "THROUGH_QUERY": True}


def types(kernel: Any, constants: dict[str, int]) -> dict[str, str]:
    """What a bfloat16 site hands over."""
    found = {}
    for name in kernel.arg_names:
        wide = name in WIDE or name in ("grad_weighted", "grad_direct")
        pointer = "*i64" if name == "chosen" else "*fp32" if wide else "*bf16"
        size = "i32" if name in ("N", "D", "OUT", "Q") else pointer
        found[name] = "constexpr" if name in constants else size
    return found


def main() -> None:
    """Compile both kernels, both ways."""
    for kernel, options in ((forward_kernel, FORWARD), (backward_kernel, BACKWARD)):
        for selected in (False, True):
            constants = {**SIZES, **options, "SELECTED": selected}
            source = ASTSource(fn=kernel, signature=types(kernel, constants), constexprs=constants)
            assert "cubin" in triton.compile(source, target=HOPPER).asm


if __name__ == "__main__":
    main()
