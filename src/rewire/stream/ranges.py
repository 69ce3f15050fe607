"""Checksums of what was read and written, and the check that it is still there.

A `Range` says that some bytes of a file had a sum. Sums are xxh3 of 64 bits, which costs a tenth of the copying or
less. Whoever copies hands every piece to a `Ledger`, which lets what goes on share one record.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import xxhash

from rewire.errors import CheckpointError
from rewire.stream.files import BLOCK, Buffer, read_exact

OUTPUT = -1
"""The file number of the output."""

LONGEST = 64 << 20
"""Bytes after which a record is closed and another one begun."""


@dataclass(frozen=True, slots=True)
class Range:
    """Some bytes of a file and their sum.

    Attributes:
        file: index into the sources' files, or -1 for the output.
        start, stop: byte offsets.
        sum: xxh3_64 of the bytes.
        count, stride: there may be several pieces, each as long and `stride` bytes on from the one before; the sum
            is that of all of them in turn.
    """

    file: int
    start: int
    stop: int
    sum: int
    count: int = 1
    stride: int = 0

    @property
    def bytes(self) -> int:
        """Bytes that the sum stands for."""
        return (self.stop - self.start) * self.count

    def to_list(self) -> list[int | str]:
        """As it stands in a journal.

        >>> Range(-1, 8, 16, 255).to_list(), Range(-1, 8, 16, 255, 3, 32).to_list()
        ([-1, 8, 16, 'ff'], [-1, 8, 16, 'ff', 3, 32])
        """
        pieces = [self.count, self.stride] if self.count > 1 else []
        return [self.file, self.start, self.stop, f"{self.sum:x}", *pieces]

    @staticmethod
    def from_list(data: Sequence[int | str]) -> Range:
        """The inverse of `to_list`. Raises `ValueError` or `TypeError` for anything else."""
        file, start, stop, found, *pieces = data
        return Range(int(file), int(start), int(stop), int(str(found), 16), *map(int, pieces))


_MOST_OPEN = 256
_FEW = 1000
_SHORT = 64 << 10


class _Open:
    """A record that may still go on."""

    __slots__ = ("count", "hasher", "start", "stop")

    def __init__(self, start: int) -> None:
        self.start, self.stop, self.count = start, start, 0
        self.hasher = xxhash.xxh3_64()


class Ledger:
    """Collects the records of one call, a few of them open at a time."""

    def __init__(self) -> None:
        self.records: list[Range] = []
        self._open: dict[tuple[int, int, int, int], _Open] = {}

    def run(self, file: int, start: int, views: Iterable[Any]) -> None:
        """`views` hold bytes that lie together in the file from `start` on."""
        one = self._begun((file, start, 0, 0))
        for view in views:
            one.hasher.update(view)
            one.stop += len(view)
        if one.stop - one.start >= LONGEST:
            self._close(file, 0, one)
        else:
            self._open[file, one.stop, 0, 0] = one

    def pieces(self, file: int, start: int, stride: int, views: Sequence[Any]) -> None:
        """`views`, all of one length, lie `stride` bytes apart in the file from `start` on."""
        length = len(views[0])
        one = self._begun((file, start, length, stride))
        for view in views:
            one.hasher.update(view)
        one.count += len(views)
        one.stop = one.start + length
        if one.count * length >= LONGEST:
            self._close(file, stride, one)
        else:
            self._open[file, one.start + one.count * stride, length, stride] = one

    def add(self, file: int, start: int, axes: Sequence[tuple[int, int]], views: Sequence[Any]) -> None:
        """`views` lie in the file as `axes` (steps and stride in bytes, outermost first) say."""
        length = len(views[0])
        if lies_together(length, axes):
            self.run(file, start, views)
            return
        count, stride = axes[-1]
        for number, outer in enumerate(offsets(axes[:-1])):
            self.pieces(file, start + outer, stride, views[number * count : (number + 1) * count])

    def _begun(self, key: tuple[int, int, int, int]) -> _Open:
        """The record that goes on there, or a new one; of too many open ones the oldest is closed."""
        one = self._open.pop(key, None) or _Open(key[1])
        if len(self._open) >= _MOST_OPEN:
            oldest = next(iter(self._open))
            self._close(oldest[0], oldest[3], self._open.pop(oldest))
        return one

    def close(self) -> list[Range]:
        """Closes what is open; all records so far."""
        for (file, _, _, stride), one in self._open.items():
            self._close(file, stride, one)
        self._open.clear()
        return self.records

    def _close(self, file: int, stride: int, one: _Open) -> None:
        pieces = (one.count, stride) if one.count > 1 else (1, 0)
        self.records.append(Range(file, one.start, one.stop, one.hasher.intdigest(), *pieces))


def lies_together(length: int, axes: Sequence[tuple[int, int]]) -> bool:
    """Whether pieces of `length` bytes, repeated along `axes` (outermost first), leave no gap.

    >>> lies_together(4, [(2, 12), (3, 4)]), lies_together(4, [(2, 16), (3, 4)])
    (True, False)
    """
    for count, stride in reversed(axes):
        if stride != length:
            return False
        length *= count
    return True


def offsets(axes: Sequence[tuple[int, int]]) -> Iterator[int]:
    """Where the steps along `axes` lead, outermost first.

    >>> list(offsets([(2, 10), (3, 1)]))
    [0, 1, 2, 10, 11, 12]
    """
    return map(sum, product(*(range(0, count * stride, stride) for count, stride in axes)))


def verify(ranges: Iterable[Range], files: Sequence[int], out: int) -> list[Range]:
    """The ranges whose bytes are others now, each with the sum that they have now; 0 where a file has ended.

    >>> import tempfile
    >>> with tempfile.TemporaryFile() as file:
    ...     _ = file.write(b"rewire"), file.flush()
    ...     good, bad = Range(-1, 0, 6, xxhash.xxh3_64(b"rewire").intdigest()), Range(-1, 0, 5, 1)
    ...     [one.stop for one in verify([good, bad], [], file.fileno())]
    [5]
    """
    buffer = Buffer(BLOCK)
    now = ((one, sum_of(one, out if one.file == OUTPUT else files[one.file], buffer)) for one in ranges)
    return [replace(one, sum=found) for one, found in now if found != one.sum]


def sum_of(one: Range, file: int, buffer: Buffer) -> int:
    """The sum that the bytes of a range have now; 0 if the file ends before them."""
    hasher = xxhash.xxh3_64()
    try:
        for piece in offsets([(one.count, one.stride or 1)]):
            for start in range(one.start + piece, one.stop + piece, BLOCK):
                view = buffer.view[: min(BLOCK, one.stop + piece - start)]
                read_exact(file, view, start)
                hasher.update(view)
    except CheckpointError:
        return 0
    return hasher.intdigest()


def condensed(records: Sequence[Range], files: Sequence[int], most: int) -> list[Range]:
    """At most about `most` records: where there are more, short ones of the sources near each other become one.

    Such a record stands for all bytes between them too, which are read for it.
    """
    if len(records) <= max(most, _FEW):
        return list(records)
    kept = [one for one in records if one.file == OUTPUT or one.bytes >= _SHORT]
    spans: list[tuple[int, int, int]] = []
    for one in sorted(set(records).difference(kept), key=lambda one: (one.file, one.start)):
        file, start, stop = spans[-1] if spans else (OUTPUT, 0, 0)
        end = one.stop + (one.count - 1) * one.stride
        if file == one.file and end - start <= LONGEST:
            spans[-1] = (file, start, max(stop, end))
        else:
            spans.append((one.file, one.start, end))
    buffer = Buffer(BLOCK)
    for file, start, stop in spans:
        whole = Range(file, start, stop, 0)
        kept.append(replace(whole, sum=sum_of(whole, files[file], buffer)))
    return kept
