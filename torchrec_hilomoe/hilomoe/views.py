"""Views: the ranges of a query's columns that each expert layer of a shared router reads.

Shape legend:
    B  samples     D  columns of the query's source     L  expert layers
    V  columns of the widest view
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from torchrec_hilomoe.hilomoe.config import HiLoMoEConfig
from torchrec_hilomoe.hilomoe.function import rms_norm

__all__ = ["check_views", "parts_of", "places_of"]


def check_views(views: Sequence[Sequence[range]], width: int, config: HiLoMoEConfig) -> None:
    """Refuse views that no router of this width and these options can have."""
    if isinstance(views, str):
        raise ValueError(
            f"SampleRouter.views is {views!r}, but a router does not find its views by itself. "
            "Let an InteractionProbe listen to the plain model, and give probe.views()."
        )
    if len(views) != config.num_layers:
        raise ValueError(
            f"SampleRouter.views must be one for each expert layer, got {len(views)} for "
            f"num_layers = {config.num_layers}. Add or drop views, or set num_layers."
        )
    if config.query_dim is not None:
        raise ValueError(
            f"SampleRouter.views need query_dim = None, got query_dim = {config.query_dim}: a "
            "projection would mix what layers must read apart. Use query_dim=None."
        )
    for layer, view in enumerate(views, start=1):
        inside = all(part.step == 1 and 0 <= part.start < part.stop <= width for part in view)
        if not view or not inside or len(set(view)) < len(view):
            raise ValueError(
                f"SampleRouter.views: layer {layer} reads {list(view)}, which must be one or more "
                f"different, non-empty ranges of step 1 within the query's {width} columns."
            )


def places_of(views: Sequence[Sequence[range]], ranges: Sequence[range]) -> Tensor:
    """``(L, V)``, where in the query each layer's columns stand; those missing to V, behind it."""
    starts, end = {}, 0
    for part in ranges:
        starts[part] = end
        end += len(part)
    columns = [[starts[part] + i for part in view for i in range(len(part))] for view in views]
    widest = max(map(len, columns))
    return torch.tensor([own + [end] * (widest - len(own)) for own in columns])


def parts_of(source_BD: Tensor, ranges: Sequence[range]) -> Tensor:
    """Return ranges of columns side by side, each divided by its own root mean square.

    Embeddings start near zero, where no choice would say anything of them. Of a single column the
    norm would leave the sign; it is taken as it is.
    """
    parts = [source_BD[:, part.start : part.stop] for part in ranges]
    return torch.cat([rms_norm(part) if part.shape[1] > 1 else part for part in parts], dim=1)
