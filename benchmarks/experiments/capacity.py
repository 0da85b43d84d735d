"""Do routed experts pay where capacity binds? A stream without tables, histories or repeats.

    python -m benchmarks.experiments.capacity --out FILE
    python -m benchmarks.experiments.capacity report --out FILE --plot PICTURE

Each row is fresh: 48 numbers, of which a random rotation has mixed three codes of hidden attributes
with noise and with 24 plain inputs. The true logit is an MLP whose first map is changed, by two
ranks, by each attribute's value, so that 24 changes make 512 maps:

    composed    three attributes of 8 values
    tree        a branch of 8, and under it a child of 8 that means another thing in every branch

Models are MLPs on the 48 numbers, dense ones and one with experts on its first map. All see the
same batches in the same order, once; test AUC is taken at the end. ``random`` is the control:
the same experts, whose routers were drawn and never learn. Seeds draw world, stream and models.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn, Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.experiments.report import report
from benchmarks.harness import append, environment, read_lines
from torchrec_hilomoe import HiLoMoEConfig, inject_hilomoe, routing_report
from torchrec_hilomoe.data.synthetic.worlds import expected_auc
from torchrec_hilomoe.hilomoe.fixed_routing import fix_random_routing
from torchrec_hilomoe.hilomoe.inject import expert_parameters
from torchrec_hilomoe.hilomoe.report import record_routing
from torchrec_hilomoe.training.metrics import auc

WORLDS = ("composed", "tree")
VALUES, CODE, PLAIN = 8, 8, 24  # values of an attribute, width of its code, plain inputs
INPUTS = 3 * CODE + PLAIN
HIDDEN, RANK = 32, 2
NOISE = 0.3  # of a code's numbers, whose own spread is 1
CHANGE = 2.0  # variance that all changes bring, against 1 of the shared map
CLICKS, BEST_AUC = 0.2, 0.914
BATCH, TEST_ROWS = 1024, 262_144
DECAY_SHARE = 0.3  # of the steps, at the end, in which rates fall to zero


@dataclass(frozen=True, kw_only=True)
class World:
    """A truth, as the module's docstring has it.

    Attributes:
        tree: Whether the second attribute is a child of the first.
        codes: ``(attributes, values, CODE)``, what stands for each value.
        mixing: A rotation of all inputs.
        shared: The first map, ``(INPUTS, HIDDEN)``.
        down: First halves of its changes, ``(changes, INPUTS, RANK)``.
        up: Second halves, ``(changes, RANK, HIDDEN)``.
        readout: The second map, ``(HIDDEN,)``.
        scale: What makes logits of its output; sets the best AUC.
        shift: Sets the click rate.
    """

    tree: bool
    codes: Tensor
    mixing: Tensor
    shared: Tensor
    down: Tensor
    up: Tensor
    readout: Tensor
    scale: float = 1.0
    shift: float = 0.0

    @classmethod
    def draw(cls, name: str, rng: torch.Generator) -> "World":
        """Draw a truth, and scale its logits to the click rate and the best AUC."""
        changes = VALUES + VALUES**2 if name == "tree" else 3 * VALUES
        attributes = 2 if name == "tree" else 3

        def normal(*shape: int, std: float = 1.0) -> Tensor:
            return torch.randn(shape, generator=rng) * std

        rotation, _ = torch.linalg.qr(normal(INPUTS, INPUTS))
        raw = cls(
            tree=name == "tree",
            codes=normal(attributes, VALUES ** (2 if name == "tree" else 1), CODE),
            mixing=rotation,
            shared=normal(INPUTS, HIDDEN, std=INPUTS**-0.5),
            down=normal(changes, INPUTS, RANK, std=INPUTS**-0.5),
            up=normal(changes, RANK, HIDDEN, std=(CHANGE / attributes / RANK) ** 0.5),
            readout=normal(HIDDEN, std=HIDDEN**-0.5),
        )
        _, probe = raw._rows(65_536, rng)
        scale = _root(lambda at: expected_auc(_chances(probe, at)[0].numpy()) - BEST_AUC, 0, 50)
        return cls(**{**vars(raw), "scale": scale, "shift": _chances(probe, scale)[1]})

    def batch(self, rows: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Inputs ``(rows, INPUTS)`` and click probabilities."""
        x, logits = self._rows(rows, rng)
        return x, torch.sigmoid(self.scale * logits + self.shift)

    def _rows(self, rows: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        first, second, third = torch.randint(VALUES, (3, rows), generator=rng)
        if self.tree:
            leaf = first * VALUES + second
            in_force = [first, VALUES + leaf]
            # A leaf's code says which child of its branch it is in the branch's own language.
            parts = [self.codes[0, first], self.codes[1, leaf]]
            parts.append(torch.randn(rows, CODE, generator=rng))
        else:
            in_force = [first, VALUES + second, 2 * VALUES + third]
            parts = [self.codes[i, value] for i, value in enumerate((first, second, third))]
        codes = torch.cat(parts, dim=1)
        codes = codes + NOISE * torch.randn(codes.shape, generator=rng)
        x = torch.cat([codes, torch.randn(rows, PLAIN, generator=rng)], dim=1) @ self.mixing
        hidden = x @ self.shared
        for change in in_force:
            ranks = torch.einsum("bi,bir->br", x, self.down[change])
            hidden = hidden + torch.einsum("br,brh->bh", ranks, self.up[change])
        return x, hidden.relu() @ self.readout


def _chances(logits: Tensor, scale: float) -> tuple[Tensor, float]:
    """Probabilities at this scale with the click rate as asked, and the shift that does it."""
    scaled = (scale * logits).double()
    shift = _root(lambda at: float(torch.sigmoid(scaled + at).mean()) - CLICKS, -100, 100)
    return torch.sigmoid(scaled + shift), shift


def _root(rising: Callable[[float], float], low: float, high: float) -> float:
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return (low + high) / 2


@dataclass(frozen=True, kw_only=True)
class Model:
    """A head of two widths on the inputs, with or without experts on its first map."""

    head: tuple[int, int] = (64, 32)
    experts: HiLoMoEConfig | None = None
    rate: float = 1.0
    random: bool = False


def experts(layers: int, count: int, rank: int, top_k: int = 1) -> HiLoMoEConfig:
    """Options of HiLoMoE."""
    return HiLoMoEConfig(num_layers=layers, num_experts=count, rank=rank, top_k=top_k)


MODELS: dict[str, Model] = {
    "plain": Model(),
    "dense 88-44": Model(head=(88, 44)),
    "dense 128-64": Model(head=(128, 64)),
    "dense 256-128": Model(head=(256, 128)),
    "rank 1": Model(experts=experts(3, 8, 1)),
    "rank 1, rate x5": Model(experts=experts(3, 8, 1), rate=5.0),
    "rank 4": Model(experts=experts(3, 8, 4)),
    "rank 4, random": Model(experts=experts(3, 8, 4), random=True),
    "rank 4, rate x5": Model(experts=experts(3, 8, 4), rate=5.0),
    "rank 8, rate x5": Model(experts=experts(3, 8, 8), rate=5.0),
    "rank 4, rate x5, random": Model(experts=experts(3, 8, 4), rate=5.0, random=True),
    "flat 24, top 3, rank 4, rate x5": Model(experts=experts(1, 24, 4, 3), rate=5.0),
    "flat 64, top 2, rank 4, rate x5": Model(experts=experts(1, 64, 4, 2), rate=5.0),
}


class Learner:
    """A model in training.

    Args:
        model: Which.
        rate: Adam's.
        seed: Of its start; models of one seed and head start with equal base maps.

    Attributes:
        net: The MLP.
        flops: Of a row's forward pass as it is computed, with all of a small site's experts.
        activated: The same if only the chosen experts were computed.
    """

    def __init__(self, model: Model, rate: float, seed: int) -> None:
        torch.manual_seed(seed)
        wide, narrow = model.head
        self.net = nn.Sequential(
            nn.Linear(INPUTS, wide), nn.ReLU(), nn.Linear(wide, narrow), nn.ReLU(),
            nn.Linear(narrow, 1),
        )  # fmt: skip
        self.flops = self.activated = 2 * (INPUTS * wide + wide * narrow + narrow)
        if model.experts is not None:
            inject_hilomoe(self.net, model.experts, sites=("0",))
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                self.net(torch.zeros(BATCH, INPUTS))
            self.flops = counter.get_total_flops() // BATCH
            vectors = model.experts.num_layers * model.experts.top_k * model.experts.rank
            self.activated += 2 * model.experts.num_layers * model.experts.num_experts * INPUTS
            self.activated += 2 * vectors * (INPUTS + wide)
        if model.random:
            fix_random_routing(self.net, seed)
        theirs = list(expert_parameters(self.net).values())
        own = [p for p in self.net.parameters() if all(p is not expert for expert in theirs)]
        groups = [{"params": own, "lr": rate}, {"params": theirs, "lr": rate * model.rate}]
        self.adam = torch.optim.Adam([group for group in groups if group["params"]])
        self._rates = [group["lr"] for group in self.adam.param_groups]

    def step(self, x: Tensor, labels: Tensor, decay: float) -> None:
        """Learn a batch."""
        for group, rate in zip(self.adam.param_groups, self._rates, strict=True):
            group["lr"] = rate * decay
        self.adam.zero_grad()
        F.binary_cross_entropy_with_logits(self.net(x)[:, 0], labels).backward()
        self.adam.step()


def train(world: World, learners: Mapping[str, Learner], rows: int, rng: torch.Generator) -> None:
    """Give every learner the same stream."""
    steps = rows // BATCH
    for step in range(steps):
        x, chance = world.batch(BATCH, rng)
        labels = torch.bernoulli(chance, generator=rng)
        decay = min(1.0, (1 - step / steps) / DECAY_SHARE)
        for learner in learners.values():
            learner.step(x, labels, decay)


@dataclass(frozen=True, kw_only=True)
class Test:
    """Rows that nobody learned from."""

    x: Tensor
    labels: Tensor
    chance: Tensor

    @classmethod
    def draw(cls, world: World, rng: torch.Generator) -> "Test":
        """Draw them."""
        x, chance = world.batch(TEST_ROWS, rng)
        return cls(x=x, labels=torch.bernoulli(chance, generator=rng), chance=chance)

    @torch.no_grad()
    def scores(self, net: nn.Module) -> dict[str, float]:
        """A model's AUC and logloss, and the AUC of the probability that is the truth."""
        logits = net(self.x)[:, 0]
        return {
            "auc": auc(logits.numpy(), self.labels.numpy()),
            "logloss": float(F.binary_cross_entropy_with_logits(logits, self.labels)),
            "best_auc": auc(self.chance.numpy(), self.labels.numpy()),
        }


def chosen_rate(world: World, rows: int, seed: int, rates: list[float]) -> float:
    """The plain model's best rate by AUC on rows that no comparison uses; experts get the same."""
    rng = torch.Generator().manual_seed(10_000 + seed)
    learners = {str(rate): Learner(MODELS["plain"], rate, seed) for rate in rates}
    train(world, learners, rows, rng)
    test = Test.draw(world, rng)
    found = {rate: test.scores(learner.net)["auc"] for rate, learner in learners.items()}
    print({rate: round(score, 4) for rate, score in found.items()})
    return float(max(found, key=lambda rate: found[rate]))


def lines(name: str, seed: int, args: argparse.Namespace) -> Iterator[dict]:
    """Train all models of one world and seed, and yield a line each."""
    rng = torch.Generator().manual_seed(seed)
    world = World.draw(name, rng)
    rate = args.rates[0]
    if len(args.rates) > 1:
        rate = chosen_rate(world, args.rows // 4, seed, args.rates)
    learners = {it: Learner(MODELS[it], rate, seed) for it in args.models}
    train(world, learners, args.rows, rng)
    test = Test.draw(world, rng)
    for model, learner in learners.items():
        net, ratio = learner.net.eval(), None
        if MODELS[model].experts is None:
            found = test.scores(net)
        else:
            with record_routing(net):
                found = test.scores(net)
            (site,) = routing_report(net).sites
            ratio = site.output_ratio
        print(f"{name:9s} seed {seed} {model:32s} {learner.flops:>8,} FLOP  AUC {found['auc']:.5f}")
        yield {
            **{"data": name, "backbone": "mlp", "variant": model, "seed": seed, "test": found},
            **{
                "flops": learner.flops,
                "activated_flops": learner.activated,
                "rows": args.rows,
                "learning_rate": rate,
            },
            **{"parameters": sum(p.numel() for p in net.parameters()), "output_ratio": ratio},
            "model": asdict(MODELS[model]),
        }


def main() -> None:
    """Run, or report."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", nargs="?", choices=["run", "report"], default="run")
    parser.add_argument("--worlds", nargs="+", choices=WORLDS, default=list(WORLDS))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rows", type=int, default=6_000_000)
    parser.add_argument(
        "--rates", nargs="+", type=float, default=[1e-3, 2e-3, 4e-3, 8e-3],
        help="Adam's; the best for the plain model is taken",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="append JSON lines to this file")
    parser.add_argument("--plot", type=Path, help="with report: draw AUC over FLOPs to this file")
    args = parser.parse_args()
    if args.action == "report":
        found = read_lines(args.out)
        report(found)
        if args.plot:
            from benchmarks.experiments.plot import draw  # needs matplotlib, an extra

            draw(found, args.plot)
        return
    stamp = environment("cpu")
    for seed, name in itertools.product(args.seeds, args.worlds):
        append(args.out, [{**line, **stamp} for line in lines(name, seed, args)])


if __name__ == "__main__":
    main()
