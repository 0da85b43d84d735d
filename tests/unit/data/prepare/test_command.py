"""apps/prepare.py: one line that says what to do about a wrong call, and exit code 2."""

import runpy
import sys

import pytest

from tests.helpers.processes import ROOT, run_command
from torchrec_hilomoe.data.parquet import ParquetSource
from torchrec_hilomoe.data.prepare.registry import DATASETS

APP = [sys.executable, ROOT / "apps" / "prepare.py"]


@pytest.fixture
def ask(monkeypatch, capsys):
    """Call the app in this process, which has torch imported: exit code and both outputs."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", [str(APP[1]), *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(APP[1]), run_name="__main__")
        return ended.value.code, *capsys.readouterr()

    return call


@pytest.fixture
def raw(tmp_path):
    folder = tmp_path / "raw"
    folder.mkdir()
    ratings = [f"1::{movie}::{1 + movie % 5}::{movie}" for movie in range(1, 21)]
    (folder / "ratings.dat").write_text("\n".join([*ratings, "oops", ""]))
    (folder / "movies.dat").write_text("1::One: the movie (1999)::Drama|War\n2::Two (2000)::War\n")
    (folder / "users.dat").write_text("1::F::25::3::90210\n")
    return folder


def test_prepares_and_reports(raw, tmp_path):
    out = tmp_path / "out"
    done = run_command([*APP, "movielens", "--raw", raw, "--out", out, "--max_history", "5"])
    assert done.returncode == 0, done.stderr
    assert f"{raw}/ratings.dat line 21: malformed: 'oops'; skipped" in done.stderr
    assert "train: 16 rows written" in done.stderr
    assert done.stdout == (out / "report.json").read_text()
    assert ParquetSource(str(out), "test").schema.sequences[0].max_length == 5
    again = run_command([*APP, "movielens", "--raw", raw, "--out", out, "--overwrite"])
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["movielans"], "error: there is no data set 'movielans'. Did you mean 'movielens'?"),
        (["xyz"], "error: there is no data set 'xyz'. Known are: "),
        (["movielens", "--raw", "x", "--outt", "y"], "Did you mean --out?"),
        (["movielens", "--raw", "x", "--out", "y", "--overwrit"], "Did you mean --overwrite?"),
        (["movielens", "--out", "y"], "error: the following arguments are required: raw"),
        (["movielens", "--raw", "x", "--out", "y", "--seed", "one"], 'error: Parser key "seed"'),
        (
            ["movielens", "--raw", "/no/raw", "--out", "y"],
            "error: there is no folder /no/raw. Get ",
        ),
        (["movielens", "--raw", ".", "--out", "y"], "error: . has neither ratings.dat nor "),
    ],
)
def test_a_wrong_call_is_one_line_and_exit_code_2(arguments, message, ask, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, stdout, stderr = ask(*arguments)
    assert code == 2
    assert stdout == ""
    assert message in stderr
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_no_arguments_list_the_data_sets(ask):
    code, listed, _ = ask()
    assert code == 2
    code, asked, _ = ask("--help")
    assert code == 0
    assert asked == listed
    for name in DATASETS:
        assert f"  {name} " in asked


@pytest.mark.parametrize("name", list(DATASETS))
def test_each_data_set_has_help(name, ask):
    code, stdout, _ = ask(name, "--help")
    assert code == 0
    for option in ("--raw RAW", "--out OUT", "--overwrite", "--seed SEED"):
        assert option in stdout


def test_without_polars_it_is_named():
    code = (
        "import sys; sys.modules['polars'] = None; from torchrec_hilomoe.apps.prepare import main"
    )
    done = run_command([sys.executable, "-c", f"{code}; sys.exit(main(['movielens']))"])
    assert done.returncode == 2
    assert done.stderr == 'error: prepare wants polars: pip install "polars>=2.1,<3".\n'
