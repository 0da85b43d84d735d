"""What a probe gathers at one site: sums of the rows that fit, then of those that judge.

Shape legend: as in `probe`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn, Tensor

from torchrec_hilomoe.hilomoe.config import HiLoMoEConfig
from torchrec_hilomoe.hilomoe.linear import HiLoMoELinear
from torchrec_hilomoe.hilomoe.probe.buckets import FeatureBuckets
from torchrec_hilomoe.hilomoe.probe.checks import CannotJudgeError
from torchrec_hilomoe.hilomoe.probe.interactions import (
    add_over_ranks,
    Directions,
    FitSums,
    HeldOutSums,
)
from torchrec_hilomoe.hilomoe.probe.pairs import PairSums
from torchrec_hilomoe.hilomoe.probe.rows import BucketRows
from torchrec_hilomoe.hilomoe.probe.verdict import Evidence
from torchrec_hilomoe.hilomoe.probe.wider import Wider
from torchrec_hilomoe.hilomoe.ranks import RankGroup

__all__ = ["ROWS_OF_A_BUCKET", "SiteSums"]

ROWS_OF_A_BUCKET = 32  # fewer say nothing about a bucket's mean
DIRECTIONS = 8
# A mean's square that is so many times the widest column's variance leaves that 16 bits of 24.
FAR = 2.0**8


class SiteSums:
    """Sums over the rows of one site.

    Args:
        name: Of the site, for errors and the report.
        module: The map.
        tokens: The module that says whose its rows are, if it sees events.
        config: The experts that are thought of.
        buckets: What puts its rows into buckets.
        blocks: Parts of the rows that judge.
        sketch: Widest side that is kept as it is.
        seed: Of projections.
        hidden: Random hidden units of the control ``wider``.
        thin_events: Whether of a site's events only about one a sample is kept.
        paired: Whether blocks of rows are compared, all with all, and none fits.
        device: Where the rows are.
        group: Ranks that share the rows; None are all.
    """

    def __init__(
        self,
        name: str,
        module: nn.Linear | HiLoMoELinear,
        tokens: str | None,
        *,
        config: HiLoMoEConfig,
        buckets: FeatureBuckets,
        blocks: int,
        sketch: int,
        seed: int,
        hidden: int,
        thin_events: bool,
        paired: bool,
        device: torch.device,
        group: RankGroup | None = None,
    ) -> None:
        self.name, self.module, self.tokens = name, module, tokens
        self._config, self._blocks, self._group = config, blocks, group
        self._buckets = buckets
        self._sketch, self._seed, self._thin = sketch, seed, thin_events
        widths = (min(module.in_features, sketch), min(module.out_features, sketch))
        sizes = (buckets.units, config.num_experts, *widths)
        self.pairs = PairSums(*sizes, blocks, device) if paired else None
        self.fit = FitSums(*sizes, device)
        # A unit beside the site costs as much as a vector of an expert down and up.
        paid = config.num_layers * config.num_experts * config.rank
        self._wider = Wider(paid, *widths, blocks, seed, device, units=hidden)
        self.held_out: HeldOutSums | None = None
        # Held-out samples and rows, those of them that tell something, and how alike the rows of a
        # sample are: see `_alike`.
        self._seen = torch.zeros(6, dtype=torch.float64, device=device)
        self.unheard = 0  # passes of this rank whose gradient was not finite

    def add(self, rows: BucketRows, size: tuple[int, int], number: int, *, judge: bool) -> None:
        """Add the rows of a pass.

        Args:
            rows: Those that tell something.
            size: Samples and rows that the site computed.
            number: Of the pass, among those that were heard.
            judge: Whether they judge.
        """
        samples, seen = rows.samples, len(rows.x_ND)
        if judge:
            self._seen += self._seen.new_tensor([*size, samples, seen, *self._alike(rows)])
        if _is_far_from_zero(rows.x_ND):
            rows = replace(
                rows,
                x_ND=rows.x_ND.double(),
                delta_NO=rows.delta_NO.double(),
                weight_N=rows.weight_N.double(),
            )
        step = round(seen / samples) if samples else 1
        if self._thin and step > 1:
            # Where histories have one length a step is one, so every pass begins at another
            # position; passes of a position go to all blocks.
            rows = rows.every(step, first=number // self._blocks % step)
        block = number % self._blocks if judge else None
        rows = rows.sketched(self._sketch, self._seed)
        if self.pairs is not None:
            self.pairs.add(rows, block)
        elif block is None:
            self.fit.add(rows)
            self._wider.fit(rows.x_ND, rows.delta_NO, rows.weight_N)
        else:
            assert self.held_out is not None
            self.held_out.add(rows, block)
            self._wider.judge(rows.x_ND, rows.delta_NO, rows.weight_N, block)

    def _alike(self, rows: BucketRows) -> tuple[float, float]:
        """Over random directions, the squares of what samples say, and of what their rows say.

        What a row says is ``delta x^T``. The rows of a sample that say all the same are as good as
        one, and those that have nothing to do with each other count each.
        """
        if rows.sample_N is None or not len(rows.x_ND):
            return 0.0, 0.0
        generator = torch.Generator().manual_seed(self._seed + 3)
        left_OW, right_DW = (
            torch.randn(side.shape[1], DIRECTIONS, generator=generator).to(side)
            for side in (rows.delta_NO, rows.x_ND)
        )
        said_NW = (rows.delta_NO @ left_OW) * ((rows.x_ND - rows.x_ND.mean(dim=0)) @ right_DW)
        _, sample_N = rows.sample_N.unique(return_inverse=True)
        of_samples_BW = said_NW.new_zeros(int(sample_N.max()) + 1, DIRECTIONS)
        of_samples_BW.index_add_(0, sample_N, said_NW)
        return float(of_samples_BW.square().sum()), float(said_NW.square().sum())

    def check_fit(self) -> None:
        """Refuse too few rows that fit, and add up nothing yet; a collective call.

        Raises:
            ValueError: The same on every rank.
        """
        rows = self._of_all_ranks(self.fit.rows)
        if not rows and self.unheard:
            raise ValueError(
                f"InteractionProbe.sites: {self.name!r} had gradients in {self.unheard} passes "
                "while the probe fitted, and none was finite, so they tell nothing. Look for what "
                "is not a number in the model's inputs, or lower the loss's scale."
            )
        if not rows:
            raise ValueError(
                f"InteractionProbe.sites: {self.name!r} had no gradient in a backward pass "
                "while the probe fitted, so it was not used or nothing before it or in it "
                "learns. Run backward inside probe.fit(), or leave this site out."
            )
        self._check_rows("fit", rows)

    def check_held_out(self) -> None:
        """Refuse too few rows that judge, and add up nothing yet; a collective call.

        Raises:
            CannotJudgeError: The same on every rank.
        """
        judged = self.held_out if self.pairs is None else self.pairs
        assert judged is not None
        self._check_rows("held-out", self._of_all_ranks(judged.rows))

    def _of_all_ranks(self, rows: Tensor) -> float:
        total = rows.clone()
        add_over_ranks((total,), self._group)
        return float(total)

    def settle(self) -> None:
        """Add up what has fit over ranks, once, and find the steps; a collective call."""
        add_over_ranks((*self.fit.tensors, *self._wider.fit_tensors), self._group)
        self.held_out = HeldOutSums(self.fit.directions(self._config.rank), self._blocks)
        self._wider.settle()

    def evidence(self) -> Evidence:
        """Add up what has judged over ranks, once; a collective call."""
        judged, wider = self.pairs, None
        if judged is None:
            judged, wider = self.held_out, self._wider
        assert judged is not None
        found = (*judged.tensors, *(wider.tensors if wider else ()), self._seen)
        add_over_ranks(found, self._group)
        weight_KE = self.fit.weight_KE if self.pairs is None else self.pairs.weight_KE
        used_K = (weight_KE > 0).sum(dim=1).tolist()
        units = self._buckets.units_of
        samples, seen, told_samples, told, of_samples, of_rows = self._seen.tolist()
        rows_per_sample = told / max(1.0, told_samples)
        alike = of_samples / of_rows if of_rows else 1.0
        return Evidence(
            site=self.name,
            in_features=self.module.in_features,
            out_features=self.module.out_features,
            rows_per_sample=seen / samples,
            independent_rows=rows_per_sample / min(max(1.0, alike), max(1.0, rows_per_sample)),
            held_out=judged,
            wider=wider,
            fit_rows=int(self.fit.rows if self.pairs is None else self.pairs.trained_rows),
            units_of=units,
            buckets_in_use={name: max(used_K[k] for k in own) for name, own in units.items()},
        )

    def _check_rows(self, kind: str, rows: float) -> None:
        least = ROWS_OF_A_BUCKET * self._config.num_experts
        if rows < least:
            where = "probe.fit()" if kind == "fit" else "probe.judge()"
            raise CannotJudgeError(
                "InteractionProbe",
                f"site {self.name!r} saw {int(rows)} {kind} rows, and {self._config.num_experts} "
                f"buckets need {least}: {ROWS_OF_A_BUCKET} each",
                f"Run more batches inside {where}, or lower num_experts.",
            )

    def sums(self) -> dict[str, Tensor]:
        """By name, what ranks have yet to add up; the tensors themselves."""
        if self.pairs is not None:
            return _named("pairs", self.pairs.tensors) | {"seen": self._seen}
        if self.held_out is None:
            return _named("fit", self.fit.tensors) | _named("wider", self._wider.fit_tensors)
        held_out = _named("held_out", self.held_out.tensors)
        return held_out | _named("wider", self._wider.tensors) | {"seen": self._seen}

    def shared(self) -> dict[str, Tensor]:
        """By name, what is the same on all ranks: the steps, and what tells of their rows."""
        if self.held_out is None:
            return {}
        directions = {f"step.{name}": it for name, it in vars(self.held_out.directions).items()}
        fit = {"weight_KE": self.fit.weight_KE, "rows": self.fit.rows}
        assert self._wider.step is not None
        return directions | fit | _named("wider", self._wider.step)

    def take(self, shared: Mapping[str, Tensor], sums: Mapping[str, Tensor]) -> None:
        """Go on from what `shared` and `sums` gave; sums that are missing stay zero."""
        if shared:
            here = {name: tensor.to(self._seen.device) for name, tensor in shared.items()}
            steps = {name: it for name, it in here.items() if name.startswith("step.")}
            found = Directions(**{name.removeprefix("step."): it for name, it in steps.items()})
            self.held_out = HeldOutSums(found, self._blocks)
            self.fit.weight_KE.copy_(here["weight_KE"])
            self.fit.rows.copy_(here["rows"])
            self._wider.step = (here["wider.0"], here["wider.1"], here["wider.2"])
        for name, tensor in self.sums().items():
            if name in sums:
                tensor.copy_(sums[name])


def _is_far_from_zero(x_ND: Tensor) -> bool:
    """Whether sums in 32 bits lose what columns vary by, since means are so much larger.

    Columns that vary little beside the widest are not looked at: see `interactions.KEPT`.
    """
    if x_ND.dtype == torch.float64 or len(x_ND) < 2:
        return False
    variance_D, mean_D = torch.var_mean(x_ND, dim=0)
    return bool(mean_D.square().max() > FAR * variance_D.max())


def _named(prefix: str, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{at}": tensor for at, tensor in enumerate(tensors)}
