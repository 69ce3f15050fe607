"""Ranges that lie together on both sides: read, summed and written piece by piece, or copied within the kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import xxhash

from rewire.stream.files import BLOCK, Buffer, copy_in_kernel, read_exact, shift, write_all
from rewire.stream.ranges import LONGEST, OUTPUT, Ledger, Range
from rewire.stream.strided import Copy

LEAST = 64 << 10
"""Ranges of fewer bytes are worth gathering in memory, if there are many of them."""

_FEW = 8
"""Ranges as few as these are not gathered however short."""

_PAGE = 4096


@dataclass(frozen=True, slots=True)
class Strip:
    """Equal ranges at equal distances: `count` times `length` bytes, each its strides on from the one before."""

    file: int
    source: int
    target: int
    length: int
    count: int = 1
    source_stride: int = 0
    target_stride: int = 0


def is_direct(copy: Copy) -> bool:
    """Whether the ranges of a copy are long, or too few to be worth gathering."""
    return not copy.casts and (copy.unit >= LEAST or copy.units <= _FEW)


def strips(copies: Iterable[Copy]) -> Iterator[Strip]:
    """The strips of copies in the order of the output; what goes on in both files becomes one."""
    last: Strip | None = None
    for strip in sorted((strip for copy in copies for strip in _strips_of(copy)), key=_target):
        if last and _goes_on(last, strip):
            last = replace(last, length=last.length + strip.length)
            continue
        if last:
            yield last
        last = strip
    if last:
        yield last


def _target(strip: Strip) -> int:
    return strip.target


def _strips_of(copy: Copy) -> Iterator[Strip]:
    """With the innermost loop as steps of the strip; short ranges and very long ones stand alone."""
    inner = len(copy.counts) - (1 if copy.counts and LEAST <= copy.unit < LONGEST else 0)
    last = tuple(loop[inner] for loop in (copy.counts, copy.sources, copy.targets)) if inner < len(copy.counts) else ()
    outer = zip(copy.counts[:inner], copy.sources[:inner], copy.targets[:inner], strict=True)
    for steps in product(*(zip(range(0, n * s, s), range(0, n * t, t), strict=True) for n, s, t in outer)):
        source, target = (sum(step[side] for step in steps) for side in (0, 1))
        yield Strip(copy.file, copy.source + source, copy.target + target, copy.unit, *last)


def _goes_on(last: Strip, strip: Strip) -> bool:
    """Whether two single ranges lie together in both files."""
    place = (last.file, last.source + last.length, last.target + last.length)
    return last.count == strip.count == 1 and place == (strip.file, strip.source, strip.target)


Summed = Callable[[memoryview, int, int], object]
"""Called with bytes that were read, and their offsets in source and output."""


class Copier:
    """Copies strips into one file. What follows on in the output is written together, up to a multiple of a block."""

    def __init__(self, files: Sequence[int], out: int, ledger: Ledger | None, advance: Callable[[int], None]) -> None:
        self._files, self._out, self._ledger, self._advance = files, out, ledger, advance
        self._buffer = Buffer(BLOCK + _PAGE).view
        self._at, self._filled, self._shift = 0, 0, 0
        self._in_kernel = ledger is None

    def run(self, strips: Iterable[Strip]) -> None:
        """Copies all of them."""
        for strip in strips:
            if self._ledger is None:
                self._copy(strip, lambda view, source, target: None)
            elif strip.count == 1 and strip.length < LEAST:
                self._copy_small(strip, self._ledger)
            else:
                for part in _parts(strip):
                    self._copy_large(part, self._ledger)
        self._flush()

    def _copy_large(self, strip: Strip, ledger: Ledger) -> None:
        """Both sides are the same bytes, so they share the sum."""
        hasher = xxhash.xxh3_64()
        self._copy(strip, lambda view, source, target: hasher.update(view))
        sides = ((strip.file, strip.source, strip.source_stride), (OUTPUT, strip.target, strip.target_stride))
        for file, start, stride in sides:
            ledger.records.append(Range(file, start, start + strip.length, hasher.intdigest(), strip.count, stride))

    def _copy_small(self, strip: Strip, ledger: Ledger) -> None:
        """Summed together with neighbours on each side, so that many small ranges make few records."""

        def summed(view: memoryview, source: int, target: int) -> None:
            ledger.run(strip.file, source, [view])
            ledger.run(OUTPUT, target, [view])

        self._copy(strip, summed)

    def _copy(self, strip: Strip, summed: Summed) -> None:
        source, target = strip.source, strip.target
        for _ in range(strip.count):
            done = self._copy_in_kernel(strip, source, target) if self._in_kernel else 0
            self._copy_piece(strip.file, source + done, target + done, strip.length - done, summed)
            source, target = source + strip.source_stride, target + strip.target_stride

    def _copy_piece(self, file: int, source: int, target: int, length: int, summed: Summed) -> None:
        while length:
            if target != self._at + self._filled:
                self._flush()
            if not self._filled:
                self._at, self._shift = target, shift(source, target)
            size = min(length, BLOCK - target % BLOCK)
            begin = self._shift + self._filled
            view = self._buffer[begin : begin + size]
            read_exact(self._files[file], view, source)
            summed(view, source, target)
            self._filled += size
            source, target, length = source + size, target + size, length - size
            if target % BLOCK == 0:
                self._flush()

    def _flush(self) -> None:
        if self._filled:
            write_all(self._out, self._buffer[self._shift : self._shift + self._filled], self._at)
            self._advance(self._filled)
            self._filled = 0

    def _copy_in_kernel(self, strip: Strip, source: int, target: int) -> int:
        """Bytes that the kernel has copied. It is fast where both sides have the same place in a page."""
        if strip.length < BLOCK or (source - target) % _PAGE:
            return 0
        done = 0
        while done < strip.length:
            count = copy_in_kernel(
                self._files[strip.file], self._out, source + done, target + done, strip.length - done
            )
            if not count:
                self._in_kernel = False
                break
            self._advance(count)
            done += count
        return done


def _parts(strip: Strip) -> Iterator[Strip]:
    """A strip in parts of about the length that one record may have."""
    if strip.count == 1:
        for start in range(0, strip.length, LONGEST):
            length = min(LONGEST, strip.length - start)
            yield replace(strip, source=strip.source + start, target=strip.target + start, length=length)
        return
    most = max(1, LONGEST // strip.length)
    for first in range(0, strip.count, most):
        source, target = strip.source + first * strip.source_stride, strip.target + first * strip.target_stride
        yield replace(strip, source=source, target=target, count=min(most, strip.count - first))
