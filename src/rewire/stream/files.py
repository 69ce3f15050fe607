"""Reading and writing at given places in files, whole or not at all, and buffers that the system copies fast to.

Nothing here holds the interpreter's lock while bytes are copied.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, repeat

from rewire.checkpoint import pread_exact

BLOCK = 256 << 10
"""Most bytes that are written at once. Writes of megabytes are slower where memory is in pieces, at times tenfold."""

GRAIN = 64 << 10
"""Writes that begin and end at multiples of this are up to half as fast again as others."""

IN_KERNEL = 8 << 20
"""Most bytes that `copy_file_range` is asked for at once, so that progress is seen."""

_LINE = 64
_HUGE = 4 << 20
_PAGE = 4096
MOST_VIEWS = 1024
"""Most buffers that one call fills."""

_CANNOT = {errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EPERM, errno.ETXTBSY, errno.EBADF}


class Buffer:
    """Memory that begins with a page; pages that are never touched take no room.

    The system copies several times more slowly into and out of memory at some distances from the beginning of a
    page, which small allocations of Python's always have.
    """

    def __init__(self, size: int) -> None:
        self.memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if size >= _HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
            self.memory.madvise(mmap.MADV_HUGEPAGE)  # a column of a large matrix has a page for every row
        self.view = memoryview(self.memory)

    @property
    def address(self) -> int:
        """Where it lies in memory."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self.memory))


def shift(source: int, target: int) -> int:
    """Where in a page a buffer should begin for bytes that go from one file offset to another.

    Copying is slow where the destination lies up to 63 bytes after the source within a page.

    >>> shift(0, 0), shift(4090, 0)
    (0, 2048)
    """

    def is_fast(at: int) -> bool:
        return (at - source) % _PAGE not in slow and (target - at) % _PAGE not in slow

    slow = range(1, _LINE)
    return next(filter(is_fast, (0, _PAGE // 2, _PAGE // 4)), 0)


def read_exact(file: int, view: memoryview, start: int) -> None:
    """Fills `view` with the bytes from `start` on. Raises `CheckpointError` if the file ends before."""
    if os.preadv(file, [view], start) != len(view):
        pread_exact(file, start, view, name_of(file))


def name_of(file: int) -> str:
    """The path under which a file was opened, where the system tells."""
    try:
        return os.readlink(f"/proc/self/fd/{file}")
    except OSError:
        return "a source file"


def write_all(file: int, view: memoryview, start: int) -> None:
    """Writes `view` from `start` on, up to a multiple of `BLOCK` at a time."""
    while view:
        count = os.pwrite(file, view[: BLOCK - start % BLOCK], start)
        view, start = view[count:], start + count


def read_pieces(file: int, views: Sequence[Sequence[memoryview]], starts: Sequence[int], size: int) -> None:
    """Fills every group of views with the bytes from its start on; `size` bytes in all.

    One call of the system each, in a loop that runs outside Python. Raises `CheckpointError`.
    """
    if sum(map(os.preadv, repeat(file), views, starts)) == size:
        return
    for group, start in zip(views, starts, strict=True):  # something was short: again, with care
        for view in group:
            read_exact(file, view, start)
            start += len(view)


def write_pieces(file: int, views: Sequence[memoryview], starts: Sequence[int], size: int) -> None:
    """Writes every view from its start on; `size` bytes in all."""
    if len(views) > 1 and len(views[0]) <= BLOCK and sum(map(os.pwrite, repeat(file), views, starts)) == size:
        return
    for view, start in zip(views, starts, strict=True):
        write_all(file, view, start)


class Joiner:
    """Writes what follows on in a file so that calls end at multiples of `GRAIN`, where the system is faster."""

    def __init__(self, file: int) -> None:
        self._file = file
        self._held = Buffer(GRAIN).view
        self._start = self._stop = 0  # what is held, as offsets in the file; no multiple lies between

    def write(self, view: memoryview, start: int) -> None:
        """Writes `view` from `start` on; its end, up to `GRAIN` bytes, perhaps only later."""
        if start != self._stop:
            self.flush()
            self._start = self._stop = start
        if self._start < self._stop:
            size = min(GRAIN - self._stop % GRAIN, len(view))
            self._hold(view[:size])
            view, start = view[size:], start + size
            if self._stop % GRAIN == 0:
                self.flush()
        whole = len(view) - min(len(view), (start + len(view)) % GRAIN)
        write_all(self._file, view[:whole], start)
        if self._start == self._stop:
            self._start = self._stop = start + whole
        self._hold(view[whole:])

    def flush(self) -> None:
        """Writes what is held."""
        write_all(self._file, self._held[: self._stop - self._start], self._start)
        self._start = self._stop

    def _hold(self, view: memoryview) -> None:
        begin = self._stop - self._start
        self._held[begin : begin + len(view)] = view
        self._stop += len(view)


def grouped(views: Iterable[memoryview]) -> Iterator[list[memoryview]]:
    """Views in groups that one call may fill."""
    views = iter(views)
    while group := list(islice(views, MOST_VIEWS)):
        yield group


def copy_in_kernel(source: int, out: int, start: int, target: int, size: int) -> int:
    """Has the system copy up to `size` bytes; how many it has copied, 0 where it cannot.

    Raises `OSError` for what goes wrong with the output. At the end of the source it gives 0 too: reading tells.
    """
    copy = getattr(os, "copy_file_range", None)  # Linux has it
    if copy is None:
        return 0
    try:
        return int(copy(source, out, min(size, IN_KERNEL), start, target))
    except OSError as error:
        if error.errno in _CANNOT:
            return 0
        raise
