"""The copy engine: fills the body of one output file with bytes of source files, as moves say.

Ranges that lie together in both files go straight from one to the other (`direct`). All else is read in boxes,
gathered in memory and written (`clusters`, `boxes`, `tiles`, `kernels`). Memory is bounded whatever the size of a
tensor. All state belongs to one call, and no lock is held while bytes are copied, so calls may run side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from rewire.stream.direct import Copier, is_direct, strips
from rewire.stream.ranges import OUTPUT, Ledger, Range, condensed, verify
from rewire.stream.strided import Copy, Place, Target, copies

__all__ = ["MEMORY", "OUTPUT", "Cost", "Place", "Range", "Target", "cost", "verify", "write"]

MEMORY = 10 << 20
"""Bytes that the large buffers of a call take at most, unless told otherwise."""


def write(
    targets: Sequence[Target],
    places: Mapping[str, Place],
    files: Sequence[int],
    out: int,
    *,
    checksums: bool = True,
    advance: Callable[[int], None] = lambda count: None,
    memory: int = MEMORY,
) -> list[Range]:
    """Fills the body of one output file.

    Args:
        targets: the tensors to write, and where in the file they begin.
        places: where the source tensors lie, by name.
        files: open source files, read with `pread`.
        out: the open output file; its space should be allocated already.
        checksums: whether to sum what is read and written.
        advance: called with the bytes of every write.
        memory: bytes that buffers may take.

    Returns:
        Ranges of everything read and written; none without checksums.

    Raises:
        CheckpointError: a source file ends too early.
        RuleError: a copy would cut a byte.
        OSError: what the system says about the output, such as that the disk is full.
    """
    direct: list[Copy] = []
    gathered: list[Copy] = []
    for copy in copies(targets, places):
        (direct if is_direct(copy) else gathered).append(copy)
    ledger = Ledger() if checksums else None
    Copier(files, out, ledger, advance).run(strips(direct))
    if gathered:
        _gather(gathered, files, out, ledger, advance, memory)
    return condensed(ledger.close(), files, 4 * len(targets)) if ledger else []


def _gather(
    gathered: Iterable[Copy],
    files: Sequence[int],
    out: int,
    ledger: Ledger | None,
    advance: Callable[[int], None],
    memory: int,
) -> None:
    from rewire.stream.clusters import clusters
    from rewire.stream.passes import passes
    from rewire.stream.tiles import Tiler

    tiler = Tiler(files, out, ledger, advance, memory)
    for cluster in clusters(gathered, tiler.seconds):
        for one in passes(cluster, memory, tiler.seconds):
            tiler.run(one)


@dataclass(frozen=True, slots=True)
class Cost:
    """What a tensor takes.

    Attributes:
        ranges: parts of source files, each of which lies together there and in the output.
        bytes: that are needed of them.
    """

    ranges: int
    bytes: int


def cost(target: Target, places: Mapping[str, Place]) -> Cost:
    """The ranges and bytes that a tensor is made of. Raises `RuleError` where they cannot be copied."""
    ranges = size = 0
    for copy in copies([target], places):
        together = copy.counts and (copy.sources[-1], copy.targets[-1]) == (copy.unit, copy.unit_out)
        ranges += copy.units // (copy.counts[-1] if together else 1)
        size += copy.units * copy.unit
    return Cost(ranges, size)
