"""Carries out clusters box by box: reads the pieces, gathers them in the order of the output, writes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rewire.stream.boxes import Box, best_box
from rewire.stream.casting import Caster
from rewire.stream.clusters import Cluster
from rewire.stream.compiled import compiled
from rewire.stream.files import Joiner, read_pieces, write_pieces
from rewire.stream.passes import Pass
from rewire.stream.programs import Calls, Output, Pieces, Program, Programmer, Steps, parts
from rewire.stream.ranges import OUTPUT, Ledger

_MANY = 16


class Tiler:
    """Carries out clusters with one set of buffers. Estimates are kept, since the layers of a model are alike."""

    def __init__(
        self, files: Sequence[int], out: int, ledger: Ledger | None, advance: Callable[[int], None], memory: int
    ) -> None:
        self._files, self._out, self._ledger, self._advance, self._memory = files, out, ledger, advance, memory
        self._boxes: dict[Any, Box] = {}
        self._casters: dict[tuple[str, ...], Caster] = {}
        self._compiled = compiled()
        self._programmer = Programmer(self._compiled)

    def seconds(self, cluster: Cluster) -> float:
        """How long a cluster takes, estimated."""
        return self._box(cluster).seconds

    def _box(self, cluster: Cluster) -> Box:
        form = cluster.form
        if form not in self._boxes:
            self._boxes[form] = best_box(cluster, self._memory)
        return self._boxes[form]

    def run(self, one: Pass) -> None:
        """Reads, gathers and writes all of a cluster."""
        cluster, box = one.cluster, one.box or self._box(one.cluster)
        programs: dict[Steps, Program] = {}
        joiners: dict[int, Joiner] = {}
        for start, steps in parts(cluster.counts, box.steps):
            if steps not in programs:
                programs[steps] = self._programmer.program(cluster, box, steps)
            self._execute(programs[steps], start, joiners, one.scratch)
        for joiner in joiners.values():
            joiner.flush()

    def _execute(self, program: Program, start: Steps, joiners: dict[int, Joiner], scratch: bool) -> None:
        for read in program.reads:
            self._read(read, read.at(start))
        for stage in program.stages:
            place = tuple(map(sum, zip(start, stage.steps, strict=True)))
            for number, (output, calls) in enumerate(zip(stage.outputs, stage.calls, strict=True)):
                self._gather(output, calls)
                self._write(output.pieces, output.pieces.at(place), number, joiners)
                if not scratch:
                    self._account(output.pieces, output.pieces.at(place))

    def _read(self, read: Pieces, at: int) -> None:
        file, starts = (self._out if read.file == OUTPUT else self._files[read.file]), read.starts(at)
        done = self._read_compiled(file, read, starts)
        read_pieces(file, read.groups[done:], starts[done:], read.size - done * read.layout.length)
        if self._ledger and read.file != OUTPUT:
            self._ledger.add(read.file, at, read.layout.pieces, read.views)

    def _read_compiled(self, file: int, read: Pieces, starts: Sequence[int]) -> int:
        """How many groups of pieces the compiled part has read: none if they are few, or irregular, or it is absent."""
        if not self._compiled or not isinstance(starts, range) or not _MANY < len(starts) == len(read.views):
            return 0
        return self._compiled.read(file, read.address, read.layout.pitch, read.layout.length, starts)

    def _gather(self, output: Output, calls: Calls) -> None:
        for call in calls:
            call()
        if output.casts:
            if output.casts not in self._casters:
                self._casters[output.casts] = Caster(output.casts)
            self._casters[output.casts](output.raw, output.pieces.memory)

    def _write(self, pieces: Pieces, at: int, number: int, joiners: dict[int, Joiner]) -> None:
        if len(pieces.views) > 1:
            write_pieces(self._out, pieces.views, pieces.starts(at), pieces.size)
        else:
            if number not in joiners:
                joiners[number] = Joiner(self._out)
            joiners[number].write(pieces.views[0], at)

    def _account(self, pieces: Pieces, at: int) -> None:
        """For bytes that stay where they were written."""
        if self._ledger:
            self._ledger.add(OUTPUT, at, pieces.layout.pieces, pieces.views)
        self._advance(pieces.size)
