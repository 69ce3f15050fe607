"""What was measured, and how it looks as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rewire.measure.bench.statistics import Ratio, Spread, paired_ratio

BEFORE, AFTER = "before", "after"
"""The untouched model, and the one that the plan makes of it."""

TIMED, CHECKED, OMITTED, FAILED = "timed", "checked", "omitted", "failed"
"""Kinds of records: a measurement; the two models agree; something cannot be measured here; a suite has failed."""

Label = int | float | str


def label_text(label: tuple[str, Label]) -> str:
    """
    >>> label_text(("batch", 8)), label_text(("padding", 0.5))
    ('batch 8', 'padding 50%')
    """
    name, value = label
    return f"{name} {value:.0%}" if isinstance(value, float) else f"{name} {value}"


@dataclass(frozen=True)
class Figure:
    """One side of a measurement.

    Attributes:
        samples: seconds, round by round.
        peak_bytes: peak memory; None where it was not measured.
    """

    samples: tuple[float, ...]
    peak_bytes: int | None = None

    @property
    def spread(self) -> Spread:
        """Median and quartiles of the seconds."""
        return Spread.of(self.samples)


@dataclass(frozen=True)
class Measurement:
    """One thing that was timed.

    Attributes:
        suite: name of the suite.
        case: what was timed, as `first token`.
        sides: `before` and, with a plan, `after`.
        labels: what distinguishes it from the same case with other sizes, as `{"batch": 8}`.
        unit: what the work is counted in, as `tokens`; empty where it is not.
        work: how much of it is done in the seconds of one sample.
    """

    suite: str
    case: str
    sides: Mapping[str, Figure]
    labels: Mapping[str, Label] = field(default_factory=dict)
    unit: str = ""
    work: float = 1.0

    @property
    def key(self) -> tuple[str, ...]:
        """The same for the same thing in another run."""
        return (self.suite, self.case, *map(label_text, sorted(self.labels.items())))

    @property
    def title(self) -> str:
        """For people.

        >>> Measurement("encode", "forward", {}, {"batch": 8, "padding": 0.5}).title
        'encode · forward · batch 8 · padding 50%'
        """
        return " · ".join(self.key)

    @property
    def ratio(self) -> Ratio | None:
        """Seconds before as a multiple of those after: more than 1 is faster than before. None without a plan."""
        if BEFORE not in self.sides or AFTER not in self.sides:
            return None
        return paired_ratio(self.sides[BEFORE].samples, self.sides[AFTER].samples)

    @property
    def memory_saving(self) -> float | None:
        """Share of the peak memory that the plan saves, `1 − after/before`; less than 0 if it takes more."""
        peaks = [self.sides[side].peak_bytes if side in self.sides else None for side in (BEFORE, AFTER)]
        before, after = peaks
        return 1 - after / before if before and after is not None else None

    def rate(self, side: str) -> float | None:
        """Units per second, at the median."""
        return self.work / self.sides[side].spread.median if self.unit else None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data, with what follows from the samples, for those who ask a database."""
        ratio = self.ratio
        return {
            "kind": TIMED,
            "suite": self.suite,
            "case": self.case,
            "labels": dict(self.labels),
            "unit": self.unit,
            "work": self.work,
            BEFORE: self._side(BEFORE),
            AFTER: self._side(AFTER),
            "ratio": None if ratio is None else {"value": ratio.value, "low": ratio.low, "high": ratio.high},
            "memory_saving": self.memory_saving,
        }

    def _side(self, side: str) -> dict[str, Any] | None:
        if side not in self.sides:
            return None
        figure = self.sides[side]
        spread = figure.spread
        return {
            "median": spread.median,
            "lower": spread.lower,
            "upper": spread.upper,
            "rate": self.rate(side),
            "peak_bytes": figure.peak_bytes,
            "samples": list(figure.samples),
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Measurement:
        """The inverse of `to_dict`."""
        sides = {
            side: Figure(tuple(data[side]["samples"]), data[side]["peak_bytes"])
            for side in (BEFORE, AFTER)
            if data.get(side) is not None
        }
        labels = dict(sorted(data["labels"].items()))  # PostgreSQL puts keys into an order of its own
        return Measurement(data["suite"], data["case"], sides, labels, data["unit"], data["work"])


def measurements(records: tuple[Mapping[str, Any], ...]) -> list[Measurement]:
    """The measurements among the records of a run."""
    return [Measurement.from_dict(one) for one in records if one.get("kind") == TIMED]


def checked(suite: str, what: str, promise: str, difference: float | None, limit: float | None) -> dict[str, Any]:
    """The record of two models that agree: the largest difference, and what it may be (None: anything)."""
    facts = {"promise": promise, "difference": difference, "limit": limit}
    return {"kind": CHECKED, "suite": suite, "what": what, **facts}


def omitted(suite: str, case: str, reason: str) -> dict[str, Any]:
    """The record of a case (or a whole suite, with no case) that this model cannot be measured with."""
    return {"kind": OMITTED, "suite": suite, "case": case, "reason": reason}


def failed(suite: str, error: str) -> dict[str, Any]:
    """The record of a suite that has failed."""
    return {"kind": FAILED, "suite": suite, "error": error}
