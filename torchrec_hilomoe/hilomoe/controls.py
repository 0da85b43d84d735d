"""Controls for experiments: what a claim about learned routing must be compared with."""

from collections.abc import Mapping

import torch
from torch import nn

from torchrec_hilomoe.hilomoe.sites import sites_of

__all__ = ["fix_random_routing"]


def fix_random_routing(model: nn.Module, seed: int) -> None:
    """Draw all routers at random, the same for the same seed, and never train them.

    A row's path is then a fixed random function of its input: as many paths, as balanced as fresh
    routers are, but nothing learned. Keys and query projections become buffers, so no schedule can
    let them learn. Call it before the model is wrapped for distributed training and before its
    optimizer is built.

    Raises:
        ValueError: If a site's keys are tied to its down-vectors: those must train.
    """
    generator = torch.Generator().manual_seed(seed)
    sites = sites_of(model)
    for name, site in sites.items():
        if site.config.tie_keys:
            raise ValueError(
                f"fix_random_routing: {name!r} has tie_keys = True, so its router cannot be fixed "
                "without its experts. Compare with tie_keys=False."
            )
    for site in sites.values():
        router = site.shared_router
        if router is None:
            site.reset_routing(generator)
            _fix(site, site.routing_parameters())
        elif router in site.children():  # once, by its owner
            router.reset_parameters(generator)
            _fix(router, dict(router.named_parameters()))


def _fix(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        delattr(module, name)
        module.register_buffer(name, parameter.detach())
