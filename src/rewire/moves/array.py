"""Symbolic arrays: they offer what the steps of a rule use of torch and numpy, and know where elements come from."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod

from rewire.errors import RuleError
from rewire.moves.copies import Axis, Move, aligned, cut, normal, reach
from rewire.tensor_rules import Shape

Index = int | slice | list[int]
Run = tuple[int, int]  # start and stop

CODES: Mapping[str, str] = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ", "float4_e2m1fn_x2": "F4",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8",
    "bool": "BOOL", "complex64": "C64",
}  # fmt: skip
"""torch's names of the types that a checkpoint can hold, and the codes of the safetensors format for them."""


class Array:
    """A tensor of `shape` made by copying `moves`, which are in normal form; nothing of it is in memory.

    The elements lie in row-major order, so a reshape copies the shape alone. `casts` are the types that the
    values go through, the source's first; it is empty where the bytes stay as they are.
    """

    __slots__ = ("_sorted", "casts", "dtype", "moves", "shape")

    def __init__(self, shape: Shape, dtype: str, moves: tuple[Move, ...], casts: tuple[str, ...] = ()) -> None:
        self.shape = shape
        self.dtype = dtype
        self.moves = moves
        self.casts = casts
        self._sorted: dict[int, _Sorted] = {}

    @classmethod
    def whole(cls, name: str, dtype: str, shape: Shape) -> Array:
        """The source tensor `name` itself."""
        size = prod(shape)
        axes = (Axis(size, 1, 1),) if size > 1 else ()
        return cls(shape, dtype, (Move(name, 0, 0, axes),) if size else ())

    def reshape(self, shape: Sequence[int]) -> Array:
        """The same elements in the same order."""
        return Array(tuple(shape), self.dtype, self.moves, self.casts)

    def permute(self, order: Sequence[int]) -> Array:
        """Dimension `order[n]` becomes dimension `n`."""
        shape = tuple(self.shape[dim] for dim in order)
        before, after = _strides(self.shape), _strides(shape)
        stride_after = {dim: after[place] for place, dim in enumerate(order)}
        pieces = self.moves
        for stride in before:
            if stride:
                pieces = tuple(part for piece in pieces for part in aligned(piece, stride))
        dims = [(before[dim], stride_after[dim]) for dim in range(len(order)) if self.shape[dim] > 1]
        return self._like(shape, (_permuted(piece, dims) for piece in pieces))

    def swapaxes(self, first: int, second: int) -> Array:
        """Two dimensions change places; negative ones count from the end."""
        order = list(range(len(self.shape)))
        order[first], order[second] = order[second], order[first]
        return self.permute(order)

    def to(self, dtype: str) -> Array:
        """Every value rounded to `dtype`, a safetensors code."""
        if dtype == self.dtype:
            return self
        return Array(self.shape, dtype, self.moves, (*(self.casts or (self.dtype,)), dtype))

    def __getitem__(self, index: Index | tuple[Index, ...]) -> Array:
        """Basic indices, and at most lists of rows: an integer takes its dimension away."""
        result, dim = self, 0
        for one in index if isinstance(index, tuple) else (index,):
            rows = result.shape[dim]
            if isinstance(one, int):
                taken = result._take(dim, [(one, one + 1)])
                result = taken.reshape((*taken.shape[:dim], *taken.shape[dim + 1 :]))
                continue
            if one != slice(None):
                result = result._take(dim, _runs(range(*one.indices(rows)) if isinstance(one, slice) else one))
            dim += 1
        return result

    def _take(self, dim: int, runs: Sequence[Run]) -> Array:
        """The rows start … stop - 1 of every run along `dim`, one run after the other; no row twice."""
        count = sum(stop - start for start, stop in runs)
        shape = (*self.shape[:dim], count, *self.shape[dim + 1 :])
        inner = prod(self.shape[dim + 1 :])
        period, new = self.shape[dim] * inner, count * inner
        if not count or not self.moves:
            return self._like(shape, ())
        ends = accumulate(stop - start for start, stop in runs)
        shifts = {start: (end - stop) * inner for (start, stop), end in zip(runs, ends, strict=True)}
        windows = sorted((start * inner, stop * inner) for start, stop in runs)
        pieces = self._by_place(period).between(windows[0][0], windows[-1][1])
        return self._like(
            shape,
            (
                _moved(part, period, new, shifts[low // inner])
                for low, parts in _dealt(pieces, windows, period)
                for part in parts
            ),
        )

    def _by_place(self, period: int) -> _Sorted:
        if period not in self._sorted:
            self._sorted[period] = _Sorted(self.moves, period)
        return self._sorted[period]

    def _like(self, shape: Shape, moves: Iterable[Move]) -> Array:
        return Array(shape, self.dtype, normal(moves), self.casts)


@dataclass(frozen=True, slots=True)
class _Piece:
    """A move aligned to a period, and the part of every period that it may write."""

    move: Move
    low: int
    high: int

    @classmethod
    def of(cls, move: Move, period: int) -> _Piece:
        low = move.target_start % period
        return cls(move, low, low + reach(tuple(axis for axis in move.axes if axis.target % period)))


class _Sorted:
    """Pieces in the order of where they begin, so that a window of the period finds its own at once."""

    def __init__(self, moves: Sequence[Move], period: int) -> None:
        pieces = (_Piece.of(part, period) for move in moves for part in aligned(move, period))
        self.pieces = sorted(pieces, key=lambda piece: piece.low)
        self.lows = [piece.low for piece in self.pieces]
        self.highs = list(accumulate((piece.high for piece in self.pieces), max))  # of all so far, hence rising

    def between(self, low: int, high: int) -> list[_Piece]:
        """Those that may write between two places of the period."""
        return self.pieces[bisect_right(self.highs, low) : bisect_left(self.lows, high)]


def _dealt(pieces: Sequence[_Piece], windows: Sequence[Run], period: int) -> Iterator[tuple[int, Iterator[Move]]]:
    """What the pieces write in each of the windows, which are in rising order: a window's start, and the parts.

    The windows are halved again and again, so that many pieces and many windows take n log n.
    """
    if len(windows) == 1:
        low, high = windows[0]
        yield low, (part for piece in pieces for part in cut(piece.move, period, low, high))
        return
    half = len(windows) // 2
    middle = windows[half][0]
    left = _narrowed(pieces, windows[0][0], middle, period)
    yield from _dealt(left, windows[:half], period)
    right = _narrowed(pieces, middle, windows[-1][1], period)
    yield from _dealt(right, windows[half:], period)


def _narrowed(pieces: Sequence[_Piece], low: int, high: int, period: int) -> list[_Piece]:
    """The pieces, or the parts of them, between `low` and `high`."""
    result = []
    for piece in pieces:
        if low <= piece.low and piece.high <= high:
            result.append(piece)
        elif piece.high > low and piece.low < high:
            result += (_Piece.of(part, period) for part in cut(piece.move, period, low, high))
    return result


def _strides(shape: Shape) -> tuple[int, ...]:
    """Of a row-major array: how many elements one step along each dimension is."""
    return tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))


def _moved(move: Move, period: int, new: int, shift: int) -> Move:
    """`move`, aligned to `period`, where periods are `new` long and their contents `shift` further on."""
    if period == new:
        return move.at(0, shift, move.axes)
    axes = tuple(
        axis if axis.target % period else Axis(axis.count, axis.source, axis.target // period * new)
        for axis in move.axes
    )
    turn, place = divmod(move.target_start, period)
    return Move(move.name, move.source_start, turn * new + place + shift, axes)


def _permuted(move: Move, dims: Sequence[tuple[int, int]]) -> Move:
    """`move`, aligned to every stride, with other strides: `dims` are the old and new ones, the widest first."""

    def place(before: int) -> int:
        after = 0
        for old, new in dims:
            steps, before = divmod(before, old)
            after += steps * new
        return after

    axes = tuple(Axis(axis.count, axis.source, place(axis.target)) for axis in move.axes)
    return Move(move.name, move.source_start, place(move.target_start), axes)


def _runs(rows: Sequence[int]) -> list[Run]:
    """Rows as (start, stop) of those that follow each other.

    >>> _runs([4, 5, 6, 0, 9])
    [(4, 7), (0, 1), (9, 10)]
    """
    if isinstance(rows, range) and rows.step == 1:
        return [(rows.start, rows.stop)] if rows else []
    runs: list[Run] = []
    for row in rows:
        if runs and runs[-1][1] == row:
            runs[-1] = (runs[-1][0], row + 1)
        else:
            runs.append((row, row + 1))
    return runs


class Library:
    """What a step takes from `numpy` or `torch`, for symbolic arrays."""

    def concatenate(self, arrays: Sequence[Array], axis: int = 0) -> Array:
        """Arrays one after the other along `axis`. Raises `RuleError` if their types differ."""
        first = arrays[0]
        _check_alike(arrays)
        shape = list(first.shape)
        shape[axis] = sum(array.shape[axis] for array in arrays)
        new, shift = prod(shape[axis:]), 0
        moves: list[Move] = []
        for array in arrays:
            period = prod(array.shape[axis:])
            moves += (_moved(piece, period, new, shift) for move in array.moves for piece in aligned(move, period))
            shift += period
        return Array(tuple(shape), first.dtype, normal(moves), first.casts)

    def stack(self, arrays: Sequence[Array], axis: int = 0) -> Array:
        """Arrays along a new dimension."""
        shape = arrays[0].shape
        return self.concatenate([array.reshape((*shape[:axis], 1, *shape[axis:])) for array in arrays], axis)

    def __getattr__(self, name: str) -> str:
        """The code of a type that torch calls `name`."""
        if name not in CODES:
            raise RuleError(f"{name} is no type of a tensor in a checkpoint; known: {', '.join(CODES)}")
        return CODES[name]


def _check_alike(arrays: Sequence[Array]) -> None:
    first = arrays[0]
    for array in arrays[1:]:
        if (array.dtype, array.casts) != (first.dtype, first.casts):
            raise RuleError(
                f"{_origin(first)} and {_origin(array)} become parts of one tensor, which has one type; "
                "cast them alike first"
            )


def _origin(array: Array) -> str:
    names = dict.fromkeys(move.name for move in array.moves)
    few = ", ".join([*names][:3]) + (", …" if len(names) > 3 else "")
    return f"{few or 'an empty tensor'} ({' → '.join(array.casts) or array.dtype})"
