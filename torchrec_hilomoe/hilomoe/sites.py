"""What one asks of, or tells, all sites of a model at once."""

import torch
from torch import nn, Tensor

from torchrec_hilomoe.hilomoe.attached import attached_losses
from torchrec_hilomoe.hilomoe.linear import HiLoMoELinear

__all__ = ["auxiliary_loss", "expert_parameters", "set_auxiliary_loss_scale", "sites_of"]


def sites_of(model: nn.Module) -> dict[str, HiLoMoELinear]:
    """The model's sites by qualified name, in the model's order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, HiLoMoELinear)}


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter that the experts brought, by qualified name.

    To train only them, freeze the rest before the model is wrapped for data-parallel training::

        model.requires_grad_(False)
        for parameter in expert_parameters(model).values():
            parameter.requires_grad_(True)
    """
    return {
        f"{site_name}.{name}" if site_name else name: parameter
        for site_name, site in sites_of(model).items()
        for name, parameter in site.expert_parameters().items()
    }


def auxiliary_loss(model: nn.Module) -> Tensor:
    """The auxiliary loss of the last training forward: the mean over sites, weighted, detached.

    Attached losses of other parts of the model are added to it.

    Under data-parallel training it is this rank's part: the average over ranks is the loss of the
    global batch, as with the host's own loss. It is unscaled, and 0 where no site has computed one.
    """
    total, sites = torch.zeros(()), sites_of(model).values()
    for site in sites:
        if site.routing_record is not None:
            part = site.routing_record.losses()
            loss_L = site.config.balance_weight * part.balance_L + site.config.z_weight * part.z_L
            total = total.to(loss_L.device) + loss_L.mean() / len(sites)
    for attached in attached_losses(model).values():
        if attached.value is not None:
            total = total.to(attached.value.device) + attached.weight * attached.value
    return total


def set_auxiliary_loss_scale(model: nn.Module, scale: float) -> None:
    """Say by what the host multiplies its loss before ``backward``; 1 unless told otherwise.

    ``1 / K`` for a host that divides its loss by ``K`` accumulated micro-batches,
    ``scaler.get_scale()`` before each step for one that uses a ``GradScaler``, and their product
    for both. The model's loss is the mean over its sites, so call it also after adding sites by
    hand; ``inject_hilomoe`` does.
    """
    sites = sites_of(model).values()
    routers = [site.shared_router for site in sites if site.shared_router is not None]
    for router in routers:
        router.auxiliary_scale = scale * routers.count(router) / len(sites)
    for site in sites:
        site.auxiliary_scale = scale / len(sites)
    for attached in attached_losses(model).values():
        attached.scale = scale
