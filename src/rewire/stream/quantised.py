"""Scales, zero points and packed integers move with their weights, or the edit is refused; never are they left.

A rule names weights. Where a weight has companions (`companions` lists them), the steps are followed on these too:
rows of a scale go where the rows of the weight go, one scale for all rows serves all parts, and no block, group or
byte is ever cut.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from rewire.errors import RefusedError
from rewire.stream.companions import WEIGHT, Axes, Companion, Infos, Kind, Weight, find_weights
from rewire.tensor_rules import (
    Drop,
    JoinRows,
    KeepRows,
    PermuteRows,
    Rename,
    Rule,
    Shape,
    SplitRows,
    Stack,
    Step,
    Transpose,
    Unstack,
)

Read = Callable[[str], bytes]
"""Gives the bytes of a tensor of the source."""


@dataclass(frozen=True)
class Carried:
    """A rule that takes companions along.

    Attributes:
        rule: the steps.
        copies: tensors that the rule gives once and the result holds again: name of the copy, name of the tensor.
    """

    rule: Rule = field(repr=False)
    copies: Mapping[str, str] = field(default_factory=dict)


def carry(rule: Rule, infos: Infos, config: Mapping[str, Any] | None, read: Read) -> Carried:
    """`rule` with the steps that its quantised weights need.

    Raises:
        RefusedError: a companion cannot go with its weight; or a bias, or a name in the configuration, would be left
            behind.
    """
    touched = {name for step in rule for name in step.inputs}
    _check_biases(rule, infos, touched)
    settings = (config or {}).get("quantization_config")
    settings = settings if isinstance(settings, dict) else {}
    _check_lists(rule, infos, settings)
    block = settings.get("weight_block_size")
    sound = isinstance(block, list) and all(type(number) is int and number > 0 for number in block)
    weights = find_weights(touched, infos, block if sound and isinstance(block, list) else ())
    return _Carrier(weights, infos, read).run(rule) if weights else Carried(rule)


class _Carrier:
    """Follows the companions of weights through a rule, under names of its own until all is done."""

    def __init__(self, weights: Mapping[str, Weight], infos: Infos, read: Read) -> None:
        self.weights: dict[str, Weight] = {}
        self.steps: list[Step] = []
        self.source: dict[str, str] = {}  # own names of tensors that are still as they were
        self.infos, self.read = infos, read
        self.made = 0
        self.uses: Counter[str] = Counter()  # weights that a tensor serves
        self.follow: dict[type[Step], Callable[[Any], None]] = {
            Rename: self._rename, Drop: self._drop, SplitRows: self._split, JoinRows: self._join, Stack: self._stack,
            Unstack: self._unstack, PermuteRows: self._rows, KeepRows: self._rows, Transpose: self._transpose,
        }  # fmt: skip
        own: dict[str, str] = {}
        for name, weight in weights.items():
            taken = {kind: self._take(one, own) for kind, one in weight.companions.items()}
            self.weights[name] = replace(weight, companions=taken)

    def _take(self, companion: Companion, own: dict[str, str]) -> Companion:
        if companion.tensor not in own:
            own[companion.tensor] = self._new(companion.shape).tensor
            self.source[own[companion.tensor]] = companion.tensor
            self.steps.append(Rename(companion.tensor, own[companion.tensor]))
        self.uses[own[companion.tensor]] += 1
        return replace(companion, tensor=own[companion.tensor])

    def _new(self, shape: Shape, axes: Axes | None = None) -> Companion:
        self.made += 1
        found = Companion(f"companion:{self.made}", shape, axes)
        self.uses[found.tensor] = 0 if axes is None else 1
        return found

    def run(self, rule: Rule) -> Carried:
        for step in rule:
            weights = [self.weights[name] for name in step.inputs if name in self.weights]
            if not all(weight.packed for weight in weights) or not weights:
                self.steps.append(step)
            if weights:
                self._check(step, weights)
                self.follow[type(step)](step)
        return self._named()

    def _check(self, step: Step, weights: Sequence[Weight]) -> None:
        if type(step) not in self.follow:
            raise _refused(step, "its values are quantised, and this step changes values")
        if len(weights) < len(step.inputs) or len({(w.packed, frozenset(w.companions)) for w in weights}) > 1:
            raise _refused(step, "some of these tensors are quantised and others are not, or not in the same way")
        if isinstance(step, Rename | Drop):
            return
        for name, weight in zip(step.inputs, weights, strict=True):
            for kind, one in weight.companions.items():
                if one.axes is None:
                    raise _refused(step, f"{kind.of(name)} speaks of the tensor as a whole; dequantise the model first")

    def _named(self) -> Carried:
        """Own names become those that go with the names of the weights."""
        copies: dict[str, str] = {}
        first: dict[str, str] = {}
        for name, weight in self.weights.items():
            for kind, companion in weight.companions.items():
                if companion.tensor in first:
                    copies[kind.of(name)] = first[companion.tensor]
                else:
                    first[companion.tensor] = kind.of(name)
        self.steps += [Rename(own, name) for own, name in first.items()]
        left = {name for step in self.steps for name in step.outputs if name.startswith("companion:")}
        left -= {name for step in self.steps for name in step.inputs}
        return Carried((*self.steps, *map(Drop, sorted(left))), copies)

    # ------------------------------------------------------------ one method for each kind of step

    def _rename(self, step: Rename) -> None:
        self.weights[step.target] = self.weights.pop(step.source)

    def _drop(self, step: Drop) -> None:
        weight = self.weights.pop(step.source)
        self.uses.subtract(companion.tensor for companion in weight.companions.values())

    def _split(self, step: SplitRows) -> None:
        weight = self.weights.pop(step.whole)
        self._check_shape(step, weight)
        parts: list[dict[Kind, Companion]] = [{} for _ in step.parts]
        for kind, one in weight.companions.items():
            for part, own in zip(parts, self._split_companion(step, kind, one), strict=True):
                part[kind] = own
        for name, size, companions in zip(step.parts, step.sizes, parts, strict=True):
            self.weights[name] = Weight(_resized(weight.shape, step.dim, size), companions, weight.packed)

    def _split_companion(self, step: SplitRows, kind: Kind, one: Companion) -> list[Companion]:
        along = _along(one, step.dim)
        if along is None:
            self.uses[one.tensor] += len(step.parts) - 1
            return [one] * len(step.parts)
        dim, sizes = along[0], _coarse(step, kind, along[1])
        self._check_alone(step, one)
        found = [self._new(_with(one.shape, dim, size), one.axes) for size in sizes]
        self.steps.append(SplitRows(one.tensor, tuple(own.tensor for own in found), sizes, step.groups, dim))
        return found

    def _join(self, step: JoinRows) -> None:
        weights = [self.weights.pop(name) for name in step.parts]
        for weight, size in zip(weights, step.sizes, strict=True):
            self._check_shape(step, weight, size)
        companions = {}
        for kind in weights[0].companions:
            ones = [weight.companions[kind] for weight in weights]
            companions[kind] = self._join_companions(step, kind, ones)
        shape = _resized(weights[0].shape, step.dim, sum(step.sizes))
        self.weights[step.whole] = Weight(shape, companions, weights[0].packed)

    def _join_companions(self, step: JoinRows, kind: Kind, ones: Sequence[Companion]) -> Companion:
        first = ones[0]
        if len({one.axes for one in ones}) > 1:
            raise _refused(step, f"the {kind.tail.strip('_.')} of its parts have different shapes")
        along = _along(first, step.dim)
        if along is None:
            return self._same(step, kind, ones)
        dim, sizes = along[0], _coarse(step, kind, along[1])
        for one in ones:
            self._check_alone(step, one)
        joined = self._new(_with(first.shape, dim, sum(sizes)), first.axes)
        self.steps.append(JoinRows(joined.tensor, tuple(one.tensor for one in ones), sizes, step.groups, dim))
        return joined

    def _same(self, step: Step, kind: Kind, ones: Sequence[Companion]) -> Companion:
        """One of several that must hold the same."""
        if len({one.tensor for one in ones}) > 1:
            values = {self._value(one) for one in ones}
            if len(values) > 1 or None in values:
                raise _refused(step, f"its parts have different {kind.tail.strip('_.')}, and a joined tensor has one")
        self.uses.subtract(one.tensor for one in ones[1:])
        return ones[0]

    def _value(self, one: Companion) -> tuple[Any, ...] | None:
        name = self.source.get(one.tensor)
        return None if name is None else (*self.infos[name], self.read(name))

    def _stack(self, step: Stack) -> None:
        weights = [self.weights.pop(name) for name in step.parts]
        companions = {}
        for kind, first in weights[0].companions.items():
            ones = [weight.companions[kind] for weight in weights]
            for one in ones:
                self._check_alone(step, one)
            if len({(one.shape, one.axes) for one in ones}) > 1 or len({one.tensor for one in ones}) < len(ones):
                raise _refused(step, f"the {kind.tail.strip('_.')} of its parts cannot be stacked as they are")
            assert first.axes is not None
            axes = ((0, 1), *(axis and (axis[0] + 1, axis[1]) for axis in first.axes))
            companions[kind] = self._new((len(ones), *first.shape), axes)
            self.steps.append(Stack(companions[kind].tensor, tuple(one.tensor for one in ones)))
        shape = weights[0].shape
        self.weights[step.whole] = Weight(shape and (len(weights), *shape), companions, weights[0].packed)

    def _unstack(self, step: Unstack) -> None:
        weight = self.weights.pop(step.whole)
        parts: list[dict[Kind, Companion]] = [{} for _ in step.parts]
        for kind, one in weight.companions.items():
            axes = one.axes or ()
            if not axes or axes[0] != (0, 1) or one.shape[0] != len(parts):
                raise _refused(step, f"there is no {kind.tail.strip('_.')} for each of its slices")
            self._check_alone(step, one)
            inner = tuple(axis and (axis[0] - 1, axis[1]) for axis in axes[1:])
            found = [self._new(one.shape[1:], inner) for _ in parts]
            self.steps.append(Unstack(one.tensor, tuple(own.tensor for own in found)))
            for part, own in zip(parts, found, strict=True):
                part[kind] = own
        for name, companions in zip(step.parts, parts, strict=True):
            self.weights[name] = Weight(weight.shape and weight.shape[1:], companions, weight.packed)

    def _rows(self, step: PermuteRows | KeepRows) -> None:
        weight = self.weights.pop(step.source)
        companions = dict(weight.companions)
        for kind, one in companions.items():
            along = _along(one, step.dim)
            if along is not None:
                if along[1] != 1:
                    raise _refused(step, f"it would cut the blocks of {along[1]} that {kind.of(step.source)} goes by")
                self._check_alone(step, one)
                own = companions[kind] = self._new(one.shape, one.axes)
                self.steps.append(replace(step, source=one.tensor, target=own.tensor, dim=along[0]))
        shape = _resized(weight.shape, step.dim, len(step.rows)) if isinstance(step, KeepRows) else weight.shape
        self.weights[step.target] = Weight(shape, companions, weight.packed)

    def _transpose(self, step: Transpose) -> None:
        weight = self.weights.pop(step.source)
        companions = dict(weight.companions)
        for kind, one in companions.items():
            assert one.axes is not None
            if len(one.axes) < 2:
                raise _refused(step, "it has fewer than two dimensions")
            axes = (*one.axes[:-2], one.axes[-1], one.axes[-2])
            if weight.packed or prod(one.shape) == 1:
                companions[kind] = replace(one, axes=axes)  # what is packed stays as it is
                continue
            if len(one.shape) != len(axes):
                raise _refused(step, f"{kind.of(step.source)} has one value for each row, and rows become columns")
            self._check_alone(step, one)
            last = len(axes) - 1
            turned = tuple(axis and ({last: last - 1, last - 1: last}.get(axis[0], axis[0]), axis[1]) for axis in axes)
            own = companions[kind] = self._new((*one.shape[:-2], one.shape[-1], one.shape[-2]), turned)
            self.steps.append(Transpose(one.tensor, own.tensor))
        shape = weight.shape and (*weight.shape[:-2], weight.shape[-1], weight.shape[-2])
        self.weights[step.target] = Weight(shape, companions, weight.packed)

    def _check_alone(self, step: Step, one: Companion) -> None:
        """A tensor that serves several weights cannot be cut for one of them."""
        if self.uses[one.tensor] > 1:
            raise _refused(step, "it shares a scale with a tensor that is not part of this step")

    def _check_shape(self, step: SplitRows | JoinRows, weight: Weight, rows: int | None = None) -> None:
        """The rule does not see the shape of a packed weight, so it is compared here."""
        rows = sum(step.sizes) if rows is None else rows
        if weight.packed and (weight.shape is None or len(weight.shape) <= step.dim or weight.shape[step.dim] != rows):
            found = "unknown" if weight.shape is None else list(weight.shape)
            raise _refused(step, f"the shape of the packed weight is {found}, without a dimension {step.dim} of {rows}")


def _along(one: Companion, dim: int) -> tuple[int, int] | None:
    assert one.axes is not None
    return one.axes[dim] if dim < len(one.axes) else None


def _coarse(step: SplitRows | JoinRows, kind: Kind, rows: int) -> tuple[int, ...]:
    """The sizes in rows of the companion, each of which stands for `rows` of the weight."""
    cut = [size for size in step.group_sizes if size % rows]
    ragged = step.groups == 1 and all(size % rows == 0 for size in step.sizes[:-1])
    if cut and not ragged:
        raise _refused(
            step, f"parts of {cut[0]} rows would cut the groups of {rows} that {kind.tail.strip('_.')} go by"
        )
    return tuple(-(-size // rows) for size in step.sizes)


def _with(shape: Shape, dim: int, size: int) -> Shape:
    return (*shape[:dim], size, *shape[dim + 1 :])


def _resized(shape: Shape | None, dim: int, size: int) -> Shape | None:
    return None if shape is None else _with(shape, dim, size)


def _refused(step: Step, reason: str) -> RefusedError:
    return RefusedError(f"{step.kind} {', '.join(step.inputs)}: {reason}. Nothing was written")


# ---------------------------------------------------------------- what else may be left behind


def _check_biases(rule: Rule, infos: Infos, touched: set[str]) -> None:
    """A bias whose weight goes elsewhere is no longer anybody's."""
    there = set(infos)
    for step in rule:
        there -= set(step.inputs)
        there |= set(step.outputs)
    within = {step.source for step in rule if isinstance(step, Rename) and step.target.startswith(_module(step.source))}
    for name in touched - there - within:
        bias = f"{_module(name)}bias"
        if name.endswith(WEIGHT) and bias in infos and bias not in touched:
            raise RefusedError(f"{name} goes elsewhere and {bias} would stay; add the steps for the bias to the plan")


def _module(name: str) -> str:
    return name.rpartition(".")[0] + "."


_LISTS = (
    "modules_to_not_convert", "ignore", "ignored_layers", "llm_int8_skip_modules", "exclude_modules",
    "modules_in_block_to_quantize",
)  # fmt: skip


def _check_lists(rule: Rule, infos: Infos, settings: Mapping[str, Any]) -> None:
    """Names of modules in the configuration of a quantiser that would be those of no module any more."""
    listed = {entry for key in _LISTS for entry in _entries(settings.get(key))}
    if not listed:
        return
    there = set(infos)
    for step in rule:
        there -= set(step.inputs)
        there |= set(step.outputs)
    gone = {_module(name)[:-1] for name in set(infos) - there} - {_module(name)[:-1] for name in there}
    for module in sorted(gone):
        if hit := next((entry for entry in listed if module == entry or module.endswith(f".{entry}")), None):
            raise RefusedError(
                f"quantization_config names {hit!r}, and {module} is called otherwise afterwards; set the lists that "
                "are right then in the plan's `resolved: config: quantization_config`"
            )


def _entries(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Iterable):
        for one in value:
            yield from _entries(one)
