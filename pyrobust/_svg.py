"""Two small charts as SVG text, for reports that must stand alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Bar", "Line", "bar_chart", "line_chart"]

_WIDTH, _HEIGHT = 560, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 14, 44


@dataclass(frozen=True)
class Line:
    """One curve: its name, ``(x, y)`` points with y in [0, 1], colour and dash pattern."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: str
    dash: str = ""


@dataclass(frozen=True)
class Bar:
    """One bar: its name, length, the text at its end, and its colour."""

    name: str
    value: float
    text: str
    colour: str


def line_chart(lines: Sequence[Line], *, x_label: str, y_label: str) -> str:
    """Curves of shares (0 to 100%) against a quantity that starts at 0."""
    right = max((x for line in lines for x, _ in line.points), default=1.0) or 1.0
    inner_w, inner_h = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        return _LEFT + inner_w * x / right, _TOP + inner_h * (1 - y)

    parts = [_open(_WIDTH, _HEIGHT, y_label)]
    for tick in range(6):
        (x0, y0), (x1, _) = place(0, tick / 5), place(right, tick / 5)
        parts.append(f'<line class="grid" x1="{x0:g}" y1="{y0:g}" x2="{x1:g}" y2="{y0:g}"/>')
        parts.append(_text(x0 - 6, y0 + 4, f"{20 * tick}%", "end"))
        x, y = place(right * tick / 5, 0)
        parts.append(_text(x, y + 16, f"{right * tick / 5:.3g}", "middle"))
    parts.append(_text(_LEFT + inner_w / 2, _HEIGHT - 8, x_label, "middle"))
    for line in lines:
        spots = [place(x, y) for x, y in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        dash = f' stroke-dasharray="{line.dash}"' if line.dash else ""
        title = f"<title>{escape(line.name)}</title>"
        parts.append(f'<polyline points="{path}" stroke="{line.colour}"{dash}>{title}</polyline>')
        parts += [
            f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="2.6" fill="{line.colour}">'
            f"<title>{escape(line.name)}: {100 * y:.1f}% at {x:g}</title></circle>"
            for (cx, cy), (x, y) in zip(spots, line.points, strict=True)
        ]
    return "\n".join([*parts, "</svg>"])


def bar_chart(bars: Sequence[Bar], *, label: str) -> str:
    """Horizontal bars from 0, one row each."""
    row, left = 26, 110
    height = row * len(bars) + 8
    longest = max((bar.value for bar in bars), default=1.0) or 1.0
    parts = [_open(_WIDTH, height, label)]
    for i, bar in enumerate(bars):
        y, length = 4 + row * i, (_WIDTH - left - 130) * bar.value / longest
        parts.append(_text(left - 8, y + 16, bar.name, "end"))
        parts.append(
            f'<rect x="{left}" y="{y + 3}" width="{max(length, 1):.1f}" height="18" rx="3" '
            f'fill="{bar.colour}"/>'
        )
        parts.append(_text(left + length + 6, y + 16, bar.text, "start"))
    return "\n".join([*parts, "</svg>"])


def _open(width: float, height: float, label: str) -> str:
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">'


def _text(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'
