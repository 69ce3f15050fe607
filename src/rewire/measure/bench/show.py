"""Runs and comparisons on a terminal, and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rewire.measure.bench.compare import Comparison, Row
from rewire.measure.bench.records import (
    AFTER,
    BEFORE,
    CHECKED,
    FAILED,
    OMITTED,
    Figure,
    Measurement,
    label_text,
    measurements,
)
from rewire.measure.bench.statistics import Ratio
from rewire.measure.store.runs import Run

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


def seconds(value: float) -> str:
    """A time in a unit that fits.

    >>> seconds(0.00001234), seconds(0.01234), seconds(12.34)
    ('12.3 µs', '12.3 ms', '12.3 s')
    """
    for factor, unit in ((1.0, "s"), (1e3, "ms")):
        if value * factor >= 1:
            return f"{_three(value * factor)} {unit}"
    return f"{_three(value * 1e6)} µs"


def _three(value: float) -> str:
    """Three digits that count."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def mebibytes(value: float) -> str:
    """
    >>> mebibytes(3 * 2**20)
    '3.0 MiB'
    """
    return f"{value / 2**20:,.1f} MiB"


def memory(value: float) -> str:
    """Bytes in a unit that fits.

    >>> memory(3.5 * 2**20), memory(2.25 * 2**30)
    ('3.50 MiB', '2.25 GiB')
    """
    return f"{_three(value / 2**30)} GiB" if value >= 2**30 else f"{_three(value / 2**20)} MiB"


def ratio(found: Ratio | None) -> str:
    """
    >>> ratio(Ratio(1.234, 1.2, 1.3)), ratio(None)
    ('1.234 (1.200–1.300)', '')
    """
    if found is None:
        return ""
    return f"{found.value:.3f}" + ("" if found.low is None else f" ({found.low:.3f}–{found.high:.3f})")


def figure(found: Figure | None) -> str:
    """Median and quartiles.

    >>> figure(Figure((0.010, 0.012, 0.014)))
    '12.0 (11.0–13.0) ms'
    """
    if found is None:
        return ""
    spread = found.spread
    number, unit = seconds(spread.median).split()
    if len(found.samples) < 2:
        return f"{number} {unit}"
    factor = {"s": 1.0, "ms": 1e3, "µs": 1e6}[unit]
    return f"{number} ({_three(spread.lower * factor)}–{_three(spread.upper * factor)}) {unit}"


def table(found: Sequence[Measurement]) -> Table:
    """Measurements, a line each, below a line for each suite with the sizes that all of it has in common."""
    from rich.table import Table

    has_plan = any(AFTER in one.sides for one in found)
    heads = (
        ["before", "after", "ratio (95 %)", "peak", "peak after", "saving"] if has_plan else ["time", "rate", "peak"]
    )
    shown = Table("case", *heads, box=None, pad_edge=False)
    for column in shown.columns[1:]:
        column.justify = "right"
        column.no_wrap = True
    for suite in dict.fromkeys(one.suite for one in found):
        group = [one for one in found if one.suite == suite]
        common = [label for label in group[0].labels.items() if all(label in one.labels.items() for one in group)]
        about = ", ".join(map(label_text, common))
        shown.add_row(f"[bold]{suite}[/] [dim]{about}[/]")
        for one in group:
            own = [label_text(label) for label in one.labels.items() if label not in common]
            shown.add_row(f"  {', '.join([one.case, *own])}", *(_with_plan(one) if has_plan else _alone(one)))
    return shown


def _with_plan(one: Measurement) -> Iterable[str]:
    sides = [one.sides.get(side) for side in (BEFORE, AFTER)]
    yield from (figure(side) for side in sides)
    yield ratio(one.ratio)
    yield from (_peak(side) for side in sides)
    yield "" if one.memory_saving is None else f"{one.memory_saving:+.1%}"


def _alone(one: Measurement) -> Iterable[str]:
    yield figure(one.sides[BEFORE])
    rate = one.rate(BEFORE)
    yield "" if rate is None else f"{rate:,.0f} {one.unit}/s"
    yield _peak(one.sides[BEFORE])


def _peak(side: Figure | None) -> str:
    return "" if side is None or side.peak_bytes is None else mebibytes(side.peak_bytes)


def run_view(run: Run) -> list[RenderableType]:
    """A whole run."""
    from rich.text import Text

    facts = run.facts
    head = f"{run.name} · {facts.model} · {facts.device} · {run.status} · {run.created_at:%Y-%m-%d %H:%M} UTC"
    parts: list[RenderableType] = [Text(head, style="bold")]
    about = [f"plan {facts.plan_hash[:12]}"] if facts.plan_hash else []
    about += [f"{facts.branch}: {facts.message}"] if facts.branch else []
    about += [f"{facts.machine.get(name)}" for name in ("processor", "memory") if name in facts.machine]
    parts += [Text(" · ".join(about), style="dim")] if about else []
    parts += [Text(f"error: {run.error}", style="red")] if run.error else []
    return [*parts, table(measurements(run.measurements)), *notes(run.measurements)]


def notes(records: Sequence[Mapping[str, Any]]) -> list[RenderableType]:
    """What was checked and what was left out."""
    from rich.text import Text

    lines = []
    for one in records:
        if one.get("kind") == CHECKED and one["difference"] is not None:
            limit = "anything" if one["limit"] is None else f"{one['limit']:.1e}"
            text = (
                f"{one['suite']}: {one['what']} agree: {one['difference']:.1e} apart, {one['promise']} allows {limit}"
            )
            lines.append(Text(text, style="dim"))
        elif one.get("kind") == OMITTED:
            lines.append(Text(": ".join(part for part in (one["suite"], one["case"], one["reason"]) if part), "yellow"))
        elif one.get("kind") == FAILED:
            lines.append(Text(f"{one['suite']} failed: {one['error']}", style="red"))
    return list(lines)


def runs_table(runs: Sequence[Run]) -> Table:
    """Runs, a line each."""
    from rich.table import Table

    shown = Table("run", "when (UTC)", "status", "model", "device", "suites", "plan", "commit", "", box=None)
    for run in runs:
        facts = run.facts
        shown.add_row(
            str(run.id),
            f"{run.created_at:%Y-%m-%d %H:%M}",
            run.status,
            facts.model,
            facts.device,
            ", ".join(facts.suites),
            (facts.plan_hash or "")[:8],
            (facts.commit or "")[:10],
            (run.error or facts.message or "").splitlines()[0] if (run.error or facts.message) else "",
        )
    return shown


def comparison_view(found: Comparison, rows: Sequence[Row] | None = None) -> list[RenderableType]:
    """Two runs side by side, or some rows of them."""
    from rich.table import Table
    from rich.text import Text

    shown = Table("case", "side", found.base, found.head, "slowdown (95 %)", "memory", box=None, pad_edge=False)
    for row in found.rows if rows is None else rows:
        shown.add_row(row.title, row.side, *(_cells(row)))
    about = [Text(f"they differ in {one}", style="yellow") for one in found.differences]
    return [shown, *about]


def _cells(row: Row) -> Iterable[str]:
    yield from ("not measured" if one is None else seconds(one) for one in (row.base, row.head))
    yield ratio(row.slowdown)
    yield "" if row.memory is None else f"{row.memory:.3f}"


# ---------------------------------------------------------------- CSV

_RUN = ("run", "created_at", "status", "branch", "commit", "message", "model", "device", "plan_hash")
_CASE = ("suite", "case", "batch", "tokens", "prompt", "padding", "side")
_FIGURES = ("samples", "median_s", "lower_s", "upper_s", "unit", "rate", "peak_bytes")
COLUMNS = (*_RUN, *_CASE, *_FIGURES, "ratio", "ratio_low", "ratio_high", "memory_saving")


def to_csv(runs: Iterable[Run]) -> str:
    """A line for each side of each measurement; times in seconds, memory in bytes."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for run in runs:
        for one in measurements(run.measurements):
            writer.writerows(_csv_row(run, one, side) for side in one.sides)
    return text.getvalue()


def _csv_row(run: Run, one: Measurement, side: str) -> dict[str, Any]:
    facts, found, figure = run.facts, one.ratio, one.sides[side]
    spread = figure.spread
    about = {"run": run.id, "created_at": run.created_at.isoformat(), "status": run.status, "model": facts.model}
    origin = {"branch": facts.branch, "commit": facts.commit, "message": facts.message, "device": facts.device}
    figures = {"median_s": spread.median, "lower_s": spread.lower, "upper_s": spread.upper}
    ratios = {} if found is None else {"ratio": found.value, "ratio_low": found.low, "ratio_high": found.high}
    return {
        **about,
        **origin,
        "plan_hash": facts.plan_hash,
        "suite": one.suite,
        "case": one.case,
        **one.labels,
        "side": side,
        "samples": len(figure.samples),
        **figures,
        "unit": one.unit,
        "rate": one.rate(side),
        "peak_bytes": figure.peak_bytes,
        **ratios,
        "memory_saving": one.memory_saving,
    }
