"""InterFormer's parameters and FLOPs on AmazonElectronics_x1, against counts made by hand."""

from dataclasses import dataclass
from itertools import pairwise

import pytest

from tests.helpers.datasets import AMAZON
from torchrec_hilomoe.config import InjectionConfig, InterFormerConfig, ModelConfig
from torchrec_hilomoe.models.build import build_task
from torchrec_hilomoe.models.flops import Cost, count_cost

ITEM, CATEGORY = 63_003, 803
FIELDS, EVENTS = 2, 100
# The paper's: 4 CLS, 2 pooled, 2 recent tokens; its width is the benchmark's.
CLS, POOLED, RECENT, WIDTH = 4, 2, 2, 64
HEAD = (1024, 512, 256, 128)
PUBLISHED = 7.18e6


@dataclass(frozen=True, kw_only=True)
class Depth:
    """Layers, and DHEN's layers in each: the paper tunes them from 1 to 3 and names none."""

    layers: int
    interactions: int


DEPTHS = [Depth(layers=1, interactions=3), Depth(layers=2, interactions=1)]


def cost_of(depth: Depth) -> Cost:
    config = ModelConfig(
        backbone="interformer",
        embedding_dim=WIDTH,
        head=HEAD,
        interformer=InterFormerConfig(
            num_layers=depth.layers, interaction_layers=depth.interactions
        ),
        hilomoe=InjectionConfig(enabled=False),
    )
    return count_cost(build_task(config, AMAZON), AMAZON, WIDTH)


def linear(inputs: int, outputs: int) -> int:
    return (inputs + 1) * outputs


@pytest.mark.parametrize("depth", DEPTHS, ids=str)
def test_parameters(depth):
    D, event, summary = WIDTH, FIELDS * WIDTH, CLS + POOLED + RECENT
    tokens = FIELDS + summary
    pairs, flat = tokens * (tokens - 1) // 2, tokens * D
    merge = 2 * linear(event, event) + linear(event, D)
    mix, gates = linear(FIELDS, CLS) + linear(CLS, CLS), 4 * linear(D, D)
    pooling = POOLED * D + 3 * linear(D, D)
    dhen = linear(pairs, flat) + linear(flat, flat) + 2 * D
    update = linear(flat, FIELDS * D) + linear(FIELDS * D, FIELDS * D)
    history = CLS * D + 4 * linear(D, D)
    widths = ((CLS + summary) * D, *HEAD, 1)
    head = sum(linear(inputs, outputs) for inputs, outputs in pairwise(widths))
    parameters = cost_of(depth).parameters
    assert parameters["tables"] == (ITEM + CATEGORY) * D
    assert parameters["head"] == head
    assert parameters["backbone"] == (
        merge
        + (depth.layers + 1) * (mix + gates + pooling)
        + depth.layers * (depth.interactions * dhen + update + history)
    )


@pytest.mark.slow
def test_the_published_size_is_among_those_that_the_tuned_depths_give():
    """The paper's choice is not known: 7.18 million lie between our smallest and our largest."""
    sizes = [
        cost_of(Depth(layers=layers, interactions=interactions)).parameters["total"]
        for layers, interactions in [(1, 1), (1, 3), (2, 1), (3, 3)]
    ]
    assert min(sizes) < PUBLISHED < max(sizes)
    assert min(abs(size - PUBLISHED) for size in sizes) < 0.02 * PUBLISHED


@pytest.mark.parametrize("depth", DEPTHS, ids=str)
def test_flops_with_a_full_history(depth):
    D, event, summary = WIDTH, FIELDS * WIDTH, CLS + POOLED + RECENT
    tokens, rows = FIELDS + summary, CLS + EVENTS
    pairs, flat = tokens * (tokens - 1) // 2, tokens * D
    merge = EVENTS * (2 * event**2 + event * D)
    mix = D * (FIELDS * CLS + CLS**2)
    gates = (CLS + summary) * 2 * D**2
    pooling = 2 * rows * D**2 + POOLED * D**2 + 2 * POOLED * rows * D
    dhen = tokens**2 * D + pairs * flat + flat**2
    update = flat * FIELDS * D + (FIELDS * D) ** 2
    # The row's own map costs two thin products a token, not one of D x D.
    history = 2 * rows * CLS * D + 4 * rows * D**2 + 2 * rows**2 * D
    widths = ((CLS + summary) * D, *HEAD, 1)
    flops = cost_of(depth).flops
    assert flops["head"] == 2 * sum(inputs * outputs for inputs, outputs in pairwise(widths))
    assert flops["backbone"] == 2 * (
        merge
        + (depth.layers + 1) * (mix + gates + pooling)
        + depth.layers * (depth.interactions * dhen + update + history)
    )
