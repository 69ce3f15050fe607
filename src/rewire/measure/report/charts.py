"""Plots as SVG: bars with whiskers, and lines. Colours come from the style of the page, for light and for dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 340
"""Width of every plot in its own units: that of a phone, so that letters keep their size there."""

LEFT, RIGHT, TOP, BOTTOM = 62, 14, 10, 34
_LETTER = 6.6
"""Width of a letter of 12 pixels, about."""

Format = Callable[[float], str]


@dataclass(frozen=True)
class Bar:
    """A bar from 0 to `value`, with whiskers from `low` to `high`. `style` is its class: before or after."""

    name: str
    style: str
    value: float
    low: float
    high: float
    text: str


def bars(found: Sequence[Bar], label: str) -> str:
    """Horizontal bars, one below the other, with their texts above each."""
    row = 40
    most = max((max(bar.high, bar.value) for bar in found), default=0.0) or 1.0
    parts = []
    for number, bar in enumerate(found):
        top = number * row
        length, low, high = (WIDTH * value / most for value in (bar.value, bar.low, bar.high))
        middle = top + 27
        parts.append(
            f'<text x="0" y="{top + 13}">{escape(bar.name)}</text>'
            f'<text x="{WIDTH}" y="{top + 13}" text-anchor="end">{escape(bar.text)}</text>'
            f'<rect class="{bar.style}" data-value="{bar.value:.9g}" x="0" y="{top + 19}" height="16" '
            f'width="{length:.2f}"><title>{escape(bar.name)}: {escape(bar.text)}</title></rect>'
            + _whisker(low, high, middle)
        )
    return _svg(row * len(found), label, parts)


def _whisker(low: float, high: float, middle: float) -> str:
    if low == high:
        return ""
    ends = f"M{low:.2f} {middle - 4}v8M{high:.2f} {middle - 4}v8"
    return f'<path class="whisker" d="M{low:.2f} {middle}H{high:.2f}{ends}"/>'


@dataclass(frozen=True)
class Point:
    """A point of a line; `low` and `high` are the ends of its whisker, `title` what is shown when pointed at."""

    x: float
    y: float
    title: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Line:
    """Points in the order of x. `style` is its class: before, after, and so on."""

    name: str
    style: str
    points: Sequence[Point]
    is_dense: bool = False  # too many points for a mark at each


@dataclass(frozen=True)
class Axes:
    """How x and y are shown. `ticks` are places on x with their texts."""

    ticks: Sequence[tuple[float, str]]
    y: Format
    x_label: str = ""
    is_log: bool = False
    height: int = 190
    step: float = 1.0  # ends of y are round numbers of these

    def x_of(self, value: float) -> float:
        """Where on x, before scaling."""
        return math.log2(value) if self.is_log else value


def lines(found: Sequence[Line], axes: Axes, label: str) -> str:
    """Lines over common axes; y begins at 0, so that what looks twice as much is."""
    points = [point for line in found for point in line.points]
    most = max([point.y if point.high is None else max(point.high, point.y) for point in points] or [1.0])
    top = _nice(most / axes.step) * axes.step
    places = [axes.x_of(point.x) for point in points] + [axes.x_of(place) for place, _ in axes.ticks]
    first, last = min(places, default=0.0), max(places, default=1.0)
    across, down = WIDTH - LEFT - RIGHT, axes.height - TOP - BOTTOM

    def x_at(value: float) -> float:
        share = 0.5 if last == first else (axes.x_of(value) - first) / (last - first)
        return LEFT + across * share

    def y_at(value: float) -> float:
        return TOP + down * (1 - value / top)

    parts = [_grid(axes, top, y_at), _ticks(axes, x_at)]
    parts += [_line(line, x_at, y_at) for line in found]
    return _svg(axes.height, label, parts)


def _line(line: Line, x_at: Callable[[float], float], y_at: Callable[[float], float]) -> str:
    places = [(x_at(point.x), y_at(point.y)) for point in line.points]
    path = "".join(f"{'ML'[number > 0]}{x:.2f} {y:.2f}" for number, (x, y) in enumerate(places))
    parts = [f'<path class="line {line.style}" d="{path}"/>']
    for point, (x, y) in zip(line.points, places, strict=True):
        if point.low is not None and point.high is not None:
            parts.append(f'<path class="whisker" d="M{x:.2f} {y_at(point.low):.2f}V{y_at(point.high):.2f}"/>')
        parts.append(
            f'<circle class="{line.style}" cx="{x:.2f}" cy="{y:.2f}" r="{0.8 if line.is_dense else 3.5}" '
            f'data-value="{point.y:.9g}"><title>{escape(point.title)}</title></circle>'
        )
    return f"<g>{''.join(parts)}</g>"


def _grid(axes: Axes, top: float, y_at: Callable[[float], float]) -> str:
    parts = []
    for value in (0.0, top / 2, top):
        place, text = y_at(value), escape(axes.y(value)) if value else "0"
        parts.append(f'<path class="grid" d="M{LEFT} {place:.2f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="soft" x="{LEFT - 6}" y="{place + 4:.2f}" text-anchor="end">{text}</text>')
    return "".join(parts)


def _ticks(axes: Axes, x_at: Callable[[float], float]) -> str:
    """Texts below x, as many as have room; the first and the last always."""
    parts, end = [], -math.inf
    final = axes.ticks[-1] if axes.ticks else None
    final_start = x_at(final[0]) - len(final[1]) * _LETTER / 2 if final else math.inf
    for place, text in axes.ticks:
        half = len(text) * _LETTER / 2
        centre = min(max(x_at(place), half), WIDTH - half)
        is_last = (place, text) == final
        if not is_last and (centre - half < end + 8 or centre + half > final_start - 8):
            continue
        end = centre + half
        parts.append(
            f'<text class="soft" x="{centre:.2f}" y="{axes.height - BOTTOM + 16}" text-anchor="middle">'
            f"{escape(text)}</text>"
        )
    if axes.x_label:
        end = WIDTH - RIGHT
        text = escape(axes.x_label)
        parts.append(f'<text class="soft" x="{end}" y="{axes.height - 3}" text-anchor="end">{text}</text>')
    return "".join(parts)


def _nice(value: float) -> float:
    """The next number that begins with 1, 2, 3, 4, 5, 6 or 8.

    >>> _nice(0.0123), _nice(47.0), _nice(0.0)
    (0.02, 50.0, 1.0)
    """
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 3, 4, 5, 6, 8, 10) if step * power >= value * (1 - 1e-9))


def _svg(height: int, label: str, parts: Sequence[str]) -> str:
    size = f"0 0 {WIDTH} {height}"
    return f'<svg viewBox="{size}" role="img" aria-label="{escape(label, quote=True)}">{"".join(parts)}</svg>'


def legend(names: Sequence[tuple[str, str]]) -> str:
    """What the colours mean: names with their classes."""
    spans = "".join(f'<span><i class="{style}"></i>{escape(name)}</span> ' for name, style in names)
    return f'<p class="legend">{spans}</p>'
