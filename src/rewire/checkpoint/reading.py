"""Reads bytes of a file exactly: positioned reads only, never a mapping, never a handle that could write.

A mapped file that somebody cuts short kills the process that looks at it; a positioned read reports it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rewire.errors import CheckpointError


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A read-only handle, closed at the end of the block. Raises `OSError` as `open_read_only` does."""
    handle = open_read_only(path)
    try:
        yield handle
    finally:
        os.close(handle)


def open_read_only(path: Path) -> int:
    """A read-only handle on a regular file.

    Raises:
        OSError: the file cannot be opened, or is a folder, pipe or device (which is not waited for).
    """
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(f"{path} is not a regular file")
    return handle


def pread_exact(handle: int, start: int, view: memoryview | bytearray, name: str) -> None:
    """Fills `view` with the bytes of the file from `start` on, in as many reads as it takes.

    Args:
        handle: a read-only handle.
        start: offset of the first byte.
        view: writable, contiguous, one byte per item; filled whole.
        name: what the file is called in an error.

    Raises:
        CheckpointError: the file ends before the view is full.
        OSError: the device reports an error.
    """
    rest = memoryview(view)
    while rest:
        count = os.preadv(handle, [rest], start)
        if not count:
            raise CheckpointError(
                f"{name} ends at byte {start:,} where {len(rest):,} more were to be read; it was cut short meanwhile. "
                "Get it whole again, then start again"
            )
        rest = rest[count:]
        start += count


def read_bytes(handle: int, start: int, count: int, name: str) -> bytearray:
    """`count` bytes of a file from `start` on; the caller has compared `count` with the file's size."""
    data = bytearray(count)
    pread_exact(handle, start, data, name)
    return data
