"""An AOTInductor package computes what the program does; it is machine code, run on request."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch
from torch import nn, Tensor
from torch.export import Dim
from torch.nn import functional as F

from tests.helpers.datasets import SCHEMA, toy_table, without
from tests.helpers.rounding import assert_within, rounding_of
from tests.helpers.serving import batch_of, ranker, with_histories
from torchrec_hilomoe.embeddings.features import ModelInputs
from torchrec_hilomoe.models.build import BACKBONES
from torchrec_hilomoe.serving import export_model, ExportOptions, Scorer
from torchrec_hilomoe.serving.artifact import Artifact
from torchrec_hilomoe.serving.inputs import InputLayout
from torchrec_hilomoe.serving.model import ServedModel
from torchrec_hilomoe.serving.package import compile_package, compile_program, load_package

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


class Padded(nn.Module):
    """What offsets of rows are made by, in one loop whose first element is no element of ``x``."""

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (1, 0)) + 1


# Its own process, which a read beyond the end of memory would end.
AT_THE_END_OF_MEMORY = """
import ctypes, mmap, sys, torch

run = torch._inductor.aoti_load_package(sys.argv[1])
memory = mmap.mmap(-1, 2 * mmap.PAGESIZE)
second = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + mmap.PAGESIZE
assert not ctypes.CDLL(None).mprotect(ctypes.c_void_p(second), mmap.PAGESIZE, 0)  # no access
for rows in (8, 16, 13, 1):
    x = torch.frombuffer(memory, dtype=torch.int64, count=rows, offset=mmap.PAGESIZE - 8 * rows)
    x.copy_(torch.arange(rows))
    assert run(x).tolist() == [1, *range(1, rows + 1)], rows
assert run(torch.empty(0, dtype=torch.int64)).tolist() == [1]
"""


@pytest.mark.slow
def test_compiled_code_reads_nothing_beyond_its_tensors(tmp_path):
    x, path = torch.arange(13), str(tmp_path / "padded.pt2")
    compile_program(torch.export.export(Padded(), (x,), dynamic_shapes=({0: Dim.AUTO},)), path)
    done = subprocess.run(
        [sys.executable, "-c", AT_THE_END_OF_MEMORY, path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


class Waves(nn.Module):
    """Work enough for any number of threads."""

    def forward(self, x: Tensor) -> Tensor:
        return (torch.sin(x) * torch.cos(x)).sum(1)


# Its own process, whose threads are counted; a server computes in others than the first.
THREADS_OF_A_RUN = """
import os, sys, threading, torch
from types import SimpleNamespace
from torchrec_hilomoe.serving.package import load_package

torch.set_num_threads(int(sys.argv[2]))
run = load_package(SimpleNamespace(file=lambda name: sys.argv[1]))
x = torch.ones(300, 4097)

def count():
    before = len(os.listdir("/proc/self/task"))
    run(x)
    print(len(os.listdir("/proc/self/task")) - before)

thread = threading.Thread(target=count)
thread.start()
thread.join()
"""


@pytest.fixture
def threads_kept():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.usefixtures("threads_kept")
def test_the_process_that_runs_it_says_how_many_threads_compute(tmp_path):
    """And not the one that compiled it."""
    x, path = torch.ones(300, 4097), str(tmp_path / "waves.pt2")
    torch.set_num_threads(3)
    compile_program(torch.export.export(Waves(), (x,), dynamic_shapes=({0: Dim.AUTO},)), path)
    with zipfile.ZipFile(path) as archive:
        sources = [archive.read(name) for name in archive.namelist() if name.endswith(".cpp")]
    assert any(b"#pragma omp parallel" in source for source in sources)
    assert not any(b"num_threads(" in source for source in sources)
    for threads in (1, 2, 4):
        done = subprocess.run(
            [sys.executable, "-c", THREADS_OF_A_RUN, path, str(threads)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "3"},
        )
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) == threads - 1


def compare(task, run, schema=SCHEMA):
    """On requests of all sizes, to the model that was trained."""
    layout = InputLayout(schema)
    with torch.no_grad():
        rounding = rounding_of(task.model, ModelInputs.of(batch_of(toy_table(64), schema)))
        for rows in (0, 1, 7, 1000):
            for lengths in ((0,), (1, 0, 2), (6,)):
                batch = batch_of(with_histories(toy_table(rows, seed=rows), lengths), schema)
                want = task.model(ModelInputs.of(batch))
                got = run(*layout.of_batch(batch).arguments)
                assert_within(got, want, rounding, f"{rows} rows of {lengths} events")


def test_a_package_is_equal_to_evaluation(tmp_path):
    """Of the model that compiles fastest, in the artifact and through the scorer."""
    schema = without(SCHEMA, "sequences", "pooled", "dense")
    task, out = ranker("dlrm", "row", schema), tmp_path / "dlrm"
    export_model(task.model, out, options=ExportOptions(package=True))
    scorer = Scorer(out, compiled=True)
    compare(task, load_package(scorer.artifact), schema)
    rows = toy_table(9)
    got, want = (torch.from_numpy(it.score(rows)) for it in (scorer, Scorer(out)))
    assert_within(got, want, rounding_of(torch.sigmoid, torch.logit(want)))


@pytest.mark.slow
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize(
    ("routing", "tables"), [("row", "fp32"), ("view", "fp32"), ("view", "int8")]
)
def test_every_backbone_compiles(tmp_path, backbone, routing, tables):
    task = ranker(backbone, routing)
    export_model(task.model, tmp_path / "it", options=ExportOptions(tables=tables, package=True))
    run = load_package(Artifact(tmp_path / "it"))
    if tables == "fp32":
        compare(task, run)
        return
    served = ServedModel(task.model, tables)
    inputs = InputLayout(SCHEMA).of_batch(batch_of(toy_table(50))).arguments
    with torch.no_grad():
        assert_within(run(*inputs), served(*inputs), rounding_of(served, *inputs))


def test_no_compiler_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler: install g\+\+ or set CXX"):
        compile_package(ServedModel(ranker("din", "plain").model), str(tmp_path / "it.pt2"))
