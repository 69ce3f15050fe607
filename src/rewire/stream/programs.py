"""What is done for a box, worked out once for all boxes of a cluster that have the same steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from rewire.stream.boxes import Box, Layout, read_layouts, write_layouts
from rewire.stream.clusters import Cluster, Member
from rewire.stream.compiled import Compiled
from rewire.stream.files import Buffer, grouped
from rewire.stream.kernels import gathers
from rewire.stream.ranges import OUTPUT, lies_together, offsets

Steps = tuple[int, ...]

_LINE = 64


@dataclass(frozen=True, slots=True)
class Pieces:
    """Bytes of a file in pieces, and the part of a buffer where they are put.

    Attributes:
        file: index of the source file, or -1.
        start: where the pieces lie for the first box.
        strides: how much further on they lie for every step along a common loop.
        layout: how they lie there and in the buffer.
        buffer, base: where the first one begins.
        views: of the buffer, one for each piece.
        groups: of views that one call of the system can fill.
    """

    file: int
    start: int
    strides: tuple[int, ...]
    layout: Layout
    buffer: Buffer
    base: int
    views: list[memoryview]
    groups: list[list[memoryview]]

    def at(self, steps: Steps) -> int:
        """Where the first piece lies for what begins with these steps."""
        return self.start + along(steps, self.strides)

    def starts(self, at: int) -> Sequence[int]:
        """Where the groups lie if the first piece lies at `at`."""
        if len(self.groups) < len(self.views):
            size = len(self.groups[0]) * self.layout.length
            return range(at, at + len(self.groups) * size, size)
        if len(self.layout.pieces) == 1:
            ((steps, stride),) = self.layout.pieces
            return range(at, at + steps * stride, stride)
        return [at + offset for offset in offsets(self.layout.pieces)]

    @property
    def memory(self) -> memoryview:
        """The part of the buffer, all pieces in turn."""
        return self.buffer.view[self.base : self.base + self.layout.size]

    @property
    def address(self) -> int:
        """Where the first piece lies in memory."""
        return self.buffer.address + self.base

    @property
    def size(self) -> int:
        """Bytes, without the room between the pieces in the buffer."""
        return self.layout.count * self.layout.length


@dataclass(frozen=True, slots=True)
class Output:
    """What is written to one place.

    Attributes:
        pieces: as written.
        casts: the types that the values go through; empty where they stay as they are.
        raw: the values before they are cast, in the order of the pieces.
        raw_base: where in its buffer `raw` begins.
    """

    pieces: Pieces
    casts: tuple[str, ...]
    raw: memoryview
    raw_base: int
    raw_buffer: Buffer


Calls = list[Callable[[], object]]


@dataclass(frozen=True, slots=True)
class Stage:
    """What is gathered and written at once: the steps at which it begins, and what to call to fill every output."""

    steps: Steps
    outputs: list[Output]
    calls: list[Calls]


@dataclass(frozen=True, slots=True)
class Program:
    """All that is done for a box, but for the offsets in the files."""

    reads: list[Pieces]
    stages: list[Stage]


class Programmer:
    """Makes programs that share one set of buffers; they grow to what the largest needs."""

    def __init__(self, compiled: Compiled | None) -> None:
        self._compiled = compiled
        self._source = self._stage = self._raw = Buffer(1)

    def program(self, cluster: Cluster, box: Box, steps: Steps) -> Program:
        """What is done for a box of `steps` steps, which are those of `box` or fewer at an edge."""
        layouts = read_layouts(cluster, steps, box.gap)
        self._source = _grown(self._source, layouts)
        reads = _placed(_sources(cluster), layouts, self._source)
        made: dict[Steps, list[Output]] = {}
        stages = []
        for start, staged in parts(steps, box.staged):
            if staged not in made:
                made[staged] = self._outputs(cluster, staged)
            calls = self._calls(cluster, reads, made[staged], start, staged)
            stages.append(Stage(start, made[staged], calls))
        return Program(reads, stages)

    def _outputs(self, cluster: Cluster, staged: Steps) -> list[Output]:
        layouts = write_layouts(cluster, staged)
        self._stage = _grown(self._stage, layouts)
        places = _placed(_targets(cluster), layouts, self._stage)
        sizes = [
            one.size * member.copy.unit // member.copy.unit_out if member.copy.casts else 0
            for one, member in zip(layouts, cluster.members, strict=False)
        ]
        if sum(sizes) > len(self._raw.view):
            self._raw = Buffer(sum(sizes))
        bases = [sum(sizes[:number]) for number in range(len(sizes))]
        return [
            Output(pieces, member.copy.casts, self._raw.view[base : base + size], base, self._raw)
            for pieces, member, base, size in zip(places, cluster.members, bases, sizes, strict=False)
        ]

    def _calls(
        self, cluster: Cluster, reads: Sequence[Pieces], outputs: Sequence[Output], start: Steps, staged: Steps
    ) -> list[Calls]:
        """For every output what fills it."""
        found: list[Calls] = [[] for _ in outputs]
        for number, member in enumerate(cluster.members):
            read, output = reads[number % len(reads)], outputs[number % len(outputs)]
            counts = (*staged, *member.counts)
            taken = (*read.layout.strides, *member.inner_sources)[: len(counts)]
            given = (*output.pieces.layout.strides, *member.inner_targets)[: len(counts)]
            source = read.base + member.copy.source - read.start + along(start, read.layout.strides)
            target = member.copy.target - output.pieces.start
            buffer, target, strides = _before_casts(member, output, target, given)
            loops = list(zip(counts, taken, strides, strict=True))
            places = (read.buffer.memory, source), (buffer.memory, target)
            found[number % len(outputs)] += gathers(member.copy.unit, loops, *places, self._compiled)
        return found


_Where = tuple[int, int, tuple[int, ...]]
"""File, offset in it, and strides along the common loops."""


def _sources(cluster: Cluster) -> list[_Where]:
    members = cluster.members
    if cluster.reads_once:
        return [(members[0].copy.file, cluster.source, members[0].sources)]
    return [(member.copy.file, member.copy.source, member.sources) for member in members]


def _targets(cluster: Cluster) -> list[_Where]:
    members = cluster.members
    if cluster.writes_once:
        return [(OUTPUT, cluster.target, members[0].targets)]
    return [(OUTPUT, member.copy.target, member.targets) for member in members]


def _grown(buffer: Buffer, layouts: Sequence[Layout]) -> Buffer:
    """A buffer that has room for the pieces of all layouts, each beginning anywhere in a cache line."""
    size = sum(one.size + 2 * _LINE for one in layouts)
    return buffer if len(buffer.view) >= size else Buffer(size)


def _placed(places: Sequence[_Where], layouts: Sequence[Layout], buffer: Buffer) -> list[Pieces]:
    """Gives every layout its part of the buffer, at the same place in a cache line as in the file."""
    found, base = [], 0
    for (file, start, strides), one in zip(places, layouts, strict=True):
        base += (start - base) % _LINE
        begins = range(base, base + one.count * one.pitch, one.pitch)
        views = [buffer.view[begin : begin + one.length] for begin in begins]
        groups = list(grouped(views)) if lies_together(one.length, one.pieces) else [[view] for view in views]
        found.append(Pieces(file, start, strides, one, buffer, base, views, groups))
        base += one.size
    return found


def _before_casts(
    member: Member, output: Output, target: int, strides: Sequence[int]
) -> tuple[Buffer, int, Sequence[int]]:
    """The buffer that is gathered into, the offset of the first unit in it, and its strides."""
    if not output.casts:
        return output.pieces.buffer, output.pieces.base + target, strides
    unit, unit_out = member.copy.unit, member.copy.unit_out
    scaled = [stride * unit // unit_out for stride in strides]
    return output.raw_buffer, output.raw_base + target * unit // unit_out, scaled


def along(steps: Sequence[int], strides: Sequence[int]) -> int:
    """How far steps along loops lead; further strides do not count.

    >>> along((2, 1), (100, 10, 1))
    210
    """
    return sum(step * stride for step, stride in zip(steps, strides, strict=False))


def parts(counts: Steps, steps: Steps) -> Iterator[tuple[Steps, Steps]]:
    """Cuts loops: where every part begins, and its steps.

    >>> list(parts((5,), (3,)))
    [((0,), (3,)), ((3,), (2,))]
    """
    for start in product(*(range(0, count, step) for count, step in zip(counts, steps, strict=True))):
        yield start, tuple(min(step, count - at) for count, step, at in zip(counts, steps, start, strict=True))
