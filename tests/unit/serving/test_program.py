"""An exported program computes what evaluation does, row by row, whatever the sizes of a batch."""

import pytest
import torch

from tests.helpers.datasets import SCHEMA, toy_table, without
from tests.helpers.rounding import assert_same, assert_within, rounding_of
from tests.helpers.serving import batch_of, ranker, with_histories
from torchrec_hilomoe.data.decode import decode_block
from torchrec_hilomoe.embeddings.features import ModelInputs
from torchrec_hilomoe.models.build import BACKBONES
from torchrec_hilomoe.serving.inputs import InputLayout
from torchrec_hilomoe.serving.model import ServedModel
from torchrec_hilomoe.serving.program import export_program, load_program, save_program
from torchrec_hilomoe.serving.tables import table_of

SIZES = (0, 1, 7, 1000)
HISTORIES = {"empty": (0,), "short": (1, 0, 2), "full": (6,), "any": tuple(range(7))}
FAST = {"bst": "view", "din": "row"}  # the others are slow
GRID = [
    pytest.param(
        (backbone, routing),
        marks=() if FAST.get(backbone) == routing else pytest.mark.slow,
        id=name,
    )
    for backbone in BACKBONES
    for routing in ("row", "sample", "view")
    if (name := f"{backbone} by {routing}")
]


@pytest.fixture(scope="module", params=GRID)
def exported(request, tmp_path_factory):
    """A ranker, and the program that was made of it, read back from its file."""
    torch.manual_seed(0)
    task = ranker(*request.param)
    path = str(tmp_path_factory.mktemp("program") / "program.pt2")
    save_program(export_program(ServedModel(task.model)), path)
    return task, load_program(path)


def test_a_program_is_equal_to_evaluation(exported):
    task, program = exported
    layout = InputLayout(SCHEMA)
    whole = ModelInputs.of(batch_of(with_histories(toy_table(64), HISTORIES["any"])))
    with torch.no_grad():
        rounding = rounding_of(task.model, whole)
        for rows in SIZES:
            for name, lengths in HISTORIES.items():
                batch = batch_of(with_histories(toy_table(rows, seed=rows), lengths))
                want = task.model(ModelInputs.of(batch))
                got = program(*layout.of_batch(batch).arguments)
                assert got.shape == (rows,)
                assert_within(got, want, rounding, f"{rows} rows, {name} histories")


@pytest.mark.parametrize(
    "absent",
    [
        pytest.param(("sequences",), marks=pytest.mark.slow, id="histories"),
        pytest.param(("sequences", "pooled", "dense"), id="all lists"),
    ],
)
def test_a_model_without_histories_is_equal_to_evaluation(absent, tmp_path):
    schema = without(SCHEMA, *absent)
    task = ranker("dlrm", "row", schema)
    save_program(export_program(ServedModel(task.model)), str(tmp_path / "program.pt2"))
    program = load_program(str(tmp_path / "program.pt2"))
    layout = InputLayout(schema)
    with torch.no_grad():
        rounding = rounding_of(task.model, ModelInputs.of(batch_of(toy_table(64), schema)))
        for rows in SIZES:
            batch = batch_of(toy_table(rows, seed=rows), schema)
            want = task.model(ModelInputs.of(batch))
            assert_within(program(*layout.of_batch(batch).arguments), want, rounding)


@pytest.mark.parametrize("rows", SIZES)
def test_inputs_of_rows_are_those_of_the_batch_that_training_makes(rows):
    table, layout = toy_table(rows), InputLayout(SCHEMA)
    decoded = decode_block(table, layout.columns, None)
    got, want = layout.of(decoded.rows), layout.of_batch(batch_of(table))
    assert got.rows == want.rows == rows
    assert_same(got.lists, want.lists)
    for name in ("singles", "lengths", "dense", "longest", "steps"):
        assert_same(getattr(got, name), getattr(want, name), name)


def test_numbers_of_int8_tables_are_off_by_half_a_step_of_their_row():
    weight_ND = torch.randn(50, 8) * torch.logspace(-3, 2, 50).unsqueeze(1)
    ids = torch.randint(50, (200,))
    error = (table_of(weight_ND, "int8")(ids) - weight_ND[ids]).abs()
    span_N1 = weight_ND.amax(dim=1, keepdim=True) - weight_ND.amin(dim=1, keepdim=True)
    rounding = 4 * torch.finfo(torch.float32).eps * weight_ND.abs().amax(dim=1, keepdim=True)
    assert (error <= (span_N1 / 255 / 2 + rounding)[ids]).all()


@pytest.mark.parametrize(("precision", "bytes_"), [("fp32", 32), ("fp16", 16), ("int8", 16)])
def test_tables_take_as_many_bytes_as_is_said(precision, bytes_):
    table = table_of(torch.randn(10, 8), precision)
    assert sum(it.numel() * it.element_size() for it in table.buffers()) == 10 * bytes_


def test_tables_of_all_precisions_look_up_the_same_but_for_their_rounding():
    weight_ND, ids = torch.randn(10, 8), torch.tensor([3, 3, 0])
    assert torch.equal(table_of(weight_ND, "fp32")(ids), weight_ND[ids])
    assert torch.equal(table_of(weight_ND, "fp16")(ids), weight_ND.half().float()[ids])
