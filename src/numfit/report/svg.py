"""A scatter plot with labelled points and optional lines, as an SVG string: no plotting library, no script.

Readable on light and dark backgrounds (the colours follow `prefers-color-scheme`), and groups differ in the marker's
shape as well as its colour. Text widths are estimated (no font is measured), so labels get a little more room than they
need.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from numfit.report.placement import Box, nearest, place_labels

_FONT, _CHARACTER = 12.0, 6.6  # label size, and the width of its average character, pixels
# a colour per group, on light and on dark
_COLOURS = (("#2563a8", "#7db4ee"), ("#b4501e", "#f0a070"), ("#2f7d4f", "#7fcf9c"), ("#7a4ba0", "#c39ae6"))
_SHAPES = ("circle", "square", "diamond", "triangle")


@dataclass(frozen=True)
class Point:
    """A marker at (x, y) in data units; `group` picks colour and shape and is named in the legend."""

    x: float
    y: float
    label: str = ""
    group: str = ""


@dataclass(frozen=True)
class Line:
    """A thin line through points in data units, drawn below the markers."""

    points: tuple[tuple[float, float], ...]
    dashed: bool = False


def frontier(points: Sequence[Point]) -> Line:
    """The line through the points that no other beats in both x and y (smaller is better)."""
    best, kept = math.inf, []
    for point in sorted(points, key=lambda p: (p.x, p.y)):
        if point.y < best:
            best = point.y
            kept.append((point.x, point.y))
    return Line(tuple(kept), dashed=True)


def scatter(
    points: Sequence[Point],
    *,
    title: str,
    x_label: str,
    y_label: str,
    lines: Sequence[Line] = (),
    log_y: bool = True,
    width: int = 760,
    height: int = 480,
) -> str:
    """The plot as one <svg> element (valid XML, usable as a file or inside HTML).

    Args:
        points: markers. lines: drawn below them.
        title: heading inside the picture, and its accessible name.
        x_label: text under the x axis. y_label: text beside the y axis.
        log_y: logarithmic y axis.
        width: of the picture, pixels. height: the same; it scales with its container.

    Raises:
        ValueError: no points, a value that is not finite, or y ≤ 0 on a logarithmic axis.
    """
    data = [(p.x, p.y, p.label or "a point") for p in points]
    data += [(x, y, "a line") for line in lines for x, y in line.points]
    if not points:
        raise ValueError("a plot needs at least one point")
    for x, y, label in data:
        if not (math.isfinite(x) and math.isfinite(y)) or (log_y and y <= 0):
            raise ValueError(f"{label} at ({x}, {y}) cannot be drawn{' on a logarithmic axis' if log_y else ''}")
    frame = Box(74, 52, width - 24, height - 58)
    x_axis = _Axis.around([x for x, _, _ in data], False, frame.left, frame.right)
    y_axis = _Axis.around([y for _, y, _ in data], log_y, frame.bottom, frame.top)
    groups = list(dict.fromkeys(p.group for p in points))
    at = [(x_axis.pixel(p.x), y_axis.pixel(p.y)) for p in points]
    paths = [[(x_axis.pixel(x), y_axis.pixel(y)) for x, y in line.points] for line in lines]
    legend, legend_box = _legend(groups, frame)
    boxes = place_labels(
        at,
        [(_text_width(p.label), _FONT + 3) if p.label else (0, 0) for p in points],
        Box(frame.left + 2, frame.top + 2, frame.right - 2, frame.bottom - 2),
        [pair for path in paths for pair in pairwise(path)],
        [legend_box] if legend else [],
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="nf" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" aria-label="{escape(title)}">',
        f"<title>{escape(title)}</title>",
        f"<style>{_STYLE}</style>",
        f'<rect class="nf-back" width="{width}" height="{height}"/>',
        _text(frame.left, 28, title, "nf-title"),
        *_axes(x_axis, y_axis, frame, x_label, y_label),
    ]
    for line, path in zip(lines, paths):
        dash = ' stroke-dasharray="5 4"' if line.dashed else ""
        parts.append(f'<polyline class="nf-line" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in path)}"{dash}/>')
    for point, (x, y), box in zip(points, at, boxes):
        end = nearest(box, (x, y))
        if point.label and math.dist((x, y), end) > 14:
            parts.append(f'<path class="nf-leader" d="M{x:.1f} {y:.1f}L{end[0]:.1f} {end[1]:.1f}"/>')
    for point, (x, y) in zip(points, at):
        tip = escape(f"{point.label}: {_number(point.x)}, {_number(point.y)}".removeprefix(": "))
        parts.append(f"<g><title>{tip}</title>{_marker(x, y, groups.index(point.group))}</g>")
    parts += [_text(b.left, b.bottom - 4, p.label, "nf-label") for p, b in zip(points, boxes) if p.label]
    return "\n".join([*parts, *legend, "</svg>"])


@dataclass(frozen=True)
class _Axis:
    low: float  # in data units, or their logarithm
    high: float
    log: bool
    start: float  # pixels
    end: float

    @staticmethod
    def around(values: Sequence[float], log: bool, start: float, end: float) -> _Axis:
        """An axis that shows all values with a margin of 7 % on both sides."""
        shown = [math.log10(v) if log else v for v in values]
        low, high = min(shown), max(shown)
        margin = 0.07 * (high - low) or (0.3 if log else max(abs(high) * 0.1, 0.5))
        return _Axis(low - margin, high + margin, log, start, end)

    def pixel(self, value: float) -> float:
        place = ((math.log10(value) if self.log else value) - self.low) / (self.high - self.low)
        return self.start + place * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round numbers inside the axis: 1, 2, 5 a decade (1 alone over many decades), or evenly spaced ones."""
        if not self.log:
            return _round_steps(self.low, self.high)
        decades = range(math.floor(self.low), math.ceil(self.high) + 1)
        inside = [10.0**d * m for d in decades for m in (1, 2, 5) if self.low <= math.log10(10.0**d * m) <= self.high]
        if self.high - self.low > 4:
            inside = [10.0**d for d in decades if self.low <= d <= self.high]
        return inside if len(inside) >= 3 else _round_steps(10**self.low, 10**self.high)


def _round_steps(low: float, high: float, wanted: int = 7) -> list[float]:
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _axes(x_axis: _Axis, y_axis: _Axis, frame: Box, x_label: str, y_label: str) -> list[str]:
    parts = []
    for value in x_axis.ticks():
        x = x_axis.pixel(value)
        parts.append(f'<path class="nf-grid" d="M{x:.1f} {frame.top}V{frame.bottom}"/>')
        parts.append(_text(x, frame.bottom + 18, _number(value), "nf-tick", "middle"))
    for value in y_axis.ticks():
        y = y_axis.pixel(value)
        parts.append(f'<path class="nf-grid" d="M{frame.left} {y:.1f}H{frame.right}"/>')
        parts.append(_text(frame.left - 8, y + 4, _number(value), "nf-tick", "end"))
    parts.append(f'<path class="nf-axis" d="M{frame.left} {frame.top}V{frame.bottom}H{frame.right}"/>')
    middle = (frame.top + frame.bottom) / 2
    parts.append(_text((frame.left + frame.right) / 2, frame.bottom + 42, x_label, "nf-name", "middle"))
    turned = f' transform="rotate(-90 20 {middle:.1f})"'
    parts.append(_text(20, middle, y_label, "nf-name", "middle", turned))
    return parts


def _legend(groups: Sequence[str], frame: Box) -> tuple[list[str], Box]:
    """Markers and names of the groups in the upper right corner; nothing when there is only one unnamed group."""
    named = [(i, group) for i, group in enumerate(groups) if group]
    if not named:
        return [], frame
    left = frame.right - 26 - max(_text_width(group) for _, group in named)
    box = Box(left - 8, frame.top, frame.right, frame.top + 12 + 18 * len(named))
    parts = []
    for row, (i, group) in enumerate(named):
        y = frame.top + 16 + 18 * row
        parts += [_marker(left + 4, y, i), _text(left + 16, y + 4, group, "nf-label")]
    return parts, box


def _marker(x: float, y: float, group: int) -> str:
    shape = _SHAPES[group % len(_SHAPES)]
    name = f'class="nf-mark nf-c{group % len(_COLOURS)}"'
    if shape == "circle":
        return f'<circle {name} cx="{x:.1f}" cy="{y:.1f}" r="5"/>'
    corners = {
        "square": ((-4.5, -4.5), (4.5, -4.5), (4.5, 4.5), (-4.5, 4.5)),
        "diamond": ((0, -6), (6, 0), (0, 6), (-6, 0)),
        "triangle": ((0, -5.5), (5.5, 4.5), (-5.5, 4.5)),
    }[shape]
    return f'<polygon {name} points="{" ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)}"/>'


def _text(x: float, y: float, text: str, name: str, anchor: str = "start", more: str = "") -> str:
    return f'<text class="{name}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(text)}</text>'


def _text_width(text: str) -> float:
    return _CHARACTER * len(text) + 2


def _number(value: float) -> str:
    """Short and plain: 0.05, 4.25, 1200; powers of ten only where plain digits would be long."""
    if value != 0 and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.3g}"
    return f"{value:.6f}".rstrip("0").rstrip(".") if abs(value) < 1 else f"{value:.4f}".rstrip("0").rstrip(".")


def _colours(back: str, text: str, faint: str, grid: str, axis: str, line: str, theme: int) -> str:
    """CSS rules of one theme: 0 is light, 1 dark."""
    marks = "".join(f".nf-c{i}{{fill:{pair[theme]}}}" for i, pair in enumerate(_COLOURS))
    return (
        f".nf-back{{fill:{back}}}.nf text{{fill:{text}}}.nf .nf-tick{{fill:{faint}}}.nf-grid{{stroke:{grid}}}"
        f".nf-axis,.nf-leader{{stroke:{axis}}}.nf-line{{stroke:{line}}}.nf .nf-label,.nf-mark{{stroke:{back}}}{marks}"
    )


def _style() -> str:
    shape = (
        f".nf text{{font-family:system-ui,-apple-system,'Segoe UI','DejaVu Sans',sans-serif;font-size:{_FONT:g}px}}"
        ".nf .nf-title{font-size:15px;font-weight:600}.nf .nf-name{font-size:12.5px}"
        ".nf-grid,.nf-axis,.nf-line,.nf-leader{fill:none;stroke-width:1}.nf-line{stroke-width:1.5}"
        # a halo in the background's colour keeps a label readable where it must lie on a line
        ".nf .nf-label{stroke-width:3px;stroke-linejoin:round;paint-order:stroke}.nf-mark{stroke-width:1.2}"
    )
    light = _colours("#ffffff", "#26313d", "#5b6773", "#e6eaee", "#8b96a1", "#a9b4bf", 0)
    dark = _colours("#14191f", "#dfe6ec", "#9aa7b3", "#262e37", "#7d8894", "#53606c", 1)
    return f"{shape}{light}@media (prefers-color-scheme:dark){{{dark}}}"


_STYLE = _style()
