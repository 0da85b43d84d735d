"""What is measured: one configuration a case, and sweeps that vary one thing of it at a time."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from benchmarks.random_batches import click_log, Stream
from torchrec_hilomoe.config import RunConfig
from torchrec_hilomoe.data.schema import Schema
from torchrec_hilomoe.training.pipelines.pipeline import resolved_kind

__all__ = ["SWEEPS", "Base", "Case", "cases_of", "parse_sweeps"]

Feed = Literal["ready", "loader"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One configuration, by what tells it from others.

    Attributes:
        backbone: Its name.
        layers: Of experts; 0 is the plain backbone.
        experts: Of a layer; 0 where there are none.
        sites: Where they are.
        pipeline: How steps overlap.
        feed: ``ready``: random batches that lie on the device; ``loader``: the product's loader,
            over Parquet files of such rows, or over a folder that was given.
        batch_size: Rows of a global batch.
        length: Events of a history, on average.
        max_length: The most events of one.
        rows: Of the largest table.
        width: Of an embedding.
        precision: Of the dense part.
        dataset: ``random``, or whose schema it is.
        options: What else was asked for, as it was written.
    """

    backbone: str
    layers: int
    experts: int
    sites: str
    pipeline: str
    feed: Feed
    batch_size: int
    length: int
    max_length: int
    rows: int
    width: int
    precision: str
    dataset: str
    options: str


@dataclass(frozen=True, kw_only=True)
class Base:
    """What every case starts from.

    Attributes:
        config: A run's configuration, resolved.
        schema: The data set's, if one was named; None is a random click log.
        rows: Of the random log's item table and of its user table.
        length: Its mean history.
        max_length: Its longest.
        skew: As in :class:`Stream`.
        options: As in :class:`Case`.
    """

    config: RunConfig
    schema: Schema | None
    rows: int
    length: int
    max_length: int
    skew: float = 1.0
    options: str = ""

    def __post_init__(self) -> None:
        for name in ("rows", "length", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}.")
        if self.length > self.max_length:
            raise ValueError(
                f"--length {self.length} is above --max_length {self.max_length}: histories are no "
                "longer than the longest. Raise --max_length or lower --length."
            )
        if not self.skew > 0:
            raise ValueError(f"--skew must be above 0 (1 draws all ids alike), got {self.skew}.")

    def case(self, ranks: int) -> Case:
        """The case that varies nothing, on so many ranks."""
        model, train = self.config.model, self.config.train
        schema = self.schema or click_log(self.rows, self.max_length)
        max_seqlen = max((group.max_length for group in schema.sequences), default=1)
        return Case(
            backbone=model.backbone,
            layers=model.hilomoe.num_layers if model.hilomoe.enabled else 0,
            experts=model.hilomoe.num_experts if model.hilomoe.enabled else 0,
            sites=",".join(model.hilomoe.sites) if model.hilomoe.enabled else "",
            pipeline="none" if train.debug else resolved_kind(train.pipeline, ranks),
            feed="ready",
            batch_size=train.batch_size,
            length=min(self.length, max_seqlen),
            max_length=max_seqlen,
            rows=max(schema.tables.values()),
            width=model.embedding_dim,
            precision=train.precision,
            dataset=schema.dataset,
            options=self.options,
        )

    def schema_of(self, case: Case) -> Schema:
        """Columns of a case."""
        return self.schema or click_log(case.rows, case.max_length)

    def stream_of(self, case: Case) -> Stream:
        """Random rows of a case."""
        return Stream(schema=self.schema_of(case), mean_length=case.length, skew=self.skew)

    def config_of(self, case: Case) -> RunConfig:
        """The run that a case is."""
        train = {"batch_size": case.batch_size, "debug": case.pipeline == "none"}
        if case.pipeline != "none":
            train["pipeline"] = case.pipeline
        hilomoe = replace(self.config.model.hilomoe, enabled=case.layers > 0)
        if case.layers:
            hilomoe = replace(hilomoe, num_layers=case.layers, num_experts=case.experts)
        return replace(
            self.config,
            model=replace(self.config.model, hilomoe=hilomoe),
            train=replace(self.config.train, **train),
        )


def _plain(case: Case) -> Case:
    return replace(case, layers=0, experts=0, sites="")


def _other_pipeline(case: Case) -> Case:
    return replace(case, pipeline="base" if case.pipeline != "base" else "sparse_dist")


def _with_length(case: Case, length: int) -> Case:
    return replace(case, length=length, max_length=max(length, case.max_length))


# What is one case or two, whatever the values.
FIXED: Mapping[str, Callable[[Case, int], list[Case]]] = MappingProxyType(
    {
        "base": lambda case, ranks: [case],
        "plain": lambda case, ranks: [_plain(case)],
        "pipeline": lambda case, ranks: [_other_pipeline(case), _other_pipeline(_plain(case))],
        "loader": lambda case, ranks: [replace(case, feed="loader")],
        "weak": lambda case, ranks: [replace(case, batch_size=case.batch_size * ranks)],
    }
)
VARIED: Mapping[str, Callable[[Case, int], Case]] = MappingProxyType(
    {
        "batch": lambda case, value: replace(case, batch_size=value),
        "length": _with_length,
        "rows": lambda case, value: replace(case, rows=value),
        "layers": lambda case, value: replace(case, layers=value),
        "experts": lambda case, value: replace(case, experts=value),
    }
)
USUAL: Mapping[str, Callable[[Case], list[int]]] = MappingProxyType(
    {
        "batch": lambda case: [max(1, case.batch_size // 4), case.batch_size, 4 * case.batch_size],
        "length": lambda case: [max(1, case.max_length // 5), case.max_length],
        "rows": lambda case: [10**5, 10**6, 10**7],
        "layers": lambda case: [1, 2, 3, 6],
        "experts": lambda case: [4, 8, 16, 32, 64],
    }
)
SWEEPS: Mapping[str, str] = MappingProxyType(
    {
        "base": "the configuration itself",
        "plain": "without experts",
        "pipeline": "the other pipeline, base or sparse_dist, with experts and without",
        "loader": "fed by the real loader",
        "weak": "each rank has the whole batch size; in all others ranks share it (strong scaling)",
        "batch": "rows of a global batch",
        "length": "mean events of a history",
        "rows": "rows of the item table and of the user table",
        "layers": "layers of experts, L",
        "experts": "experts of a layer, E",
    }
)


def parse_sweeps(words: Sequence[str]) -> dict[str, list[int] | None]:
    """Read ``NAME`` or ``NAME=VALUE,VALUE``; the values of a name alone are its usual ones.

    Raises:
        ValueError: If a sweep is unknown or a value is no number of at least 1.

    Example:
        >>> parse_sweeps(["base", "rows=1000,1e5"])
        {'base': None, 'rows': [1000, 100000]}
    """
    found: dict[str, list[int] | None] = {}
    for word in words:
        name, given, values = word.partition("=")
        if name not in SWEEPS:
            raise ValueError(f"--sweep: there is no {name!r}. Take some of {', '.join(SWEEPS)}.")
        if given and name in FIXED:
            raise ValueError(f"--sweep: {name} takes no values, got {word!r}.")
        numbers = values.split(",") if given else []
        for number in numbers:
            if not re.fullmatch(r"[1-9]\d*(e\d+)?", number):
                raise ValueError(
                    f"--sweep: {number!r} in {word!r} is no whole number of at least 1; write "
                    f"{name}=1000,1e6."
                )
        found[name] = [int(float(number)) for number in numbers] if given else None
    return found


def cases_of(base: Base, sweeps: Mapping[str, list[int] | None], ranks: int) -> list[Case]:
    """Return the cases of all sweeps, each once.

    Raises:
        ValueError: If a case cannot be, with the option that would make it possible.
    """
    start = base.case(ranks)
    cases: list[Case] = []
    for name, values in sweeps.items():
        _check_sweep(name, base)
        if name in FIXED:
            cases += FIXED[name](start, ranks)
        else:
            chosen = USUAL[name](start) if values is None else values
            cases += [VARIED[name](start, value) for value in chosen]
    for case in cases:
        if case.batch_size < ranks:
            raise ValueError(
                f"a batch of {case.batch_size} rows for {ranks} ranks: each needs one at least. "
                f"Raise train.batch_size to {ranks}."
            )
    return list(dict.fromkeys(cases))


def _check_sweep(name: str, base: Base) -> None:
    if name in ("layers", "experts") and not base.config.model.hilomoe.enabled:
        raise ValueError(f"--sweep {name}: the model has no experts. Leave out model.hilomoe null.")
    if name in ("rows", "length") and base.schema is not None:
        raise ValueError(
            f"--sweep {name}: the columns are those of {base.schema.dataset!r}. Name no recipe and "
            "no folder of data, and random ones of any shape are made."
        )
