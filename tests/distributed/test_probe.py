"""A probe over ranks: whoever has which rows, all ranks report what one process does."""

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from tests.helpers.processes import run_ranks
from tests.helpers.rounding import bounds_of, nudged
from torchrec_hilomoe import HiLoMoEConfig, InteractionProbe
from torchrec_hilomoe.hilomoe import LossTerms, ProbeReport

ROWS, PASSES, FEW = 120, 6, 20
FEATURES = {"a": range(4), "b": range(4, 8), "number": range(8, 9)}


class Host(nn.Module):
    """A map of features and free inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(9, 4) for _ in range(2))
        self.query = nn.Identity()
        self.up, self.last = nn.Linear(9 + 3, 5), nn.Linear(5, 1)

    def forward(self, ids, number, free, weights):
        parts = [table(ids[:, at]) for at, table in enumerate(self.tables)]
        x = torch.cat([self.query(torch.cat([*parts, number], dim=1)), free], dim=1)
        losses = F.binary_cross_entropy_with_logits(
            self.last(self.up(x).tanh()).squeeze(1), (free[:, 0] > 0).double(), reduction="none"
        )
        return (losses * weights).sum()


def build_host() -> Host:
    torch.manual_seed(3)
    return Host().double()


def make_batch(seed: int) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(9, (ROWS, 2), generator=rng)
    number, free = torch.randn(ROWS, 1, generator=rng), torch.randn(ROWS, 3, generator=rng)
    weights = torch.rand(ROWS, generator=rng) + 0.5
    return [ids, *(part.double() for part in (number, free, weights))]


def probe_host(
    plain: Host, model: nn.Module, shares: tuple[int, ...], rank: int, asked_early: bool
) -> ProbeReport:
    """Fit and judge on this rank's rows; the host averages over ranks, as DDP does.

    Whoever asks early has few rows, is refused, and goes on.
    """
    start, ranks = sum(shares[:rank]), len(shares)
    mine, factor = slice(start, start + shares[rank]), ranks / ROWS
    probe = InteractionProbe(
        plain,
        HiLoMoEConfig(num_layers=2, num_experts=3, rank=2),
        ["up"],
        "query",
        FEATURES,
        loss_terms=lambda *batch: LossTerms(weights=batch[3], denominator=1 / factor),
        draws=2,
        blocks=3,
    )
    for phase, seeds in ((probe.fit, range(PASSES)), (probe.judge, range(PASSES, 2 * PASSES))):
        if asked_early:
            with phase():
                few = [part[mine][:FEW] for part in make_batch(100 + seeds.start)]
                (model(*few) * factor).backward()
            with pytest.raises(ValueError, match="and 3 buckets need 96"):
                probe.report()
        with phase():
            for seed in seeds:
                (model(*(part[mine] for part in make_batch(seed))) * factor).backward()
    return probe.report()


def probe_rank(shares: tuple[int, ...], asked_early: bool) -> ProbeReport:
    plain = build_host()
    model = DistributedDataParallel(plain)
    return probe_host(plain, model, shares, dist.get_rank(), asked_early)


def numbers(report: ProbeReport) -> dict[str, torch.Tensor]:
    """What is compared, in an order of its own: equal gains may change places."""
    gains = [*report.features, *(gain for found in report.controls.values() for gain in found)]
    return {
        gain.name: torch.tensor([gain.gain, gain.low, gain.high], dtype=torch.float64)
        for gain in gains
    }


@pytest.mark.parametrize("shares", [(60, 60), (101, 19), (30, 0, 50, 40)], ids=str)
def test_ranks_report_what_one_process_does(shares):
    plain = build_host()
    alone = probe_host(plain, plain, (ROWS,), 0, asked_early=False)
    moved = []
    for seed in range(4):
        torch.manual_seed(seed)
        other = nudged(plain)
        moved.append(numbers(probe_host(other, other, (ROWS,), 0, asked_early=False)))
    want = numbers(alone)
    bounds = bounds_of(want, moved, terms=ROWS * PASSES)
    del bounds["random"]  # it hashes bits, so inputs that are moved go elsewhere
    bounds["random"] = max(bounds.values())
    found = run_ranks(probe_rank, len(shares), shares, False)
    for report in found:
        assert report == found[0]
        assert (report.fit_rows, report.held_out_rows) == (ROWS * PASSES, ROWS * PASSES)
        assert report.route_by == alone.route_by
        assert report.pays == alone.pays
        got = numbers(report)
        for name, bound in bounds.items():
            assert float((got[name] - want[name]).abs().max()) <= bound, name


def test_rows_that_were_too_few_are_counted_once():
    """A refusal that says to run more batches has added up nothing yet."""
    first, second = run_ranks(probe_rank, 2, (60, 60), True)
    assert first == second
    rows = 2 * FEW + ROWS * PASSES
    assert (first.fit_rows, first.held_out_rows) == (rows, rows)
