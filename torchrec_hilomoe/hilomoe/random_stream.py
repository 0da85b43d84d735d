"""Random numbers of injection's own, so that a host's stay as they would be without experts."""

from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral

import torch
from torch import nn, Tensor

from torchrec_hilomoe.hilomoe.linear import HiLoMoELinear
from torchrec_hilomoe.hilomoe.router import SampleRouter

__all__ = ["check_seed", "kept_random_numbers", "own_random_numbers"]

WITHOUT = ("cpu", "meta")  # the CPU's generator is always kept, and meta has none


def check_seed(seed: object, caller: str) -> None:
    """Refuse what PyTorch's generators do not take.

    Raises:
        ValueError: If it is no whole number of 64 bits.
    """
    number = int(seed) if isinstance(seed, Integral) and not isinstance(seed, bool) else None
    if number is None or not -(2**63) <= number < 2**64:
        raise ValueError(
            f"{caller}: seed must be a whole number of at most 64 bits, got {seed!r}. Give "
            "one such as 0."
        )


@contextmanager
def kept_random_numbers(model: nn.Module) -> Iterator[list[torch.device]]:
    """Leave generators as they are found; yields the model's devices that have one of their own."""
    devices = {parameter.device for parameter in model.parameters()}
    devices = [device for device in devices if device.type not in WITHOUT]
    kind = devices[0].type if devices else "cuda"
    with torch.random.fork_rng(devices=devices, device_type=kind):
        yield devices


@contextmanager
def own_random_numbers(model: nn.Module, seed: int | None) -> Iterator[None]:
    """Draw from a stream of its own inside; the generators are afterwards as they were.

    The stream begins with the seed or, without one, where the host's generators stand: then the
    host's seed decides it. Experts that the model has already have taken the first numbers of such
    a stream, so these are passed over: two injections into a model differ.

    Args:
        model: On whose devices numbers are drawn.
        seed: Of the stream.

    Raises:
        ValueError: If it is no seed.
    """
    if seed is not None:
        check_seed(seed, "inject")
    with kept_random_numbers(model) as devices:
        if seed is not None:
            torch.default_generator.manual_seed(int(seed))
            for device in devices:
                with torch.get_device_module(device).device(device):
                    torch.get_device_module(device).manual_seed(int(seed))
        for parameter in _experts_of(model):
            torch.empty_like(parameter).normal_()
        yield


def _experts_of(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        if isinstance(module, HiLoMoELinear):
            yield from module.expert_parameters().values()
        elif isinstance(module, SampleRouter):
            yield from module.parameters()
