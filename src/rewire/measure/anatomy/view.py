"""An anatomy on the screen."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rewire.inspection.view import names
from rewire.measure.anatomy.listing import COUNTED, listing, notes
from rewire.measure.anatomy.record import Anatomy
from rewire.measure.anatomy.tree import Part
from rewire.measure.anatomy.words import short

DEPTH = 4
"""Levels of the tree where nobody says."""


def view(found: Anatomy, after: Anatomy | None = None, depth: int = DEPTH) -> RenderableType:
    """Counts, the tree and the memory; with the same model after a plan, side by side."""
    parts: list[RenderableType] = [_title(found), Text(), _tree(found, depth), Text()]
    if after is not None:
        parts += [Text("after the plan", style="bold"), _title(after), Text(), _tree(after, depth), Text()]
    parts += [
        _memory(found, after),
        Text(COUNTED, style="dim"),
        *(Text(one, style="yellow") for one in notes(found, after)),
    ]
    return Group(*parts)


def _title(found: Anatomy) -> Text:
    text = Text.assemble((found.model, "bold"), f" ({found.model_type})" if found.model_type else "")
    text.append(f" · {found.tree.parameters:,} parameters")
    if found.tree.trainable != found.tree.parameters:
        text.append(f", {found.tree.trainable:,} trainable")
    text.append(f" · {short(found.tree.bytes, 'B')} {', '.join(found.dtypes)}")
    if found.flops is not None:
        text.append(f" · {short(found.flops)}FLOP per {found.unit}")
    return text


# ---------------------------------------------------------------- the tree


def _tree(found: Anatomy, depth: int) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("module", overflow="fold")
    for head in _heads(found):
        table.add_column(head, justify="right", no_wrap=True)
    for level, part in _lines(found.tree, depth):
        table.add_row(_label(level, part), *_figures(found, part))
    return table


def _heads(found: Anatomy) -> list[str]:
    heads = ["parameters", "bytes"]
    heads += [f"FLOP/{found.unit}"] if found.tree.flops is not None else []
    return heads + (["kept for backward"] if found.tree.activations is not None else [])


def _lines(part: Part, depth: int, level: int = 0) -> Iterator[tuple[int, Part]]:
    yield level, part
    if level < depth:
        for child in part.children:
            yield from _lines(child, depth, level + 1)


def _label(level: int, part: Part) -> Text:
    text = Text("  " * level)
    text.append(names(part.names), style="bold")
    times = f" {part.count} ×" if part.count > 1 else ""
    return text.append(f"{times} {part.module}" if part.names else part.module, style="cyan")


def _figures(found: Anatomy, part: Part) -> list[str]:
    """Of one of several that are alike."""
    figures = [short(part.parameters), short(part.bytes, "B")]
    if found.tree.flops is not None:
        figures.append(short(None if part.flops is None else round(part.flops / found.count)))
    return figures + ([short(part.activations, "B")] if found.tree.activations is not None else [])


def _memory(found: Anatomy, after: Anatomy | None) -> Table:
    listed = listing(found, after)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(f"memory at {listed.sizes}", overflow="fold")
    for head in listed.heads:
        table.add_column(head, justify="right", no_wrap=True)
    for line in listed.lines:
        name = line.name if line.is_peak else f"  {line.name}"
        table.add_row(name, *line.cells, style="bold" if line.is_peak else "")
    return table
