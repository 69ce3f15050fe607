"""An anatomy as one page with a map of the modules, that needs no network, readable on a phone and in the dark."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape

from rewire.measure.anatomy.listing import COUNTED, listing, notes
from rewire.measure.anatomy.record import Anatomy
from rewire.measure.anatomy.tree import Part
from rewire.measure.anatomy.words import short

WIDTH, HEIGHT = 360, 480
"""Of the map, in its own units; it grows with the screen."""

SMALLEST = 30.0
"""Area in the map's units under which a module is not drawn by itself."""

HUES = ("#3b6fb6", "#a8552d", "#3f7d4e", "#7a4f9c", "#8a6d1b", "#a33f5c", "#2f7f86", "#5b5f69")
"""Colours of the parts below the model, dark enough for white letters."""

STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --page: #fff; --line: #ccc; --soft: #595959 }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --page: #16181b; --line: #444; --soft: #a8a8a8 } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  margin: 0 auto; padding: 1rem; max-width: 60rem; overflow-wrap: anywhere }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem }
.soft { color: var(--soft); font-size: .85rem }
svg { width: 100%; height: auto; max-height: 80vh; display: block }
svg rect { stroke: var(--page); stroke-width: 1 }
svg text { fill: #fff; font: 9px system-ui, sans-serif; pointer-events: none }
svg g:hover > rect, svg g:focus > rect { stroke: var(--ink); stroke-width: 2 } svg g:focus { outline: none }
.shown { position: sticky; bottom: 0; background: var(--page); border-top: 1px solid var(--line); padding: .5rem 0;
  min-height: 3rem }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .9rem }
th, td { text-align: left; padding: .2rem .6rem .2rem 0; border-bottom: 1px solid var(--line) }
td.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
tr.peak { font-weight: 600 } td.inner { padding-left: 1rem }
""".strip()

SCRIPT = """
for (const map of document.querySelectorAll("svg")) {
  const shown = map.nextElementSibling;
  for (const kind of ["pointerover", "focusin", "click"]) {
    map.addEventListener(kind, (event) => {
      const part = event.target.closest("g[data-text]");
      if (part) shown.textContent = part.dataset.text;
    });
  }
}
""".strip()


def page(found: Anatomy, after: Anatomy | None = None) -> str:
    """The whole page; with the same model after a plan, both maps and both columns."""
    maps = [("", found)] if after is None else [("before the plan", found), ("after the plan", after)]
    body = "\n".join(
        [
            f"<h1>{escape(found.name)}</h1>",
            "<p>The area of a module is the memory of its weights. Point at one, or tap it, for its figures.</p>",
            *(_map(one, heading) for heading, one in maps),
            _memory(found, after),
            f'<p class="soft">{escape(COUNTED)}</p>',
            *(f'<p class="soft">{escape(text)}</p>' for text in notes(found, after)),
        ]
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Anatomy: {escape(found.name)}</title>\n<style>\n{STYLE}\n</style></head>\n"
        f"<body>\n{body}\n<script>\n{SCRIPT}\n</script>\n</body>\n</html>\n"
    )


# ---------------------------------------------------------------- the map


@dataclass(frozen=True)
class Box:
    """A rectangle, in the map's units."""

    x: float
    y: float
    width: float
    height: float

    @property
    def area(self) -> float:
        """Square units."""
        return self.width * self.height


def squarify(sizes: list[float], box: Box) -> list[Box]:
    """Divides a rectangle into ones with areas in proportion to `sizes`, largest first, as square as they come.

    After Bruls, Huizing and van Wijk, "Squarified Treemaps" (2000): a row along the shorter side takes the next
    rectangle as long as that makes its worst one squarer.

    >>> [(box.width, box.height) for box in squarify([2, 1, 1], Box(0, 0, 2, 2))]
    [(1.0, 2.0), (1.0, 1.0), (1.0, 1.0)]
    """
    found: list[Box] = []
    total = sum(sizes)
    rest = [size * box.area / total for size in sizes] if total else []
    while rest:
        count = _row(rest, min(box.width, box.height))
        placed, box = _place(rest[:count], box)
        found += placed
        rest = rest[count:]
    return found


def _row(areas: list[float], side: float) -> int:
    """How many of the areas make the best first row."""
    count = 1
    while count < len(areas) and _worst(areas[: count + 1], side) <= _worst(areas[:count], side):
        count += 1
    return count


def _worst(areas: list[float], side: float) -> float:
    """The largest ratio of long to short side in a row."""
    total = sum(areas)
    return max(max(side**2 * area / total**2, total**2 / (side**2 * area)) for area in areas)


def _place(areas: list[float], box: Box) -> tuple[list[Box], Box]:
    """A row along the shorter side, and what is left of the box."""
    thick = sum(areas) / min(box.width, box.height)
    placed, at = [], 0.0
    for area in areas:
        long = area / thick
        if box.width >= box.height:
            placed.append(Box(box.x, box.y + at, thick, long))
        else:
            placed.append(Box(box.x + at, box.y, long, thick))
        at += long
    if box.width >= box.height:
        return placed, Box(box.x + thick, box.y, max(box.width - thick, 0.0), box.height)
    return placed, Box(box.x, box.y + thick, box.width, max(box.height - thick, 0.0))


def _map(found: Anatomy, heading: str) -> str:
    drawn = "\n".join(_drawn(found, found.tree, "", Box(0, 0, WIDTH, HEIGHT), HUES[-1], 0))
    title = f"<h2>{escape(heading)}</h2>\n" if heading else ""
    return (
        f'{title}<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="Map of the modules of {escape(found.model, quote=True)}">\n{drawn}\n</svg>\n'
        f'<p class="shown">{escape(_text(found, found.tree, ""))}</p>'
    )


def _drawn(found: Anatomy, part: Part, path: str, box: Box, colour: str, level: int) -> Iterator[str]:
    """A module as a group: its rectangle, its name where there is room, and on top of it what it holds."""
    text = escape(_text(found, part, path), quote=True)
    yield f'<g tabindex="0" data-text="{text}"><title>{text}</title>'
    yield (f'<rect x="{box.x:.1f}" y="{box.y:.1f}" width="{box.width:.1f}" height="{box.height:.1f}" fill="{colour}"/>')
    label = path.rpartition(".")[2] or part.module
    room = 11.0 if box.height > 24 and box.width > 5.5 * len(label) + 4 else 0.0
    if room or (box.height > 11 and box.width > 5.5 * len(label) + 4):
        yield f'<text x="{box.x + 3:.1f}" y="{box.y + 9:.1f}">{escape(label)}</text>'
    yield "</g>"
    inside = Box(box.x + 1, box.y + 1 + room, max(box.width - 2, 0.0), max(box.height - 2 - room, 0.0))
    yield from _children(found, part, path, inside, colour, level)


def _children(found: Anatomy, part: Part, path: str, box: Box, colour: str, level: int) -> Iterator[str]:
    """What a module holds, each of several that are alike by itself; its own parameters take what is left."""
    each = [(name, child) for child in part.children for name in child.names if child.bytes]
    each.sort(key=lambda one: -one[1].bytes)
    own = part.bytes - sum(child.bytes for _, child in each)
    sizes = sorted([child.bytes for _, child in each] + ([own] if own > 0 and each else []), reverse=True)
    boxes = squarify([float(size) for size in sizes], box) if box.area > SMALLEST else []
    if own > 0 and each:
        del boxes[sizes.index(own) : sizes.index(own) + bool(boxes)]
    for number, ((name, child), place) in enumerate(zip(each, boxes, strict=False)):
        if place.area >= SMALLEST:
            below = f"{path}.{name}" if path else name
            hue = HUES[number % len(HUES)] if level < 1 or len(each) == 1 else colour
            yield from _drawn(found, child, below, place, hue, level + (len(each) > 1))


def _text(found: Anatomy, part: Part, path: str) -> str:
    share = part.bytes / found.tree.bytes if found.tree.bytes else 0
    texts = [f"{path or found.model} ({part.module})", f"{part.parameters:,} parameters"]
    texts.append(f"{short(part.bytes, 'B')}, {100 * share:.1f} % of the model")
    if part.flops is not None and found.count:
        texts.append(f"{short(round(part.flops / found.count))}FLOP per {found.unit}")
    if part.activations is not None:
        texts.append(f"{short(part.activations, 'B')} kept for backward")
    return " · ".join(texts)


# ---------------------------------------------------------------- memory


def _memory(found: Anatomy, after: Anatomy | None) -> str:
    listed = listing(found, after)
    head = "".join(f"<th>{escape(one)}</th>" for one in ("", *listed.heads))
    lines = "\n".join(
        f"<tr{' class=peak' * line.is_peak}><td{' class=inner' * (not line.is_peak)}>{escape(line.name)}</td>"
        + "".join(f'<td class="number">{escape(cell)}</td>' for cell in line.cells)
        + "</tr>"
        for line in listed.lines
    )
    title = f"<h2>Memory at {escape(listed.sizes)}</h2>"
    return f'{title}\n<div class="wide"><table><tr>{head}</tr>\n{lines}</table></div>'
