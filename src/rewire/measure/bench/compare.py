"""One run against another, and the verdict on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rewire.errors import MeasureError
from rewire.measure.bench.records import Measurement, measurements
from rewire.measure.bench.statistics import FEWEST, Ratio, unpaired_ratio
from rewire.measure.store.runs import Run


@dataclass(frozen=True)
class Row:
    """One side of one case in two runs.

    Attributes:
        title: of the case.
        side: `before` or `after`.
        base: median seconds in the first run; None where it was not measured there.
        head: the same of the second run.
        slowdown: `head/base`, with its interval: more than 1 is slower. None where one of them is missing.
        samples: the fewer samples of the two.
        memory: peak memory, `head/base`; None where it was not measured.
    """

    title: str
    side: str
    base: float | None
    head: float | None
    slowdown: Ratio | None
    samples: int
    memory: float | None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data."""
        return asdict(self)


@dataclass(frozen=True)
class Comparison:
    """Two runs.

    Attributes:
        base: name of the first.
        head: name of the second.
        rows: side by side.
        differences: settings and facts in which they differ, besides the code: what was measured under other
            circumstances says little.
    """

    base: str
    head: str
    rows: tuple[Row, ...]
    differences: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data."""
        return asdict(self)


def compare_runs(base: Run, head: Run) -> Comparison:
    """Sets two runs side by side. Raises `MeasureError` for runs that have nothing in common, or have failed."""
    for run in (base, head):
        if run.status != "done":
            reason = f": {run.error}" if run.error else ""
            raise MeasureError(f"{run.name} is {run.status} and no measurement to compare with{reason}")
    if base.id == head.id:
        raise MeasureError(f"{base.name} is one run; comparing takes two")
    sides = [_sides(measurements(run.measurements)) for run in (base, head)]
    if not set(sides[0]) & set(sides[1]):
        raise MeasureError(
            f"{base.name} and {head.name} have no case in common; measure both with the same "
            "--suite, --batch and --tokens"
        )
    keys = dict.fromkeys((*sides[0], *sides[1]))
    rows = tuple(_row(key, *(side.get(key) for side in sides)) for key in keys)
    return Comparison(base.name, head.name, rows, tuple(_differences(base, head)))


Key = tuple[tuple[str, ...], str]


def _sides(found: Sequence[Measurement]) -> dict[Key, Measurement]:
    return {(one.key, side): one for one in found for side in one.sides}


def _row(key: Key, base: Measurement | None, head: Measurement | None) -> Row:
    title, side = " · ".join(key[0]), key[1]
    figures = [one.sides[side] if one is not None else None for one in (base, head)]
    first, second = figures
    before, after = (one.spread.median if one is not None else None for one in figures)
    if first is None or second is None:
        return Row(title, side, before, after, None, 0, None)
    memory = second.peak_bytes / first.peak_bytes if first.peak_bytes and second.peak_bytes is not None else None
    slowdown = unpaired_ratio(second.samples, first.samples)
    return Row(title, side, before, after, slowdown, min(len(first.samples), len(second.samples)), memory)


def _differences(base: Run, head: Run) -> list[str]:
    facts = [
        {"model": run.facts.model, "device": run.facts.device, "plan": run.facts.plan_hash, **_flat(run)}
        for run in (base, head)
    ]
    names = dict.fromkeys((*facts[0], *facts[1]))
    return [f"{n}: {facts[0].get(n)} → {facts[1].get(n)}" for n in names if facts[0].get(n) != facts[1].get(n)]


def _flat(run: Run) -> Mapping[str, Any]:
    return {**run.facts.settings, **run.facts.machine}


# ---------------------------------------------------------------- the gate


@dataclass(frozen=True)
class Verdict:
    """What a gate says.

    Attributes:
        comparison: the two runs.
        max_slowdown: how much slower the second may be, as a share: 0.05 is 5 %.
        offending: rows that are slower than that, or were not measured again.
        unjudged: rows with too few samples to tell.
    """

    comparison: Comparison
    max_slowdown: float
    offending: tuple[Row, ...]
    unjudged: tuple[Row, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing offends."""
        return not self.offending

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data."""
        return {"passed": self.passed, **asdict(self)}


def gate(base: Run, head: Run, max_slowdown: float) -> Verdict:
    """Whether the second run is no more than `max_slowdown` slower than the first, in every row.

    A row offends when its median is slower by more, and so certainly that the 95 % interval of the slowdown leaves
    "no slower" out; or when the second run has not measured it. Rows of fewer than three samples (compiling) are not
    judged. Raises `MeasureError` as `compare_runs` does.
    """
    comparison = compare_runs(base, head)
    both = [row for row in comparison.rows if row.base is not None]
    unjudged = tuple(row for row in both if row.slowdown is not None and row.samples < FEWEST)
    offending = tuple(row for row in both if row not in unjudged and _offends(row, max_slowdown))
    return Verdict(comparison, max_slowdown, offending, unjudged)


def _offends(row: Row, max_slowdown: float) -> bool:
    if row.slowdown is None:
        return True
    return row.slowdown.value > 1 + max_slowdown and row.slowdown.low is not None and row.slowdown.low > 1


def parse_share(text: str) -> float:
    """A share given as a number or in per cent. Raises `MeasureError` for anything else.

    >>> parse_share("5%"), parse_share("0.05"), parse_share("0")
    (0.05, 0.05, 0.0)
    """
    number = text.strip()
    try:
        value = float(number.removesuffix("%")) / (100 if number.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < 100:
        raise MeasureError(f"{text!r} is no share such as 5% or 0.05")
    return value
