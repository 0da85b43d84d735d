"""What hosts do with their models, with experts in them: docs/injection.md has the table."""

import pytest

from tests.helpers.host_matrix import ALONE, ON_RANKS, outcomes, read_table, table_of
from tests.helpers.hosts import HOSTS

QUICK = [title for title in ALONE if "compile" not in title and "export" not in title]


@pytest.mark.parametrize("title", QUICK)
def test_every_host_alone(title):
    assert outcomes(title, list(HOSTS)) == dict.fromkeys(HOSTS, "yes")


@pytest.mark.parametrize("title", ["DMP, 2 ranks", "FSDP2"])
@pytest.mark.slow
def test_hosts_on_ranks(title):
    """A tower that reads one feature is given it before it was waited for."""
    some = ["DLRM", "DLRM, a shared router", "two towers"]
    assert outcomes(title, some) == dict.fromkeys(some, "yes")


def test_the_page_has_every_host_and_check():
    every = {title: dict.fromkeys(HOSTS, "yes") for title in (*ALONE, *ON_RANKS)}
    want, found = (
        [line.split(" | ")[0] for line in table.splitlines()]
        for table in (table_of(every), read_table())
    )
    assert found == want
    assert read_table().splitlines()[0] == table_of(every).splitlines()[0]


@pytest.mark.slow
def test_the_page_says_what_comes_out():
    found = {title: outcomes(title, list(HOSTS)) for title in (*ALONE, *ON_RANKS)}
    assert table_of(found) == read_table()
