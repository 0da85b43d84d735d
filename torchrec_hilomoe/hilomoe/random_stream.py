"""Random numbers of injection's own, so that a host's stay as they would be without experts."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn, Tensor

from torchrec_hilomoe.hilomoe.linear import HiLoMoELinear
from torchrec_hilomoe.hilomoe.router import SampleRouter

__all__ = ["own_random_numbers"]

WITHOUT = ("cpu", "meta")  # the CPU's generator is always kept, and meta has none


@contextmanager
def own_random_numbers(model: nn.Module, seed: int | None) -> Iterator[None]:
    """Draw from a stream of its own inside; the generators are afterwards as they were.

    The stream begins with the seed or, without one, where the host's generators stand: then the
    host's seed decides it. Experts that the model has already have taken the first numbers of such
    a stream, so these are passed over: two injections into a model differ.

    Args:
        model: On whose devices numbers are drawn.
        seed: Of the stream.
    """
    devices = {parameter.device for parameter in model.parameters()}
    devices = [device for device in devices if device.type not in WITHOUT]
    kind = devices[0].type if devices else "cuda"
    with torch.random.fork_rng(devices=devices, device_type=kind):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
            for device in devices:
                with torch.get_device_module(device).device(device):
                    torch.get_device_module(device).manual_seed(seed)
        for parameter in _experts_of(model):
            torch.empty_like(parameter).normal_()
        yield


def _experts_of(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        if isinstance(module, HiLoMoELinear):
            yield from module.expert_parameters().values()
        elif isinstance(module, SampleRouter):
            yield from module.parameters()
