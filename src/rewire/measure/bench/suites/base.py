"""What a suite is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rewire.measure.bench.bench import Bench
from rewire.measure.bench.records import Label
from rewire.measure.bench.timing import Trial


@dataclass(frozen=True)
class Work:
    """What is done in one phase.

    Attributes:
        unit: what it is counted in, as `tokens`; empty where it is not.
        amount: how much of it is done each time.
        times: how often it is done in one phase; seconds are given for one of them.
    """

    unit: str = ""
    amount: float = 1.0
    times: int = 1


@dataclass(frozen=True)
class Case:
    """Something that is timed on both sides.

    Attributes:
        phases: the phases that its trials go through, by name, with the work of each.
        trials: by side, what does it once.
        labels: what distinguishes it from the same with other sizes, as `{"batch": 8}`.
        once: whether it can be done only once, as compiling.
    """

    phases: Mapping[str, Work]
    trials: Mapping[str, Trial]
    labels: Mapping[str, Label] = field(default_factory=dict)
    once: bool = False


@dataclass(frozen=True)
class Omitted:
    """A case that cannot be measured with this model, and why."""

    case: str
    reason: str


@dataclass(frozen=True)
class Suite:
    """A named set of things to time.

    Attributes:
        name: as `--suite` takes it.
        about: what it times, in one line.
        unfit: says why it cannot be run on the models of a bench; None where it can.
        check: raises `MeasureError` unless the two models agree within the promise of the plan; gives the records of
            what was compared (`rewire.measure.bench.agreement`).
        cases: what is timed. A case is made before the one before it is run, so its trials do the work.
    """

    name: str
    about: str
    unfit: Callable[[Bench], str | None]
    check: Callable[[Bench], Sequence[dict[str, Any]]]
    cases: Callable[[Bench], Sequence[Case | Omitted]]


def fits_all(bench: Bench) -> None:
    """For suites that any model can run."""
