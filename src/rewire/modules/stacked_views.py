"""Linear layers of experts whose parameters are views of the stacked tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import repeat
from operator import contains, getitem, is_
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Place:
    """Where in a stacked tensor a parameter of the experts lies.

    Attributes:
        number: the expert; empty for the experts module's own parameters.
        part: the linear layer in it; empty too.
        leaf: the parameter of that.
        whole: name of the stacked tensor.
        size, stride, offset: the view, counted from the first element of the stacked tensor.
    """

    number: str
    part: str
    leaf: str
    whole: str
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @staticmethod
    def find(name: str, view: Tensor, wholes: Mapping[str, Tensor]) -> Place:
        """The place of `view` in the one of `wholes` that holds its memory. Raises `ValueError` if none does."""
        *path, leaf = name.split(".")
        number, part = path or ("", "")
        for key, whole in wholes.items():
            distance = view.data_ptr() - whole.data_ptr()
            if 0 <= distance < max(whole.nbytes, 1):
                offset = distance // whole.element_size()
                return Place(number, part, leaf, key, tuple(view.shape), view.stride(), offset)
        raise ValueError(f"{name} is not a view of a stacked tensor")

    def of(self, whole: Tensor) -> Tensor:
        """The view of `whole`."""
        return whole.as_strided(self.size, self.stride, whole.storage_offset() + self.offset)

    def layer(self, experts: nn.Module) -> Any:
        """The module in `experts` whose parameter this is."""
        return experts._modules[self.number]._modules[self.part] if self.part else experts  # type: ignore[union-attr]


class _AsMade:
    """What the layers were when their parameters became views; `holds` says whether they still are.

    That is asked at every call, of thousands of layers, so what is looked at is gathered beforehand, and no loop runs
    in Python.
    """

    def __init__(self, experts: nn.Module, places: Sequence[Place]) -> None:
        layers = {(place.number, place.part): place.layer(experts) for place in places if place.part}
        owners = [place.layer(experts) for place in places]
        self.leaves = [place.leaf for place in places]
        self.tensors = [owner._parameters for owner in owners]
        self.views = [owner._parameters[leaf] for owner, leaf in zip(owners, self.leaves, strict=True)]
        self.pointers = [view.data_ptr() for view in self.views]
        self.numbers = list(dict.fromkeys(number for number, _ in layers))
        self.experts = [experts._modules[number] for number in self.numbers]
        self.parts = [part for _, part in layers]
        self.homes = [experts._modules[number]._modules for number, _ in layers]  # type: ignore[union-attr]
        self.layers = list(layers.values())
        self.attributes = [vars(layer) for layer in self.layers]
        self.hooks = [hooks for one in self.layers for hooks in (one._forward_hooks, one._forward_pre_hooks)]

    def holds(self, experts: nn.Module) -> bool:
        """Whether every layer stands in its place, is plain, and has for parameters the views that it was given."""
        try:
            return (
                all(map(is_, map(getitem, repeat(experts._modules), self.numbers), self.experts))
                and all(map(is_, map(getitem, self.homes, self.parts), self.layers))
                and all(map(is_, map(getitem, self.tensors, self.leaves), self.views))
                and not any(self.hooks)
                and not any(map(contains, self.attributes, repeat("forward")))
                and set(map(type, self.layers)) <= {nn.Linear}
                and list(map(Tensor.data_ptr, self.views)) == self.pointers
            )
        except KeyError:  # something was taken away
            return False


@dataclass(frozen=True)
class StackedViews:
    """The stacked parameters, and the views of them that the layers of an experts module have for parameters.

    Attributes:
        wholes: the stacked parameters by name.
        places: where the views lie.
        made: the layers as they were made; None while nothing is a view.
    """

    wholes: Mapping[str, nn.Parameter]
    places: tuple[Place, ...]
    made: _AsMade | None = None

    def put_in(self, experts: nn.Module) -> StackedViews:
        """Puts views in the place of the layers' own parameters, gradients too."""
        for place in self.places:
            layer, whole = place.layer(experts), self.wholes[place.whole]
            view = nn.Parameter(place.of(whole.detach()), requires_grad=layer._parameters[place.leaf].requires_grad)
            if whole.grad is not None and whole.grad.stride() == whole.stride():
                view.grad = place.of(whole.grad)
            layer._parameters[place.leaf] = view
        for whole in self.wholes.values():
            whole.grad = None
        return self._as_they_are(experts)

    def take_out(self, experts: nn.Module) -> None:
        """Leaves the layers with parameters on meta."""
        for place in self.places:
            layer = place.layer(experts)
            layer._parameters[place.leaf] = on_meta(place.size, layer._parameters[place.leaf])

    def _as_they_are(self, experts: nn.Module) -> StackedViews:
        return replace(self, made=_AsMade(experts, self.places))

    def untouched(self, experts: nn.Module) -> bool:
        """Whether every layer is plain, and its parameters the views that were put there."""
        return self.made is not None and self.made.holds(experts)

    @property
    def views(self) -> list[nn.Parameter]:
        """The parameters that are views, in the order of `places`."""
        return self.made.views if self.made is not None else []

    @property
    def has_gradients(self) -> bool:
        """Whether a layer has collected gradients, which the stacked parameters know nothing of."""
        return any(view.grad is not None for view in self.views)

    def moved(self, experts: nn.Module, wholes: Mapping[str, Tensor]) -> StackedViews:
        """Has `wholes` for data in place of the tensors now, the parameters staying the same objects."""
        for name, whole in self.wholes.items():
            whole.data = wholes[name]
        for place, view in zip(self.places, self.views, strict=True):
            gradient, view.grad = view.grad, None
            view.data = place.of(self.wholes[place.whole].detach())
            if gradient is not None:
                view.grad = gradient.to(view.device, view.dtype)
        return self._as_they_are(experts)

    @contextmanager
    def hidden(self, experts: nn.Module) -> Iterator[None]:
        """Meanwhile the layers have no parameters."""
        views = self.views
        for place in self.places:
            place.layer(experts)._parameters[place.leaf] = None
        try:
            yield
        finally:
            for place, view in zip(self.places, views, strict=True):
                place.layer(experts)._parameters[place.leaf] = view

    def can_move(self, wholes: Mapping[str, Tensor]) -> bool:
        """Whether `wholes` can be the data of the parameters, all views lying where they lie now."""
        return all(
            torch._has_compatible_shallow_copy_type(whole, wholes[name]) and wholes[name].stride() == whole.stride()
            for name, whole in self.wholes.items()
        )


def on_meta(shape: tuple[int, ...] | torch.Size, like: Tensor) -> nn.Parameter:
    """A parameter without values, of the type and flag of `like`."""
    return nn.Parameter(torch.empty(shape, dtype=like.dtype, device="meta"), requires_grad=like.requires_grad)
