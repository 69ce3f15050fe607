"""The modules of a model with what each of them takes, layers that are alike drawn together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from rewire.inspection.tree import class_name


@dataclass(frozen=True)
class Part:
    """A module with all that it holds, or several siblings with all-digit names that are alike.

    Attributes:
        names: names in the parent, one for each of the siblings; empty for the model itself.
        module: class.
        parameters: elements of the parameters of one of them; a parameter that several modules share belongs to the
            first of them.
        trainable: those that are trained.
        bytes: of the parameters and buffers of one of them.
        flops: floating-point operations of a forward in one of them; None where that is not known.
        activations: bytes that one of them keeps until backward; None where that is not known.
        children: what it holds.
    """

    names: tuple[str, ...]
    module: str
    parameters: int
    trainable: int
    bytes: int
    flops: int | None
    activations: int | None
    children: tuple[Part, ...] = ()

    @property
    def count(self) -> int:
        """How many siblings these are."""
        return max(len(self.names), 1)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data."""
        own = {name: value for name, value in vars(self).items() if name != "children"}
        return {**own, "names": list(self.names), "children": [child.to_dict() for child in self.children]}


Figures = Mapping[str, int]
"""Bytes or operations by the path of the module that they belong to, without what is inside other modules."""


def tree(model: nn.Module, flops: Figures | None = None, activations: Figures | None = None) -> Part:
    """The modules of `model`.

    >>> found = tree(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1)))
    >>> found.parameters, [(part.names, part.parameters) for part in found.children]
    (45, [(('0', '1'), 20), (('2',), 5)])
    """
    return _Trees(flops, activations).part("", "", model)


class _Trees:
    """What was counted already is not counted again."""

    def __init__(self, flops: Figures | None, activations: Figures | None) -> None:
        self.flops, self.activations = flops, activations
        self.tensors: set[int] = set()
        self.modules: set[int] = set()

    def part(self, path: str, name: str, module: nn.Module) -> Part:
        """A module by itself."""
        own = list(self._new(module.parameters(recurse=False)))
        buffers = list(self._new(module.buffers(recurse=False)))
        children = [
            self.part(f"{path}.{inner}" if path else inner, inner, child)
            for inner, child in module.named_children()
            if self._is_new(child)
        ]
        return Part(
            names=(name,) if name else (),
            module=class_name(module),
            parameters=sum(one.numel() for one in own) + _total(children, lambda part: part.parameters),
            trainable=sum(one.numel() for one in own if one.requires_grad)
            + _total(children, lambda part: part.trainable),
            bytes=sum(one.numel() * one.itemsize for one in (*own, *buffers))
            + _total(children, lambda part: part.bytes),
            flops=_with(self.flops, path, [child.flops for child in children]),
            activations=_with(self.activations, path, [child.activations for child in children]),
            children=_together(children),
        )

    def _new(self, tensors: Iterator[Any]) -> Iterator[Tensor]:
        for tensor in tensors:
            if id(tensor) not in self.tensors and not isinstance(tensor, nn.UninitializedParameter):
                self.tensors.add(id(tensor))
                yield tensor

    def _is_new(self, module: nn.Module) -> bool:
        known = id(module) in self.modules
        self.modules.add(id(module))
        return not known


def _total(parts: list[Part], figure: Callable[[Part], int]) -> int:
    return sum(map(figure, parts))


def _with(own: Figures | None, path: str, inside: list[int | None]) -> int | None:
    return None if own is None else own.get(path, 0) + sum(one or 0 for one in inside)


def _together(children: list[Part]) -> tuple[Part, ...]:
    """Children with all-digit names that are built alike become one part, where the first of them stands."""
    groups: dict[Part, list[Part]] = {}
    for child in children:
        is_number = bool(child.names) and child.names[0].isdigit()
        groups.setdefault(_built(child) if is_number else child, []).append(child)
    return tuple(_mean(alike) for alike in groups.values())


def _built(part: Part) -> Part:
    """A part without its name and without what a run has found."""
    return replace(part, names=(), flops=None, activations=None, children=tuple(map(_inside, part.children)))


def _inside(part: Part) -> Part:
    return replace(_built(part), names=part.names)


def _mean(alike: Sequence[Part]) -> Part:
    """One part for several that are built alike; what a run has found (which may differ by a few bytes) is averaged."""
    first = alike[0]
    if len(alike) == 1:
        return first
    children = zip(*(part.children for part in alike), strict=True)
    return replace(
        first,
        names=tuple(name for part in alike for name in part.names),
        flops=_average([part.flops for part in alike]),
        activations=_average([part.activations for part in alike]),
        children=tuple(replace(_mean(inner), names=inner[0].names) for inner in children),
    )


def _average(figures: Sequence[int | None]) -> int | None:
    known = [figure for figure in figures if figure is not None]
    return round(sum(known) / len(known)) if known else None
