"""All types, in several processes, each type in one that may die or hang without taking the others along."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from rewire.coverage.record import EDITS, Coverage, Finding, TypeReport, library_versions, merged
from rewire.errors import CheckpointError

MAX_SECONDS = 300.0
"""After which a type is given up."""

Progress = Callable[[str, int, int], None]
"""Called with the type just done, how many are done, and how many there are."""


def measure_coverage(
    model_types: Sequence[str],
    *,
    edits: Sequence[str] = EDITS,
    jobs: int = 1,
    state: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    max_seconds: float = MAX_SECONDS,
) -> Coverage:
    """Tries `edits` on the tiny model of every type and proves them.

    Args:
        model_types: which types.
        edits: which edits, of `EDITS`.
        jobs: processes at work side by side, each with one thread.
        state: a file that every type is added to as soon as it is done; types that it holds already, from the same
            versions, are not done again.
        progress: called after every type.
        max_seconds: after which a type is given up and reported as failed.

    Raises `CheckpointError` where `state` is another kind of file.
    """
    log = _Log(Path(state)) if state is not None else None
    done = {one.model_type: one for one in (log.read() if log else ()) if one.model_type in model_types}
    todo = [name for name in model_types if not _covers(done.get(name), edits)]
    for report in _in_processes(todo, edits, max(1, min(jobs, len(todo))), max_seconds):
        done[report.model_type] = report
        if log:
            log.add(report)
        if progress:
            progress(report.model_type, len(model_types) - len(todo) + _count(done, todo), len(model_types))
    return Coverage(merged(done.values()))


def _covers(report: TypeReport | None, edits: Sequence[str]) -> bool:
    return report is not None and set(edits) <= {one.edit for one in report.findings}


def _count(done: dict[str, TypeReport], todo: Sequence[str]) -> int:
    return sum(name in done for name in todo)


class _Log:
    """Reports as lines of JSON, the versions first. A line that a crash cut off is left out."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.head = {"rewire_coverage_log": 1, "versions": library_versions()}

    def read(self) -> Iterator[TypeReport]:
        """What is there, of the same versions; the file is begun anew where there is nothing of them."""
        lines = self.path.read_text("utf-8").splitlines() if self.path.is_file() else []
        if lines and "rewire_coverage_log" not in lines[0]:
            raise CheckpointError(f"{self.path} is no log of a coverage run; name another file")
        if not lines or json.loads(lines[0]) != self.head:
            self.path.write_text(json.dumps(self.head) + "\n", "utf-8")
            return
        for line in lines[1:]:
            try:
                yield TypeReport.from_dict(json.loads(line))
            except ValueError:
                continue

    def add(self, report: TypeReport) -> None:
        """Adds a report, on disk at once."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(report.to_dict()) + "\n")


# ---------------------------------------------------------------- processes


@dataclass
class _Worker:
    """A process that takes types and gives reports; made anew when it dies or hangs."""

    edits: Sequence[str]
    process: Any = field(init=False)
    connection: Connection = field(init=False)
    busy: str | None = None
    since: float = 0.0

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_work, args=(other, tuple(self.edits)), daemon=True)
        self.process.start()
        other.close()

    def give(self, model_type: str) -> None:
        try:
            self.connection.send(model_type)
        except OSError:  # it died while it had nothing to do
            self.stop()
            self.start()
            self.connection.send(model_type)
        self.busy, self.since = model_type, time.monotonic()

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def _work(connection: Connection, edits: tuple[str, ...]) -> None:
    """What a worker does, until its parent is gone."""
    from rewire import hf_seam
    from rewire.coverage.check import check_type, single_threaded

    warnings.simplefilter("ignore")
    with hf_seam.quiet(), single_threaded():
        while True:
            try:
                model_type = connection.recv()
            except EOFError:
                return
            connection.send(check_type(model_type, edits).to_dict())


def _in_processes(
    model_types: Sequence[str], edits: Sequence[str], jobs: int, max_seconds: float
) -> Iterator[TypeReport]:
    if not model_types:
        return
    waiting = list(reversed(model_types))
    workers = [_Worker(edits) for _ in range(jobs)]
    try:
        for worker in workers:
            worker.give(waiting.pop())
        while any(worker.busy for worker in workers):
            yield from _collected(workers, max_seconds)
            for worker in workers:
                if worker.busy is None and waiting:
                    worker.give(waiting.pop())
    finally:
        for worker in workers:
            worker.stop()


def _collected(workers: Sequence[_Worker], max_seconds: float) -> Iterator[TypeReport]:
    """Reports that have come in, and those of workers that died or hang."""
    busy = [worker for worker in workers if worker.busy]
    ready = set(wait([worker.connection for worker in busy], timeout=1.0))
    for worker in busy:
        model_type, seconds = worker.busy or "", time.monotonic() - worker.since
        if worker.connection in ready:
            worker.busy = None
            try:
                yield TypeReport.from_dict(worker.connection.recv())
                continue
            except (EOFError, OSError):
                worker.process.join()
                problem = f"the process died ({worker.process.exitcode})"
        elif seconds > max_seconds:
            worker.busy, problem = None, f"not done after {max_seconds:.0f} s"
        else:
            continue
        worker.stop()
        worker.start()
        findings = tuple(Finding(edit, "failed", detail=problem) for edit in worker.edits)
        yield TypeReport(model_type, findings=findings, seconds=round(seconds, 2))
