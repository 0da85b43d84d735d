"""What a probe is told, refused where it means nothing; and rows that tell too little."""

from collections.abc import Mapping, Sequence

from torch import nn

from torchrec_hilomoe.hilomoe.linear import HiLoMoELinear
from torchrec_hilomoe.hilomoe.probe.buckets import ALL, RANDOM, WIDER
from torchrec_hilomoe.hilomoe.selectors import matcher, Selector, shown

__all__ = ["CannotJudgeError", "check_columns", "check_experts", "check_features", "match_sites"]


class CannotJudgeError(ValueError):
    """The rows tell too little of what is asked; the same on every rank.

    Args:
        option: Whose the rows are, for the message.
        reason: What they lack.
        remedy: What a host's author can do, in a sentence.

    Attributes:
        reason: As given; a run whose loop is not the user's has another remedy.

    Example:
        >>> CannotJudgeError("probe", "1 row fits, but 2 are needed", "Give more rows.").reason
        '1 row fits, but 2 are needed'
    """

    def __init__(self, option: str, reason: str, remedy: str) -> None:
        super().__init__(f"{option}: {reason}. {remedy}")
        self.reason = reason


def check_experts(num_experts: int) -> None:
    """Refuse experts among which there is nothing to choose."""
    if num_experts < 2:
        raise ValueError(
            f"InteractionProbe: num_experts is {num_experts}, so that no feature can part rows. "
            "Raise num_experts (model.hilomoe.num_experts) to 2 or more, or probe nothing."
        )


def check_features(features: Mapping[str, range]) -> None:
    """Refuse features that cannot be ranked."""
    if not isinstance(features, Mapping):
        raise ValueError(
            f"InteractionProbe.features must say which columns of the query each feature is, got "
            f"{features!r}. Give a mapping such as {{'item': range(0, 16), 'hour': range(16, 32)}}."
        )
    if len(features) < 2:
        raise ValueError(
            f"InteractionProbe.features must be two at least, since a ranking of one says nothing; "
            f"got {list(features)}. Name the columns of more features."
        )
    for name, part in features.items():
        if not isinstance(name, str) or not isinstance(part, range):
            raise ValueError(
                f"InteractionProbe.features: {name!r} is {part!r}, but a feature has a name and a "
                "range of columns. Write it as 'item': range(0, 16)."
            )
        if name in (ALL, RANDOM, WIDER):
            raise ValueError(
                f"InteractionProbe.features: {name!r} is the name of a control, beside which "
                f"features are reported. Give the feature another name than {ALL!r}, {RANDOM!r} "
                f"and {WIDER!r}."
            )
        if part.step != 1 or not 0 <= part.start < part.stop:
            raise ValueError(
                f"InteractionProbe.features: {name!r} is {part!r}, which must be a range of "
                "columns of step 1 that is not empty, such as range(0, 16)."
            )


def match_sites(
    model: nn.Module, sites: Sequence[Selector]
) -> dict[str, nn.Linear | HiLoMoELinear]:
    """The maps that are meant, by name, in the model's order."""
    modules = model.named_modules()
    maps = {n: m for n, m in modules if isinstance(m, nn.Linear | HiLoMoELinear) and n}
    listed = ", ".join(maps) or "(none)"
    if isinstance(sites, str) or not sites:
        raise ValueError(
            f"InteractionProbe.sites must be a list of at least one name pattern, got "
            f"{sites!r}. The model's linear maps: {listed}."
        )
    meant: set[str] = set()
    for selector in sites:
        means = matcher(model, selector)
        found = {name for name, module in maps.items() if means(name, module)}
        if not found:
            raise ValueError(
                f"InteractionProbe.sites pattern {shown(selector)} matches none of the model's "
                f"linear maps: {listed}. Write a pattern that matches one of these names."
            )
        meant |= found
    return {name: module for name, module in maps.items() if name in meant}


def check_columns(features: Mapping[str, range], query_module: str, width: int) -> None:
    """Refuse a feature whose columns the query does not have."""
    for name, part in features.items():
        if part.stop > width:
            raise ValueError(
                f"InteractionProbe.features: {name!r} is columns {part.start} to {part.stop}, "
                f"but the output of query_module {query_module!r} has {width} columns. "
                "Correct the range, or name another module."
            )
