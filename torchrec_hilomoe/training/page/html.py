"""The page: numbers, pictures and texts in one file, which asks no other for anything."""

from base64 import b64encode
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from torchrec_hilomoe.runtime.console import counted
from torchrec_hilomoe.runtime.paths import write_text
from torchrec_hilomoe.training.page import pictures
from torchrec_hilomoe.training.page.files import read_run, RunFiles

__all__ = ["write_page"]

PAGE = "report.html"
TEST = ("auc", "gauc", "logloss", "ne", "calibration")
BACKBONES = {
    "din": "DIN",
    "dien": "DIEN",
    "bst": "BST",
    "transact": "TransAct",
    "interformer": "InterFormer",
    "dlrm": "DLRM",
    "dcn": "DCN-v2",
}
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 1.5rem auto; max-width: 90rem;
       padding: 0 1rem; color: #222; background: #fff; overflow-wrap: anywhere }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
table { border-collapse: collapse } td, th { padding: .2rem .8rem; text-align: right }
th { border-bottom: 1px solid #999; font-weight: 600 }
td:first-child, th:first-child { text-align: left }
tr:last-child.total td { border-top: 1px solid #999; font-weight: 600 }
.tiles { display: flex; flex-wrap: wrap; gap: .6rem } .tiles div { background: #f3f5f9;
  border-radius: .4rem; padding: .4rem .8rem } .tiles b { display: block; font-size: 1.25rem }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(22rem, 100%), 1fr));
  gap: .6rem; align-items: start } .wide { overflow-x: auto }
img { width: 100%; max-width: 42rem; display: block }
pre { background: #f3f5f9; padding: 1rem; overflow-x: auto }
.note { color: #666 }
"""


def write_page(folder: Path) -> Path:
    """Write ``report.html`` into a run's folder, and return its path.

    Raises:
        ValueError: If there is no run.
        ImportError: If matplotlib is not installed.
    """
    run = read_run(folder)
    routers = list(dict.fromkeys(row["router"] for row in run.routing))
    parts = [
        f"<h1>{escape(_headline(run))}</h1>",
        f"<p class=note>{escape(_where(run))}</p>",
        _tiles(run),
        "<h2>Curves</h2>",
        _grid(pictures.curves(run)),
        "<h2>Stages</h2>",
        _table(
            ("stage", "first step", "last step"),
            [
                (f"{number} {band.stage}", f"{band.start + 1:,}", f"{band.stop:,}")
                for number, band in enumerate(run.bands(), 1)
            ],
        ),
        _found(run),
        "<h2>Routing</h2>" if routers else "",
        _grid(
            {
                name: pictures.routing(name, [r for r in run.routing if r["router"] == name])
                for name in routers
            }
        ),
        _costs(run.summary),
        _text("Where the tables are", run.plan),
        _text("Configuration", run.config),
    ]
    title = escape(f"{_headline(run)}: {folder.resolve().name}")
    page = folder / PAGE
    write_text(
        str(page),
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<title>{title}</title><style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n",
    )
    return page


def _headline(run: RunFiles) -> str:
    """Name the backbone and the data set, which a recipe's name need not: options override it."""
    model, data = run.options.get("model", {}), run.options.get("data", {})
    backbone = str(model.get("backbone") or "a run")
    backbone = BACKBONES.get(backbone, backbone)
    dataset = run.summary.get("dataset") or Path(str(data.get("path") or "generated data")).name
    experts = " with experts" if run.routing else ""
    return f"{backbone}{experts} on {dataset}"


def _where(run: RunFiles) -> str:
    if not run.summary:
        last = run.metrics[-1] if run.metrics else {"step": 0}
        return f"{run.folder}: not finished; step {last['step']:,} so far."
    versions = ", ".join(f"{name} {it}" for name, it in run.summary.get("versions", {}).items())
    steps = counted(run.summary.get("steps", 0), "step")
    ranks = counted(run.summary.get("world_size", 1), "rank")
    return (
        f"{run.folder}: recipe {run.summary.get('recipe')}, {steps}, {ranks}, "
        f"{run.summary.get('device')}; {versions}"
    )


def _tiles(run: RunFiles) -> str:
    test = run.summary.get("test", {})
    shown = [(f"test {name}", f"{test[name]:.4f}") for name in TEST if _is_number(test.get(name))]
    if _is_number(run.summary.get("best_auc")):
        shown.append(("best possible auc", f"{run.summary['best_auc']:.4f}"))
    without = run.summary.get("without_experts") or {}
    if _is_number(without.get("test_auc")):
        shown.append(("auc without experts, recorded", f"{without['test_auc']:.4f}"))
    if _is_number(run.summary.get("samples_per_second")):
        shown.append(("samples per second", f"{run.summary['samples_per_second']:,.0f}"))
    tiles = "".join(f"<div>{escape(name)}<b>{value}</b></div>" for name, value in shown)
    return f"<div class=tiles>{tiles}</div>"


def _found(run: RunFiles) -> str:
    """Say what ``route_by: auto`` has found, and by what."""
    decision = run.summary.get("route_by")
    verdict = (decision or run.probe).get("verdict")
    if not verdict:
        return ""
    features, controls = run.probe.get("features", ()), run.probe.get("controls", {})
    gains = [*features, *(gain for found in controls.values() for gain in found)]
    rows = [
        (gain["name"], gain["site"], *(f"{gain[key]:.5f}" for key in ("gain", "low", "high")))
        for gain in gains
    ]
    heads = ("feature or control", "site", "predicted gain, nats a row", "low", "high")
    table = f"<details><summary>Predicted gains</summary>{_table(heads, rows)}</details>"
    plain = decision is not None and decision.get("route_by") is None
    stays = " The model has no experts." if plain else ""
    said = f"<p>{escape(verdict)}{stays}</p>"
    return f"<h2>What routes the experts</h2>{said}{table if rows else ''}"


def _costs(summary: Mapping[str, Any]) -> str:
    parameters, flops = summary.get("parameters", {}), summary.get("flops", {})
    if not parameters:
        return ""
    names = [name for name in parameters if name != "total"] + ["total"]
    rows = [(name, f"{parameters[name]:,}", f"{flops.get(name, 0):,}") for name in names]
    table = _table(("component", "parameters", "FLOPs a sample"), rows, total=True)
    lookups = f"<p class=note>Lookups: {summary.get('lookup_bytes', 0):,} bytes a sample.</p>"
    return f"<h2>Cost</h2>{table}{lookups}"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]], *, total: bool = False) -> str:
    heads = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    mark = " class=total" if total else ""
    body = "".join(f"<tr{mark}>{line}</tr>" for line in lines)
    return f"<div class=wide><table><tr>{heads}</tr>{body}</table></div>"


def _grid(pictures_by_title: Mapping[str, bytes]) -> str:
    images = [
        f'<img alt="{escape(title)}" src="data:image/png;base64,{b64encode(png).decode()}">'
        for title, png in pictures_by_title.items()
    ]
    return f"<div class=grid>{''.join(images)}</div>" if images else ""


def _text(title: str, text: str) -> str:
    if not text:
        return ""
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and value == value
