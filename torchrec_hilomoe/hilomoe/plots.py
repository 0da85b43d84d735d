"""A routing report as pictures: where rows go, layer by layer. Needs the extra ``plots``."""

from pathlib import Path

from torchrec_hilomoe.hilomoe.report import RoutingReport, SiteReport

__all__ = ["draw_routing"]


def draw_routing(report: RoutingReport, folder: Path | str) -> list[Path]:
    """Draw each site: a heat map of every layer's load, and the paths from layer to layer.

    Args:
        report: What ``routing_report`` returned.
        folder: Where to write one PNG a site; made if it does not exist.

    Returns:
        The files, in the report's order.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "draw_routing needs matplotlib: pip install 'torchrec-hilomoe[plots]'"
        ) from error

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for site in report.sites:
        L, E = len(site.layers), len(site.layers[0].load)
        figure = Figure(figsize=(max(6.0, 0.35 * E + 3), 2.2 + 1.5 * L), layout="constrained")
        heat, paths = figure.subplots(2, 1, height_ratios=[0.4 * L + 0.6, 1.1 * L + 0.6])
        used = f"{site.paths_in_use} of {site.paths_possible} paths, {site.rows} rows"
        figure.suptitle(f"{site.name}: {used}")
        picture = heat.imshow(
            [layer.load for layer in site.layers], aspect="auto", cmap="viridis", vmin=0
        )
        figure.colorbar(picture, ax=heat, label="load")
        heat.set_yticks(range(L), [_label(site, layer) for layer in range(L)])
        heat.set_xlabel("expert")
        _draw_paths(paths, site)
        # A site's name may hold what a file's may not.
        files.append(folder / f"routing-{site.name.replace('/', '_') or 'model'}.png")
        figure.savefig(files[-1], dpi=120)
    return files


def _label(site: SiteReport, layer: int) -> str:
    dead = len(site.layers[layer].dead_experts)
    return f"layer {layer + 1}: entropy {site.layers[layer].entropy:.2f}, {dead} dead"


def _draw_paths(axes, site: SiteReport) -> None:
    """Experts as dots, as large as their load; transitions as lines, as wide as their share."""
    from matplotlib.collections import LineCollection

    flows = [
        (((source, layer), (target, layer + 1)), share)
        for layer, flow in enumerate(site.transitions)
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
    for layer, report in enumerate(site.layers):
        sizes = [10 + 600 * load for load in report.load]
        colors = ["tab:red" if load == 0 else "tab:orange" for load in report.load]
        axes.scatter(range(len(sizes)), [layer] * len(sizes), s=sizes, c=colors, zorder=2)
    axes.set_yticks(range(len(site.layers)), [f"layer {i + 1}" for i in range(len(site.layers))])
    axes.invert_yaxis()
    axes.set_xlabel("expert (red: dead)")
