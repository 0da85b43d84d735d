"""What a probe is told, refused where it means nothing."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from torchrec_hilomoe.hilomoe.linear import HiLoMoELinear

__all__ = ["check_columns", "check_features", "match_sites"]


def check_features(features: Mapping[str, range]) -> None:
    """Refuse features that cannot be ranked."""
    if len(features) < 2:
        raise ValueError(
            f"InteractionProbe.features must be two at least, since a ranking of one says nothing; "
            f"got {list(features)}. Name the columns of more features."
        )
    for name, part in features.items():
        if part.step != 1 or not 0 <= part.start < part.stop:
            raise ValueError(
                f"InteractionProbe.features: {name!r} is {part!r}, which must be a range of "
                "columns of step 1 that is not empty, such as range(0, 16)."
            )


def match_sites(
    modules: Mapping[str, nn.Module], patterns: Sequence[str]
) -> dict[str, nn.Linear | HiLoMoELinear]:
    """The maps that the patterns mean, by name, in the model's order."""
    maps = {n: m for n, m in modules.items() if isinstance(m, nn.Linear | HiLoMoELinear) and n}
    listed = ", ".join(maps) or "(none)"
    if isinstance(patterns, str) or not patterns:
        raise ValueError(
            f"InteractionProbe.sites must be a list of at least one name pattern, got "
            f"{patterns!r}. The model's linear maps: {listed}."
        )
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in maps):
            raise ValueError(
                f"InteractionProbe.sites pattern {pattern!r} matches none of the model's linear "
                f"maps: {listed}. Write a pattern that matches one of these names."
            )
    return {n: m for n, m in maps.items() if any(fnmatchcase(n, pattern) for pattern in patterns)}


def check_columns(features: Mapping[str, range], query_module: str, width: int) -> None:
    """Refuse a feature whose columns the query does not have."""
    for name, part in features.items():
        if part.stop > width:
            raise ValueError(
                f"InteractionProbe.features: {name!r} is columns {part.start} to {part.stop}, "
                f"but the output of query_module {query_module!r} has {width} columns. "
                "Correct the range, or name another module."
            )
