"""The data sets that ``apps/prepare.py`` knows, by name."""

from collections.abc import Callable, Mapping

from torchrec_hilomoe.data.prepare.folder import Report
from torchrec_hilomoe.data.prepare.movielens import prepare_movielens

__all__ = ["DATASETS"]

# The signature of each function is its command line, and its docstring the help.
DATASETS: Mapping[str, Callable[..., Report]] = {"movielens": prepare_movielens}
