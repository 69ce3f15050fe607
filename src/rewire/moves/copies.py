"""Strided copies, their normal form, and how they are cut. Counts, starts and strides are in elements.

The axes of a move go from the widest target stride to the narrowest and are *nested*: all that the later axes
reach lies within one stride of an earlier one. Every function here relies on that and keeps it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import gcd, prod


@dataclass(frozen=True, slots=True)
class Axis:
    """One loop of a strided copy: `count` steps, each `source` elements on in one tensor and `target` in the other."""

    count: int
    source: int
    target: int


Axes = tuple[Axis, ...]


@dataclass(frozen=True, slots=True)
class Move:
    """A strided copy out of the tensor `name`; without axes it is a single element.

    Strides are positive, axes ordered by falling target stride: where the last one has strides of 1, its count
    is the run of elements that lie together on both sides.
    """

    name: str
    source_start: int
    target_start: int
    axes: Axes

    @property
    def size(self) -> int:
        """How many elements are copied."""
        return prod(axis.count for axis in self.axes)

    def at(self, source: int, target: int, axes: Axes) -> Move:
        """The move that starts `source` and `target` elements later and has other axes."""
        return Move(self.name, self.source_start + source, self.target_start + target, axes)


def reach(axes: Axes) -> int:
    """How many target elements the axes span, from the first that they write to the last."""
    return 1 + sum((axis.count - 1) * axis.target for axis in axes)


def normal_axes(axes: Axes) -> Axes:
    """The same loops in normal order, those of one step left out and neighbours that make one loop merged.

    >>> normal_axes((Axis(4, 1, 1), Axis(3, 4, 4), Axis(1, 7, 7)))
    (Axis(count=12, source=1, target=1),)
    """
    if len(axes) < 2:
        return axes if axes and axes[0].count > 1 else ()
    result: list[Axis] = []
    for axis in sorted(axes, key=lambda axis: -axis.target):
        if axis.count == 1:
            continue
        outer = result[-1] if result else axis
        if outer.source == axis.count * axis.source and outer.target == axis.count * axis.target:
            result[-1] = Axis(outer.count * axis.count, axis.source, axis.target)
        else:
            result.append(axis)
    return tuple(result)


# ---------------------------------------------------------------- merging


def normal(moves: Iterable[Move]) -> tuple[Move, ...]:
    """The same copies as few moves, in the order of their target starts.

    >>> halves = [Move("w", 4, 4, (Axis(4, 1, 1),)), Move("w", 0, 0, (Axis(4, 1, 1),))]
    >>> normal(halves)
    (Move(name='w', source_start=0, target_start=0, axes=(Axis(count=8, source=1, target=1),)),)
    """
    plain = [move.at(0, 0, normal_axes(move.axes)) for move in moves]
    if len(plain) < 2:
        return tuple(plain)
    of_tensor: dict[str, list[Move]] = {}
    for move in plain:
        of_tensor.setdefault(move.name, []).append(move)
    found = [move for same in of_tensor.values() for move in (_few(same) if len(same) > 1 else same)]
    return tuple(sorted(found, key=_target_start))


def _target_start(move: Move) -> int:
    return move.target_start


def _few(moves: list[Move]) -> list[Move]:
    """Moves out of one tensor, merged: first what lies together, then what goes on, then what repeats."""
    moves = _solid(sorted(moves, key=_target_start))
    count = len(moves) + 1
    while 1 < len(moves) < count:
        count = len(moves)
        moves = _extended(sorted(moves, key=_target_start))
        if len(moves) == count:
            moves = _spread(_paired(sorted(moves, key=_target_start)))
    return moves


def _solid(moves: Sequence[Move]) -> list[Move]:
    """Moves that together copy one unbroken run of elements as it lies become that run, however they interlock."""
    result: list[Move] = []
    as_it_lies: dict[int, list[Move]] = {}  # by the distance between source and target
    for move in moves:
        straight = all(axis.source == axis.target for axis in move.axes)
        where = as_it_lies.setdefault(move.source_start - move.target_start, []) if straight else result
        where.append(move)
    return result + [move for alike in as_it_lies.values() for move in _unbroken(alike)]


def _unbroken(moves: Sequence[Move]) -> Iterator[Move]:
    held: list[Move] = []
    stop = 0
    for move in moves:
        if held and move.target_start >= stop:
            yield from _run_of(held, stop)
            held = []
        held.append(move)
        stop = max(stop, move.target_start + reach(move.axes))
    yield from _run_of(held, stop)


def _run_of(moves: Sequence[Move], stop: int) -> Iterable[Move]:
    """One move if `moves`, no two of which write the same element, write every one from the first to `stop`."""
    length = stop - moves[0].target_start
    if len(moves) > 1 and length == sum(move.size for move in moves):
        return [moves[0].at(0, 0, (Axis(length, 1, 1),))]
    return moves


class _Placed:
    """Moves found again by where they start and by where a further step along one of their axes would."""

    def __init__(self) -> None:
        self.at: dict[int, Move] = {}
        self._ends: dict[tuple[int, int, Axes], tuple[Move, Axis]] = {}

    def add(self, move: Move) -> None:
        self.at[move.target_start] = move
        for axis, others in _each(move.axes):
            end = move.source_start + axis.count * axis.source, move.target_start + axis.count * axis.target
            self._ends[*end, others] = move, axis

    def before(self, move: Move) -> Iterator[tuple[Move, Axes]]:
        """Those that `move` goes on from, each with the axes of both together; the shortest strides first."""
        start = move.source_start, move.target_start
        for axis, others in _each(move.axes):
            yield from self._ending(start, others, axis)
            earlier = self.at.get(move.target_start - axis.target)
            if earlier and earlier.source_start == move.source_start - axis.source and earlier.axes == others:
                yield earlier, (Axis(axis.count + 1, axis.source, axis.target), *others)
        yield from self._ending(start, move.axes, None)

    def _ending(self, start: tuple[int, int], others: Axes, more: Axis | None) -> Iterator[tuple[Move, Axes]]:
        earlier, axis = self._ends.get((*start, others), (None, None))
        if earlier is None or axis is None or self.at.get(earlier.target_start) is not earlier:
            return
        if more is None or (more.source, more.target) == (axis.source, axis.target):
            steps = axis.count + (more.count if more else 1)
            yield earlier, (Axis(steps, axis.source, axis.target), *others)


def _each(axes: Axes) -> Iterator[tuple[Axis, Axes]]:
    """Every axis, the innermost first, with the others."""
    for at in reversed(range(len(axes))):
        yield axes[at], (*axes[:at], *axes[at + 1 :])


def _extended(moves: Iterable[Move]) -> list[Move]:
    """Each move merged with those that it goes on from along one axis."""
    placed = _Placed()
    for move in moves:
        while found := _first_nested(placed.before(move)):
            earlier, axes = found
            del placed.at[earlier.target_start]
            move = earlier.at(0, 0, axes)
        placed.add(move)
    return list(placed.at.values())


def _first_nested(candidates: Iterable[tuple[Move, Axes]]) -> tuple[Move, Axes] | None:
    normalised = ((move, normal_axes(axes)) for move, axes in candidates)
    return next((found for found in normalised if _nested(found[1])), None)


def _nested(axes: Axes) -> bool:
    return all(reach(axes[at + 1 :]) <= axis.target for at, axis in enumerate(axes))


def _paired(moves: Iterable[Move]) -> list[Move]:
    """Neighbours of the same form become one move, as many in turn as lie at equal distances."""
    result: list[Move] = []
    turn: list[Move] = []
    for move in moves:
        if turn and not _goes_on(turn, move):
            result.append(_in_turn(turn))
            turn = []
        turn.append(move)
    return [*result, _in_turn(turn)]


def _in_turn(moves: Sequence[Move]) -> Move:
    one = _repeated(moves[0], len(moves), _distance(*moves[:2])) if len(moves) > 1 else moves[0]
    assert one is not None  # or the last of them had not gone on from the others
    return one


def _goes_on(turn: Sequence[Move], move: Move) -> bool:
    distance = _distance(turn[-1], move)
    return (
        move.axes == turn[0].axes
        and distance == (_distance(turn[0], turn[1]) if len(turn) > 1 else distance)
        and _repeated(turn[0], len(turn) + 1, distance) is not None
    )


def _spread(moves: Iterable[Move]) -> list[Move]:
    """Moves of the same form that follow each other at equal distances, others between them, become one."""
    alike: dict[Axes, list[Move]] = {}
    for move in moves:
        alike.setdefault(move.axes, []).append(move)
    result = []
    for group in alike.values():
        distances = {_distance(*pair) for pair in pairwise(group)}
        one = _repeated(group[0], len(group), distances.pop()) if len(distances) == 1 else None
        result += [one] if one else group
    return result


def _distance(first: Move, second: Move) -> tuple[int, int]:
    return second.source_start - first.source_start, second.target_start - first.target_start


def _repeated(move: Move, count: int, distance: tuple[int, int]) -> Move | None:
    """`move` and its like at equal distances, `count` in all, as one; None if the source falls or it is not nested."""
    axes = normal_axes((Axis(count, *distance), *move.axes))
    return move.at(0, 0, axes) if distance[0] > 0 and _nested(axes) else None


# ---------------------------------------------------------------- cutting


def aligned(move: Move, period: int) -> Iterator[Move]:
    """`move` in pieces that respect the multiples of `period` in the target.

    The axes of a piece are of two kinds: those whose target stride is a multiple of `period`, and those that
    stay within one period from every start.

    >>> for piece in aligned(Move("w", 0, 3, (Axis(11, 1, 1),)), 4):  # one element, then 2 x 4, then two
    ...     print(piece.target_start, [(axis.count, axis.target) for axis in piece.axes])
    3 [(1, 1)]
    4 [(2, 4), (4, 1)]
    12 [(2, 1)]
    """
    wide = next((at for at, axis in enumerate(move.axes) if axis.target % period), len(move.axes))
    outer, inner = move.axes[:wide], move.axes[wide:]
    if move.target_start % period + reach(inner) <= period:
        yield move
        return
    axis, rest = inner[0], inner[1:]
    for step, axes in _blocks(axis, move.target_start % period, reach(rest), period):
        piece = move.at(step * axis.source, step * axis.target, (*axes, *rest))
        for part in aligned(piece, period):
            yield part.at(0, 0, (*outer, *part.axes))


def _blocks(axis: Axis, offset: int, room: int, period: int) -> Iterator[tuple[int, Axes]]:
    """Cuts an axis at the multiples of `period`; its steps start `offset` after one and take `room` elements.

    Gives the step at which each block begins, and the axes that go over it.
    """
    if period % axis.target == 0 and offset % axis.target + room <= axis.target:
        yield from _whole_periods(axis, offset, period)
        return
    # No step, or only some, fit between two multiples; after `cycle` steps the picture repeats.
    cycle = period // gcd(axis.target, period)
    step, end = 0, min(cycle, axis.count)
    while step < end:
        at = (offset + step * axis.target) % period
        repeats = -((step - axis.count) // cycle)
        alike = axis.count - (repeats - 1) * cycle - step  # the steps from here that repeat as often
        fitting = max(1, (period - room - at) // axis.target + 1)
        width = min(fitting, alike, end - step)
        outer = Axis(repeats, axis.source * cycle, axis.target * cycle)
        yield step, tuple(one for one in (outer, Axis(width, axis.source, axis.target)) if one.count > 1)
        step += width


def _whole_periods(axis: Axis, offset: int, period: int) -> Iterator[tuple[int, Axes]]:
    per_period = period // axis.target
    head = min(-(offset // axis.target) % per_period, axis.count)
    body, tail = divmod(axis.count - head, per_period)
    if head:
        yield 0, (Axis(head, axis.source, axis.target),)
    if body:
        outer = Axis(body, axis.source * per_period, period)
        yield head, (outer, Axis(per_period, axis.source, axis.target))
    if tail:
        yield axis.count - tail, (Axis(tail, axis.source, axis.target),)


def cut(move: Move, period: int, low: int, high: int) -> Iterator[Move]:
    """What `move`, aligned to `period`, writes between `low` and `high` of every period.

    >>> [piece.target_start for piece in cut(Move("w", 0, 0, (Axis(3, 8, 8), Axis(4, 1, 1))), 8, 3, 9)]
    [3]
    """
    wide = next((at for at, axis in enumerate(move.axes) if axis.target % period), len(move.axes))
    outer, inner = move.axes[:wide], move.axes[wide:]
    for source, target, axes in _within(inner, move.target_start % period, low, high):
        yield move.at(source, target, (*outer, *axes))


def _within(axes: Axes, start: int, low: int, high: int) -> Iterator[tuple[int, int, Axes]]:
    """The parts of `axes` between `low` and `high`: how much later they start in source and target, and their axes."""
    stop = start + reach(axes)
    if stop <= low or start >= high:
        return
    if low <= start and stop <= high:
        yield 0, 0, axes
        return
    axis, rest = axes[0], axes[1:]
    first = max(0, -((start - low) // axis.target))
    last = min(axis.count, (high - reach(rest) - start) // axis.target + 1)
    if first < last:  # steps first … last - 1 lie wholly between
        yield first * axis.source, first * axis.target, (Axis(last - first, axis.source, axis.target), *rest)
    for step in {first - 1, last}:  # steps of which a part may
        if 0 <= step < axis.count and not first <= step < last:
            for source, target, inner in _within(rest, start + step * axis.target, low, high):
                yield step * axis.source + source, step * axis.target + target, inner
