"""A HiLoMoE site between the bare linear map and the ways that people write experts.

    python -m benchmarks.bench_hilomoe --out benchmarks/results/hilomoe.jsonl --plot hilomoe.png

Every contender that computes the same function is checked against the float64 reference before it
is timed: a wrong answer stops the run. One JSON line per measurement, stamped with the commit and
the machine; ratios are to the bare map of the same case.

Shape legend:
    N  rows     D  width, of input and output     L  expert layers     E  experts
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn, Tensor
from torch.nn import functional as F

from benchmarks.harness import append, environment, measure, Measurement, peak_bytes, read_lines
from benchmarks.rounding import of_sums
from torchrec_hilomoe.hilomoe import HiLoMoEConfig, HiLoMoELinear, reference

CHECKED_ROWS = 4
BASELINE = "linear"


@dataclass(frozen=True, kw_only=True)
class Case:
    """``rows`` of width ``width`` through ``layers`` of ``experts``, ``top_k`` of them chosen."""

    rows: int = 8192
    width: int = 256
    layers: int = 3
    experts: int = 8
    top_k: int = 1
    dtype: str = "float32"
    tied: bool = False
    query_dim: int | None = None
    query_update: str = "soft"


MAIN = [Case(width=width) for width in (64, 256, 512)]
GROWTH = [
    Case(layers=6),
    Case(experts=32),
    Case(experts=64),
    Case(experts=256),
    Case(experts=256, query_dim=32),
    Case(experts=256, query_update="selected"),
]
MORE = [
    *[Case(rows=rows, width=width) for rows in (512, 32768) for width in (64, 256)],
    *[Case(width=width, tied=True) for width in (64, 256)],
    Case(top_k=2),
    *[Case(width=width, dtype="bfloat16") for width in (64, 256)],
]
SETS = {"main": MAIN, "growth": GROWTH, "more": MORE, "all": [*MAIN, *GROWTH, *MORE]}
GPU = [Case(rows=65536, width=width, dtype="bfloat16") for width in (256, 512, 1024)]


class Loop(nn.Module):
    """The equations as one writes them first: query space, a loop over layers and experts."""

    def __init__(self, site: HiLoMoELinear) -> None:
        super().__init__()
        self.site = site

    def forward(self, x_ND: Tensor) -> Tensor:
        """See the class."""
        y_NO, q_NQ = F.linear(x_ND, self.site.weight, self.site.bias), _query(self.site, x_ND)
        for layer in range(self.site.config.num_layers):
            scores_NE, gates_NE, q_NQ = _step(self.site, layer, q_NQ)
            for e in range(self.site.config.num_experts):
                hidden_N = x_ND @ self.site.expert_in[layer, e, 0]
                y_NO = y_NO + (gates_NE[:, e] * hidden_N)[:, None] * self.site.expert_out[layer, e]
        return y_NO


class RowGather(nn.Module):
    """Gather each row's own vectors, as token dispatch does for whole experts."""

    def __init__(self, site: HiLoMoELinear) -> None:
        super().__init__()
        self.site = site

    def forward(self, x_ND: Tensor) -> Tensor:
        """See the class."""
        y_NO, q_NQ = F.linear(x_ND, self.site.weight, self.site.bias), _query(self.site, x_ND)
        for layer in range(self.site.config.num_layers):
            scores_NE, _, q_NQ = _step(self.site, layer, q_NQ)
            gates_Nk, chosen_Nk = scores_NE.topk(self.site.config.top_k, dim=1)
            down_NkD = self.site.expert_in[layer, :, 0][chosen_Nk]
            up_NkO = self.site.expert_out[layer, :, 0][chosen_Nk]
            w_Nk = gates_Nk * torch.einsum("nd,nkd->nk", x_ND, down_NkD)
            y_NO = y_NO + torch.einsum("nk,nko->no", w_Nk, up_NkO)
        return y_NO


class FullExperts(nn.Module):
    """A dense mixture of full-size experts; these ones happen to have rank 1."""

    def __init__(self, site: HiLoMoELinear) -> None:
        super().__init__()
        self.site = site
        outer = torch.einsum("led,leo->lode", site.expert_in[:, :, 0], site.expert_out[:, :, 0])
        self.experts = nn.Parameter(outer.detach().movedim(3, 1).flatten(1, 2))  # (L, E O, D)

    def forward(self, x_ND: Tensor) -> Tensor:
        """See the class."""
        y_NO, q_NQ = F.linear(x_ND, self.site.weight, self.site.bias), _query(self.site, x_ND)
        for layer in range(self.site.config.num_layers):
            _, gates_NE, q_NQ = _step(self.site, layer, q_NQ)
            all_NEO = F.linear(x_ND, self.experts[layer]).unflatten(1, (gates_NE.shape[1], -1))
            y_NO = y_NO + torch.einsum("ne,neo->no", gates_NE, all_NEO)
        return y_NO


def _query(site: HiLoMoELinear, x_ND: Tensor) -> Tensor:
    return x_ND if site.config.query_dim is None else F.linear(x_ND, site.query_proj)


def _step(site: HiLoMoELinear, layer: int, q_NQ: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, gates and the next query of a layer, in query space."""
    keys = site.expert_in[:, :, 0] if site.config.tie_keys else site.expert_keys
    scores_NE = torch.softmax(q_NQ @ keys[layer].t() * q_NQ.shape[1] ** -0.5, dim=1)
    best_NE = torch.zeros_like(scores_NE, dtype=torch.bool)
    best_NE = best_NE.scatter(1, scores_NE.topk(site.config.top_k, dim=1).indices, True)
    gates_NE = torch.where(best_NE, scores_NE, 0)
    passed_NE = scores_NE if site.config.query_update == "soft" else gates_NE
    return scores_NE, gates_NE, q_NQ + passed_NE @ keys[layer]


def build(case: Case, device: str, backends: list[str], dense: bool) -> dict[str, nn.Module]:
    """The contenders, the limit first; those that compute the same function share parameters."""
    dtype = getattr(torch, case.dtype)
    config = HiLoMoEConfig(
        num_layers=case.layers,
        num_experts=case.experts,
        top_k=case.top_k,
        tie_keys=case.tied,
        query_dim=case.query_dim,
        query_update="soft" if case.query_update == "soft" else "selected",
    )
    site = HiLoMoELinear(case.width, case.width, config, device=device, dtype=dtype)
    nn.init.normal_(site.expert_out)
    plain = nn.Linear(case.width, case.width, device=device, dtype=dtype)
    plain.load_state_dict({"weight": site.weight, "bias": site.bias})
    modules: dict[str, nn.Module] = {BASELINE: plain}
    for backend in backends:
        options = replace(config, backend=backend)
        other = HiLoMoELinear(case.width, case.width, options, device=device, dtype=dtype)
        other.load_state_dict(site.state_dict())
        modules[f"hilomoe_{backend}"] = other
    if dense:
        modules |= {"loop": Loop(site), "row_gather": RowGather(site)}
        modules["full_experts"] = FullExperts(site)
        layers = [nn.Linear(case.width, case.width) for _ in range(case.layers)]
        modules["dense_stack"] = nn.Sequential(plain, *layers).to(device, dtype)
    return modules


def check(case: Case, modules: dict[str, nn.Module], x_ND: Tensor) -> None:
    """Refuse to time a wrong answer."""
    site = next(m for m in modules.values() if isinstance(m, HiLoMoELinear))
    params = {name: p.detach().double().cpu() for name, p in site.named_parameters()}
    few_ND = x_ND[:CHECKED_ROWS].detach()
    out = site.compute(few_ND)
    chosen_LEN = torch.zeros_like(out.routing.scores_LEN, dtype=torch.bool)
    chosen_NLE = chosen_LEN.scatter(1, out.routing.chosen_LkN, True).permute(2, 0, 1).cpu()
    want = reference.hilomoe_linear(few_ND.double().cpu(), params, site.config, None, chosen_NLE)
    # Twice what the loops err by in this dtype, and the rounding of a sum over the width.
    plain = {name: p.detach().cpu() for name, p in site.named_parameters()}
    near = reference.hilomoe_linear(few_ND.cpu(), plain, site.config, None, chosen_NLE)
    eps, largest = torch.finfo(x_ND.dtype).eps, want.y_NO.abs().max().item()
    allowed = 2 * (near.y_NO.double() - want.y_NO).abs().max().item()
    allowed += of_sums(case.width) * eps * largest
    for name, module in modules.items():
        if name not in (BASELINE, "dense_stack"):
            error = (module(few_ND).double().cpu() - want.y_NO).abs().max().item()
            assert error <= allowed, f"{name} errs by {error}, allowed {allowed}: {case}"


def calls(
    modules: dict[str, nn.Module], x_ND: Tensor
) -> dict[str, dict[str, Callable[[], object]]]:
    """What is timed: for each pass, a call for each contender."""
    grad_NO = torch.randn_like(x_ND)

    def forward(module: nn.Module) -> Callable[[], object]:
        def call() -> object:
            with torch.no_grad():
                return module(x_ND)

        return call

    def forward_backward(module: nn.Module) -> Callable[[], object]:
        def call() -> object:
            x_ND.grad = None
            module.zero_grad()
            module(x_ND).backward(grad_NO)
            return None

        return call

    return {
        "forward": {name: forward(m) for name, m in modules.items()},
        "forward_backward": {name: forward_backward(m) for name, m in modules.items()},
    }


def run(case: Case, args: argparse.Namespace) -> list[dict]:
    """Check and time one case; return its JSON rows."""
    dense = not args.quick and case.rows * case.width * case.layers * case.experts < 2**26
    modules = build(case, args.device, args.backends, dense)
    dtype = getattr(torch, case.dtype)
    x_ND = torch.randn(case.rows, case.width, device=args.device, dtype=dtype, requires_grad=True)
    check(case, modules, x_ND)
    rows = []
    for part, fns in calls(modules, x_ND).items():
        for name, figures in measure(fns, args.seconds, args.device).items():
            peak = peak_bytes(fns[name], args.device)
            show(case, part, name, figures, peak)
            figured = {"provider": name, "pass": part, **asdict(figures), "peak_bytes": peak}
            rows.append({**asdict(case), **figured})
    return rows


def show(case: Case, part: str, name: str, figures: Measurement, peak: int) -> None:
    """One line of the table."""
    changed = {k: v for k, v in asdict(case).items() if v != asdict(Case())[k]}
    what = ", ".join(f"{k} {v}" for k, v in changed.items()) or "default"
    print(
        f"{what:32s} {part:16s} {name:16s} {figures.median_us:10.0f} us  "
        f"x{figures.ratio:6.2f} (iqr {figures.ratio_iqr:.2f})  {peak / 2**20:7.1f} MiB"
    )


def draw(results: Path, picture: Path) -> None:
    """Ratios over width, for each pass and contender; the last result of each counts."""
    from matplotlib import pyplot as plt

    rows = read_lines(results)
    widths = sorted(case.width for case in MAIN)
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axis, part in zip(axes, ("forward", "forward_backward"), strict=True):
        for name in dict.fromkeys(row["provider"] for row in rows):
            ratio = {
                row["width"]: row["ratio"]
                for row in rows
                if (row["provider"], row["pass"]) == (name, part)
                and Case(**{k: row[k] for k in asdict(Case())}) in MAIN
            }
            if ratio:
                shown = [width for width in widths if width in ratio]
                axis.plot(shown, [ratio[width] for width in shown], marker="o", label=name)
        axis.set(title=part.replace("_", " + "), xlabel="width", xscale="log", yscale="log")
        axis.set_xticks(widths, [str(width) for width in widths])
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("time / bare linear map")
    axes[1].legend()
    figure.savefig(picture, dpi=120)


def main() -> None:
    """Run the benchmark."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", choices=[*SETS, "gpu"], default="all")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--backends", nargs="+", default=["eager"], help="HiLoMoEConfig.backend")
    parser.add_argument("--quick", action="store_true", help="the site and the bare map alone")
    parser.add_argument("--seconds", type=float, default=4.0, help="spent on a case and pass")
    parser.add_argument("--out", type=Path, required=True, help="append JSON lines to this file")
    parser.add_argument("--plot", type=Path, help="draw ratios over width to this file")
    args = parser.parse_args()
    torch.manual_seed(0)
    stamp = environment(args.device)
    for case in GPU if args.cases == "gpu" else SETS[args.cases]:
        append(args.out, [{**row, **stamp} for row in run(case, args)])
    if args.plot is not None:
        draw(args.out, args.plot)


if __name__ == "__main__":
    main()
