"""``Scorer``: raw values or ids, rows in order, one sentence for what cannot be scored."""

import threading
import zipfile
from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.helpers.datasets import replace_column, SCHEMA, toy_table
from tests.helpers.rounding import assert_same, assert_within, of_sums, rounding_of
from tests.helpers.serving import batch_of, ranker
from torchrec_hilomoe.data.hashing import hash_ids
from torchrec_hilomoe.data.prepare.encoding import Hashed
from torchrec_hilomoe.data.schema import VocabularyRule
from torchrec_hilomoe.embeddings.features import ModelInputs
from torchrec_hilomoe.serving import export_model, Scorer
from torchrec_hilomoe.serving import scorer as scorer_module
from torchrec_hilomoe.serving.archive import ArtifactError
from torchrec_hilomoe.serving.artifact import Artifact, PROGRAM_FILE, REQUEST_FILE
from torchrec_hilomoe.serving.program import load_program, load_request
from torchrec_hilomoe.serving.requests import Requests

ROWS = 40
EMPTY = pa.list_(pa.int8())


def test_scores_are_the_probabilities_that_evaluation_has(scorer, rows):
    torch.manual_seed(0)
    task = ranker("din", "row")  # the one that was exported
    inputs = ModelInputs.of(batch_of(toy_table(ROWS, seed=3)))

    def probabilities(model, inputs):
        return torch.sigmoid(model(inputs))

    with torch.no_grad():
        want, rounding = probabilities(task.model, inputs), None
        rounding = rounding_of(probabilities, task.model, inputs)
    got = scorer.score(rows)
    assert got.dtype == np.float32
    assert_within(torch.from_numpy(got), want, rounding)


def test_rows_may_come_as_columns_in_any_order_with_others_or_none_at_all(scorer, rows):
    want = scorer.score(rows)
    columns = dict(reversed(rows.to_pydict().items()))
    assert_same(torch.from_numpy(scorer.score(columns)), torch.from_numpy(want))
    arrays = columns | {"item": np.array(columns["item"], dtype=np.int16)}
    assert_same(torch.from_numpy(scorer.score(arrays, values="ids")), torch.from_numpy(want))
    assert scorer.score(rows.slice(0, 0)).shape == (0,)
    assert scorer.score(rows.slice(0, 0).to_pydict()).shape == (0,)
    chunked = pa.concat_tables([rows.slice(0, 7), rows.slice(7)])
    assert_same(torch.from_numpy(scorer.score(chunked)), torch.from_numpy(want))


def test_many_rows_are_scored_a_piece_at_a_time(scorer, rows, monkeypatch):
    want = scorer.score(rows)
    monkeypatch.setattr(scorer_module, "ROWS_AT_ONCE", 7)
    # Products of other shapes add up otherwise; no sum has more terms than the head's input.
    rounding = of_sums(64) * torch.finfo(torch.float32).eps
    assert_within(torch.from_numpy(scorer.score(rows)), torch.from_numpy(want), rounding)


def test_a_request_is_its_rows(scorer, rows):
    one = rows.slice(5, 1).to_pylist()[0]
    own = ("item", "kind", "price")
    user = {name: value for name, value in one.items() if name not in own}
    candidates = rows.select(own)
    table = rows
    for name in user:
        kind = rows.schema.field(name).type
        table = replace_column(table, name, pa.array([one[name]] * ROWS, kind))
    want = torch.from_numpy(scorer.score(table))
    # What of a history is computed once adds up otherwise.
    rounding = of_sums(64) * torch.finfo(torch.float32).eps
    by_value = torch.from_numpy(scorer.score_request(user, candidates))
    assert_within(by_value, want, rounding)
    assert_same(torch.from_numpy(scorer.score_request(user, candidates, values="ids")), by_value)
    part = {name: it for name, it in user.items() if name != "clicks_item"}
    others = candidates.append_column("clicks_item", table["clicks_item"])
    assert_same(torch.from_numpy(scorer.score_request(part, others)), want)
    assert scorer.score_request(user, candidates.slice(0, 0)).shape == (0,)


def test_a_column_of_the_user_and_of_the_candidates_is_refused(scorer, rows):
    one = rows.slice(5, 1).to_pylist()[0]
    user = {name: value for name, value in one.items() if name != "item"}
    told = "column 'item' is given of the user and of the candidates; leave one out"
    for candidates in ({"item": [1, 2, 3]}, pa.table({"item": [1, 2, 3]})):
        assert scorer.score_request(user | {"unused": 1}, candidates).shape == (3,)
        with pytest.raises(ValueError, match=told):
            scorer.score_request(user | {"item": 5}, candidates)
    with pytest.raises(ValueError, match="no column is given of the candidates"):
        scorer.score_request(user | {"item": 5}, {"other": [1]})
    with pytest.raises(ValueError, match="the rows are a list; give an Arrow table"):
        scorer.score_request(user, [1, 2, 3])


@pytest.mark.parametrize("values", ["raw", "ids"])
def test_a_user_without_a_history_has_an_empty_one(scorer, rows, values):
    """Preparing makes null lists empty ones; a prepared folder has none."""
    names = ("clicks_item", "clicks_kind", "views_item", "tags")
    columns = rows.to_pydict()
    empty = columns | {name: [[], *columns[name][1:]] for name in names}
    null = columns | {name: [None, *columns[name][1:]] for name in names}
    none = columns | dict.fromkeys(names, [None] * ROWS)
    one = {name: value for name, value in rows.slice(5, 1).to_pylist()[0].items() if name != "item"}
    user = one | dict.fromkeys(names)
    if values == "ids":
        for told, wrong in (("row 0: .* is null", null), ("is null, the schema wants a", none)):
            with pytest.raises(ValueError, match=told):
                scorer.score(wrong, values=values)
        with pytest.raises(ValueError, match="is null, the schema wants a list"):
            scorer.score_request(user, {"item": [1, 2]}, values=values)
        return
    want = torch.from_numpy(scorer.score(empty))
    assert_same(torch.from_numpy(scorer.score(null)), want)
    want = torch.from_numpy(scorer.score(columns | dict.fromkeys(names, [[]] * ROWS)))
    assert_same(torch.from_numpy(scorer.score(none)), want)
    want = scorer.score_request(one | {name: [] for name in names}, {"item": [1, 2]})
    got = scorer.score_request(user, {"item": [1, 2]})
    assert_same(torch.from_numpy(got), torch.from_numpy(want))


def test_threads_share_a_scorer(scorer, rows):
    want, found = scorer.score(rows), {}
    scorer.warm_up()

    def run(number):
        found[number] = [scorer.score(rows) for _ in range(3)]

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(np.array_equal(got, want) for of_thread in found.values() for got in of_thread)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda it: it.drop_columns(["kind"]), "column 'kind' is missing; rows need the columns i"),
        (
            lambda it: replace_column(it, "item", pa.array(["a"] * ROWS)),
            "column 'item' has values of type string, but those of table 'item' are int64",
        ),
        (
            lambda it: replace_column(it, "item", pa.array([1.5] * ROWS)),
            "values of type double, but values of table 'item' are whole numbers or texts",
        ),
        (
            lambda it: replace_column(it, "tags", pa.array([1] * ROWS)),
            "column 'tags' is int64, the schema wants a list of integers",
        ),
        (
            lambda it: replace_column(it, "price", pa.array(["1"] * ROWS)),
            "column 'price' is string, the schema wants a number",
        ),
        (
            lambda it: replace_column(it, "item", pa.array([1] * 3 + [20] + [1] * (ROWS - 4))),
            "row 3: item has id 20, outside its table's 0 to 19; correct it",
        ),
        (
            lambda it: replace_column(it, "views_item", pa.array([[1, -1]] * ROWS)),
            "row 0: views_item has id -1",
        ),
        (
            lambda it: replace_column(
                it, "clicks_item", pa.array([[]] * ROWS, pa.list_(pa.int8()))
            ),
            "sequence group 'clicks' have unequal lengths",
        ),
        (
            lambda it: replace_column(it, "price", pa.array([None] * ROWS, pa.float64())),
            "price is null",
        ),
    ],
)
def test_what_cannot_be_scored_is_told_in_a_sentence(scorer, rows, change, told):
    with pytest.raises(ValueError, match=r"column|row") as error:
        scorer.score(change(rows))
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_columns_of_unequal_length_are_told(scorer, rows):
    told = f"no columns of equal length: 'item' has {ROWS}, 'place' has 1;"
    with pytest.raises(ValueError, match=told):
        scorer.score(rows.to_pydict() | {"place": [1]})


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ([1, "a"] * (ROWS // 2), "is a list of int and str, which is no column of one type"),
        ("1" * ROWS, "is a str; give an array or a list"),
        (b"1" * ROWS, "is a bytes; give an array or a list"),
        (dict.fromkeys(range(ROWS)), "is a dict; give an array or a list"),
        (set(range(ROWS)), "is a set; give an array or a list"),
        (torch.zeros(ROWS, dtype=torch.int64), "is a Tensor, which is no column"),
        ([pa.array([1])] * ROWS, "is a list of Int64Array, which is no column"),
        (["\ud800"] * ROWS, "is a list of str, which is no column"),
        (7, "is a int, which is no column"),
    ],
    ids=["mixed", "text", "bytes", "mapping", "set", "tensor", "arrays", "surrogates", "number"],
)
@pytest.mark.parametrize("column", ["item", "clicks_item"])
def test_what_is_no_column_is_told_by_name(scorer, rows, column, values, found):
    with pytest.raises(ValueError, match=f"column '{column}' ") as error:
        scorer.score(rows.to_pydict() | {column: values})
    assert found in str(error.value)


def test_a_history_of_mixed_types_is_told_by_name(scorer, rows):
    with pytest.raises(ValueError, match="column 'views_item' is a list of int and str, which"):
        scorer.score(rows.to_pydict() | {"views_item": [[1, "2"]] * ROWS})


VOCABULARY = pa.table({"value": ["red", "green", "blue"], "id": [1, 2, 3]})


@pytest.fixture(scope="module")
def of_texts(tmp_path_factory):
    """A ranker of texts: a counted table, unknown ones apart; hashed ones; and numbers."""
    torch.manual_seed(0)
    task = ranker("din", "row")
    schema = task.model.sparse.schema
    rules = {
        "kind": VocabularyRule(kind="given", unknown="last", file="vocabularies/kind.parquet"),
        "user": VocabularyRule(kind="hashed"),
        "tag": VocabularyRule(kind="counted", file="vocabularies/tag.parquet"),
    }
    object.__setattr__(schema, "vocabularies", rules)
    numbers = pa.table({"value": [70, 8, -5], "id": [1, 2, 3]})
    out = tmp_path_factory.mktemp("texts") / "din"
    export_model(task.model, out, vocabularies={"kind": VOCABULARY, "tag": numbers})
    object.__setattr__(schema, "vocabularies", {})
    return Scorer(out)


def test_raw_values_become_ids_and_what_is_unknown_is_as_in_training(of_texts, rows):
    kinds = ["red", "blue", "mauve", None] * (ROWS // 4)
    ids = [1, 3, SCHEMA.tables["kind"] - 1, SCHEMA.tables["kind"] - 1] * (ROWS // 4)
    clicks = [["green", None, "mauve"], []] * (ROWS // 2)
    click_ids = [[2, 4, 4], []] * (ROWS // 2)
    tags, tag_ids = [[70, 9], [-5]] * (ROWS // 2), [[1, 0], [3]] * (ROWS // 2)
    items = [[0, 0, 0], []] * (ROWS // 2)
    columns = rows.to_pydict() | {"clicks_item": items}
    raw = columns | {"kind": kinds, "clicks_kind": clicks, "tags": tags}
    wanted = columns | {"kind": ids, "clicks_kind": click_ids, "tags": tag_ids}
    raw["user"] = [str(it) for it in columns["user"]]
    wanted["user"] = hash_ids(pa.array(raw["user"]), SCHEMA.tables["user"]).tolist()
    requests = Requests(of_texts.artifact)
    assert requests.encode(requests.table_of(raw)).to_pydict() == {
        name: wanted[name] for name in requests.columns
    }
    got = torch.from_numpy(of_texts.score(raw))
    assert_same(torch.from_numpy(of_texts.score(wanted, values="ids")), got)
    # A number has the hash of its text.
    assert_same(torch.from_numpy(of_texts.score(raw | {"user": columns["user"]})), got)


@pytest.mark.parametrize("encoded", [False, True])
def test_booleans_are_hashed_as_preparing_hashes_them(of_texts, rows, encoded):
    values = [True, False, None, True] * (ROWS // 4)
    prepared = pl.Series(values).cast(pl.Int64)  # as prepare reads a column of booleans
    want = Hashed(SCHEMA.tables["user"]).encode(prepared).to_list()
    plain = rows.drop_columns(["kind", "tags", "clicks_kind"])  # that have texts, or numbers
    requests = Requests(of_texts.artifact)
    column = pa.array(values).dictionary_encode() if encoded else pa.array(values)
    found = requests.encode(replace_column(plain, "user", column))
    assert found["user"].to_pylist() == want


def test_fingerprints_of_64_bits_are_hashed_from_python_too(of_texts, rows):
    prints = [2**63 + number for number in range(ROWS)]
    plain = rows.drop_columns(["kind", "tags", "clicks_kind", "user"])
    requests = Requests(of_texts.artifact)
    names = ["item", "user"]
    columns = {"item": plain["item"], "user": prints}
    found = requests.encode(requests.table_of(columns, names))
    want = hash_ids(pa.array([str(number) for number in prints]), SCHEMA.tables["user"])
    assert found["user"].to_pylist() == want.tolist()
    iterators = requests.table_of(columns | {"user": iter(prints)}, names)
    assert iterators["user"].to_pylist() == prints
    listed = requests.table_of(columns | {"user": [[number] for number in prints]}, names)
    assert listed["user"].type == pa.list_(pa.uint64())


@pytest.mark.parametrize("number", [2**63, 2**64])
@pytest.mark.parametrize("values", ["raw", "ids"])
def test_whole_numbers_that_are_too_large_are_told(scorer, rows, number, values):
    columns = rows.to_pydict()
    for wrong in (columns | {"item": [number] * ROWS}, columns | {"views_item": [[number]] * ROWS}):
        with pytest.raises(ValueError, match="item"):
            scorer.score(wrong, values=values)


def test_histories_may_all_be_empty(scorer, rows):
    none = {name: [[]] * ROWS for name in ("clicks_item", "clicks_kind", "tags")}
    columns = rows.to_pydict() | none
    want = torch.from_numpy(scorer.score(columns))
    assert_same(torch.from_numpy(scorer.score(columns, values="ids")), want)


def test_rows_may_be_a_record_batch_but_no_frame(scorer, rows):
    (batch,) = rows.combine_chunks().to_batches()
    assert_same(torch.from_numpy(scorer.score(batch)), torch.from_numpy(scorer.score(rows)))
    with pytest.raises(ValueError, match="the rows are a DataFrame; give an Arrow table"):
        scorer.score(pl.DataFrame(rows))


@pytest.mark.parametrize("column", ["user", "kind", "tags"])
@pytest.mark.parametrize("unit", ["s", "ns"])
def test_timestamps_are_refused_for_their_text_depends_on_the_unit(of_texts, column, unit):
    moments = pa.array([0, 10**9], pa.timestamp(unit))
    requests = Requests(of_texts.artifact)
    with pytest.raises(
        ValueError, match=rf"column '{column}' has values of type timestamp\[{unit}"
    ):
        requests.encode(pa.table({column: moments}))


def test_values_are_raw_or_ids(scorer, rows):
    with pytest.raises(ValueError, match="values is 'id', but must be 'raw' or 'ids'"):
        scorer.score(rows, values="id")
    with pytest.raises(ValueError, match="values is 'id', but must be 'raw' or 'ids'"):
        scorer.score_request({}, rows, values="id")


def test_values_of_another_type_than_the_vocabulary_are_told(of_texts, rows):
    wrong = replace_column(rows, "tags", pa.array([["many"]] * ROWS))
    with pytest.raises(ValueError, match=r"those of table 'tag' are int64 .*convert them"):
        of_texts.score(wrong)


def of_buckets(folder, least):
    """The requests of a model with buckets of numbers; nothing here scores them."""
    rule = VocabularyRule(kind="bucketed", buckets=3, file="vocabularies/place.parquet")
    (folder / "vocabularies").mkdir()
    pq.write_table(pa.table({"value": least, "id": [1, 2, 3]}), folder / rule.file)
    schema = replace(SCHEMA, vocabularies={"place": rule})
    artifact = SimpleNamespace(path=folder, schema=schema, file=lambda it: str(folder / it))
    return Requests(cast(Artifact, artifact))


@pytest.mark.parametrize("stored", [pa.float64(), pa.float32(), pa.string()], ids=str)
def test_borders_are_numbers_however_another_engine_stores_them(tmp_path, stored):
    requests = of_buckets(tmp_path, pa.array([-np.inf, 0.5, 2.0**60]).cast(stored))

    def ids(numbers):
        return requests.encode(pa.table({"place": numbers}))["place"].to_pylist()

    assert ids([0.5, np.nextafter(0.5, 0.0), 2.0**60, None]) == [2, 1, 3, 0]
    for kind in (pa.int64(), pa.uint64(), pa.decimal128(20, 0)):  # of which float64 has not all
        assert ids(pa.array([2**60 + 1, 2**62 + 1, 2**60 - 1000, 0], kind)) == [3, 3, 2, 1]


@pytest.mark.parametrize("least", [["a", "b", "c"], [[0.5], [1.0], [2.0]]], ids=["text", "lists"])
def test_borders_that_are_no_numbers_are_told(tmp_path, least):
    with pytest.raises(ArtifactError, match=r"place\.parquet is no vocabulary \("):
        of_buckets(tmp_path, least)


def test_what_is_wrong_with_a_request_is_said_of_the_user_or_the_candidates(scorer, rows):
    one = rows.slice(5, 1).to_pylist()[0]
    own = ("item", "kind", "price")
    user = {name: value for name, value in one.items() if name not in own}
    candidates = rows.select(own).to_pydict()
    with pytest.raises(ValueError, match=r"the user with the first candidate: row 0: views_item"):
        scorer.score_request(user | {"views_item": [-1]}, candidates)
    with pytest.raises(ValueError, match=r"the candidates: row 3: item has id 20"):
        scorer.score_request(user, candidates | {"item": [1] * 3 + [20] + [1] * (ROWS - 4)})
    with pytest.raises(ValueError, match=r"the candidates: row 0: place has id 999"):
        scorer.score_request(user | {"place": 999}, candidates)


def test_a_request_shares_the_models_weights(exported_once):
    model = load_program(str(exported_once / PROGRAM_FILE))
    path = exported_once / REQUEST_FILE
    request = load_request(str(path), model)
    held = [{it.data_ptr() for it in them.state_dict().values()} for them in (model, request)]
    assert held[0] == held[1]
    with zipfile.ZipFile(path) as archive:  # and its file has none of them
        sizes = [it.file_size for it in archive.infolist() if "data/weights/weight_" in it.filename]
    assert set(sizes) <= {4, 8}
    other = torch.nn.Linear(2, 2)
    with pytest.raises(ArtifactError, match=r"request\.pt2 is of another model"):
        load_request(str(path), other)
