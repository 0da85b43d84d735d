"""What a probe adds up, batch by batch, against loops over rows in float64."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from tests.helpers.rounding import assert_same, assert_within, float64_rounding, rounding_of
from torchrec_hilomoe.hilomoe.probe.interactions import FitSums, HeldOutSums, signed_gain
from torchrec_hilomoe.hilomoe.probe.pairs import PairSums
from torchrec_hilomoe.hilomoe.probe.rows import bucket_sums, BucketRows, Buckets, joint_weights
from torchrec_hilomoe.hilomoe.reference import BucketedRows, interaction, paired_gain

BLOCKS = 3
# rows, D, O, E, R: odd and degenerate sizes first
SHAPES = [(40, 1, 1, 2, 1), (60, 5, 3, 4, 2), (90, 4, 7, 3, 9)]


def make_rows(shape, seed: int, weighted: bool, units: int = 2) -> BucketRows:
    """Rows whose map differs by bucket of the first unit."""
    rows, width_in, width_out, experts, _ = shape
    rng = torch.Generator().manual_seed(seed)
    bucket_KN = torch.randint(experts, (units, rows), generator=rng)
    x_ND = torch.randn(rows, width_in, generator=rng).double() + 0.3
    maps_EOD = torch.randn(
        experts, width_out, width_in, generator=torch.Generator().manual_seed(9)
    ).double()
    delta_NO = torch.randn(rows, width_out, generator=rng).double()
    delta_NO += torch.einsum("nod,nd->no", maps_EOD[bucket_KN[0]], x_ND)
    weight_N = torch.ones(rows).double()
    if weighted:
        weight_N = torch.rand(rows, generator=rng).double() + 0.1
    return BucketRows(
        x_ND=x_ND,
        delta_NO=delta_NO * weight_N[:, None],
        weight_N=weight_N,
        buckets=Buckets(bucket_KN, experts),
    )


def in_buckets(rows: BucketRows, unit: int) -> BucketedRows:
    """As the reference takes them: gradients without weights."""
    return BucketedRows(
        x_ND=rows.x_ND.double(),
        delta_NO=(rows.delta_NO / rows.weight_N[:, None]).double(),
        weight_N=rows.weight_N.double(),
        bucket_N=rows.buckets.bucket_KN[unit],
    )


def pieces(rows: BucketRows) -> list[BucketRows]:
    """The same rows in unequal batches; one of them is empty."""
    cuts = [0, 7, 7, len(rows.x_ND) // 2, len(rows.x_ND)]
    return [rows.at(slice(start, stop)) for start, stop in zip(cuts, cuts[1:], strict=False)]


def streamed(fit: BucketRows, held_out: BucketRows, experts: int, rank: int) -> HeldOutSums:
    sums = FitSums(
        len(fit.buckets), experts, fit.x_ND.shape[1], fit.delta_NO.shape[1], torch.device("cpu")
    )
    for part in pieces(fit):
        sums.add(part)
    judge = HeldOutSums(sums.directions(rank), BLOCKS)
    for at, part in enumerate(pieces(held_out)):
        judge.add(part, at % BLOCKS)
    return judge


def results(fit: BucketRows, held_out: BucketRows, experts: int, rank: int) -> dict:
    found = streamed(fit, held_out, experts, rank).statistics()
    gain_K = signed_gain(found.slope_K, found.size_K)
    return {"slope": found.slope_K, "size": found.size_K, "gain": gain_K}


def reference_results(fit: BucketRows, held_out: BucketRows, experts: int, rank: int) -> dict:
    found = [
        interaction(in_buckets(fit, unit), in_buckets(held_out, unit), experts, rank)
        for unit in range(len(fit.buckets))
    ]
    return {
        name: torch.tensor([getattr(one, name) for one in found], dtype=torch.float64)
        for name in ("slope", "size", "gain")
    }


@pytest.mark.parametrize("weighted", [False, True], ids=["equal", "weighted"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "N{}-D{}-O{}-E{}-R{}".format(*s))
def test_matches_the_reference_in_float64(shape, weighted):
    fit, held_out = make_rows(shape, 0, weighted), make_rows(shape, 1, weighted)
    _, _, _, experts, rank = shape
    want = reference_results(fit, held_out, experts, rank)
    bound = rounding_of(results, fit, held_out, experts, rank)
    assert_within(results(fit, held_out, experts, rank), want, bound)
    assert float(want["size"][0]) > 0


def test_matches_the_reference_in_float32():
    shape = SHAPES[1]
    fit, held_out = (
        replace(
            rows,
            x_ND=rows.x_ND.float(),
            delta_NO=rows.delta_NO.float(),
            weight_N=rows.weight_N.float(),
        )
        for rows in (make_rows(shape, 0, True), make_rows(shape, 1, True))
    )
    want = reference_results(fit, held_out, shape[3], shape[4])
    bound = rounding_of(results, fit, held_out, shape[3], shape[4])
    assert_within(results(fit, held_out, shape[3], shape[4]), want, bound)


def test_a_bucket_without_rows_adds_nothing():
    shape = SHAPES[1]
    fit, held_out = make_rows(shape, 0, False), make_rows(shape, 1, False)
    fit.buckets.bucket_KN[0].clamp_(max=2)  # bucket 3 has held-out rows only
    held_out.buckets.bucket_KN[1].clamp_(min=1)  # bucket 0 has fit rows only
    want = reference_results(fit, held_out, shape[3], shape[4])
    bound = rounding_of(results, fit, held_out, shape[3], shape[4])
    assert_within(results(fit, held_out, shape[3], shape[4]), want, bound)


def test_overlap_is_the_mean_product_of_two_rows_steps():
    shape = SHAPES[1]
    fit, held_out = make_rows(shape, 0, True), make_rows(shape, 1, True)
    judge = streamed(fit, held_out, shape[3], shape[4])
    found, steps = judge.statistics(), judge.directions
    full = torch.einsum("kero,kerd->keod", steps.left_KERO, steps.right_KERD)
    total, want = held_out.weight_N.sum(), torch.zeros(2, 2, dtype=torch.float64)
    for n, weight in enumerate(held_out.weight_N):
        own = [full[unit, held_out.buckets.bucket_KN[unit, n]] for unit in range(2)]
        for one in range(2):
            for other in range(2):
                want[one, other] += weight / total * (own[one] * own[other]).sum()
    bound = float64_rounding(held_out.weight_N, full)
    assert_within(found.overlap_KK, want, bound)
    assert_within(found.overlap_KK.diagonal(), found.size_K, bound)


def test_blocks_that_count_twice_are_rows_that_stand_there_twice():
    shape = SHAPES[1]
    fit, held_out = make_rows(shape, 0, True), make_rows(shape, 1, True)
    judge = streamed(fit, held_out, shape[3], shape[4])
    slope_BK, size_BK = judge.slopes(torch.tensor([[2.0, 0.0, 1.0]], dtype=torch.float64))
    again = HeldOutSums(judge.directions, BLOCKS)
    for at, part in enumerate(pieces(held_out)):
        for _ in range((2, 0, 1)[at % BLOCKS]):
            again.add(part, 0)
    want = again.statistics()
    bound = float64_rounding(held_out.x_ND, held_out.delta_NO, want.size_K)
    assert_within(slope_BK[0], want.slope_K, bound)
    assert_within(size_BK[0], want.size_K, bound)


def blocks_of(shape, weighted: bool) -> list[BucketRows]:
    """Three blocks that judge, and one of rows that are not held out."""
    return [make_rows(shape, seed, weighted) for seed in range(BLOCKS + 1)]


def paired(blocks: list[BucketRows], experts: int) -> PairSums:
    first = blocks[0]
    sums = PairSums(
        len(first.buckets),
        experts,
        first.x_ND.shape[1],
        first.delta_NO.shape[1],
        BLOCKS,
        torch.device("cpu"),
    )
    for at, block in enumerate(blocks):
        for part in pieces(block):
            sums.add(part, at if at < BLOCKS else None)
    return sums


def paired_gains(blocks: list[BucketRows], experts: int) -> torch.Tensor:
    sums = paired(blocks, experts)
    slope_BK, size_BK = sums.slopes(torch.ones(1, BLOCKS, dtype=torch.float64))
    return signed_gain(slope_BK[0], size_BK[0])


@pytest.mark.parametrize("trained", [False, True], ids=["all held out", "some trained on"])
@pytest.mark.parametrize("weighted", [False, True], ids=["equal", "weighted"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "N{}-D{}-O{}-E{}-R{}".format(*s))
def test_pairs_of_blocks_match_the_reference_in_float64(shape, weighted, trained):
    experts = shape[3]
    blocks = blocks_of(shape, weighted)[: BLOCKS + trained]
    blocks[1].buckets.bucket_KN[0].clamp_(max=experts - 2)  # one has no rows
    want = torch.tensor(
        [
            paired_gain([in_buckets(block, unit) for block in blocks], experts)
            for unit in range(len(blocks[0].buckets))
        ],
        dtype=torch.float64,
    )
    assert_within(paired_gains(blocks, experts), want, rounding_of(paired_gains, blocks, experts))
    assert float(want[0]) > float(want[1])


def test_a_block_is_never_compared_with_itself():
    """One held-out block and no other rows: nothing can be said."""
    block = make_rows(SHAPES[1], 0, False)
    assert_same(paired_gains([block], SHAPES[1][3]), torch.zeros(2).double())


def test_what_units_have_in_common_is_theirs_alone_on_the_diagonal():
    blocks = blocks_of(SHAPES[2], True)[:BLOCKS]
    for block in blocks:
        block.buckets.bucket_KN[1] = block.buckets.bucket_KN[0]
    found = paired(blocks, SHAPES[2][3]).statistics()
    gain_K = paired_gains(blocks, SHAPES[2][3])
    bound = float64_rounding(*(block.delta_NO for block in blocks), found.overlap_KK)
    assert_within(found.overlap_KK.diagonal() / 2, gain_K, bound)
    assert float(found.overlap_KK[0, 1]) > 0.9 * float(found.overlap_KK[0, 0])


def test_units_are_compared_whichever_blocks_have_rows():
    """A pass that judges need not come to the first block, where others have been heard before."""
    rows = make_rows(SHAPES[1], seed=1, weighted=True)
    rows.buckets.bucket_KN[1] = rows.buckets.bucket_KN[0]
    sums = PairSums(2, 4, 5, 3, BLOCKS, torch.device("cpu"))
    for block in (None, 1, 2):
        sums.add(rows, block)
    overlap_KK = sums.statistics().overlap_KK
    assert float(overlap_KK[0, 1]) > 0.9 * float(overlap_KK[0, 0])  # one unit, twice: .99


@pytest.mark.parametrize(
    ("units", "experts", "rows", "width_in", "width_out"),
    [
        (3, 4, 50, 5, 3),
        (2, 3, 40, 40, 33),  # outer products of all rows would be too many
        (3, 20_000, 30, 2, 1),  # more buckets than 16 bits tell apart
        (2, 3, 0, 4, 2),
    ],
)
def test_sums_of_sorted_rows_are_those_of_one_hot_rows(units, experts, rows, width_in, width_out):
    rng = torch.Generator().manual_seed(5)

    def whole(low: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, 9, shape, generator=rng).double()  # of which sums are exact

    bucket_KN = torch.randint(experts, (units, rows), generator=rng)
    found = BucketRows(
        x_ND=whole(-9, rows, width_in),
        delta_NO=whole(-9, rows, width_out),
        weight_N=whole(1, rows),
        buckets=Buckets(bucket_KN, experts),
    )
    sums = bucket_sums(found)
    for unit in range(units):
        for bucket in {*bucket_KN[unit].tolist(), 0, experts - 1}:
            own = bucket_KN[unit] == bucket
            x_nD, delta_nO, weight_n = found.x_ND[own], found.delta_NO[own], found.weight_N[own]
            expected = (weight_n.sum(), weight_n @ x_nD, delta_nO.sum(dim=0), delta_nO.t() @ x_nD)
            for tensor, wanted in zip(sums, expected, strict=True):
                assert torch.equal(tensor[unit, bucket], wanted)
    if experts > 4:
        return  # joint weights of so many buckets do not fit into memory
    joint_CC = joint_weights(found)
    for one, other in product(range(units * experts), repeat=2):
        both = bucket_KN[one // experts] == one % experts
        both &= bucket_KN[other // experts] == other % experts
        assert joint_CC[one, other] == found.weight_N[both].sum()
