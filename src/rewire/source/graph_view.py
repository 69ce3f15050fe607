"""Who inherits from whom among modular files, as text, data and picture, and what a change makes necessary."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from rewire.source.build import workspace
from rewire.source.graph import inheritance, levels, outline
from rewire.source.modules import generating_file
from rewire.source.rules import Rules


@dataclass(frozen=True)
class Inheritance:
    """Modular files with the parent files that each names, and the modular files that these come from."""

    parents: Mapping[Path, tuple[Path, ...]]
    sources: Mapping[Path, tuple[Path, ...]]

    @cached_property
    def levels(self) -> list[list[Path]]:
        """The files by depth, from those whose parents nobody generates; those in a circle are missing."""
        return levels(self.sources)

    @cached_property
    def depth(self) -> dict[Path, int]:
        """How many generations of generated parents stand above each file."""
        return {path: depth for depth, level in enumerate(self.levels) for path in level}

    @cached_property
    def circular(self) -> list[Path]:
        """Files in, or below, a circle."""
        return sorted(self.sources.keys() - self.depth.keys())

    def affected(self, changed: Path) -> list[Path]:
        """The modular files to be built after a change, in order. `changed` is one of them, or a parent file."""
        changed = changed.resolve()
        if changed in self.parents:
            first = [changed]
        else:
            first = [path for path, parents in self.parents.items() if changed in parents]
        found = set(first)
        for level in self.levels:
            found |= {path for path in level if not found.isdisjoint(self.sources[path])}
        return sorted(found, key=lambda path: (self.depth.get(path, 0), path))


def inheritance_of(
    paths: Iterable[Path], *, package_root: Path | None = None, rules: str | Rules | None = None
) -> Inheritance:
    """Reads the imports of modular files."""
    shop = workspace(package_root, "disk", rules)
    outlines = {path: outline(path, shop.names_for(path), shop.package_of(path), shop.rules_of(path)) for path in paths}
    parents = {path: tuple(one.path for one in found.parents) for path, found in outlines.items()}
    return Inheritance(parents, inheritance(outlines))


def short(path: Path) -> str:
    """The model that a modular file describes.

    >>> short(Path("models/gemma/modular_gemma.py"))
    'gemma'
    """
    return path.stem.removeprefix("modular_")


def as_text(graph: Inheritance) -> str:
    """Each level with its files and what these inherit from; hand-written parents in parentheses.

    >>> llama, gemma = Path("llama/modeling_llama.py"), Path("gemma/modular_gemma.py")
    >>> print(as_text(Inheritance({gemma: (llama,)}, {gemma: ()})), end="")
    depth 0
      gemma <- (modeling_llama)
    """
    lines: list[str] = []
    for depth, level in enumerate(graph.levels):
        lines.append(f"depth {depth}")
        lines += [_line(graph, path) for path in sorted(level)]
    if graph.circular:
        lines += ["in a circle", *(_line(graph, path) for path in graph.circular)]
    return "".join(f"{line}\n" for line in lines)


def _line(graph: Inheritance, path: Path) -> str:
    made = [short(one) for one in graph.sources[path]]
    sources = set(graph.sources[path])
    written = [f"({one.stem})" for one in graph.parents[path] if generating_file(one) not in sources]
    return f"  {short(path)} <- {', '.join([*made, *written]) or 'nothing'}"


def as_data(graph: Inheritance) -> dict[str, Any]:
    """Plain data: every file with its depth, its parent files and the modular files behind these."""
    files = [
        {
            "file": str(path),
            "depth": graph.depth.get(path),
            "parents": [str(one) for one in graph.parents[path]],
            "inherits_from": [str(one) for one in graph.sources[path]],
        }
        for path in graph.parents
    ]
    return {"files": files, "depth": len(graph.levels), "circular": [str(path) for path in graph.circular]}


# ---------------------------------------------------------------- the picture

_ROW, _COLUMN, _WIDTH, _MARGIN = 20, 230, 170, 20


def as_svg(graph: Inheritance, marked: Sequence[Path] = ()) -> str:
    """A picture with one column for each depth. `marked` files are drawn in another colour."""
    columns = [sorted(level) for level in graph.levels]
    places = {
        path: (_MARGIN + x * _COLUMN, _MARGIN + y * _ROW)
        for x, level in enumerate(columns)
        for y, path in enumerate(level)
    }
    width = 2 * _MARGIN + _COLUMN * max(0, len(columns) - 1) + _WIDTH
    height = 2 * _MARGIN + _ROW * max((len(level) for level in columns), default=0)
    edges = [_edge(places[parent], places[path], path in marked) for path in places for parent in graph.sources[path]]
    nodes = [_node(path, place, path in marked) for path, place in places.items()]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif">\n'
    return "".join([head, f'<rect width="{width}" height="{height}" fill="#fff"/>\n', *edges, *nodes, "</svg>\n"])


def _edge(start: tuple[int, int], end: tuple[int, int], is_marked: bool) -> str:
    x, y, to_x, to_y = start[0] + _WIDTH, start[1] + _ROW // 2, end[0], end[1] + _ROW // 2
    middle = (x + to_x) // 2
    colour, opacity = ("#c2410c", 0.8) if is_marked else ("#64748b", 0.35)
    path = f"M{x} {y}C{middle} {y} {middle} {to_y} {to_x} {to_y}"
    return f'<path d="{path}" fill="none" stroke="{colour}" stroke-opacity="{opacity}"/>\n'


def _node(path: Path, place: tuple[int, int], is_marked: bool) -> str:
    x, y = place
    fill, colour = ("#ffedd5", "#9a3412") if is_marked else ("#e2e8f0", "#0f172a")
    box = f'<rect x="{x}" y="{y + 2}" width="{_WIDTH}" height="{_ROW - 4}" rx="3" fill="{fill}"/>'
    return f'{box}<text x="{x + 6}" y="{y + 14}" font-size="11" fill="{colour}">{escape(short(path))}</text>\n'
