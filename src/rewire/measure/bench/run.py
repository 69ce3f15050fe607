"""Running suites: check, time, measure memory, record; one case after the other."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from rewire.errors import MeasureError
from rewire.measure.bench.bench import Bench
from rewire.measure.bench.memory import Peaks
from rewire.measure.bench.records import Figure, Measurement, failed, omitted
from rewire.measure.bench.settings import Settings
from rewire.measure.bench.suites.base import Case, Omitted, Suite
from rewire.measure.bench.timing import interleave

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many cases are done, and how many there are (0: nobody knows yet)."""


class Recorder(Protocol):
    """Takes records as they come, as `rewire.measure.store.Recorder` does."""

    def measured(self, measurement: Mapping[str, Any]) -> None:
        """One more record."""


@dataclass(frozen=True)
class Failure:
    """A suite that has failed."""

    suite: str
    error: str
    details: str

    def __str__(self) -> str:
        return f"{self.suite}: {self.error}"


@dataclass
class Outcome:
    """What a run has found.

    Attributes:
        measurements: what was timed.
        records: all records: these, what was checked, left out, and has failed.
        failures: suites that have failed; a run with any is no success.
    """

    measurements: list[Measurement] = field(default_factory=list)
    records: list[Mapping[str, Any]] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)


def run_bench(
    bench: Bench,
    suites: Sequence[Suite],
    *,
    is_all: bool = False,
    recorder: Recorder | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Runs suites one after the other. One that fails is recorded as failed, and the others are run nevertheless.

    Args:
        bench: the models, and how to measure.
        suites: what to run.
        is_all: leaves suites out that do not fit the model; otherwise these fail.
        recorder: gets every record as soon as it is there.
        progress: called before every round.

    Raises:
        MeasureError: none of the suites fits the model.
    """
    work = _Work(bench, recorder, progress or (lambda text, done, total: None))
    with _threads(bench.settings.threads):
        for suite in suites:
            try:
                work.run(suite, is_all)
            except Exception as error:  # whatever a model or a suite of others does; recorded, and told at the end
                work.fail(suite, error)
    if not (work.outcome.measurements or work.outcome.failures):
        reasons = "; ".join(f"{one['suite']}: {one['reason']}" for one in work.outcome.records if "reason" in one)
        raise MeasureError(f"no suite fits this model ({reasons})")
    return work.outcome


class _Work:
    """A run in the making."""

    def __init__(self, bench: Bench, recorder: Recorder | None, progress: Progress) -> None:
        self.bench, self.recorder, self.progress = bench, recorder, progress
        self.outcome = Outcome()

    def run(self, suite: Suite, is_all: bool) -> None:
        self.progress(f"{suite.name}: loading", 0, 0)
        reason = suite.unfit(self.bench)
        if reason is not None:
            if not is_all:
                raise MeasureError(reason)
            return self.record(omitted(suite.name, "", reason))
        self.progress(f"{suite.name}: comparing the models", 0, 0)
        for record in suite.check(self.bench):
            self.record(record)
        cases = suite.cases(self.bench)
        for number, case in enumerate(cases):
            if isinstance(case, Omitted):
                self.record(omitted(suite.name, case.case, case.reason))
            else:
                text = f"{suite.name}: {', '.join(case.phases)}"
                self.measure(suite, case, lambda n=number, t=text: self.progress(t, n, len(cases)))  # type: ignore[misc]
        return None

    def measure(self, suite: Suite, case: Case, tick: Callable[[], None]) -> None:
        """Times a case, and looks at its memory in a round of its own, for that would take time."""
        tick()
        for measurement in measure(suite.name, case, self.bench.settings, tick):
            self.outcome.measurements.append(measurement)
            self.record(measurement.to_dict())

    def fail(self, suite: Suite, error: Exception) -> None:
        text = str(error) if isinstance(error, MeasureError) else f"{type(error).__name__}: {error}"
        self.outcome.failures.append(Failure(suite.name, text, "".join(traceback.format_exception(error))))
        self.record(failed(suite.name, text))

    def record(self, record: Mapping[str, Any]) -> None:
        self.outcome.records.append(record)
        if self.recorder is not None:
            self.recorder.measured(record)


def measure(suite: str, case: Case, settings: Settings, tick: Callable[[], None] = lambda: None) -> list[Measurement]:
    """One measurement for every phase of a case."""
    how = (1, 0.0, 0) if case.once else (settings.repeats, settings.seconds, settings.warm_ups)
    repeats, seconds, warm_ups = how
    samples = interleave(case.trials, settings.device, repeats=repeats, seconds=seconds, warm_ups=warm_ups, tick=tick)
    peaks = {} if case.once else {side: _peaks(case, side, settings.device) for side in case.trials}
    return [
        Measurement(
            suite=suite,
            case=phase,
            sides={
                side: Figure(tuple(one / work.times for one in samples[side][phase]), peaks.get(side, {}).get(phase))
                for side in case.trials
            },
            labels=case.labels,
            unit=work.unit,
            work=work.amount,
        )
        for phase, work in case.phases.items()
    ]


def _peaks(case: Case, side: str, device: str) -> dict[str, int]:
    watch = Peaks(device)
    case.trials[side](watch)
    return watch.bytes


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """So many threads of torch inside; as many as before afterwards."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
