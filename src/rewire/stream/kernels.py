"""Gathering in memory: strided views of numpy's, cut into blocks that stay in the processor's first cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from math import prod
from sys import byteorder
from typing import TYPE_CHECKING, Any

from rewire.stream.compiled import WIDTH, Compiled

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

Loops = Sequence[tuple[int, int, int]]
"""Steps, stride in the source and stride in the target, in bytes, of every loop."""

_WIDTHS = (8, 4, 2, 1)
_ROWS, _COLUMNS = 256, 128  # of a block: units along the output, bytes along the source
_FEW = 64


def gathers(
    unit: int, axes: Loops, source: tuple[Any, int], target: tuple[Any, int], compiled: Compiled | None
) -> Iterator[Callable[[], object]]:
    """What has to be called to copy units of bytes along loops.

    Args:
        unit: bytes of a unit.
        axes: the loops.
        source, target: a buffer, and the offset of the first unit in it. Up to 7 bytes after the last unit of the
            source may be read.
        compiled: the compiled part of the engine, if there is one.
    """
    import numpy as np

    width = next(width for width in _WIDTHS if unit % width == 0)
    loops = sorted((axis for axis in axes if axis[0] > 1), key=lambda axis: -axis[2])
    if unit > width:
        loops.append((unit // width, width, width))
    shape = tuple(steps for steps, _, _ in loops)
    taken = np.ndarray(shape, f"u{_wide(width, loops)}", *source, tuple(stride for _, stride, _ in loops))
    given = np.ndarray(shape, f"u{width}", *target, tuple(stride for _, _, stride in loops))
    if compiled and _is_transpose(width, loops):
        yield from _transposes(given, taken, compiled)
        return
    for block in _blocks(width, loops):
        yield partial(np.copyto, given[block], taken[block], casting="unsafe")


def _wide(width: int, loops: Loops) -> int:
    """Bytes of the elements of the source whose low bytes are wanted.

    Every second unit of a row is the low half of a unit twice as wide, and casting takes low halves at four times the
    speed of strided copying.
    """
    if byteorder == "little" and loops and loops[-1][2] == width and loops[-1][1] in _WIDTHS:
        return loops[-1][1]
    return width


def _blocks(width: int, loops: Loops) -> Iterator[tuple[Any, ...]]:
    """Blocks of a transpose: some steps along the innermost loop of the target and of the source; else one for all."""
    whole = (slice(None),) * len(loops)
    inner = min(range(len(loops)), key=lambda at: loops[at][1], default=0)
    if not loops or inner == len(loops) - 1:
        yield (..., *whole)  # with the dots the result is an array even if there are no loops
        return
    columns = max(1, _COLUMNS // width)
    for row, column in product(range(0, loops[-1][0], _ROWS), range(0, loops[inner][0], columns)):
        block = [*whole]
        block[-1], block[inner] = slice(row, row + _ROWS), slice(column, column + columns)
        yield tuple(block)


def _is_transpose(width: int, loops: Loops) -> bool:
    """Whether the innermost loops of source and target are two, each over adjoining units, and the others short."""
    if width != WIDTH or len(loops) < 2 or loops[-1][2] != width:
        return False
    inner = [at for at, loop in enumerate(loops[:-1]) if loop[1] == width]
    others = [loop[0] for at, loop in enumerate(loops[:-1]) if at not in inner]
    return len(inner) == 1 and prod(others) <= _FEW


def _transposes(given: Array, taken: Array, compiled: Compiled) -> Iterator[Callable[[], object]]:
    """One call for every step of the loops that are neither rows nor columns."""
    inner = taken.strides.index(WIDTH)
    outer = [at for at in range(taken.ndim - 1) if at != inner]
    order = (*outer, inner, taken.ndim - 1)
    given, taken = given.transpose(order), taken.transpose(order)
    for steps in product(*(range(given.shape[at]) for at in range(len(outer)))):
        yield compiled.transpose(given[steps], taken[steps].T)
