"""The public FuxiCTR package, the oracle for parity; where it is absent, tests that ask it skip."""

import sys
import warnings
from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest

__all__ = [
    "build_fuxictr",
    "fuxictr_features",
    "fuxictr_layers",
    "fuxictr_model",
    "fuxictr_preprocessing",
]

# What its preprocessing imports of ray, a cluster's worth of packages that no model needs.
RAY = {
    "ray": (),
    "ray.data": ("SaveMode", "TaskPoolStrategy"),
    "ray.data.datasource": (),
    "ray.data.datasource.filename_provider": ("FilenameProvider",),
}


def fuxictr_model(name: str) -> type[Any]:
    """One of the wheel's long-sequence models, such as ``DIN``."""
    return getattr(_imported(f"model_zoo.LongCTR.{name}"), name)


def build_fuxictr(
    name: str,
    item: Mapping[str, int],
    context: Mapping[str, int],
    embedding_dim: int,
    **options: Any,
) -> Any:
    """Build one of the wheel's long-sequence models, with Adam, and cross-entropy on its sigmoid.

    Args:
        name: Such as ``DIN``.
        item: Vocabulary of each field that events and targets have.
        context: Vocabulary of each field that a row has once.
        embedding_dim: Of all of them.
        **options: The model's own.
    """
    feature_map = fuxictr_features(item, context)
    feature_map.default_emb_dim = embedding_dim
    feature_map.num_fields = feature_map.get_num_fields()
    common: dict[str, Any] = {"verbose": 0, "model_root": "unused", "metrics": ["AUC"]}
    training = {"optimizer": "adam", "loss": "binary_crossentropy", "learning_rate": 1e-3}
    return fuxictr_model(name)(
        feature_map,
        embedding_dim=embedding_dim,
        **common,
        **training,
        **options,
    )


def fuxictr_features(item: Mapping[str, int], context: Mapping[str, int]) -> Any:
    """Its description of fields that an item has and of those that a row has once."""
    feature_map = _imported("fuxictr.features").FeatureMap("parity", "unused")
    for source, fields in (("user", context), ("item", item)):
        for field, vocabulary in fields.items():
            kind = {"type": "categorical", "vocab_size": vocabulary, "padding_idx": 0}
            feature_map.features[field] = {"source": source, **kind}
    feature_map.labels = ["label"]
    return feature_map


def fuxictr_layers() -> ModuleType:
    """The layers that its models share."""
    return _imported("fuxictr.pytorch.layers")


def _imported(module: str) -> ModuleType:
    pytest.importorskip("fuxictr", reason="pip install --no-deps -r requirements/dev.txt")
    for name, attributes in RAY.items():
        empty = ModuleType(name)
        for attribute in attributes:
            setattr(empty, attribute, object)
        sys.modules.setdefault(name, empty)
    with warnings.catch_warnings(action="ignore"):  # its own, at import
        return import_module(module)


def fuxictr_preprocessing(
    path: Any, features: list[dict[str, Any]], min_count: int
) -> dict[str, int]:
    """Return the vocabulary sizes that its preprocessing finds in a CSV file.

    Args:
        path: The file; its label is the first column.
        features: Its own descriptions of the columns.
        min_count: Rarer values are unknown.
    """
    preprocess = _imported("fuxictr.preprocess")
    import polars

    processor = preprocess.FeatureProcessor(
        feature_cols=features,
        label_col=[],
        dataset_id="parity",
        data_root=str(path.parent / "fuxictr"),
    )
    processor.save_pickle = lambda path: None  # it leaves its files open
    processor.save_vocab = lambda path: None
    processor.feature_map.save = lambda path: None
    # Its own reading names an argument that polars has renamed.
    frame = polars.scan_csv(path, schema_overrides=processor.dtype_dict)
    processor.fit(processor.preprocess(frame), min_categr_count=min_count)
    return {name: spec["vocab_size"] for name, spec in processor.feature_map.features.items()}
