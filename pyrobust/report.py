"""The demo's report: a table for the terminal, ``report.json``, and a page that stands alone.

Table and page are made from the figures of ``report.json`` and from nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from pyrobust._files import write_text
from pyrobust._svg import Bar, Line, bar_chart, line_chart

__all__ = ["report_html", "report_table", "write_report"]

Report = Mapping[str, Any]

_COLOURS = {"plain": "#c2571a", "interval": "#1f6fb4"}
_DASHES = {32: "", 8: "9 3", 4: "5 3", 2: "2 3"}
_TABLE_EPS, _TABLE_RADII = (0.05, 0.1), (0.25, 0.5)
_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2rem auto; }
body { padding: 0 1rem; }
h1 { margin-bottom: .2rem; } h2 { margin: 2rem 0 .4rem; } .sub { opacity: .75; margin-top: 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(21rem, 1fr)); gap: 1.5rem; }
figure { margin: 0; padding: .8rem; border: 1px solid var(--line); border-radius: 8px; }
figcaption { font-weight: 600; margin-bottom: .4rem; }
svg { width: 100%; height: auto; } svg text { font-size: 12px; fill: currentColor; }
svg polyline { fill: none; stroke-width: 2; } svg .grid { stroke: var(--line); stroke-width: 1; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; }
th, td { padding: .35rem .6rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; } thead th { background: var(--soft); }
.key { display: flex; flex-wrap: wrap; gap: .4rem 1.2rem; margin: .6rem 0; font-size: .9rem; }
.key svg { width: 34px; height: 10px; margin-right: .4rem; }
dt { font-weight: 600; } dd { margin: 0 0 .5rem 0; }
"""


def write_report(report: Report, folder: Path) -> None:
    """Write ``report.json`` and ``report.html`` into ``folder``, each whole or not at all."""
    write_text(folder / "report.json", json.dumps(report, indent=2) + "\n")
    write_text(folder / "report.html", report_html(report))


def report_table(report: Report) -> str:
    """One line per variant; size and speed are against the float variant of the same training."""
    head, rows = _rows(report)
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    top = "  ".join(cell.rjust(w) for cell, w in zip(head, widths, strict=True))
    return "\n".join([top, "-" * len(top), *lines])


def report_html(report: Report) -> str:
    """The page, complete in itself: inline styles and charts, no scripts, nothing to fetch."""
    variants = report["variants"]
    linf = [_line(v, "linf", "eps") for v in variants]
    l2 = [_line(v, "l2", "radius") for v in variants]
    share = "certified and correct"
    charts = [
        ("Certified accuracy, l∞ (intervals)", line_chart(linf, x_label="eps", y_label=share)),
        ("Certified accuracy, l2 (smoothing)", line_chart(l2, x_label="radius", y_label=share)),
        ("Size of weights and biases", bar_chart(_size_bars(variants), label="bytes")),
        ("Time of 1,000 images", bar_chart(_speed_bars(variants), label="seconds")),
    ]
    figures = "\n".join(
        f"<figure><figcaption>{escape(title)}</figcaption>{chart}</figure>"
        for title, chart in charts
    )
    data = report["data"]
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(report["title"])}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{escape(report["title"])}</h1>
<p class="sub">One network trained twice on {data["train_images"]:,} images, packed, bounded and
smoothed; every figure is over all {data["test_images"]:,} test images. Certified accuracy counts
images that are certified and classified right.</p>
{_key(variants)}
<div class="charts">
{figures}
</div>
<h2>Figures</h2>
<div class="scroll">{_html_table(report)}</div>
<h2>What the certificates say</h2>
{_definitions(report["assumptions"])}
<h2>Settings</h2>
{_definitions(report["settings"])}
<h2>Machine</h2>
{_definitions(report["machine"])}
</body>
</html>
"""


def _rows(report: Report) -> tuple[list[str], list[list[str]]]:
    """Head and cells of the table, as text."""
    variants = report["variants"]
    head = ["variant", "bits", "bytes", "smaller", "s/1000", "speed", "clean"]
    head += [f"linf {eps:g}" for eps in _TABLE_EPS] + [f"l2 {r:g}" for r in _TABLE_RADII]
    rows = []
    for variant in variants:
        base = _float_twin(variants, variant)
        cells = [variant["name"], str(variant["bits"]), f"{variant['bytes']:,}"]
        cells.append(f"{base['bytes'] / variant['bytes']:.2f}x")
        cells.append(f"{variant['seconds_per_1000']:.4f}")
        cells.append(f"{base['seconds_per_1000'] / variant['seconds_per_1000']:.2f}x")
        cells.append(_percent(variant["clean_accuracy"]))
        cells += [_at(variant["linf"], "eps", eps) for eps in _TABLE_EPS]
        cells += [_at(variant["l2"], "radius", radius) for radius in _TABLE_RADII]
        rows.append(cells)
    return head, rows


def _at(curve: Sequence[Mapping[str, float]], key: str, value: float) -> str:
    """The certified accuracy of a curve at ``value``, or a dash where it was not measured."""
    found = [p["certified_accuracy"] for p in curve if p[key] == value]
    return _percent(found[0]) if found else "-"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _training(variant: Report) -> str:
    return str(variant["name"].rsplit("-", 1)[0])


def _float_twin(variants: Sequence[Report], variant: Report) -> Report:
    """The 32-bit variant of the same training (the variant itself where there is none)."""
    same = [v for v in variants if _training(v) == _training(variant) and v["bits"] == 32]
    return same[0] if same else variant


def _line(variant: Report, norm: str, key: str) -> Line:
    points = [(point[key], point["certified_accuracy"]) for point in variant[norm]]
    return Line(variant["name"], points, _colour(variant), _DASHES.get(variant["bits"], ""))


def _colour(variant: Report) -> str:
    return _COLOURS.get(_training(variant), "#555555")


def _size_bars(variants: Sequence[Report]) -> list[Bar]:
    return [
        Bar(
            v["name"],
            v["bytes"],
            f"{v['bytes']:,} ({_float_twin(variants, v)['bytes'] / v['bytes']:.1f}x less)",
            _colour(v),
        )
        for v in variants
    ]


def _speed_bars(variants: Sequence[Report]) -> list[Bar]:
    bars = []
    for v in variants:
        ratio = _float_twin(variants, v)["seconds_per_1000"] / v["seconds_per_1000"]
        text = f"{1e3 * v['seconds_per_1000']:.1f} ms ({ratio:.2f}x float)"
        bars.append(Bar(v["name"], v["seconds_per_1000"], text, _colour(v)))
    return bars


def _key(variants: Sequence[Report]) -> str:
    """Which line is which variant."""
    entries = []
    for v in variants:
        dash = _DASHES.get(v["bits"], "")
        entries.append(
            f'<span><svg viewBox="0 0 34 10"><polyline points="0,5 34,5" stroke="{_colour(v)}" '
            f'stroke-dasharray="{dash}"/></svg>{escape(v["name"])}</span>'
        )
    return f'<div class="key">{"".join(entries)}</div>'


def _html_table(report: Report) -> str:
    head, rows = _rows(report)
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _definitions(entries: Mapping[str, Any]) -> str:
    items = "".join(
        f"<dt>{escape(name.replace('_', ' '))}</dt><dd>{escape(_plain(value))}</dd>"
        for name, value in entries.items()
    )
    return f"<dl>{items}</dl>"


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
