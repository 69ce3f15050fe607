"""The journal of a job: one line of JSON for every finished shard, on disk before the next one is begun.

The first line says what the job is, so that nobody goes on with another plan or another source. A process may be
killed at any moment: a last line that has no end counts as not written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewire.errors import OutputError
from rewire.stream.ranges import Range


@dataclass(frozen=True)
class Heading:
    """The first line of a journal: what is written, from what, and which part of it.

    `key` stands for plan, source and options (the same on every machine); `files` holds size, time of change and
    header hash of each source shard as this machine saw them.
    """

    key: str
    part: tuple[int, int]
    shards: int
    files: tuple[tuple[str, int, int, str], ...]

    def to_dict(self) -> dict[str, Any]:
        """As it stands in the journal."""
        files = [list(file) for file in self.files]
        return {"rewire": 1, "key": self.key, "part": list(self.part), "shards": self.shards, "files": files}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Heading:
        """The inverse of `to_dict`."""
        first, count = data["part"]
        files = tuple((str(name), int(size), int(time), str(hashed)) for name, size, time, hashed in data["files"])
        return Heading(str(data["key"]), (int(first), int(count)), int(data["shards"]), files)


@dataclass(frozen=True)
class Entry:
    """A finished shard.

    Attributes:
        number: from 1.
        size: bytes of its file.
        ranges: checksums of what was read and written; None where they were not wanted.
    """

    number: int
    size: int
    ranges: tuple[Range, ...] | None

    def to_dict(self) -> dict[str, Any]:
        """As it stands in the journal."""
        ranges = None if self.ranges is None else [one.to_list() for one in self.ranges]
        return {"shard": self.number, "size": self.size, "ranges": ranges}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Entry:
        """The inverse of `to_dict`."""
        ranges = None if data["ranges"] is None else tuple(map(Range.from_list, data["ranges"]))
        return Entry(int(data["shard"]), int(data["size"]), ranges)


class Journal:
    """A journal on disk. Reading it keeps the sizes alone in memory, not the checksums."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def heading(self) -> Heading | None:
        """The first line; None where there is no journal yet, or nothing whole in it."""
        for line in self._lines():
            try:
                return Heading.from_dict(line)
            except (KeyError, ValueError, TypeError) as error:
                raise self._damaged(error) from error
        return None

    def sizes(self) -> dict[int, int]:
        """The finished shards: number to bytes."""
        return {entry.number: entry.size for entry in self.entries()}

    def entries(self) -> Iterator[Entry]:
        """The finished shards; one that was written again stands here more than once, and the last line counts."""
        lines = self._lines()
        next(lines, None)
        for line in lines:
            try:
                yield Entry.from_dict(line)
            except (KeyError, ValueError, TypeError) as error:
                raise self._damaged(error) from error

    def latest(self) -> Iterator[Entry]:
        """The finished shards, each once."""
        last = {entry.number: line for line, entry in enumerate(self.entries())}
        return (entry for line, entry in enumerate(self.entries()) if last[entry.number] == line)

    def begin(self, heading: Heading) -> None:
        """Writes the first line of a new journal."""
        self._write(heading.to_dict(), os.O_TRUNC)

    def add(self, entry: Entry) -> None:
        """Adds a line; it is on disk when this returns."""
        self._write(entry.to_dict(), os.O_APPEND)

    def mend(self) -> None:
        """Takes off a last line that was not written to its end."""
        with self.path.open("rb+") as file:
            end = 0
            for line in file:
                end += len(line) if line.endswith(b"\n") else 0
            file.truncate(end)

    def _write(self, data: Mapping[str, Any], flag: int) -> None:
        line = memoryview((json.dumps(data, separators=(",", ":")) + "\n").encode("ascii"))
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | flag, 0o666)
        try:
            while line:
                line = line[os.write(handle, line) :]
            os.fsync(handle)
        finally:
            os.close(handle)

    def _lines(self) -> Iterator[dict[str, Any]]:
        try:
            with self.path.open("rb") as file:
                for line in file:
                    if line.endswith(b"\n"):
                        yield self._parsed(line)
        except FileNotFoundError:
            return

    def _parsed(self, line: bytes) -> dict[str, Any]:
        try:
            data = json.loads(line)
        except ValueError as error:
            raise self._damaged(error) from error
        if not isinstance(data, dict):
            raise self._damaged("a line is no object")
        return data

    def _damaged(self, reason: object) -> OutputError:
        return OutputError(f"{self.path} is damaged ({reason}); begin anew with restart=True (--restart)")
