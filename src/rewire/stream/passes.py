"""Transposes of tall matrices in two passes, through the place in the output where they belong.

In one pass a matrix of many rows is read in shreds: as many columns as fit into memory, row by row. The two passes
read and write long pieces only. The first deals the columns out into panels, as a column split does, each of which it
writes where the rows that its columns become will lie: they are as many bytes. The second takes one panel after the
other into memory, transposes it, and writes it back to the same place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from rewire.stream.boxes import Box, whole_box
from rewire.stream.clusters import Cluster, Member
from rewire.stream.ranges import OUTPUT
from rewire.stream.strided import Copy

_MOST_PANELS = 64
_LINE = 64
_GAIN = 0.9  # gathering twice takes time that the estimates leave out


@dataclass(frozen=True, slots=True)
class Pass:
    """A cluster to carry out.

    Attributes:
        cluster: what to copy.
        scratch: whether what it writes will not stay there.
        box: how, if that does not stand open: what is read from where it is then written must be read at once.
    """

    cluster: Cluster
    scratch: bool = False
    box: Box | None = None


def passes(cluster: Cluster, memory: int, seconds: Callable[[Cluster], float]) -> Iterator[Pass]:
    """The cluster itself, or the passes that do the same in less time."""
    matrices = _matrices(cluster)
    if not matrices or 2 * _bytes(matrices[0]) < memory:
        yield Pass(cluster)
        return
    both = _both(matrices[0], memory)
    taken = sum(one.box.seconds if one.box else seconds(one.cluster) for one in both)
    if both and len(matrices) * taken < _GAIN * seconds(cluster):
        for copy in matrices:
            yield from _both(copy, memory)
    else:
        yield Pass(cluster)


def _bytes(copy: Copy) -> int:
    return copy.unit * copy.units


def _matrices(cluster: Cluster) -> list[Copy]:
    """The transposes that a cluster consists of, if units adjoin in rows of the source and of the output."""
    copy = cluster.members[0].copy
    order = sorted(range(len(copy.counts)), key=lambda at: -copy.targets[at])
    if len(cluster.members) > 1 or copy.casts or len(order) < 2:
        return []
    *outer, column, row = order
    rows, columns = copy.counts[row], copy.counts[column]
    whole = (copy.targets[row], copy.sources[column], copy.targets[column], copy.sources[row])
    if whole != (copy.unit, copy.unit, rows * copy.unit, columns * copy.unit):
        return []
    matrix = replace(
        copy, counts=(columns, rows), sources=(copy.unit, columns * copy.unit), targets=(rows * copy.unit, copy.unit)
    )
    starts = product(*(range(copy.counts[at]) for at in outer))
    return [
        replace(
            matrix,
            source=copy.source + sum(step * copy.sources[at] for step, at in zip(steps, outer, strict=True)),
            target=copy.target + sum(step * copy.targets[at] for step, at in zip(steps, outer, strict=True)),
        )
        for steps in starts
    ]


def _both(copy: Copy, memory: int) -> list[Pass]:
    """The first pass over a matrix, and the second for every panel; nothing if panels would be too many or too thin."""
    columns, rows = copy.counts
    lines = memory // (rows * _LINE) - 1
    width = (lines - 1 + lines % 2) * _LINE // copy.unit  # in memory rows lie best at odd multiples of a cache line
    if width < 1 or not 1 < -(-columns // width) <= _MOST_PANELS:
        return []
    panels = [(start, min(width, columns - start)) for start in range(0, columns, width)]
    turned = [_turned(copy, *panel) for panel in panels]
    return [Pass(_dealt_out(copy, panels), scratch=True), *(Pass(one, box=whole_box(one)) for one in turned)]


def _dealt_out(copy: Copy, panels: Sequence[tuple[int, int]]) -> Cluster:
    """Some columns of every row go to each panel."""
    columns, rows = copy.counts
    row = columns * copy.unit
    members = [
        Copy(
            copy.file,
            copy.source + start * copy.unit,
            copy.target + start * rows * copy.unit,
            width * copy.unit,
            width * copy.unit,
            (rows,),
            (row,),
            (width * copy.unit,),
        )
        for start, width in panels
    ]
    alone = (Member(member, member.sources, member.targets, member.counts) for member in members)
    return Cluster((rows,), tuple(alone), reads_once=True)


def _turned(copy: Copy, start: int, width: int) -> Cluster:
    """A panel is transposed in its place."""
    _, rows = copy.counts
    place = copy.target + start * rows * copy.unit
    strides = (copy.unit, width * copy.unit), (rows * copy.unit, copy.unit)
    panel = Copy(OUTPUT, place, place, copy.unit, copy.unit, (width, rows), *strides)
    return Cluster(panel.counts, (Member(panel, panel.sources, panel.targets, panel.counts),))
