"""How a cluster is cut into boxes that fit into memory: a box is some steps of every common loop.

The bytes of a box lie in the files in pieces. The best box is the one whose pieces cost least: long enough to be read
and written with few calls of the system, small enough for the processor's caches where that is possible.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

from rewire.stream.clusters import Cluster, Member
from rewire.stream.files import BLOCK, MOST_VIEWS
from rewire.stream.ranges import lies_together
from rewire.stream.strided import Axes

STAGE = 4 * BLOCK
"""Most bytes of the output that are gathered at once, over all members of a cluster."""

_CACHE = 1 << 20

# What things take, in seconds and bytes a second, as measured; only their proportions matter.
_READ_CALL, _READ_RATE = 0.8e-6, 9e9
_WRITE_CALL, _WRITE_RATE = 4e-6, 6e9
_SLOW_MEMORY = 10e9
_BOX, _STAGED = 30e-6, 15e-6

_GAP = 8 << 10
"""Bytes that may as well be read as jumped over."""

_LINE = 64
_BLOCK = 32  # transposes like multiples of it


Steps = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """How the bytes that loops touch in a file lie in pieces, and where they are put in memory.

    Attributes:
        length: bytes of a piece.
        pieces: steps and strides in the file over the pieces, outermost first.
        pitch: bytes from one piece to the next in memory.
        strides: in memory, for every loop given.
    """

    length: int
    pieces: Axes
    pitch: int
    strides: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many pieces there are."""
        return prod(steps for steps, _ in self.pieces)

    @property
    def size(self) -> int:
        """Bytes in memory."""
        return self.count * self.pitch


def layout(unit: int, axes: Axes, *, gap: int = 0, split: int | None = None, padded: bool = False) -> Layout:
    """The layout of units that loops repeat.

    Args:
        unit: bytes.
        axes: steps and stride of every loop, in any order.
        gap: bytes between two pieces that are read rather than jumped over.
        split: loops of this stride and wider ones lead to pieces of their own even if these lie together.
        padded: whether pieces lie at odd multiples of a cache line, so that many of them fit into a cache at once.

    >>> layout(2, ((4, 100), (10, 2)))
    Layout(length=20, pieces=((4, 100),), pitch=20, strides=(20, 2))
    >>> layout(2, ((4, 20), (10, 2))).length
    80
    """
    length = unit
    strides = [0] * len(axes)
    outer: list[int] = []
    for at in sorted(range(len(axes)), key=lambda at: axes[at][1]):
        steps, stride = axes[at]
        if steps == 1:
            continue
        if outer or stride > length + gap or (split is not None and stride >= split):
            outer.append(at)
        else:
            strides[at] = stride
            length += (steps - 1) * stride
    pitch = _padded(length) if padded and outer else length
    width = pitch
    for at in outer:
        strides[at] = width
        width *= axes[at][0]
    return Layout(length, tuple(axes[at] for at in reversed(outer)), pitch, tuple(strides))


def _padded(length: int) -> int:
    lines = -(-length // _LINE)
    return (lines + 1 - lines % 2) * _LINE


# ---------------------------------------------------------------- what a box costs


@dataclass(frozen=True, slots=True)
class Box:
    """Steps of the common loops that are read at once, and how.

    Attributes:
        steps: of every common loop.
        staged: steps of those that are gathered and written at once.
        gap: see `layout`.
        seconds: estimated for the whole cluster.
    """

    steps: tuple[int, ...]
    staged: tuple[int, ...]
    gap: int
    seconds: float


def best_box(cluster: Cluster, memory: int) -> Box:
    """The box of a cluster that takes the least time and `memory` bytes at most, or a single step."""
    found = (_box(cluster, steps, gap, memory) for steps in _candidates(cluster) for gap in (0, _GAP))
    return min(filter(None, found), key=lambda box: box.seconds, default=None) or _smallest(cluster)


def whole_box(cluster: Cluster) -> Box:
    """The box that is all of a cluster."""
    staged = _staged(cluster, cluster.counts)
    return Box(cluster.counts, staged, 0, _seconds(cluster, cluster.counts, staged, 0))


def _smallest(cluster: Cluster) -> Box:
    one = (1,) * len(cluster.counts)
    return Box(one, one, 0, float("inf"))


def _candidates(cluster: Cluster) -> set[tuple[int, ...]]:
    """Boxes that consist of whole stretches of the source and whole stretches of the output."""
    first = cluster.members[0]
    reads, writes = _stretches(cluster.counts, first.sources), _stretches(cluster.counts, first.targets)
    return {tuple(map(max, read, write)) for read in reads for write in writes}


def _stretches(counts: Sequence[int], strides: Sequence[int]) -> list[tuple[int, ...]]:
    """Boxes of growing size that lie together as far as loops of these strides do."""
    box = [1] * len(counts)
    found = [tuple(box)]
    for at in sorted(range(len(counts)), key=lambda at: strides[at]):
        for share in _shares(counts[at]):
            box[at] = share
            found.append(tuple(box))
    return found


def _shares(count: int) -> Iterator[int]:
    """Steps that divide a loop into more and more parts of about the same size, the smallest first."""
    parts = sorted({round(2 ** (power / 2)) for power in range(2 * count.bit_length())}, reverse=True)
    return iter(sorted({-(-count // min(number, count)) for number in parts}))


def read_layouts(cluster: Cluster, steps: Sequence[int], gap: int) -> list[Layout]:
    """Where the bytes of a box lie in the source: once for all members if they share them, else for each."""
    split = _split(cluster.members[0], steps)
    if cluster.reads_once:
        axes = tuple(zip(steps, cluster.members[0].sources, strict=True))
        return [layout(cluster.source_span, axes, gap=gap, split=split, padded=True)]
    return [
        layout(member.copy.unit, member.source_axes(steps), gap=gap, split=split, padded=True)
        for member in cluster.members
    ]


def write_layouts(cluster: Cluster, steps: Sequence[int]) -> list[Layout]:
    """The same for the output."""
    if cluster.writes_once:
        return [layout(cluster.target_span, tuple(zip(steps, cluster.members[0].targets, strict=True)))]
    return [layout(member.copy.unit_out, member.target_axes(steps)) for member in cluster.members]


def _split(member: Member, steps: Sequence[int]) -> int | None:
    """The stride in the source at which rows of a transpose should have room between them; None if there are none.

    Reading a column whose rows lie at a large power of two from each other uses a small part of a cache.
    """
    loops = [
        (target, source)
        for (count, source), (_, target) in zip(member.source_axes(steps), member.target_axes(steps), strict=True)
        if count > 1
    ]
    if not loops or member.copy.unit >= _LINE:
        return None
    inner = min(loops)[1]
    is_transpose = inner >= 8 * _LINE and inner > min(source for _, source in loops)
    return inner if is_transpose and inner % (2 * _LINE) != _LINE else None


def _box(cluster: Cluster, steps: tuple[int, ...], gap: int, memory: int) -> Box | None:
    """The box of these steps; None if it needs more memory."""
    if sum(one.size for one in read_layouts(cluster, steps, gap)) > memory:
        return None
    staged = _staged(cluster, steps)
    return Box(steps, staged, gap, _seconds(cluster, steps, staged, gap))


def _seconds(cluster: Cluster, steps: Steps, staged: Steps, gap: int) -> float:
    """How long a cluster takes in boxes of so many steps."""
    reads, writes = read_layouts(cluster, steps, gap), write_layouts(cluster, staged)
    size = sum(one.size for one in reads)
    read = _BOX + sum(map(_calls, reads)) * _READ_CALL + size / _READ_RATE + (size > _CACHE) * size / _SLOW_MEMORY
    write = _STAGED + sum(one.count * _WRITE_CALL + one.size / _WRITE_RATE for one in writes)
    return _parts(cluster.counts, steps) * (read + _parts(steps, staged) * write)


def _calls(one: Layout) -> int:
    """How many calls of the system read the pieces of a layout."""
    return -(-one.count // MOST_VIEWS) if lies_together(one.length, one.pieces) else one.count


def _parts(counts: Iterable[int], steps: Iterable[int]) -> int:
    return prod(-(-count // step) for count, step in zip(counts, steps, strict=True))


def _staged(cluster: Cluster, steps: Sequence[int]) -> tuple[int, ...]:
    """As many steps as fit into the stage: loops are cut from the outermost on, so that written pieces stay long."""
    staged = list(steps)
    for at, count in enumerate(steps):
        size = sum(one.size for one in write_layouts(cluster, staged))
        if size <= STAGE:
            break
        fitting = max(1, STAGE * count // size)
        staged[at] = fitting - fitting % _BLOCK if fitting > _BLOCK else fitting
    return tuple(staged)
