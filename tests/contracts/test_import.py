"""Importing the package is free: no device, no network, no optional package, nothing changed."""

import json
import sys

from tests.helpers.processes import run_command

# What only extras or development install; the package imports each where it is used, if at all.
OPTIONAL = [
    *("fastapi", "hypothesis", "matplotlib", "optuna", "pytest", "sklearn", "tensorboard"),
    *("torchx", "uvicorn"),
]

IMPORT_ALL = """
import json, logging, os, pkgutil, random, signal, sys, threading, warnings
import numpy, polars, pyarrow.parquet, torch, torchrec, torch.distributed.checkpoint

def state():
    return {
        "default dtype": str(torch.get_default_dtype()),
        "default device": str(torch.get_default_device()),
        "grad mode": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "torch threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "threads": threading.active_count(),
        "torch seed": torch.initial_seed(),
        "random state": [hash(random.getstate()), str(numpy.random.get_state())],
        "warning filters": [str(f) for f in warnings.filters],
        "root logger": [logging.root.level, len(logging.root.handlers)],
        "signals": [str(signal.getsignal(s)) for s in (signal.SIGTERM, signal.SIGINT)],
        "environment": dict(os.environ),
        "process group": torch.distributed.is_initialized(),
    }

connections = []
sys.addaudithook(lambda event, args: event == "socket.connect" and connections.append(str(args[1])))
before, modules = state(), set(sys.modules)
import torchrec_hilomoe
names = [m.name for m in pkgutil.walk_packages(torchrec_hilomoe.__path__, "torchrec_hilomoe.")]
for name in names:
    __import__(name)
after = state()
print(json.dumps({
    "names": names,
    "changed": {k: [before[k], after[k]] for k in before if before[k] != after[k]},
    "imported": sorted({m.partition(".")[0] for m in set(sys.modules) - modules}),
    "cuda": torch.cuda.is_initialized(),
    "connections": connections,
}))
"""


def test_importing_every_module_changes_and_touches_nothing():
    result = run_command([sys.executable, "-c", IMPORT_ALL])
    assert result.returncode == 0, result.stderr
    seen = json.loads(result.stdout)
    assert "torchrec_hilomoe.hilomoe.linear" in seen["names"]
    assert seen["changed"] == {}
    assert not set(OPTIONAL) & set(seen["imported"])
    assert seen["cuda"] is False
    assert seen["connections"] == []


def test_the_package_itself_needs_no_torch():
    """The doctor is for environments in which torch does not import."""
    code = (
        "import sys, torchrec_hilomoe, torchrec_hilomoe.doctor;"
        "print([m for m in ('torch', 'torchrec', 'numpy') if m in sys.modules])"
    )
    result = run_command([sys.executable, "-c", code])
    assert result.stdout == "[]\n", result.stderr


def test_only_preparing_imports_polars():
    """It is an extra, and sets variables of the environment where it is imported."""
    modules = "sys, torchrec_hilomoe.apps.train, torchrec_hilomoe.apps.prepare"
    code = f"import {modules}; print('polars' in sys.modules)"
    result = run_command([sys.executable, "-c", code])
    assert result.returncode == 0, result.stderr
    assert result.stdout == "False\n"
