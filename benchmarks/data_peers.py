"""Other loaders over the same rows, for ``bench_data``: FuxiCTR's, and torch's as one writes it.

Both pad every history to the schema's length and hold all rows in memory before the first batch;
that preparation is not timed.
"""

import sys
import tempfile
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.rounding import of_sums
from torchrec_hilomoe.data.schema import Schema

__all__ = ["fuxictr_loader", "iterate", "padded_columns", "torch_loader"]


def padded_columns(table: pa.Table, schema: Schema) -> dict[str, np.ndarray]:
    """Return every column as a matrix or vector of numbers, histories padded with 0."""
    limits = {feature.name: feature.max_length for feature in schema.pooled}
    for group in schema.sequences:
        limits |= {field.name: group.max_length for field in group.fields}
    columns = {}
    for name in schema.columns:
        array = table.column(name).combine_chunks()
        if not pa.types.is_list(array.type):
            columns[name] = np.array(array)  # a copy that torch may call its own
            continue
        lengths_N = np.diff(array.offsets.to_numpy())
        padded_NT = np.zeros((len(array), limits[name]), dtype=np.int64)
        assert lengths_N.max(initial=0) <= limits[name]
        padded_NT[np.arange(limits[name]) < lengths_N[:, None]] = array.flatten().to_numpy()
        columns[name] = padded_NT
    return columns


class _Rows(Dataset):
    """Rows of tensors, one at a time, as the tutorials have it."""

    def __init__(self, columns: Mapping[str, np.ndarray]) -> None:
        self._columns = {name: torch.from_numpy(array) for name, array in columns.items()}
        self._rows = len(next(iter(columns.values())))

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {name: column[row] for name, column in self._columns.items()}


def torch_loader(columns: Mapping[str, np.ndarray], batch_size: int, workers: int) -> DataLoader:
    """Return torch's loader over :func:`padded_columns`, shuffled."""
    return DataLoader(_Rows(columns), batch_size, shuffle=True, num_workers=workers)


def fuxictr_loader(
    columns: Mapping[str, np.ndarray], label: str, batch_size: int, workers: int
) -> Any:
    """Return FuxiCTR's loader of ``.npz`` files over :func:`padded_columns`, shuffled.

    Its loader of Parquet files is Ray's, which this project does not install.

    Returns:
        The loader; ``None`` where FuxiCTR is not installed.
    """
    if find_spec("fuxictr") is None:
        return None
    from tests.helpers.fuxictr import fuxictr_layers

    fuxictr_layers()  # stands in for ray
    feature_map = import_module("fuxictr.features").FeatureMap("bench", "unused")
    for name, array in columns.items():
        if name == label:
            continue
        kind = {"type": "sequence", "max_len": array.shape[1]} if array.ndim > 1 else {}
        feature_map.features[name] = {"type": "categorical", "source": "", **kind}
    feature_map.labels = [label]
    feature_map.set_column_index()
    module = import_module("fuxictr.pytorch.dataloaders.npz_dataloader")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.npz"
        np.savez(path, **cast(dict[str, Any], columns))
        return module.NpzDataLoader(
            feature_map, str(path), batch_size=batch_size, shuffle=True, num_workers=workers
        )


def iterate(loader: Any, columns: Mapping[str, np.ndarray]) -> Callable[[], int]:
    """Return a pass over ``loader``, after checking that it brings every value once.

    Raises:
        SystemExit: If a column's sum is not the stored one.
    """
    sums = dict.fromkeys(columns, 0.0)
    for batch in loader:
        for name in columns:
            sums[name] += float(batch[name].double().sum())
    for name, array in columns.items():
        values = array.astype(np.float64)
        allowed = of_sums(len(values)) * np.finfo(np.float64).eps * np.abs(values).sum()
        if not abs(sums[name] - values.sum()) <= allowed:
            sys.exit(f"column {name!r} of the other loader is not the file's")
    first = next(iter(columns))

    def one_pass() -> int:
        return sum(len(batch[first]) for batch in loader)

    return one_pass
