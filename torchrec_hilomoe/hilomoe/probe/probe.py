"""`InteractionProbe`: find out in a host's own loop by which features experts should be routed.

What a model cannot express shows in its gradients before any expert is trained (`interactions`).
The probe hears them through hooks (`listener`). Outside of `InteractionProbe.fit` and
`InteractionProbe.judge` it does nothing and costs nothing.

Shape legend:
    B  samples     N  rows of a site: samples, or their events     D  input width
    O  output width     E  experts     K  units: features x draws of keys
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from types import MappingProxyType

import torch
from torch import distributed as dist
from torch import nn, Tensor

from torchrec_hilomoe.hilomoe.config import HiLoMoEConfig
from torchrec_hilomoe.hilomoe.module_names import check_module
from torchrec_hilomoe.hilomoe.probe.advice import PlainModel
from torchrec_hilomoe.hilomoe.probe.buckets import FeatureBuckets
from torchrec_hilomoe.hilomoe.probe.checks import (
    check_columns,
    check_experts,
    check_features,
    match_sites,
)
from torchrec_hilomoe.hilomoe.probe.gathered import SiteSums
from torchrec_hilomoe.hilomoe.probe.heard import HeardPass, LossTerms
from torchrec_hilomoe.hilomoe.probe.listener import PassListener
from torchrec_hilomoe.hilomoe.probe.report import ProbeReport
from torchrec_hilomoe.hilomoe.probe.verdict import conclude
from torchrec_hilomoe.hilomoe.ranks import RankGroup
from torchrec_hilomoe.hilomoe.selectors import Selector

__all__ = ["InteractionProbe"]

LAYOUT = 2  # counts up where what is gathered gets another shape, so that older states are refused


class InteractionProbe:
    """Predicts what experts would gain at some sites if a feature routed them.

    Rows fit for each feature the step that pays most, and later rows judge it, so what is only
    learned by heart does not count: judge rows that the model has not been trained on yet. During
    the first epoch that is every row. A model that has seen all of its training rows is judged on
    a validation split.

    Works for any model: nothing is injected, parameters are not touched, the loop stays the
    host's. With several ranks, all run the same number of passes and give the same report.

    Args:
        model: The model, not its wrapper, before or after it is wrapped for distributed training;
            its forward is what the host's loop calls.
        config: The experts that are thought of: ``num_layers``, ``num_experts``, ``rank``.
        sites: As for ``inject_hilomoe``: patterns, types or predicates, of ``nn.Linear`` or sites.
        query_module: Qualified name of the module whose output, ``(samples, ...)``, has the
            features; flattened to ``(samples, columns)``, or a ``KeyedTensor``.
        features: For each feature, its columns in that output; two features at least. One of a
            single column is a number, parted at the quantiles of the first pass that is heard.
        query_entry: Key or index of the query in that output, where it is a dict or a tuple.
        tokens: For sites that see the events of all samples in one list: name pattern to the
            module whose output, ``(samples + 1,)``, says where each sample's begin.
        loss_terms: Called with the arguments of the model's forward, tells how the host makes its
            loss. None: it is the mean over the samples. A constant factor does not matter.
        draws: Draws of keys whose gains are averaged.
        blocks: Parts of the rows that judge, for the intervals.
        sketch: Widest side of a site that is kept as it is; wider ones are projected at random to
            this width, which bounds memory.
        every: Passes of which one is heard, to make a step cheaper.
        hidden: Random hidden units of the control ``wider``.
        thin_events: Whether of a site that sees events only about one a sample is kept.
        paired: Whether no rows fit, but all held-out rows judge each other, in blocks: more is
            seen in fewer rows, for ``blocks`` times the memory. What `fit` hears counts as not held
            out, and may be nothing. There is no control ``wider``.
        seed: Of keys and projections.
        process_group: Ranks that train the model, where these are not all of the job.

    Raises:
        ValueError: If a name, a pattern or a range of columns means nothing, or there are fewer
            than two features.

    Example:
        >>> class Host(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.tables = nn.ModuleList(nn.Embedding(9, 4) for _ in "ab")
        ...         self.features = nn.Flatten()
        ...         self.up = nn.Linear(8, 1)
        ...
        ...     def forward(self, ids):
        ...         found = [table(column) for table, column in zip(self.tables, ids.t())]
        ...         return self.up(self.features(torch.stack(found, dim=1)))
        >>> model = Host()
        >>> probe = InteractionProbe(
        ...     model,
        ...     HiLoMoEConfig(num_layers=2, num_experts=4),
        ...     sites=["up"],
        ...     query_module="features",
        ...     features={"a": range(0, 4), "b": range(4, 8)},
        ... )
        >>> def steps(number):
        ...     for _ in range(number):
        ...         ids = torch.randint(9, (64, 2))
        ...         clicks = ((ids[:, 0] < 4) == (ids[:, 1] < 4)).float()
        ...         logits = model(ids).squeeze(1)
        ...         nn.functional.binary_cross_entropy_with_logits(logits, clicks).backward()
        >>> with probe.fit():
        ...     steps(8)
        >>> with probe.judge():
        ...     steps(8)
        >>> report = probe.report()
        >>> sorted(found.name for found in report.features)
        ['a', 'b']
    """

    def __init__(
        self,
        model: nn.Module,
        config: HiLoMoEConfig,
        sites: Sequence[Selector],
        query_module: str,
        features: Mapping[str, range],
        *,
        query_entry: str | int | None = None,
        tokens: Mapping[str, str] = MappingProxyType({}),
        loss_terms: Callable[..., LossTerms] | None = None,
        draws: int = 4,
        blocks: int = 8,
        sketch: int = 128,
        every: int = 1,
        hidden: int = 256,
        thin_events: bool = False,
        paired: bool = False,
        seed: int = 0,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        counts = {"draws": draws, "sketch": sketch, "every": every, "hidden": hidden}
        counts["blocks"] = blocks - 1
        for option, value in counts.items():
            if value < 1:
                least, got = (2, blocks) if option == "blocks" else (1, value)
                raise ValueError(
                    f"InteractionProbe.{option} must be at least {least}, got {got}. "
                    f"Use {option}={least} or more."
                )
        modules = dict(model.named_modules())
        given = [("query_module", query_module), *(("tokens", name) for name in tokens.values())]
        for option, name in given:
            check_module(f"InteractionProbe.{option}:", name, modules)
        check_features(features)
        check_experts(config.num_experts)
        self._model, self._config, self._features = model, config, dict(features)
        self._query_module = query_module
        self._draws, self._blocks, self._sketch, self._seed = draws, blocks, sketch, seed
        self._every, self._group = every, RankGroup.of(process_group, "InteractionProbe")
        self._hidden, self._thin_events, self._paired = hidden, thin_events, paired
        self._modules = match_sites(model, sites)
        self._tokens = {
            name: next((t for p, t in tokens.items() if fnmatchcase(name, p)), None)
            for name in self._modules
        }
        self._listener = PassListener(
            model,
            query_module,
            query_entry,
            self._tokens,
            loss_terms,
            every=every,
            prepare=self._prepare,
            add=self._add,
        )
        self._sites: list[SiteSums] = []  # from the first pass that is heard
        self._buckets: FeatureBuckets | None = None
        self._phase = "idle"
        self._settled = False
        self._report: ProbeReport | None = None

    @contextmanager
    def fit(self) -> Iterator[None]:
        """Let the backward passes inside fit the steps that experts would take.

        Raises:
            ValueError: If rows have judged already.
        """
        self._check_idle("fit")
        if self._settled and not self._paired:
            raise ValueError(
                "InteractionProbe.fit: rows have judged already, and what they judged must not "
                "change. Make another probe."
            )
        with self._listening("fit"):
            yield

    @contextmanager
    def judge(self) -> Iterator[None]:
        """Let the backward passes inside judge; with several ranks, a collective call.

        Raises:
            ValueError: If too few rows have fit, or a site, or the query, has not run.
        """
        self._check_idle("judge")
        if not self._paired:
            self._settle()
        with self._listening("judge"):
            yield

    def report(
        self,
        *,
        loss: float | None = None,
        constant_loss: float | None = None,
        steps: int | None = None,
    ) -> ProbeReport:
        """Say what was found; with several ranks, a collective call.

        What the host tells of the model makes the verdict careful: one that has not learned yet
        what it can by itself promises anything to experts. The first call decides.

        Args:
            loss: Mean loss of the rows that judged, in nats a sample; None is not known.
            constant_loss: The same of a model that predicts their mean for all.
            steps: Optimizer steps that the model had been trained for when it was first heard.

        Raises:
            CannotJudgeError: A ``ValueError``, if too few rows have judged, or no feature varies.
        """
        if self._report is not None:
            return self._report
        self._settle()
        assert self._buckets is not None
        for site in self._sites:
            site.check_held_out()
        evidence = [site.evidence() for site in self._sites]
        self._report = conclude(
            evidence,
            self._buckets.names,
            self._config,
            self._draws,
            self._seed,
            PlainModel(loss=loss, constant_loss=constant_loss, steps=steps),
        )
        return self._report

    def views(self) -> tuple[tuple[range, ...], ...]:
        """The views to take, as `inject_shared_router` wants them, one for each expert layer.

        Raises:
            ValueError: If nothing decides, so that experts would not pay.
        """
        report = self.report()
        if not report.pays:
            raise ValueError(
                f"InteractionProbe.views: {report.verdict} Keep the plain model, or name features "
                "that you know to decide."
            )
        return tuple(tuple(self._features[name] for name in names) for names in report.route_by)

    @contextmanager
    def _listening(self, phase: str) -> Iterator[None]:
        self._phase = phase
        try:
            with self._listener:
                yield
        finally:
            self._phase = "idle"

    def _check_idle(self, phase: str) -> None:
        if self._phase != "idle":
            raise ValueError(
                f"InteractionProbe.{phase}: begun inside of probe.{self._phase}(), and rows either "
                "fit or judge. End that first."
            )

    def _prepare(self, query_BQ: Tensor) -> bool:
        """Begin with the first query, and say whether its samples can be put into buckets."""
        if self._buckets is None:
            check_columns(self._features, self._query_module, query_BQ.shape[1])
            self._buckets = self._start(query_BQ.device)
        return self._buckets.prepare(query_BQ)

    def _add(self, heard: HeardPass) -> None:
        """Add a pass to the sums."""
        assert self._buckets is not None
        for query in heard.queries():
            if query.buckets is None:
                query.buckets = self._buckets(query.query_BQ, heard.number)
        for site in self._sites:
            site.unheard += heard.not_finite.count(site.name)
            rows = heard.rows(site.name, site.tokens)
            if rows is not None:
                judge = self._phase == "judge"
                site.add(rows, heard.size(site.name), heard.number, judge=judge)

    def _start(self, device: torch.device) -> FeatureBuckets:
        """Begin the sums, also where this rank will have no row."""
        config = self._config
        buckets = FeatureBuckets(
            self._features, config.num_experts, self._draws, self._seed, device, self._group
        )
        self._sites = [
            SiteSums(
                name,
                module,
                self._tokens[name],
                config=config,
                buckets=buckets,
                blocks=self._blocks,
                sketch=self._sketch,
                seed=self._seed,
                hidden=self._hidden,
                thin_events=self._thin_events,
                paired=self._paired,
                device=device,
                group=self._group,
            )
            for name, module in self._modules.items()
        ]
        return buckets

    def _settle(self) -> None:
        """Add up what has fit over ranks, and find the steps; once."""
        if self._settled:
            return
        first = "judge" if self._paired else "fit"
        if self._buckets is None:
            raise ValueError(
                f"InteractionProbe.query_module: {self._query_module!r} did not run in a training "
                f"forward of the model inside probe.{first}(). Run the model's own forward inside "
                f"probe.{first}(), or name a module that runs; the hooks of a module that FX has "
                "traced away do not."
            )
        if not self._paired:
            for site in self._sites:
                site.check_fit()
            for site in self._sites:
                site.settle()
        self._settled = True

    def state_dict(self) -> dict[str, Tensor]:
        """What was gathered so far, by name: views, not copies; empty before the first pass.

        Names that begin with ``sums.`` are this rank's part, to be added up where fewer ranks go
        on; what begins with ``shared.`` is the same on every rank.
        """
        if self._buckets is None:
            return {}
        self._listener.add_heard()
        state = {
            "shared.made_for": torch.tensor(list(self._made_for().encode()), dtype=torch.uint8),
            "shared.passes": torch.tensor([self._listener.passes, int(self._settled)]),
        }
        for at, edges in enumerate(self._buckets.edges()):
            state[f"shared.edges.{at}"] = edges
        for at, site in enumerate(self._sites):
            state |= {f"shared.{at}.{name}": tensor for name, tensor in site.shared().items()}
            state |= {f"sums.{at}.{name}": tensor for name, tensor in site.sums().items()}
        return state

    def _made_for(self) -> str:
        """All that decides what sums mean."""
        config = self._config
        options = {
            "layout": LAYOUT,
            "features": {name: [part.start, part.stop] for name, part in self._features.items()},
            "sites": list(self._modules),
            "num_experts": config.num_experts,
            "rank": config.rank,
            "draws": self._draws,
            "blocks": self._blocks,
            "sketch": self._sketch,
            "every": self._every,
            "hidden": self._hidden,
            "thin_events": self._thin_events,
            "paired": self._paired,
            "seed": self._seed,
        }
        if not self._paired:  # as many units has the control `wider`
            options["num_layers"] = config.num_layers
        return json.dumps(options)

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`state_dict` gave, to the bit on as many ranks.

        Raises:
            ValueError: If it is of a probe with other features, sites, experts or options.
        """
        if not state_dict:
            return
        theirs, own = bytes(state_dict["shared.made_for"].tolist()).decode(), self._made_for()
        if theirs != own:
            saved, here = json.loads(theirs), json.loads(own)
            pairs = {n: (json.dumps(saved.get(n)), json.dumps(here.get(n))) for n in here | saved}
            others = [
                f"{n} was {was} and is {now}" for n, (was, now) in pairs.items() if was != now
            ]
            raise ValueError(
                f"InteractionProbe.load_state_dict: the state is of another probe: "
                f"{', '.join(others)}. Make the probe as that one was, or load no state and listen "
                "anew."
            )
        device = next(iter(self._modules.values())).weight.device
        self._buckets = self._start(device)
        passes, settled = state_dict["shared.passes"].tolist()
        self._listener.passes, self._settled = passes, bool(settled)
        edges = _below("shared.edges.", state_dict)  # whoever kept them may have sorted names
        self._buckets.take_edges([edges[str(at)].to(device) for at in range(len(edges))])
        for at, site in enumerate(self._sites):
            site.take(_below(f"shared.{at}.", state_dict), _below(f"sums.{at}.", state_dict))


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): it for n, it in tensors.items() if n.startswith(prefix)}
