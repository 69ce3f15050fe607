"""Tensor rules: how the tensors named before an edit become the tensors named after it.

A rule is a tuple of steps out of the closed set below. A step knows names, shapes and plain array
operations (reshape, slice, concatenate) and nothing else, so that one definition serves torch tensors,
numpy arrays and, as shapes alone, byte ranges of a file. This module imports neither.

Every step has an exact inverse. What a step would lose (dropped rows, the wide original of a narrowing
cast) it moves to a side tensor, named with `KEPT`; a caller that has no use for the way back discards
those with `visible`.

>>> import numpy as np
>>> rule = (SplitRows("qkv.weight", ("q.weight", "k.weight", "v.weight"), sizes=(4, 2, 2), groups=2),)
>>> fused = np.arange(8).reshape(8, 1)
>>> parts = run(rule, {"qkv.weight": fused}, xp=np)
>>> parts["q.weight"].ravel().tolist(), parts["k.weight"].ravel().tolist()
([0, 1, 4, 5], [2, 6])
>>> bool((run(invert(rule), parts, xp=np)["qkv.weight"] == fused).all())
True
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import accumulate
from math import prod
from typing import Any, ClassVar

from rewire.errors import RuleError

Array = Any
"""A torch tensor or a numpy array."""

Shape = tuple[int, ...]

KEPT = "kept:"
"""Prefix of the names of side tensors."""


def kept(name: str) -> str:
    """The name under which a step puts aside what it would otherwise lose of `name`."""
    return KEPT + name


def visible(tensors: Mapping[str, Array]) -> dict[str, Array]:
    """`tensors` without the side tensors."""
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(KEPT)}


@dataclass(frozen=True)
class Step:
    """One step of a rule: takes the tensors named `inputs`, gives the tensors named `outputs`."""

    kind: ClassVar[str]

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names taken."""
        raise NotImplementedError

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names given, side tensors left out."""
        raise NotImplementedError

    def inverse(self) -> Step:
        """The step that takes the outputs back to the inputs, bit for bit."""
        raise NotImplementedError

    def shapes(self, *shapes: Shape) -> tuple[Shape, ...]:
        """Shapes of the outputs, given those of the inputs. Raises `RuleError` where they do not fit."""
        raise NotImplementedError

    def apply(self, tensors: dict[str, Array], xp: Any) -> None:
        """Replaces the inputs by the outputs in `tensors`; `xp` is `torch` or `numpy`."""
        raise NotImplementedError

    def _fail(self, message: str) -> RuleError:
        return RuleError(f"{self.kind} {', '.join(self.inputs)}: {message}")


@dataclass(frozen=True)
class _OneToOne(Step):
    """Shared by the steps that make `target` out of `source`."""

    source: str
    target: str

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.source,)

    @property
    def outputs(self) -> tuple[str, ...]:
        return (self.target,)


@dataclass(frozen=True)
class Rename(_OneToOne):
    """`source` is called `target`."""

    kind = "rename"

    def inverse(self) -> Rename:
        return Rename(self.target, self.source)

    def shapes(self, *shapes: Shape) -> tuple[Shape, ...]:
        return shapes

    def apply(self, tensors: dict[str, Array], xp: Any) -> None:
        tensors[self.target] = tensors.pop(self.source)


@dataclass(frozen=True)
class Transpose(_OneToOne):
    """The last two dimensions of `source` change places."""

    kind = "transpose"

    def inverse(self) -> Transpose:
        return Transpose(self.target, self.source)

    def shapes(self, *shapes: Shape) -> tuple[Shape, ...]:
        (shape,) = shapes
        if len(shape) < 2:
            raise self._fail(f"needs at least two dimensions, the tensor has shape {list(shape)}")
        return ((*shape[:-2], shape[-1], shape[-2]),)

    def apply(self, tensors: dict[str, Array], xp: Any) -> None:
        source = tensors.pop(self.source)
        self.shapes(tuple(source.shape))
        tensors[self.target] = source.swapaxes(-2, -1)


@dataclass(frozen=True)
class _Rows(Step):
    """Shared by split and join: how the rows of `whole` are dealt out to `parts`.

    Along dimension `dim` the whole consists of `groups` equal groups; each group holds the rows of every
    part in turn. `sizes` are the rows of each part over all groups, so uneven parts need nothing special:
    `groups=1` is the stacked layout, `groups=heads` per head, `groups=key-value heads` grouped-query,
    `groups=rows` alternating rows.
    """

    whole: str
    parts: tuple[str, ...]
    sizes: tuple[int, ...]
    groups: int = 1
    dim: int = 0

    def __post_init__(self) -> None:
        if len(self.parts) != len(self.sizes):
            raise RuleError(f"{self.whole}: {len(self.parts)} parts but {len(self.sizes)} sizes")
        if self.groups < 1 or any(size < 1 or size % self.groups for size in self.sizes):
            raise RuleError(f"{self.whole}: sizes {list(self.sizes)} do not divide by {self.groups} groups")

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Rows of each part within one group."""
        return tuple(size // self.groups for size in self.sizes)

    @property
    def bounds(self) -> tuple[tuple[int, int], ...]:
        """Where each part lies within one group, as (start, stop)."""
        stops = tuple(accumulate(self.group_sizes))
        return tuple(zip((0, *stops), stops, strict=False))

    def _whole_shape(self, shapes: Sequence[Shape]) -> Shape:
        first = shapes[0]
        for part, size, shape in zip(self.parts, self.sizes, shapes, strict=True):
            expected = _with_rows(first, self.dim, size)
            if shape != expected:
                raise self._fail(f"{part} has shape {list(shape)}, expected {list(expected)}")
        return _with_rows(first, self.dim, sum(self.sizes))

    def _part_shapes(self, shape: Shape) -> tuple[Shape, ...]:
        if len(shape) <= self.dim or shape[self.dim] != sum(self.sizes):
            parts = " + ".join(map(str, self.sizes))
            raise self._fail(f"shape {list(shape)} has no dimension {self.dim} of {parts} = {sum(self.sizes)} rows")
        return tuple(_with_rows(shape, self.dim, size) for size in self.sizes)


@dataclass(frozen=True)
class SplitRows(_Rows):
    """`whole` becomes `parts`."""

    kind = "split"

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.whole,)

    @property
    def outputs(self) -> tuple[str, ...]:
        return self.parts

    def inverse(self) -> JoinRows:
        return JoinRows(self.whole, self.parts, self.sizes, self.groups, self.dim)

    def shapes(self, *shapes: Shape) -> tuple[Shape, ...]:
        (shape,) = shapes
        return self._part_shapes(shape)

    def apply(self, tensors: dict[str, Array], xp: Any) -> None:
        whole = tensors.pop(self.whole)
        part_shapes = self.shapes(tuple(whole.shape))
        grouped = whole.reshape(_grouped(tuple(whole.shape), self.dim, self.groups))
        before = (slice(None),) * (self.dim + 1)
        for part, (start, stop), shape in zip(self.parts, self.bounds, part_shapes, strict=True):
            tensors[part] = grouped[(*before, slice(start, stop))].reshape(shape)


@dataclass(frozen=True)
class JoinRows(_Rows):
    """`parts` become `whole`."""

    kind = "join"

    @property
    def inputs(self) -> tuple[str, ...]:
        return self.parts

    @property
    def outputs(self) -> tuple[str, ...]:
        return (self.whole,)

    def inverse(self) -> SplitRows:
        return SplitRows(self.whole, self.parts, self.sizes, self.groups, self.dim)

    def shapes(self, *shapes: Shape) -> tuple[Shape, ...]:
        return (self._whole_shape(shapes),)

    def apply(self, tensors: dict[str, Array], xp: Any) -> None:
        parts = [tensors.pop(name) for name in self.parts]
        (shape,) = self.shapes(*(tuple(part.shape) for part in parts))
        grouped = [part.reshape(_grouped(tuple(part.shape), self.dim, self.groups)) for part in parts]
        tensors[self.whole] = xp.concatenate(grouped, axis=self.dim + 1).reshape(shape)


@dataclass(frozen=True)
class Stack(Step):
    """`parts`, equal in shape, become the slices of `whole` along a new first dimension."""

    whole: str
    parts: tuple[str, ...]
    kind = "stack"

    @property
    def inputs(self) -> tuple[str, ...]:
        return self.parts

    @property
    def outputs(self) -> tuple[str, ...]:
        return (self.whole,)

    def inverse(self) -> Unstack:
        return Unstack(self.whole, self.parts)

    def shapes(self, *shapes: Shape) -> tuple[Shape, ...]:
        if len(set(shapes)) != 1:
            raise self._fail(f"shapes differ: {sorted({str(list(shape)) for shape in shapes})}")
        return ((len(self.parts), *shapes[0]),)

    def apply(self, tensors: dict[str, Array], xp: Any) -> None:
        parts = [tensors.pop(name) for name in self.parts]
        self.shapes(*(tuple(part.shape) for part in parts))
        tensors[self.whole] = xp.stack(parts, 0)


@dataclass(frozen=True)
class Unstack(Step):
    """The slices of `whole` along its first dimension become `parts`."""

    whole: str
    parts: tuple[str, ...]
    kind = "unstack"

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.whole,)

    @property
    def outputs(self) -> tuple[str, ...]:
        return self.parts

    def inverse(self) -> Stack:
        return Stack(self.whole, self.parts)

    def shapes(self, *shapes: Shape) -> tuple[Shape, ...]:
        (shape,) = shapes
        if not shape or shape[0] != len(self.parts):
            raise self._fail(f"shape {list(shape)} does not hold {len(self.parts)} slices")
        return (shape[1:],) * len(self.parts)

    def apply(self, tensors: dict[str, Array], xp: Any) -> None:
        whole = tensors.pop(self.whole)
        self.shapes(tuple(whole.shape))
        for index, part in enumerate(self.parts):
            tensors[part] = whole[index]


@dataclass(frozen=True)
class PermuteRows(_OneToOne):
    """The rows of `source` along `dim`, seen as a grid of the given `grid` sizes, are read in `order`.

    `grid=(heads, 2, half), order=(0, 2, 1)` turns rotary rows from half-split to alternating.
    """

    grid: tuple[int, ...]
    order: tuple[int, ...]
    dim: int = 0
    kind = "permute"

    def __post_init__(self) -> None:
        if sorted(self.order) != list(range(len(self.grid))):
            raise RuleError(f"{self.source}: {list(self.order)} is not an order of {len(self.grid)} dimensions")

    def inverse(self) -> PermuteRows:
        grid = tuple(self.grid[axis] for axis in self.order)
        order = tuple(self.order.index(axis) for axis in range(len(self.order)))
        return PermuteRows(self.target, self.source, grid, order, self.dim)

    def shapes(self, *shapes: Shape) -> tuple[Shape, ...]:
        (shape,) = shapes
        if len(shape) <= self.dim or shape[self.dim] != prod(self.grid):
            raise self._fail(f"shape {list(shape)} has no dimension {self.dim} of {prod(self.grid)} rows")
        return (shape,)

    def apply(self, tensors: dict[str, Array], xp: Any) -> None:
        source = tensors.pop(self.source)
        shape = tuple(source.shape)
        self.shapes(shape)
        wide = source.reshape((*shape[: self.dim], *self.grid, *shape[self.dim + 1 :]))
        axes = [*range(self.dim), *(self.dim + axis for axis in self.order)]
        axes += range(len(axes), len(wide.shape))
        tensors[self.target] = _permute(wide, tuple(axes)).reshape(shape)


@dataclass(frozen=True)
class KeepRows(_OneToOne):
    """Only the given `rows` of `source` along `dim` remain, in that order; the others are put aside.

    `total` is the number of rows before.
    """

    rows: tuple[int, ...]
    total: int
    dim: int = 0
    kind = "keep_rows"

    def __post_init__(self) -> None:
        if len(set(self.rows)) != len(self.rows) or not all(0 <= row < self.total for row in self.rows):
            raise RuleError(f"{self.source}: rows must be distinct and within 0…{self.total - 1}")

    @property
    def dropped(self) -> tuple[int, ...]:
        """The rows that are put aside, in rising order."""
        remaining = set(self.rows)
        return tuple(row for row in range(self.total) if row not in remaining)

    def inverse(self) -> RestoreRows:
        return RestoreRows(self.target, self.source, self.rows, self.total, self.dim)

    def shapes(self, *shapes: Shape) -> tuple[Shape, ...]:
        (shape,) = shapes
        if len(shape) <= self.dim or shape[self.dim] != self.total:
            raise self._fail(f"shape {list(shape)} has no dimension {self.dim} of {self.total} rows")
        return (_with_rows(shape, self.dim, len(self.rows)),)

    def apply(self, tensors: dict[str, Array], xp: Any) -> None:
        source = tensors.pop(self.source)
        self.shapes(tuple(source.shape))
        before = (slice(None),) * self.dim
        tensors[kept(self.source)] = source[(*before, list(self.dropped))]
        tensors[self.target] = source[(*before, list(self.rows))]


@dataclass(frozen=True)
class RestoreRows(Step):
    """The inverse of `KeepRows`: the rows put aside come back to their places."""

    source: str
    target: str
    rows: tuple[int, ...]
    total: int
    dim: int = 0
    kind = "restore_rows"

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.source, kept(self.target))

    @property
    def outputs(self) -> tuple[str, ...]:
        return (self.target,)

    def inverse(self) -> KeepRows:
        return KeepRows(self.target, self.source, self.rows, self.total, self.dim)

    def shapes(self, *shapes: Shape) -> tuple[Shape, ...]:
        return (_with_rows(shapes[0], self.dim, self.total),)

    def apply(self, tensors: dict[str, Array], xp: Any) -> None:
        remaining = tensors.pop(self.source)
        dropped = _pop_kept(self, tensors, self.target)
        both = xp.concatenate([remaining, dropped], axis=self.dim)
        now_at = {row: place for place, row in enumerate((*self.rows, *self.inverse().dropped))}
        before = (slice(None),) * self.dim
        tensors[self.target] = both[(*before, [now_at[row] for row in range(self.total)])]


@dataclass(frozen=True)
class Cast(_OneToOne):
    """`source` of type `from_dtype` is stored as `dtype`; a narrowing cast puts the original aside."""

    dtype: str
    from_dtype: str
    kind = "cast"

    @property
    def exact(self) -> bool:
        """Whether every value of `from_dtype` is one of `dtype` too."""
        return (self.from_dtype, self.dtype) in _WIDENING or self.from_dtype == self.dtype

    def inverse(self) -> CastBack:
        return CastBack(self.target, self.source, self.dtype, self.from_dtype)

    def shapes(self, *shapes: Shape) -> tuple[Shape, ...]:
        return shapes

    def apply(self, tensors: dict[str, Array], xp: Any) -> None:
        source = tensors.pop(self.source)
        tensors[self.target] = _cast(source, self.dtype, xp)
        if not self.exact:
            tensors[kept(self.source)] = source


@dataclass(frozen=True)
class CastBack(Step):
    """The inverse of `Cast`: values unchanged since the cast return bit for bit, changed ones are widened."""

    source: str
    target: str
    from_dtype: str
    dtype: str
    kind = "cast_back"

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.source,) if self.inverse().exact else (self.source, kept(self.target))

    @property
    def outputs(self) -> tuple[str, ...]:
        return (self.target,)

    def inverse(self) -> Cast:
        return Cast(self.target, self.source, self.from_dtype, self.dtype)

    def shapes(self, *shapes: Shape) -> tuple[Shape, ...]:
        return shapes[:1]

    def apply(self, tensors: dict[str, Array], xp: Any) -> None:
        current = tensors.pop(self.source)
        back = _cast(current, self.dtype, xp)
        if not self.inverse().exact:
            original = _pop_kept(self, tensors, self.target)
            back = xp.where(current == _cast(original, self.from_dtype, xp), original, back)
        tensors[self.target] = back


@dataclass(frozen=True)
class Drop(Step):
    """`source` has no successor; it is put aside."""

    source: str
    kind = "drop"

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.source,)

    @property
    def outputs(self) -> tuple[str, ...]:
        return ()

    def inverse(self) -> Restore:
        return Restore(self.source)

    def shapes(self, *shapes: Shape) -> tuple[Shape, ...]:
        return ()

    def apply(self, tensors: dict[str, Array], xp: Any) -> None:
        tensors[kept(self.source)] = tensors.pop(self.source)


@dataclass(frozen=True)
class Restore(Step):
    """The inverse of `Drop`."""

    target: str
    kind = "restore"

    @property
    def inputs(self) -> tuple[str, ...]:
        return (kept(self.target),)

    @property
    def outputs(self) -> tuple[str, ...]:
        return (self.target,)

    def inverse(self) -> Drop:
        return Drop(self.target)

    def shapes(self, *shapes: Shape) -> tuple[Shape, ...]:
        return shapes

    def apply(self, tensors: dict[str, Array], xp: Any) -> None:
        tensors[self.target] = _pop_kept(self, tensors, self.target)


Rule = tuple[Step, ...]

STEPS: Mapping[str, type[Step]] = {
    step.kind: step
    for step in (
        Rename, Transpose, SplitRows, JoinRows, Stack, Unstack, PermuteRows, KeepRows, RestoreRows, Cast,
        CastBack, Drop, Restore,
    )
}  # fmt: skip

_WIDENING = {
    ("float16", "float32"), ("bfloat16", "float32"),
    ("float16", "float64"), ("bfloat16", "float64"), ("float32", "float64"),
}  # fmt: skip


def run(steps: Iterable[Step], tensors: Mapping[str, Array], xp: Any) -> dict[str, Array]:
    """The tensors after `steps`, given those before; names that no step takes pass through.

    `xp` is the array library, `torch` or `numpy`. Results may be views of the inputs. Raises `RuleError`
    where a tensor is absent, has the wrong shape, or a name would be given twice.
    """
    current = dict(tensors)
    for step in steps:
        check_names(step, current)
        step.apply(current, xp)
    return current


def run_shapes(steps: Iterable[Step], shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """As `run`, on shapes alone; side tensors are left out."""
    current = dict(shapes)
    for step in steps:
        check_names(step, current)
        inputs = [current.pop(name) for name in step.inputs]
        current.update(zip(step.outputs, step.shapes(*inputs), strict=True))
    return current


def invert(steps: Sequence[Step]) -> Rule:
    """The rule that undoes `steps`, bit for bit."""
    return tuple(step.inverse() for step in reversed(steps))


@dataclass(frozen=True)
class Component:
    """A part of a rule that shares no tensor with the rest of it."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    steps: Rule


def components(steps: Iterable[Step]) -> tuple[Component, ...]:
    """The independent parts of a rule, each runnable on its own; side tensors are neither source nor target.

    >>> rule = (Rename("a", "b"), Rename("x", "y"), Rename("b", "c"))
    >>> sorted((part.sources, part.targets) for part in components(rule))
    [(('a',), ('c',)), (('x',), ('y',))]
    """
    part_of: dict[str, list[Step]] = {}
    parts: dict[int, list[Step]] = {}
    for step in steps:
        touched = {id(part_of[name]): part_of[name] for name in step.inputs if name in part_of}
        merged = [*(earlier for part in touched.values() for earlier in part), step]
        for key in touched:
            del parts[key]
        parts[id(merged)] = merged
        names = {name for one in merged for name in (*one.inputs, *one.outputs)}
        part_of |= dict.fromkeys(names, merged)
    return tuple(part for part in map(_component, parts.values()) if part.sources and part.targets)


def _component(steps: Sequence[Step]) -> Component:
    made: dict[str, None] = {}
    sources: dict[str, None] = {}
    for step in steps:
        for name in step.inputs:
            if name not in made and not name.startswith(KEPT):
                sources[name] = None
            made.pop(name, None)
        made |= dict.fromkeys(step.outputs)
    return Component(tuple(sources), tuple(made), tuple(steps))


def with_names(step: Step, rename: Callable[[str], str]) -> Step:
    """The same step on tensors of other names.

    >>> with_names(Rename("a", "b"), lambda name: f"layer.{name}")
    Rename(source='layer.a', target='layer.b')
    """
    changed: dict[str, Any] = {}
    for field in fields(step):
        value = getattr(step, field.name)
        if field.name in {"source", "target", "whole"}:
            changed[field.name] = rename(value)
        elif field.name == "parts":
            changed[field.name] = tuple(map(rename, value))
    return replace(step, **changed)


def to_record(step: Step) -> dict[str, Any]:
    """A step as plain JSON data.

    >>> to_record(Rename("a", "b"))
    {'step': 'rename', 'source': 'a', 'target': 'b'}
    """
    return {"step": step.kind, **asdict(step)}


def from_record(record: Mapping[str, Any]) -> Step:
    """The inverse of `to_record`. Raises `RuleError` for anything that is not such a record."""
    data = dict(record)
    step = STEPS.get(data.pop("step", ""))
    if step is None or set(data) - {field.name for field in fields(step)}:
        raise RuleError(f"not a step: {record!r}; known steps: {', '.join(STEPS)}")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
    try:
        return step(**values)
    except TypeError as error:
        raise RuleError(f"not a step: {record!r} ({error})") from error


def check_names(step: Step, tensors: Mapping[str, Any]) -> None:
    """Raises `RuleError` if `step` takes a tensor that is not in `tensors` or gives one that is."""
    missing = [name for name in step.inputs if name not in tensors]
    if missing:
        raise RuleError(f"{step.kind}: no tensor named {', '.join(missing)}")
    taken = [name for name in step.outputs if name in tensors and name not in step.inputs]
    if taken:
        raise RuleError(f"{step.kind} {', '.join(step.inputs)}: {', '.join(taken)} exists already")


def _pop_kept(step: Step, tensors: dict[str, Array], name: str) -> Array:
    if kept(name) not in tensors:
        raise RuleError(f"{step.kind} {name}: what was put aside is not available; the original was not kept")
    return tensors.pop(kept(name))


def _with_rows(shape: Shape, dim: int, rows: int) -> Shape:
    return (*shape[:dim], rows, *shape[dim + 1 :])


def _grouped(shape: Shape, dim: int, groups: int) -> Shape:
    return (*shape[:dim], groups, shape[dim] // groups, *shape[dim + 1 :])


def _permute(array: Array, axes: tuple[int, ...]) -> Array:
    return array.permute(axes) if hasattr(array, "permute") else array.transpose(axes)


def _cast(array: Array, dtype: str, xp: Any) -> Array:
    target = getattr(xp, dtype)
    return array.to(target) if hasattr(array, "to") else array.astype(target)
