"""Carries a job out: locks, journal, shards, publication."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rewire.artefact import read_record
from rewire.errors import OutputError
from rewire.stream.job import Job, part_numbers, signature
from rewire.stream.journal import Heading, Journal
from rewire.stream.paths import is_taken
from rewire.stream.publish import Publication, config_before, left_behind, publish, write_manifest
from rewire.stream.report import Conversion
from rewire.stream.shards import is_whole, verify_shard, write_shard
from rewire.stream.task import said_of, some
from rewire.stream.workspace import WHOLE, Workspace

Progress = Callable[[str, int, int], None]
"""Called with the shard that is written, the bytes written so far, and out of how many."""


@dataclass(frozen=True)
class How:
    """The options of `convert` that do not change the result."""

    part: tuple[int, int] | None
    resume: bool
    restart: bool
    jobs: int
    checksums: bool
    verify: bool
    manifest: Path | None
    progress: Progress | None


@dataclass
class Run:
    """One call of `convert`: `write` or `finish` is called, once."""

    job: Job
    work: Workspace
    how: How
    start: float
    written: int = 0
    kept: int = 0
    needed: int = 0
    bytes_written: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    # ------------------------------------------------------------ writing

    def write(self) -> Conversion:
        """Writes this part; if it is the whole, publishes it."""
        if self._is_there():
            return self._already(may=self.how.resume)
        part = self.how.part or WHOLE
        with self.work.locked(part):
            if self._is_there():  # finished while this call waited
                return self._already(may=self.how.resume)
            if self.how.restart:
                self.work.clear()
            journal = self._open_journal(part)
            try:
                self._write_shards(journal, part)
            except BaseException:
                if part == WHOLE and not journal.sizes():
                    self.work.remove()  # nothing in it is worth keeping
                raise
            if self.how.part is not None:
                self._verify({part: journal})
                return self.report("part")
            self._publish({part: journal})
        return self.report("done")

    def finish(self) -> Conversion:
        """Publishes what all parts have written."""
        if self._is_there():
            return self._already(may=True)
        if not self.work.root.is_dir():
            raise OutputError(f"there is nothing to finish: {self.work.root} does not exist")
        with self.work.locked(None):
            journals = self.work.journals()
            self._check_parts(journals)
            self.kept = self.job.count
            self._publish(journals)
        return self.report("done")

    def _open_journal(self, part: tuple[int, int]) -> Journal:
        heading = self._heading(part)
        self._check_others(heading)
        journal = self.work.journal(part)
        found = journal.heading()
        if found is None:
            journal.begin(heading)
        elif not self.how.resume:
            raise OutputError(
                f"{self.work.root} holds what an earlier conversion left ({len(journal.sizes())} of {self.job.count} "
                "shards). Go on with it (resume=True, --resume) or begin anew (restart=True, --restart)"
            )
        elif found != heading:
            raise OutputError(f"{self.work.root} cannot be gone on with: {_difference(found, heading)}. {_ANEW}")
        else:
            journal.mend()
        return journal

    def _heading(self, part: tuple[int, int]) -> Heading:
        shards = self.job.checkpoint.shards
        files = tuple((shard.name, shard.size, shard.mtime_ns, shard.header_hash) for shard in shards)
        return Heading(self.job.key, part, self.job.count, files)

    def _check_others(self, heading: Heading) -> None:
        """Parts that were begun by others have to be parts of the same."""
        for part, journal in self.work.journals().items():
            found = journal.heading()
            if part == heading.part or found is None:
                continue
            if part[1] != heading.part[1]:
                ways = "whole" if part == WHOLE else f"in {part[1]} parts"
                raise OutputError(f"{self.work.root} was begun {ways}. Go on that way, or begin anew. {_ANEW}")
            if found.key != heading.key:
                raise OutputError(f"part {part[0]} of {part[1]} was written from another plan or source. {_ANEW}")

    def _write_shards(self, journal: Journal, part: tuple[int, int]) -> None:
        numbers = part_numbers(part, self.job.count)
        self.kept, self.needed = 0, 0
        missing = []
        sizes = journal.sizes()
        for shard in self.job.shards(numbers):
            if shard.number in sizes and is_whole(shard, self.work.model):
                self.kept += 1
            else:
                missing.append(shard.number)
                self.needed += shard.size
        self._check_space()
        for number in missing:
            name = f"shard {number} of {self.job.count}"
            entry = write_shard(
                self.job,
                number,
                self.work.model,
                checksums=self.how.checksums,
                jobs=self.how.jobs,
                advance=self._advance(name, self.bytes_written),
            )
            journal.add(entry)
            self.bytes_written += entry.size
            self.written += 1

    def _advance(self, name: str, done: int) -> Callable[[int], None]:
        """What the threads that write a shard call."""
        so_far = [done]
        progress = self.how.progress

        def advance(count: int) -> None:
            if progress is not None:
                with self.lock:
                    so_far[0] += count
                    progress(name, so_far[0], self.needed)

        return advance

    def _check_space(self) -> None:
        free = self._free()
        if self.needed > free:
            raise OutputError(
                f"{self.work.destination.parent} has {free:,} bytes free, {self.needed:,} are needed; make room first"
            )

    def _free(self) -> int:
        folder = next(path for path in (self.work.root, *self.work.root.parents) if path.is_dir())
        found = os.statvfs(folder)
        return found.f_bavail * found.f_frsize

    # ------------------------------------------------------------ publishing

    def _check_parts(self, journals: Mapping[tuple[int, int], Journal]) -> None:
        """Every shard is there, written by this plan from this source."""
        done: set[int] = set()
        for part, journal in journals.items():
            found = journal.heading()
            if found is None or found.key != self.job.key or found.shards != self.job.count:
                raise OutputError(f"part {part[0]} of {part[1]} was written from another plan or source. {_ANEW}")
            done |= set(journal.sizes())
        absent = [shard for shard in self.job.shards() if shard.number not in done]
        if absent:
            count = max((part[1] for part in journals), default=1)
            parts = sorted({(shard.number - 1) % count + 1 for shard in absent})
            raise OutputError(
                f"{len(absent)} of {self.job.count} shards are not written yet: {some([one.name for one in absent])}. "
                f"They are of part{'s' * (len(parts) > 1)} {some([f'{part}/{count}' for part in parts])}"
            )

    def _publish(self, journals: Mapping[tuple[int, int], Journal]) -> None:
        how = Publication(self._receipt(), self.how.manifest)
        publish(self.job, self.work, how, lambda: self._verify(journals))

    def _verify(self, journals: Mapping[tuple[int, int], Journal]) -> None:
        if not self.how.verify:
            return
        for journal in journals.values():
            for entry in journal.latest():
                verify_shard(self.job, entry, self.work.model)

    def _receipt(self) -> dict[str, Any]:
        """What the record of the folder says. Nothing in it depends on when or where it was made."""
        job, task = self.job, self.job.task
        said = {
            "key": job.key,
            "source": job.checkpoint.fingerprint,
            "shards": job.count,
            "tensors": [len(job.checkpoint.tensors), sum(map(len, job.layout))],
            "bytes": [job.checkpoint.tensor_bytes, job.bytes],
            "signature": signature((one.name, one.dtype, one.shape) for one in job.checkpoint.tensors.values()),
            "passed_over": list(task.passed_over),
            "losses": list(task.losses),
            "config_before": config_before(job.checkpoint.config, task.config),
        }
        return {"convert": said}

    # ------------------------------------------------------------ what is there already

    def _is_there(self) -> bool:
        return is_taken(self.work.destination)

    def _already(self, *, may: bool) -> Conversion:
        """Nothing is left to do, if the destination holds the result and the caller says that it may."""
        if not may:
            raise OutputError(f"{self.work.destination} is not empty; choose another folder, or delete it")
        if not self._holds():
            raise OutputError(
                f"{self.work.destination} holds something else than the result of this conversion; choose another "
                "folder, or delete it"
            )
        if self.work.root.is_dir() and not self.work.model.exists():  # killed between publishing and tidying up
            with self.work.locked(None):
                self.work.remove()
        if self.how.manifest is not None:
            write_manifest(self.work.destination, self.how.manifest)
        self.kept = self.job.count
        return self.report("already")

    def _holds(self) -> bool:
        folder = self.work.destination
        record = read_record(folder)
        key = None if record is None else said_of(record).get("key")
        if key != (None if self.job.task.revert else self.job.key):
            return False
        return all(is_whole(shard, folder) for shard in self.job.shards())

    def report(self, state: str) -> Conversion:
        """What this call did."""
        job, task = self.job, self.job.task
        if state == "planned":
            self.needed = sum(shard.size for shard in job.shards())
        return Conversion(
            how="revert" if task.revert else "convert",
            state=state,
            source=str(job.checkpoint.folder),
            destination=str(self.work.destination),
            plan_hash=task.plan.hash,
            key=job.key,
            part=self.how.part,
            shards=job.count,
            written=self.written,
            kept=self.kept,
            tensors=(len(job.checkpoint.tensors), sum(map(len, job.layout))),
            bytes=(job.checkpoint.tensor_bytes, job.bytes),
            needed_bytes=self.needed,
            bytes_written=self.bytes_written,
            free_bytes=self._free(),
            config=(*task.config, *task.unset),
            losses=task.losses,
            left=tuple(left_behind(job)),
            verified=self.how.verify and state in {"part", "done"},
            seconds=time.perf_counter() - self.start,
            job=job,
        )


_ANEW = "To begin anew: restart=True (--restart)"


def _difference(found: Heading, heading: Heading) -> str:
    if found.key != heading.key:
        return "the plan, the source or an option is another one since"
    changed = [new[0] for old, new in zip(found.files, heading.files, strict=False) if old != new]
    return f"the source was written to since ({some(changed)})"
