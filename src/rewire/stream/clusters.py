"""Copies that share bytes of a file go together, so that nothing is read, or written in shreds, several times.

A column split reads rows of which three tensors take their parts; a column join writes rows to which three tensors
give theirs. Such copies have loops in common (over the rows) and differ within one step of these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

from rewire.stream.strided import Axes, Copy, reach

MOST = 1 << 20
"""Most bytes that the common loops may leave for the buffers to hold at every step."""


@dataclass(frozen=True, slots=True)
class Member:
    """A copy as part of a cluster.

    Attributes:
        copy: the whole of it.
        sources, targets: its strides in bytes for the common loops.
        steps: of the common loops.
        counts, inner_sources, inner_targets: its other loops.
    """

    copy: Copy
    sources: tuple[int, ...]
    targets: tuple[int, ...]
    steps: tuple[int, ...]
    counts: tuple[int, ...] = ()
    inner_sources: tuple[int, ...] = ()
    inner_targets: tuple[int, ...] = ()

    def source_axes(self, steps: Sequence[int]) -> Axes:
        """All loops over the source when the common ones take so many steps."""
        return (*zip(steps, self.sources, strict=True), *zip(self.counts, self.inner_sources, strict=True))

    def target_axes(self, steps: Sequence[int]) -> Axes:
        """All loops over the output when the common ones take so many steps."""
        return (*zip(steps, self.targets, strict=True), *zip(self.counts, self.inner_targets, strict=True))

    @property
    def source_reach(self) -> int:
        """Bytes of the source from the first to the last within one step of the common loops."""
        return reach(self.copy.unit, self.counts, self.inner_sources)

    @property
    def target_reach(self) -> int:
        """The same for the output."""
        return reach(self.copy.unit_out, self.counts, self.inner_targets)

    @property
    def units(self) -> int:
        """Units within one step of the common loops."""
        return prod(self.counts)


@dataclass(frozen=True, slots=True)
class Cluster:
    """Copies with common loops.

    Attributes:
        counts: steps of the common loops, in the order of the output, outermost first.
        members: the copies.
        reads_once: all take their parts out of the same bytes of one source file.
        writes_once: all give their parts to the same bytes of the output.
    """

    counts: tuple[int, ...]
    members: tuple[Member, ...]
    reads_once: bool = False
    writes_once: bool = False

    @property
    def form(self) -> tuple[object, ...]:
        """Equal for clusters that differ in their place alone."""
        source, target = self.source, self.target
        members = [
            (
                *(member.copy.unit, member.copy.unit_out, member.copy.casts),
                member.copy.source - source if self.reads_once else 0,
                member.copy.target - target if self.writes_once else 0,
                *(member.sources, member.targets, member.counts, member.inner_sources, member.inner_targets),
            )
            for member in self.members
        ]
        return (self.counts, self.reads_once, self.writes_once, *members)

    @property
    def source(self) -> int:
        """Offset of the first byte that is read."""
        return min(member.copy.source for member in self.members)

    @property
    def target(self) -> int:
        """Offset of the first byte that is written."""
        return min(member.copy.target for member in self.members)

    @property
    def source_span(self) -> int:
        """Bytes from the first to the last that one step of the common loops reads."""
        return max(member.copy.source + member.source_reach for member in self.members) - self.source

    @property
    def target_span(self) -> int:
        """Bytes from the first to the last that one step of the common loops writes."""
        return max(member.copy.target + member.target_reach for member in self.members) - self.target


def clusters(copies: Iterable[Copy], seconds: Callable[[Cluster], float]) -> list[Cluster]:
    """Groups copies where that takes less time, as `seconds` estimates it; those first in the output come first."""
    found: list[Cluster] = []
    alone: list[Copy] = []
    for group in _overlapping(copies, _source_span):
        cluster = _best(group, _sharing_source(group), seconds)
        found += [cluster] if cluster else []
        alone += [] if cluster else group
    for group in _overlapping(alone, _target_span):
        cluster = _best(group, _sharing_target(group), seconds)
        found += [cluster] if cluster else map(_single, group)
    return sorted(found, key=lambda cluster: cluster.target)


def _best(group: Sequence[Copy], candidates: Iterable[Cluster], seconds: Callable[[Cluster], float]) -> Cluster | None:
    """The candidate that takes the least time, if that is less than the copies take one after the other."""
    if len(group) == 1:
        return None
    best = min(candidates, key=seconds, default=None)
    return best if best and seconds(best) < sum(map(seconds, map(_single, group))) else None


def _source_span(copy: Copy) -> tuple[int, int, int]:
    return copy.file, copy.source, copy.source_stop


def _target_span(copy: Copy) -> tuple[int, int, int]:
    return 0, copy.target, copy.target_stop


def _overlapping(copies: Iterable[Copy], span: Callable[[Copy], tuple[int, int, int]]) -> Iterator[list[Copy]]:
    """Copies whose spans (file, start, stop) overlap, directly or through others."""
    group: list[Copy] = []
    last, end = -1, 0
    for copy in sorted(copies, key=span):
        file, start, stop = span(copy)
        if group and (file != last or start >= end):
            yield group
            group, end = [], 0
        group.append(copy)
        last, end = file, max(end, stop)
    if group:
        yield group


def _single(copy: Copy) -> Cluster:
    return Cluster(copy.counts, (Member(copy, copy.sources, copy.targets, copy.counts),))


def _sharing_source(group: Sequence[Copy]) -> Iterator[Cluster]:
    """Clusters whose bytes within one step are few and mostly wanted."""
    for members in _members(group, [tuple(zip(copy.counts, copy.sources, strict=True)) for copy in group]):
        cluster = _cluster(members, reads_once=True)
        wanted = sum(member.units * member.copy.unit for member in members)
        if cluster.source_span <= min(MOST, 2 * wanted):
            yield cluster


def _sharing_target(group: Sequence[Copy]) -> Iterator[Cluster]:
    """Clusters that fill every byte within one step."""
    if len({(copy.unit / copy.unit_out, copy.casts) for copy in group}) > 1:
        return
    for members in _members(group, [tuple(zip(copy.counts, copy.targets, strict=True)) for copy in group]):
        cluster = _cluster(members, writes_once=True)
        if sum(member.units * member.copy.unit_out for member in members) == cluster.target_span <= MOST:
            yield cluster


def _members(group: Sequence[Copy], loops: Sequence[Axes]) -> Iterator[list[Member]]:
    """The copies with the loops that all have as common ones: with all of these, then without the narrowest, …"""
    common = [loop for loop in dict.fromkeys(loops[0]) if all(loop in others for others in loops)]
    common.sort(key=lambda loop: -loop[1])
    for count in range(len(common), 0, -1):
        places = [[own.index(loop) for loop in common[:count]] for own in loops]
        yield [_member(copy, place) for copy, place in zip(group, places, strict=True)]


def _member(copy: Copy, common: Sequence[int]) -> Member:
    inner = [at for at in range(len(copy.counts)) if at not in common]

    def pick(values: Sequence[int], which: Sequence[int]) -> tuple[int, ...]:
        return tuple(values[at] for at in which)

    return Member(
        copy,
        pick(copy.sources, common),
        pick(copy.targets, common),
        pick(copy.counts, common),
        pick(copy.counts, inner),
        pick(copy.sources, inner),
        pick(copy.targets, inner),
    )


def _cluster(members: Sequence[Member], *, reads_once: bool = False, writes_once: bool = False) -> Cluster:
    first = members[0]
    order = sorted(range(len(first.steps)), key=lambda at: -first.targets[at])
    arranged = [_in_order(member, order) for member in members]
    return Cluster(arranged[0].steps, tuple(arranged), reads_once, writes_once)


def _in_order(member: Member, order: Sequence[int]) -> Member:
    steps, sources, targets = (
        tuple(values[at] for at in order) for values in (member.steps, member.sources, member.targets)
    )
    return replace(member, steps=steps, sources=sources, targets=targets)
