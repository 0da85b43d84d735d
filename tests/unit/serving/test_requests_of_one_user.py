"""A request of one user computes their histories once, and what it computes is its rows'."""

import pytest
import torch

from tests.helpers.datasets import replace_column, SCHEMA, toy_table
from tests.helpers.rounding import assert_within, rounding_of
from tests.helpers.serving import ranker, with_histories
from torchrec_hilomoe.data.decode import decode_block
from torchrec_hilomoe.models.build import BACKBONES
from torchrec_hilomoe.serving.inputs import InputLayout, RequestLayout
from torchrec_hilomoe.serving.model import ServedModel, ServedRequest
from torchrec_hilomoe.serving.program import export_program, load_program, save_program

HISTORIES = {"empty": 0, "of one": 1, "short": 2, "full": 6}
# Those whose histories are computed once, unless a site asks whose its events are.
SHARING = ("bst", "din", "dlrm", "dcn")


def inputs_of(rows, events):
    """Rows of one user with so many events: as rows, and as a request."""
    table = with_histories(toy_table(max(rows, 1), seed=rows), (events,))
    for field in SCHEMA.sequence_fields:
        first = table[field.name].combine_chunks()
        table = replace_column(table, field.name, first.take([0] * table.num_rows))
    whole = InputLayout(SCHEMA)
    layout = RequestLayout(whole)
    user = decode_block(table.slice(0, 1), whole.columns, None).rows
    table = table.slice(0, rows)
    candidates = decode_block(table, layout.candidates.columns, None).rows
    of_rows = whole.of(decode_block(table, whole.columns, None).rows)
    return of_rows, layout.of(user, candidates)


def assert_rows_are_equal(run, served):
    with torch.no_grad():
        rounding = rounding_of(served, *inputs_of(64, 6)[0].arguments)
        for rows in (0, 1, 7, 300):
            for name, events in HISTORIES.items():
                of_rows, request = inputs_of(rows, events)
                got, want = run(*request.arguments), served(*of_rows.arguments)
                assert got.shape == (rows,)
                assert_within(got, want, rounding, f"{rows} candidates, {name} histories")


@pytest.mark.parametrize(
    "routing", ["plain", pytest.param("row", marks=pytest.mark.slow), "sample", "view"]
)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_request_is_equal_to_its_rows(backbone, routing):
    torch.manual_seed(0)
    served = ServedModel(ranker(backbone, routing).model)
    request = ServedRequest(served)
    by_sample = routing in ("sample", "view") and backbone in ("bst", "din")
    assert request.shared == (backbone in SHARING and not by_sample)
    assert_rows_are_equal(request, served)


@pytest.mark.parametrize(
    ("backbone", "routing"),
    [
        ("din", "plain"),
        pytest.param("bst", "row", marks=pytest.mark.slow),
        pytest.param("bst", "view", marks=pytest.mark.slow),
        pytest.param("dien", "row", marks=pytest.mark.slow),
        pytest.param("transact", "view", marks=pytest.mark.slow),
        pytest.param("interformer", "row", marks=pytest.mark.slow),
        pytest.param("dlrm", "row", marks=pytest.mark.slow),
    ],
)
def test_a_program_of_a_request_is_equal_to_its_rows(backbone, routing, tmp_path):
    torch.manual_seed(0)
    served = ServedModel(ranker(backbone, routing).model)
    save_program(export_program(ServedRequest(served)), str(tmp_path / "request.pt2"))
    assert_rows_are_equal(load_program(str(tmp_path / "request.pt2")), served)
