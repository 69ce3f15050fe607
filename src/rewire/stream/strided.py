"""Moves of elements become strided copies of bytes between one place in a source file and one in the output."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

from rewire.checkpoint import DTYPES
from rewire.errors import RuleError
from rewire.moves import Axis, Made, Move

Axes = tuple[tuple[int, int], ...]
"""Steps and stride in bytes of every loop over one file."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a source tensor lies.

    Attributes:
        file: index into the files given.
        start: absolute byte offset.
        dtype: safetensors code.
    """

    file: int
    start: int
    dtype: str


@dataclass(frozen=True, slots=True)
class Target:
    """A tensor of the output: how it is made, and its absolute byte offset in the file."""

    made: Made
    start: int


@dataclass(frozen=True, slots=True)
class Copy:
    """A strided copy of units of bytes.

    Attributes:
        file: index of the source file.
        source, target: absolute byte offsets of the first unit.
        unit: bytes of a unit in the source: a whole run that lies together on both sides, or one element.
        unit_out: bytes of a unit in the output; others than `unit` where values are cast.
        counts: steps of the loops, outermost first.
        sources, targets: strides of the loops in bytes.
        casts: the types that the values go through; empty where bytes stay as they are.
    """

    file: int
    source: int
    target: int
    unit: int
    unit_out: int
    counts: tuple[int, ...] = ()
    sources: tuple[int, ...] = ()
    targets: tuple[int, ...] = ()
    casts: tuple[str, ...] = ()

    @property
    def units(self) -> int:
        """How many units there are."""
        return prod(self.counts)

    @property
    def source_stop(self) -> int:
        """The offset after the last byte read."""
        return self.source + reach(self.unit, self.counts, self.sources)

    @property
    def target_stop(self) -> int:
        """The offset after the last byte written."""
        return self.target + reach(self.unit_out, self.counts, self.targets)


def reach(unit: int, counts: Iterable[int], strides: Iterable[int]) -> int:
    """Bytes from the first to the last that loops touch.

    >>> reach(2, (3, 4), (100, 10))
    232
    """
    return unit + sum((count - 1) * stride for count, stride in zip(counts, strides, strict=True))


def copies(targets: Iterable[Target], places: Mapping[str, Place]) -> Iterator[Copy]:
    """The copies that fill `targets`.

    Raises:
        RuleError: elements narrower than a byte would be cut, or the types do not fit.
    """
    for target in targets:
        for move in target.made.moves:
            yield _copy(target, move, places[move.name])


def _copy(target: Target, move: Move, place: Place) -> Copy:
    made = target.made
    casts = made.casts if len(set(made.casts)) > 1 else ()
    bits, bits_out = DTYPES[place.dtype], DTYPES[made.dtype]
    if bits != bits_out and not casts:
        raise RuleError(f"{made.name} is {made.dtype}, its source {move.name} {place.dtype}, and no cast is given")
    run, axes = (1, move.axes) if casts else _run(move)

    def size(elements: int, bits: int) -> int:
        if elements * bits % 8:
            raise RuleError(f"{made.name} takes parts of bytes out of {move.name}, whose elements have {bits} bits")
        return elements * bits // 8

    return Copy(
        place.file,
        place.start + size(move.source_start, bits),
        target.start + size(move.target_start, bits_out),
        size(run, bits),
        size(run, bits_out),
        tuple(axis.count for axis in axes),
        tuple(size(axis.source, bits) for axis in axes),
        tuple(size(axis.target, bits_out) for axis in axes),
        casts,
    )


def _run(move: Move) -> tuple[int, tuple[Axis, ...]]:
    """How many elements lie together on both sides, and the loops over such runs."""
    last = move.axes[-1] if move.axes else Axis(1, 1, 1)
    return (last.count, move.axes[:-1]) if last.source == last.target == 1 else (1, move.axes)
