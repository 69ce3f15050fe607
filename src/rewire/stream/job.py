"""A rule and a checkpoint become output shards: which tensors each holds, where they lie and where they come from.

Everything here is arithmetic on names, shapes and offsets. An output shard is a pure function of the plan, the
headers of the source and its number, so that several machines can write one checkpoint together.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from rewire.checkpoint import (
    DTYPES,
    Checkpoint,
    Entry,
    aligned_order,
    header_bytes,
    parse_size,
    partition,
    shard_name,
    tensor_bytes,
)
from rewire.errors import OutputError, RefusedError
from rewire.moves import Made, check_bytes, compile_rule
from rewire.stream.casting import why_not
from rewire.stream.engine import Place, Target
from rewire.stream.quantised import Carried
from rewire.stream.task import Task
from rewire.tensor_rules import Step

LAYOUT = 1
"""Counts up when the same plan and source lead to other files than with earlier versions of Rewire."""

PAGE = 4096
"""Bodies keep their place within a page, so that file systems that can share blocks may do so."""


def size_of(made: Made) -> int:
    """Bytes of a tensor.

    >>> size_of(Made("a", (2, 3), "BF16", ()))
    12
    """
    return tensor_bytes(made.dtype, made.shape)


def _entry(made: Made) -> Entry:
    return made.name, made.dtype, made.shape


@dataclass(frozen=True)
class OutputShard:
    """One file of the result: its tensors in the order in which they lie there."""

    number: int
    name: str
    tensors: tuple[Made, ...] = field(repr=False)
    metadata: Mapping[str, str] = field(repr=False)
    body_at: int = 0

    @cached_property
    def header(self) -> bytes:
        """Length and JSON, as they stand at the front of the file."""
        return header_bytes(list(map(_entry, self.tensors)), self.metadata, align_to=self.body_at)

    @cached_property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.header) + sum(map(size_of, self.tensors))

    def targets(self) -> Iterator[Target]:
        """The tensors with the places that they have in the file."""
        start = len(self.header)
        for made in self.tensors:
            yield Target(made, start)
            start += size_of(made)


@dataclass(frozen=True)
class Job:
    """What is written.

    Attributes:
        key: stands for plan, source and options: equal keys, equal files.
        checkpoint: the source.
        task: what it was made for, without the rule.
        names: of the files, in order; shards are made when they are asked for.
    """

    key: str
    checkpoint: Checkpoint
    task: Task
    layout: tuple[tuple[Made, ...], ...] = field(repr=False)
    homes: tuple[int, ...] = field(repr=False)

    @property
    def count(self) -> int:
        """How many shards there are."""
        return len(self.layout)

    def shard(self, number: int) -> OutputShard:
        """Output shard `number`, from 1."""
        home = self.homes[number - 1]
        source = self.checkpoint.shards[home]
        metadata = {"format": "pt", **source.metadata}
        name = shard_name(number, self.count)
        return OutputShard(number, name, self.layout[number - 1], metadata, source.body_start % PAGE)

    def shards(self, numbers: Iterable[int] | None = None) -> Iterator[OutputShard]:
        """Output shards, by default all, one at a time."""
        return map(self.shard, range(1, self.count + 1) if numbers is None else numbers)

    @cached_property
    def bytes(self) -> int:
        """Bytes of all tensors of the result."""
        return sum(map(size_of, self.tensors()))

    def tensors(self) -> Iterator[Made]:
        """All tensors of the result, in the order of the files."""
        return (made for tensors in self.layout for made in tensors)

    def places(self, shard: OutputShard) -> tuple[dict[str, Place], list[int]]:
        """Where the sources of a shard lie, and the numbers of the source files that their `file` counts in."""
        infos = {move.name: self.checkpoint.tensors[move.name] for made in shard.tensors for move in made.moves}
        files = sorted({info.shard for info in infos.values()})
        number = {file: index for index, file in enumerate(files)}
        return {name: Place(number[info.shard], info.start, info.dtype) for name, info in infos.items()}, files


def make_job(checkpoint: Checkpoint, task: Task, carried: Carried, max_shard_size: int | str | None = None) -> Job:
    """Lays out the result of a task.

    By default a tensor goes to the shard that holds the first of its sources, so that the result has the sharding of
    the source. With `max_shard_size` (bytes, or text such as "5GB") shards are filled up to that size instead.

    Raises:
        RuleError: the rule does not fit the shapes.
        RefusedError: it would cut a byte of a packed type.
        OutputError: `max_shard_size` is no size, or a name cannot be written.
    """
    limit = None if max_shard_size is None else parse_size(max_shard_size)
    made = {one.name: one for one in _made(checkpoint, carried)}
    origin = _origins(checkpoint, carried.rule, made.values())
    ordered = sorted(map(_entry, made.values()), key=lambda entry: (origin[entry[0]], entry[0]))
    groups = _by_source(ordered, origin) if limit is None else partition(ordered, limit)
    homes = tuple(origin[group[0][0]][0] if group else 0 for group in groups)
    layout = tuple(tuple(made[entry[0]] for entry in aligned_order(group)) for group in groups)
    task = replace(task, rule=())  # done with; for a large model its steps take much memory
    return Job(_key(checkpoint, task, limit), checkpoint, task, layout, homes)


def _made(checkpoint: Checkpoint, carried: Carried) -> list[Made]:
    infos = {name: (info.dtype, info.shape) for name, info in checkpoint.tensors.items()}
    found = compile_rule(carried.rule, infos)
    copies = [replace(found[name], name=copy) for copy, name in carried.copies.items()]
    packed = any(DTYPES[info.dtype] % 8 for info in checkpoint.tensors.values())
    for one in found.values():
        if packed:
            _check_bytes(one, infos)
        if reason := why_not(one.casts):
            raise RefusedError(f"{one.name}: {reason}. Nothing was written")
    return [*found.values(), *copies]


def _check_bytes(made: Made, infos: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    bits = {DTYPES[infos[move.name][0]] for move in made.moves}
    if reason := next(filter(None, (check_bytes(made, width) for width in bits if width % 8)), None):
        raise RefusedError(f"{reason}. Nothing was written")


_Origin = tuple[int, int]
"""Shard and byte offset of the first source byte of a tensor."""


def _origins(checkpoint: Checkpoint, rule: Sequence[Step], made: Iterable[Made]) -> dict[str, _Origin]:
    found: dict[str, _Origin] = {}
    empty: list[str] = []
    for one in made:
        if one.moves:
            found[one.name] = _first_byte(checkpoint, one)
        else:
            empty.append(one.name)
    if empty:
        ancestors = _ancestors(checkpoint, rule)
        found |= {name: ancestors.get(name, (0, 0)) for name in empty}
    return found


def _first_byte(checkpoint: Checkpoint, made: Made) -> _Origin:
    first: _Origin | None = None
    for move in made.moves:
        info = checkpoint.tensors[move.name]
        origin = info.shard, info.start + move.source_start * DTYPES[info.dtype] // 8
        first = origin if first is None or origin < first else first
    assert first is not None
    return first


def _ancestors(checkpoint: Checkpoint, rule: Sequence[Step]) -> dict[str, _Origin]:
    """For tensors without elements, from whose bytes nothing can be read off: where the steps took them from."""
    found = {name: (info.shard, info.start) for name, info in checkpoint.tensors.items()}
    for step in rule:
        origins = [found[name] for name in step.inputs if name in found]
        found |= dict.fromkeys(step.outputs, min(origins, default=(0, 0)))
    return found


def _by_source(ordered: Sequence[Entry], origin: Mapping[str, _Origin]) -> list[list[Entry]]:
    """Tensors by the shard that their first byte comes from; a checkpoint without tensors stays one."""
    groups: dict[int, list[Entry]] = {}
    for entry in ordered:
        groups.setdefault(origin[entry[0]][0], []).append(entry)
    return list(groups.values()) or [[]]


def _key(checkpoint: Checkpoint, task: Task, limit: int | None) -> str:
    said = [LAYOUT, task.identity, checkpoint.fingerprint, limit]
    return hashlib.sha256(json.dumps(said).encode("utf-8")).hexdigest()


def signature(entries: Iterable[Entry]) -> str:
    """Stands for the names, types and shapes of tensors, whatever their order.

    >>> signature([("a", "U8", (2,)), ("b", "U8", ())]) == signature([("b", "U8", ()), ("a", "U8", (2,))])
    True
    """
    digest = hashlib.sha256()
    for name, dtype, shape in sorted(entries):
        digest.update(json.dumps([name, dtype, *shape]).encode("ascii"))
    return digest.hexdigest()


def part_numbers(part: tuple[int, int], count: int) -> list[int]:
    """The shards that a part writes.

    >>> part_numbers((2, 3), 7)
    [2, 5]
    """
    return list(range(part[0], count + 1, part[1]))


def parse_part(text: str) -> tuple[int, int]:
    """Which part, of how many: `"3/16"`. Raises `OutputError` for anything else.

    >>> parse_part("3/16")
    (3, 16)
    """
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count) <= 100_000):
        raise OutputError(f"{text!r} is no part of the shards; write 3/16 for the third of sixteen")
    return int(number), int(count)
