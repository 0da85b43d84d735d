"""Pictures of a routing report: each layer's load, and the paths that rows take.

They need the extra ``plots``.
"""

from pathlib import Path

from torchrec_hilomoe.hilomoe.report import RouterReport, RoutingReport

__all__ = ["draw_routing"]


def draw_routing(report: RoutingReport, folder: Path | str) -> list[Path]:
    """Draw each router: a heat map of every layer's load, and the paths from layer to layer.

    Args:
        report: What ``routing_report`` returned.
        folder: Where to write one PNG a router, in the report's order; made if it does not exist.

    Raises:
        ImportError: If matplotlib is not installed.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torchrec_hilomoe.hilomoe import HiLoMoEConfig, inject_hilomoe
        >>> from torchrec_hilomoe.hilomoe import record_routing, routing_report
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> _ = inject_hilomoe(model, HiLoMoEConfig(num_layers=2, num_experts=4), sites=["0"])
        >>> with record_routing(model):
        ...     _ = model(torch.randn(64, 8))
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     [path.suffix for path in draw_routing(routing_report(model), folder)]
        ['.png']
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "draw_routing needs matplotlib: pip install 'matplotlib>=3.8,<4'"
        ) from error

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for router in report.routers:
        L, E = len(router.layers), len(router.layers[0].load)
        figure = Figure(figsize=(max(6.0, 0.35 * E + 3), 2.2 + 1.5 * L), layout="constrained")
        heat, paths = figure.subplots(2, 1, height_ratios=[0.4 * L + 0.6, 1.1 * L + 0.6])
        used = f"{router.paths_in_use} of {router.paths_possible} paths, {router.rows} rows"
        figure.suptitle(f"{router.name}: {used}")
        picture = heat.imshow(
            [layer.load for layer in router.layers], aspect="auto", cmap="viridis", vmin=0
        )
        figure.colorbar(picture, ax=heat, label="load")
        heat.set_yticks(range(L), [_label(router, layer) for layer in range(L)])
        heat.set_xlabel("expert")
        _draw_paths(paths, router)
        # A name may hold what a file's may not.
        files.append(folder / f"routing-{router.name.replace('/', '_') or 'model'}.png")
        figure.savefig(files[-1], dpi=120)
    return files


def _label(router: RouterReport, layer: int) -> str:
    dead = len(router.layers[layer].dead_experts)
    return f"layer {layer + 1}: entropy {router.layers[layer].entropy:.2f}, {dead} dead"


def _draw_paths(axes, router: RouterReport) -> None:
    """Experts as dots, as large as their load; transitions as lines, as wide as their share."""
    from matplotlib.collections import LineCollection

    flows = [
        (((source, layer), (target, layer + 1)), share)
        for layer, flow in enumerate(router.transitions)
        for source, shares in enumerate(flow)
        for target, share in enumerate(shares)
        if share > 0
    ]
    lines = LineCollection(  # one, because there may be tens of thousands
        [line for line, _ in flows],
        linewidths=[0.3 + 12 * share for _, share in flows],
        colors=[("tab:blue", min(1.0, 0.15 + share)) for _, share in flows],
    )
    axes.add_collection(lines)
    for layer, report in enumerate(router.layers):
        sizes = [10 + 600 * load for load in report.load]
        colors = ["tab:red" if load == 0 else "tab:orange" for load in report.load]
        axes.scatter(range(len(sizes)), [layer] * len(sizes), s=sizes, c=colors, zorder=2)
    L = len(router.layers)
    axes.set_yticks(range(L), [f"layer {layer}" for layer in range(1, L + 1)])
    axes.invert_yaxis()
    axes.set_xlabel("expert (red: dead)")
