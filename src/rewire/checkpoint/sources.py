"""Holds the files of a checkpoint open while they are read, and notices when they change."""

from __future__ import annotations

import errno
import os
from collections.abc import Collection
from types import TracebackType

from rewire.checkpoint.faults import Faults
from rewire.checkpoint.header import header_digest
from rewire.checkpoint.reading import open_read_only, pread_exact
from rewire.checkpoint.records import Checkpoint, Shard
from rewire.errors import CheckpointError


class Sources:
    """Read-only handles on the shards of a checkpoint, for a `with` block.

    `files[number]` is the handle of `checkpoint.shards[number]`, and -1 for a shard that was not asked for. Entering
    raises `CheckpointError` if a shard is not the one whose header was read, or cannot be opened.
    """

    def __init__(self, checkpoint: Checkpoint, only: Collection[int] | None = None) -> None:
        """`only`: the numbers of the shards that are needed (a process may hold 1,024 files open, often); else all."""
        self.checkpoint = checkpoint
        self.files: list[int] = [-1] * len(checkpoint.shards)
        self._wanted = sorted(set(only)) if only is not None else list(range(len(checkpoint.shards)))

    def __enter__(self) -> Sources:
        try:
            for number in self._wanted:
                self.files[number] = self._open(self.checkpoint.shards[number])
            self.check_unchanged()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the handles; they are -1 afterwards."""
        for number, handle in enumerate(self.files):
            if handle >= 0:
                self.files[number] = -1
                os.close(handle)

    def pread_exact(self, file: int, start: int, view: memoryview | bytearray) -> None:
        """Fills `view` from byte `start` of shard `file` on. Raises `CheckpointError` where the file ends too soon."""
        pread_exact(self.files[file], start, view, str(self.checkpoint.shards[file].path))

    def check_unchanged(self) -> None:
        """Raises `CheckpointError` that lists every open shard whose size, time or header is not what it was."""
        faults = Faults()
        for number in self._wanted:
            shard = self.checkpoint.shards[number]
            change = _change(shard, self.files[number])
            if change:
                faults.add(
                    f"{change} since the checkpoint was opened",
                    file=shard.name,
                    advice="Let whatever writes there finish, then start again.",
                )
        faults.check(self.checkpoint.folder)

    def _open(self, shard: Shard) -> int:
        try:
            return open_read_only(shard.path)
        except OSError as error:
            advice = ""
            if error.errno == errno.EMFILE:
                advice = f"; this process may not hold {len(self._wanted):,} files open, see ulimit -n"
            raise CheckpointError(f"{shard.path} cannot be read: {error.strerror or error}{advice}") from error


def _change(shard: Shard, handle: int) -> str:
    """How a shard differs from what was read of it; nothing if it does not."""
    there = os.fstat(handle)
    if there.st_size != shard.size:
        return f"has changed its size from {shard.size:,} to {there.st_size:,} bytes"
    if there.st_mtime_ns != shard.mtime_ns:
        return "was written to"
    if header_digest(handle, shard.name) != shard.header_hash:
        return "has another header"
    try:
        now = os.stat(shard.path)
    except OSError:
        return "was moved or deleted"
    if (now.st_dev, now.st_ino) != shard.inode:
        return "was replaced by another file"
    return ""
