"""Reading and writing runs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from types import TracebackType

from sqlalchemy import URL, Engine, Select, select
from sqlalchemy.orm import Session

from rewire.errors import MeasureError
from rewire.measure.store.runs import (
    Data,
    DeviceSample,
    Recorder,
    Run,
    RunFacts,
    is_alive,
    now,
    this_host,
    this_process,
)
from rewire.measure.store.tables import DONE, FAILED, RUNNING, Benchmark, DeviceMeasurement, ModelMeasurement
from rewire.measure.store.trouble import explained

WRITING = "rewire_writing"
"""Execution option of connections that will write."""

SILENT = timedelta(minutes=10)
"""A run on another machine that has not been heard of for so long counts as lost."""

LOST = "the process ended without saying so (killed, out of memory, or the machine went down)"


class Store:
    """All runs in one database. Use it in a `with` statement, or `close` it."""

    def __init__(self, engine: Engine, url: URL, write: bool = True) -> None:
        self.engine = engine
        self.url = url
        self.write = write
        self._writer = engine.execution_options(**{WRITING: True})

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Closes all connections."""
        self.engine.dispose()

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A session that reads."""
        with explained(self.url), Session(self.engine) as session:
            yield session

    @contextmanager
    def writing(self) -> Iterator[Session]:
        """A session that writes: all of it when the block ends, or nothing."""
        with Session(self._writer) as session, session.begin():
            yield session

    # ------------------------------------------------------------ writing

    @contextmanager
    def run(self, facts: RunFacts) -> Iterator[Recorder]:
        """A run from its beginning to its end: failed if an exception leaves the block, done otherwise.

        What was measured until then is kept either way.
        """
        number = self.begin(facts)
        try:
            yield Recorder(self, number)
        except BaseException as error:
            self.end(number, f"{type(error).__name__}: {error}".rstrip(": "))
            raise
        self.end(number)

    def begin(self, facts: RunFacts) -> int:
        """Adds a run that has just begun; returns its number."""
        process, started = this_process()
        moment = now()
        row = Benchmark(
            **{**asdict(facts), "suites": list(facts.suites)},
            status=RUNNING,
            created_at=moment,
            heartbeat=moment,
            host=this_host(),
            process=process,
            process_started=started,
        )
        with explained(self.url), self.writing() as session:
            session.add(row)
            session.flush()
            return row.id

    def end(self, number: int, error: str | None = None) -> None:
        """Says that a run is over: failed with `error`, else done. What has failed stays failed."""
        with explained(self.url), self.writing() as session:
            row = self._row(session, number)
            if error is not None:
                _fail(row, error)
            elif row.status != FAILED or row.error == LOST:  # it was not lost after all
                row.status, row.error = DONE, None
            row.finished_at = now()

    def fail(self, number: int, error: str) -> None:
        """Marks a run as failed while it goes on: nothing that follows makes it a success."""
        with explained(self.url), self.writing() as session:
            _fail(self._row(session, number), error)

    def add_measurement(self, number: int, measurement: Data) -> None:
        """Adds something that was measured in a run. Raises `MeasureError` for numbers that are not finite."""
        row = ModelMeasurement(benchmark_id=number, measurements=dict(measurement), time=now())
        with explained(self.url), self.writing() as session:
            session.add(row)

    def add_samples(self, number: int, samples: Sequence[DeviceSample]) -> None:
        """Adds samples of the machine to a run, which is alive then."""
        with explained(self.url), self.writing() as session:
            session.add_all([DeviceMeasurement(benchmark_id=number, **asdict(one)) for one in samples])
            self._row(session, number).heartbeat = now()

    def mark_lost(self) -> list[int]:
        """Marks the runs whose process is gone as failed; returns their numbers."""
        with self.writing() as session:
            rows = session.scalars(select(Benchmark).where(Benchmark.status == RUNNING))
            lost = [row for row in rows if _is_lost(row)]
            for row in lost:
                row.status, row.error = FAILED, LOST
            return [row.id for row in lost]

    # ------------------------------------------------------------ reading

    def runs(self, *, model: str | None = None, status: str | None = None, last: int | None = None) -> list[Run]:
        """Runs, the oldest first, without what was measured in them; the `last` ones only."""
        wanted = select(Benchmark).order_by(Benchmark.id.desc())
        wanted = wanted if model is None else wanted.where(Benchmark.model == model)
        wanted = wanted if status is None else wanted.where(Benchmark.status == status)
        with self.reading() as session:
            return [_run(row) for row in session.scalars(wanted.limit(last))][::-1]

    def get(self, name: str | int, *, devices: bool = False) -> Run:
        """One run with what was measured.

        `name` is its number; `last` or `last~2`; or a branch, or the beginning of a commit, of which the last run that
        is done is meant. Raises `MeasureError` where there is no such run.
        """
        with self.reading() as session:
            row = session.scalars(_named(str(name))).first()
            if row is None:
                raise MeasureError(self._no_such(session, str(name)))
            found = session.scalars(
                select(ModelMeasurement).where(ModelMeasurement.benchmark_id == row.id).order_by(ModelMeasurement.id)
            )
            samples = session.scalars(
                select(DeviceMeasurement).where(DeviceMeasurement.benchmark_id == row.id).order_by(DeviceMeasurement.id)
            )
            return _run(
                row,
                tuple(one.measurements for one in found),
                tuple(_sample(one) for one in samples) if devices else (),
            )

    def _row(self, session: Session, number: int) -> Benchmark:
        row = session.get(Benchmark, number)
        if row is None:
            raise MeasureError(f"run {number} was taken out of the database while it was at work")
        return row

    def _no_such(self, session: Session, name: str) -> str:
        last = session.scalars(select(Benchmark.id).order_by(Benchmark.id.desc())).first()
        if last is None:
            return f"there is no run {name}: the database is empty. Measure first (rewire bench run MODEL)"
        return f"there is no run {name}; the last one is {last}, and rewire bench list shows them all"


def _fail(row: Benchmark, error: str) -> None:
    earlier = f"{row.error}\n" if row.status == FAILED and row.error not in (None, LOST) else ""
    row.status, row.error = FAILED, earlier + error


def _named(name: str) -> Select[Benchmark]:
    newest = select(Benchmark).order_by(Benchmark.id.desc())
    if name.isdecimal() and len(name) < 10:
        return newest.where(Benchmark.id == int(name))
    if found := re.fullmatch(r"last(?:~(\d{1,6}))?", name):
        return newest.offset(int(found[1] or 0)).limit(1)
    done = newest.where(Benchmark.status == DONE)
    if re.fullmatch(r"[0-9a-f]{4,40}", name):
        return done.where(Benchmark.commit.startswith(name))
    return done.where(Benchmark.branch == name)


def _is_lost(row: Benchmark) -> bool:
    if row.host == this_host():
        return not is_alive(row.process, row.process_started)
    return now() - row.heartbeat > SILENT


def _run(row: Benchmark, measurements: tuple[Data, ...] = (), devices: tuple[DeviceSample, ...] = ()) -> Run:
    facts = RunFacts(
        model=row.model,
        device=row.device,
        suites=tuple(row.suites),
        settings=row.settings,
        machine=row.machine,
        plan=row.plan,
        plan_hash=row.plan_hash,
        branch=row.branch,
        commit=row.commit,
        message=row.message,
    )
    return Run(row.id, facts, row.status, row.error, row.created_at, row.finished_at, measurements, devices)


def _sample(row: DeviceMeasurement) -> DeviceSample:
    return DeviceSample(row.time, row.cpu, row.memory, row.gpu, row.gpu_memory)
