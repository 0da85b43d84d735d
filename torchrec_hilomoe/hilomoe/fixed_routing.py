"""The control for learned routing: routers that are drawn at random and never train."""

import torch
from torch import nn

from torchrec_hilomoe.hilomoe.inject import routers_of, sites_of
from torchrec_hilomoe.hilomoe.linear import HiLoMoELinear, ROUTING
from torchrec_hilomoe.hilomoe.random_stream import check_seed
from torchrec_hilomoe.hilomoe.router import SampleRouter

__all__ = ["fix_random_routing"]


def fix_random_routing(model: nn.Module, seed: int) -> None:
    """Draw all routers at random, the same for the same seed, and never train them.

    A row's path is then a fixed random function of its input: as many paths, as balanced as fresh
    routers are, but nothing learned. Keys and query projections become buffers, so no schedule can
    let them learn. Call it before the model is wrapped for distributed training and before its
    optimizer is built.

    Raises:
        ValueError: If a site's keys are tied to its down-vectors, which must train; or if a router
            is reparametrized; or if it is no seed. The model is then as it was.

    Example:
        >>> from torchrec_hilomoe.hilomoe import HiLoMoEConfig, inject_hilomoe
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> _ = inject_hilomoe(model, HiLoMoEConfig(), sites=["0"])
        >>> fix_random_routing(model, seed=0)
        >>> [name for name, _ in model.named_parameters()]
        ['0.weight', '0.bias', '0.expert_in', '0.expert_out']
    """
    check_seed(seed, "fix_random_routing")
    for name, site in sites_of(model).items():
        if site.config.tie_keys:
            raise ValueError(
                f"fix_random_routing: {name!r} has tie_keys = True, so its router cannot be fixed "
                "without its experts. Compare with tie_keys=False."
            )
    learned = {name: _learned_by(router) for name, router in routers_of(model).items()}
    for name, parameters in learned.items():
        others = [own for own in parameters if own not in ROUTING]
        if others:
            raise ValueError(
                f"fix_random_routing: the router {name!r} is reparametrized: it has "
                f"{', '.join(others)}, which would go on learning. Fix it first, or take that off "
                "with torch.nn.utils.parametrize.remove_parametrizations or prune.remove."
            )
    generator = torch.Generator().manual_seed(int(seed))
    for name, router in routers_of(model).items():
        if isinstance(router, SampleRouter):
            router.reset_parameters(generator)
        else:
            router.reset_routing(generator)
        for own, parameter in learned[name].items():
            delattr(router, own)
            router.register_buffer(own, parameter.detach())


def _learned_by(router: HiLoMoELinear | SampleRouter) -> dict[str, nn.Parameter]:
    """What a router learns, by its own names."""
    if isinstance(router, SampleRouter):
        return dict(router.named_parameters())
    return router.routing_parameters()
