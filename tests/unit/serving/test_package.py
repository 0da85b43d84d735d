"""An AOTInductor package computes what the program does; it is machine code, run on request."""

import shutil

import pytest
import torch

from tests.helpers.datasets import SCHEMA, toy_table, without
from tests.helpers.rounding import assert_within, rounding_of
from tests.helpers.serving import batch_of, ranker, with_histories
from torchrec_hilomoe.embeddings.features import ModelInputs
from torchrec_hilomoe.models.build import BACKBONES
from torchrec_hilomoe.serving import export_model, ExportOptions, Scorer
from torchrec_hilomoe.serving.artifact import Artifact
from torchrec_hilomoe.serving.inputs import InputLayout
from torchrec_hilomoe.serving.model import ServedModel
from torchrec_hilomoe.serving.package import compile_package, load_package

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


REFUSED = ("transact", "interformer")


@pytest.mark.parametrize("backbone", REFUSED)
def test_a_package_that_would_crash_is_refused(tmp_path, backbone):
    with pytest.raises(ValueError, match=r"have crashed\. Export without --package\.$"):
        compile_package(ServedModel(ranker(backbone, "plain").model), str(tmp_path / "it.pt2"))


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
@pytest.mark.parametrize("backbone", [it for it in BACKBONES if it not in REFUSED])
@pytest.mark.parametrize("tables", ["fp32", "int8"])
def test_every_backbone_compiles(tmp_path, backbone, tables):
    task = ranker(backbone, "view")
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
