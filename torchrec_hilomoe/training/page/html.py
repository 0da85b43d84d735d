"""The page: numbers, pictures and texts in one file, which asks no other for anything."""

from base64 import b64encode
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from torchrec_hilomoe.runtime.console import counted
from torchrec_hilomoe.training.page import pictures
from torchrec_hilomoe.training.page.files import read_run, RunFiles

__all__ = ["write_page"]

PAGE = "report.html"
TEST = ("auc", "gauc", "logloss", "ne", "calibration")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 90rem; padding: 0 1rem;
       color: #222; background: #fff }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
table { border-collapse: collapse } td, th { padding: .2rem .8rem; text-align: right }
th { border-bottom: 1px solid #999; font-weight: 600 }
td:first-child, th:first-child { text-align: left }
tr:last-child.total td { border-top: 1px solid #999; font-weight: 600 }
.tiles { display: flex; flex-wrap: wrap; gap: 1rem } .tiles div { background: #f3f5f9;
  border-radius: .4rem; padding: .5rem 1rem } .tiles b { display: block; font-size: 1.25rem }
img { max-width: 100%; display: block } pre { background: #f3f5f9; padding: 1rem; overflow-x: auto }
.note { color: #666 }
"""


def write_page(folder: Path) -> Path:
    """Write ``report.html`` into a run's folder, and return its path.

    Raises:
        ValueError: If there is no run.
        ImportError: If matplotlib is not installed.
    """
    run = read_run(folder)
    sites = list(dict.fromkeys(row["site"] for row in run.routing))
    parts = [
        f"<h1>{escape(str(run.summary.get('recipe', 'run')))}</h1>",
        f"<p class=note>{escape(_where(run))}</p>",
        _tiles(run),
        "<h2>Curves</h2>",
        _picture(pictures.curves(run), "metrics over steps"),
        "<h2>Stages</h2>",
        _table(
            ("stage", "first step", "last step"),
            [(band.stage, f"{band.start + 1:,}", f"{band.stop:,}") for band in run.bands()],
        ),
        "<h2>Routing</h2>" if sites else "",
        *(
            _picture(pictures.routing(site, [r for r in run.routing if r["site"] == site]), site)
            for site in sites
        ),
        _costs(run.summary),
        _text("Where the tables are", run.plan),
        _text("Configuration", run.config),
    ]
    title = escape(folder.resolve().name)
    page = folder / PAGE
    page.write_text(
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        f"<title>{title}</title><style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )
    return page


def _where(run: RunFiles) -> str:
    if not run.summary:
        last = run.metrics[-1] if run.metrics else {"step": 0}
        return f"{run.folder}: not finished; step {last['step']:,} so far."
    versions = ", ".join(f"{name} {it}" for name, it in run.summary.get("versions", {}).items())
    steps = counted(run.summary.get("steps", 0), "step")
    ranks = counted(run.summary.get("world_size", 1), "rank")
    return f"{run.folder}: {steps}, {ranks}, {run.summary.get('device')}; {versions}"


def _tiles(run: RunFiles) -> str:
    test = run.summary.get("test", {})
    shown = [(f"test {name}", f"{test[name]:.4f}") for name in TEST if _is_number(test.get(name))]
    if _is_number(run.summary.get("best_auc")):
        shown.append(("best possible auc", f"{run.summary['best_auc']:.4f}"))
    if _is_number(run.summary.get("samples_per_second")):
        shown.append(("samples per second", f"{run.summary['samples_per_second']:,.0f}"))
    tiles = "".join(f"<div>{escape(name)}<b>{value}</b></div>" for name, value in shown)
    return f"<div class=tiles>{tiles}</div>"


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
    return f"<table><tr>{heads}</tr>{''.join(f'<tr{mark}>{line}</tr>' for line in lines)}</table>"


def _picture(png: bytes, alt: str) -> str:
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{b64encode(png).decode()}">'


def _text(title: str, text: str) -> str:
    if not text:
        return ""
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and value == value
