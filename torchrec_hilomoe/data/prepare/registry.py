"""The data sets that ``apps/prepare.py`` knows, by name."""

from collections.abc import Callable, Mapping

from torchrec_hilomoe.data.prepare.amazon_sequences import prepare_amazon_sequences
from torchrec_hilomoe.data.prepare.folder import Report
from torchrec_hilomoe.data.prepare.movielens import prepare_movielens
from torchrec_hilomoe.data.prepare.trivago import prepare_trivago

__all__ = ["DATASETS"]

# The signature of each function is its command line, and its docstring the help.
DATASETS: Mapping[str, Callable[..., Report]] = {
    "movielens": prepare_movielens,
    "amazon-sequences": prepare_amazon_sequences,
    "trivago": prepare_trivago,
}
