"""Metrics: exact, weighted, over all ranks, in bounded memory.

definitions.py  what is computed, of arrays     predictions.py  collected while a model runs
over_ranks.py   a sort shared out over ranks    sorted_runs.py  rows, sorted, on disk if many
"""

from torchrec_hilomoe.training.metrics.definitions import (
    auc,
    compute_metrics,
    gauc,
    logloss,
    Metrics,
)
from torchrec_hilomoe.training.metrics.predictions import pack_rows, Predictions, SlicedPredictions

__all__ = [
    "Metrics",
    "Predictions",
    "SlicedPredictions",
    "auc",
    "compute_metrics",
    "gauc",
    "logloss",
    "pack_rows",
]
