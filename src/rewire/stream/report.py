"""What a conversion did, or would do."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rewire.stream import engine
from rewire.stream.job import Job, size_of

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

_STATES = {
    "planned": "nothing was written",
    "part": "part done (when all are, --finish publishes the result)",
    "done": "done",
    "already": "was done already",
}


@dataclass(frozen=True)
class Fate:
    """What becomes of tensors: where the bytes of `name` come from.

    Attributes:
        sources: names of the tensors that it is made of.
        name: its name.
        shard: the file that holds it.
        shape: its shape.
        dtype: its type, by the code of the format.
        bytes: its size.
        ranges: how many separate pieces it is read in.
    """

    sources: tuple[str, ...]
    name: str
    shard: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    ranges: int

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data."""
        return {name: _data(getattr(self, name)) for name in self.__dataclass_fields__}

    @property
    def is_copy(self) -> bool:
        """Whether it stays as it is."""
        return self.sources == (self.name,) and self.ranges <= 1


@dataclass(frozen=True)
class Conversion:
    """What `rewire.convert` did.

    Attributes:
        how: `"convert"` or `"revert"`.
        state: `"planned"` (a dry run), `"part"` (written, not published), `"done"`, or `"already"` (nothing was left
            to do).
        source: the folder that was read.
        destination: the folder that was written.
        plan_hash: hash of the plan.
        key: stands for plan, source and options; equal keys lead to equal files.
        part: which part of the shards, and of how many; None for all.
        shards: output shards of the whole.
        written: how many of them this call wrote.
        kept: how many of them were there from an earlier call.
        tensors: tensors before and after.
        bytes: bytes of tensors before and after.
        needed_bytes: what remained to be written when the call began.
        bytes_written: what this call wrote.
        free_bytes: what the file system had free then.
        config: the keys of `config.json` that have other values.
        losses: what the result no longer holds, so that it cannot be brought back.
        left: files of weights and folders of the source that were not carried along.
        verified: whether all bytes were read again and compared.
        seconds: wall time.
        job: what was planned, for `fates`.
    """

    how: str
    state: str
    source: str
    destination: str
    plan_hash: str
    key: str
    part: tuple[int, int] | None
    shards: int
    written: int
    kept: int
    tensors: tuple[int, int]
    bytes: tuple[int, int]
    needed_bytes: int
    bytes_written: int
    free_bytes: int
    config: tuple[str, ...]
    losses: tuple[str, ...]
    left: tuple[str, ...]
    verified: bool
    seconds: float
    job: Job = field(repr=False, compare=False)

    def fates(self) -> Iterator[Fate]:
        """What becomes of every tensor, in the order of the files."""
        return fates(self.job)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data, without the fates."""
        names = [name for name in self.__dataclass_fields__ if name != "job"]
        return {name: _data(getattr(self, name)) for name in names}

    def summary(self) -> str:
        """One line for people."""
        if self.state == "planned":
            return f"{_STATES[self.state]}: {self.needed_bytes:,} bytes needed, {self.free_bytes:,} free"
        counts = [f"{self.written} of {self.shards} shard{'s' * (self.shards != 1)} written"] if self.written else []
        counts += [f"{self.kept} kept"] if self.kept else []
        rate = f" ({self.bytes_written / self.seconds / 1e9:.2f} GB/s)" if self.written else ""
        return f"{_STATES[self.state]}: {', '.join(counts)}; {self.bytes_written:,} bytes in {self.seconds:.2f} s{rate}"

    def __rich__(self) -> Group:
        return _shown(self)


def _data(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def fates(job: Job) -> Iterator[Fate]:
    """What becomes of every tensor of the result."""
    for shard in job.shards():
        places, _ = job.places(shard)
        for made in shard.tensors:
            sources = tuple(dict.fromkeys(move.name for move in made.moves)) or (made.name,)
            ranges = engine.cost(engine.Target(made, 0), places).ranges
            yield Fate(sources, made.name, shard.name, made.shape, made.dtype, size_of(made), ranges)


@dataclass
class FateRow:
    """Fates that differ in numbers of layers alone."""

    first: Fate
    count: int = 0
    bytes: int = 0
    ranges: int = 0


def alike(found: Iterable[Fate]) -> list[FateRow]:
    """Fates with layers alike in one row.

    >>> fate = Fate(("l.0.qkv",), "l.0.q", "model.safetensors", (4, 2), "F32", 32, 1)
    >>> [(row.first.name, row.count, row.bytes) for row in alike([fate, fate])]
    [('l.0.q', 2, 64)]
    """
    rows: dict[tuple[Any, ...], FateRow] = {}
    for fate in found:
        sources = tuple(dict.fromkeys(map(general, fate.sources)))
        row = rows.setdefault((sources, general(fate.name), fate.shape, fate.dtype), FateRow(fate))
        row.count += 1
        row.bytes += fate.bytes
        row.ranges += fate.ranges
    return list(rows.values())


def general(name: str) -> str:
    """A name without the numbers of layers.

    >>> general("model.layers.11.mlp.experts.3.w1.weight")
    'model.layers.*.mlp.experts.*.w1.weight'
    """
    return _NUMBER.sub("*", name)


_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


# --- On the screen ---


def _shown(done: Conversion) -> Group:
    from rich.console import Group
    from rich.text import Text

    title = f"{done.how} · {done.source} → {done.destination} · plan {done.plan_hash[:12]}"
    part = "" if done.part is None else f" · part {done.part[0]} of {done.part[1]}"
    return Group(Text(title + part, "bold"), _counts(done), *map(Text, _notes(done)), Text(done.summary(), "dim"))


def _counts(done: Conversion) -> Table:
    from rich.table import Table

    table = Table("", "tensors", "bytes", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for when, tensors, size in zip(("before", "after"), done.tensors, done.bytes, strict=True):
        table.add_row(when, f"{tensors:,}", f"{size:,}")
    return table


def _notes(done: Conversion) -> Iterator[str]:
    if done.config:
        yield f"config.json: {', '.join(done.config)} changed"
    for loss in done.losses:
        yield f"cannot be brought back: {loss}"
    if done.verified:
        yield "all bytes read again: as they were written"
    if done.left:
        yield f"not carried along: {', '.join(done.left)}"
    if any(name.startswith(("optimizer", "scheduler")) for name in done.left):
        yield "The state of an optimizer follows with rewire.carry_optimizer (rewire adapters)."


def fate_table(found: Iterable[Fate]) -> Table:
    """Fates as a table, layers alike in one row."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("from", "to", "shape", "type", "tensors", "bytes", "ranges", box=None, pad_edge=False)
    for column in table.columns[4:]:
        column.justify = "right"
    for row in alike(found):
        many = row.count > 1
        names = [general(name) if many else name for name in row.first.sources]
        names = list(dict.fromkeys(names))
        sources = ", ".join(names[:3]) + (f", … ({len(names)})" if len(names) > 3 else "")
        target = general(row.first.name) if many else row.first.name
        numbers = f"{row.count:,}", f"{row.bytes:,}", f"{row.ranges:,}"
        shape = "×".join(map(str, row.first.shape)) or "scalar"
        style = "dim" if row.first.is_copy else None
        table.add_row(escape(sources), escape(target), shape, row.first.dtype, *numbers, style=style)
    return table
