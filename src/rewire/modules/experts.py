"""Stacked experts that have become one module per expert, each with linear layers of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rewire.modules.rows import together
from rewire.modules.stacked_tensor import Call, StackedWeight, stand_ins
from rewire.modules.stacked_views import Place, StackedViews, on_meta

#: What a configuration calls the implementation that runs a class's own forward, expert by expert.
EAGER = {"_experts_implementation": "eager"}

#: Ends the name of the parameter that keeps the slices which no expert reads.
SURPLUS = "_surplus"

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


class Expert(nn.Module):
    """The linear layers of one expert. It is called by nobody: the experts' forward says what comes between."""


@dataclass(frozen=True)
class Origin:
    """What it takes to make a module again: its class, plain attributes, and the order of what it holds.

    Attributes:
        kind: its class.
        attributes: everything in its `__dict__` that not every module has.
        tensors: its parameters by name, in order: the shape of one that is stacked, None for the others.
        children: names of its children, in order.
    """

    kind: type[nn.Module]
    attributes: Mapping[str, Any]
    tensors: Mapping[str, tuple[int, ...] | None]
    children: tuple[str, ...]

    @staticmethod
    def of(module: nn.Module, stacked: Sequence[str]) -> Origin:
        """The origin of `module`, whose parameters `stacked` are given up."""
        attributes = {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}
        tensors = {
            name: tuple(parameter.shape) if parameter is not None and name in stacked else None
            for name, parameter in module._parameters.items()
        }
        return Origin(type(module), attributes, tensors, tuple(module._modules))


class Remains(nn.Module):
    """What is left of a module whose stacked tensors have become linear layers: everything else.

    The other tensors and the children keep their names, and attributes are those of the original.
    """

    origin: Origin

    def __init__(self, original: nn.Module, stacked: Mapping[str, Any]) -> None:
        """`stacked`: names of the tensors given up; a child that gives some up has a mapping of its own."""
        super().__init__()
        self.__dict__["origin"] = Origin.of(original, [name for name, inner in stacked.items() if inner is None])
        self._parameters.update({n: p for n, p in original._parameters.items() if n not in stacked})
        self._buffers.update(original._buffers)
        self._non_persistent_buffers_set |= original._non_persistent_buffers_set
        for name, child in original._modules.items():
            inner = stacked.get(name)
            self._modules[name] = Remains(child, inner) if child is not None and inner else child
        self.training = original.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            origin = self.__dict__.get("origin")
            if origin is None or name not in origin.attributes:
                raise
            return origin.attributes[name]

    def as_original(self, stacked: Mapping[str, Any], overlay: Mapping[str, Any]) -> nn.Module:
        """An instance of the original class that finds `stacked` (nested for children) in its stacked tensors' place.

        It shares everything else with this module, and lives for one call. `overlay` is what its
        configuration says besides.
        """
        shadow = self.origin.kind.__new__(self.origin.kind)
        shadow.__dict__.update(vars(self))  # hooks, tensors, children, mode
        shadow.__dict__.update(self.origin.attributes)
        if overlay and "config" in shadow.__dict__:
            shadow.__dict__["config"] = _Overlaid(shadow.__dict__["config"], overlay)
        for name, value in stacked.items():
            child = self._modules.get(name)
            shadow.__dict__[name] = child.as_original(value, overlay) if isinstance(child, Remains) else value
        return shadow

    def rebuilt(self, like: Mapping[str, Any]) -> nn.Module:
        """The original module, its stacked tensors on meta; `like` has a tensor for each, for type and flag."""
        module = self.origin.kind.__new__(self.origin.kind)
        nn.Module.__init__(module)
        module.__dict__.update(self.origin.attributes)
        for name, shape in self.origin.tensors.items():
            given = self._parameters.get(name) if shape is None else None
            module._parameters[name] = given if shape is None else on_meta(shape, like[name])
        module._buffers.update(self._buffers)
        module._non_persistent_buffers_set |= self._non_persistent_buffers_set
        for name in self.origin.children:
            child = self._modules[name]
            module._modules[name] = child.rebuilt(like[name]) if isinstance(child, Remains) else child
        module.training = self.training
        return module


class UnstackedExperts(Remains):
    """Stands where a module with stacked experts stood; its children `0`, `1`, … are the experts.

    Each holds linear layers of the names that `weights` gives. The forward is that of the original class, which
    runs the experts one by one; where it reads a slice of a stacked tensor it meets the expert's layers.

    Args:
        original: the module with stacked tensors.
        weights: what each of them holds.
        count: number of experts.

    >>> class Stacked(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.up_proj = nn.Parameter(torch.randn(2, 6, 4))
    ...
    ...     def forward(self, x):
    ...         return torch.stack([nn.functional.linear(x, self.up_proj[expert]) for expert in range(2)])
    >>> experts = UnstackedExperts(Stacked(), [StackedWeight("up_proj", ("up_proj",), (6,), 4)], 2)
    >>> experts.get_submodule("1.up_proj")
    Linear(in_features=4, out_features=6, bias=False)
    """

    weights: tuple[StackedWeight, ...]
    count: int
    views: StackedViews | None

    def __init__(self, original: nn.Module, weights: Sequence[StackedWeight], count: int) -> None:
        super().__init__(original, nested({name: None for weight in weights for name in weight.tensors}))
        self.__dict__.update(weights=tuple(weights), count=count, views=None)
        self._register_state_dict_hook(_in_one_piece)  # type: ignore[no-untyped-call]
        first = _expert(original, weights).train(original.training)
        for number in range(count):
            self._modules[str(number)] = _twin(first) if number else first
        for weight in (weight for weight in weights if weight.surplus):
            like = original.get_parameter(weight.name)
            self._parameters[weight.name + SURPLUS] = on_meta((weight.surplus, *like.shape[1:]), like)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the original class computes."""
        if self.views is not None and self.reads_whole:
            shadow = self.as_original(nested(self.views.wholes), {})
            return type(shadow).forward(shadow, *args, **kwargs)
        return self._one_by_one(args, kwargs)

    # Which expert runs depends on the tokens: there is nothing to trace.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _one_by_one(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = Call([expert._modules for expert in self.experts])
        shadow = self.as_original(nested(stand_ins(call, self.weights)), EAGER)
        output = type(shadow).forward(shadow, *args, **kwargs)
        call.close()
        return output

    @property
    def experts(self) -> list[nn.Module]:
        """The experts, in order."""
        return [self._modules[str(number)] for number in range(self.count)]  # type: ignore[misc]

    def __getattr__(self, name: str) -> Any:
        if any(name in weight.tensors for weight in self.__dict__.get("weights", ())):
            return self.stacked(name)
        return super().__getattr__(name)

    def stacked(self, name: str) -> Tensor:
        """The stacked tensor called `name`, put together anew at every access unless the layers are views of it.

        It says of itself what all its parts say: loaders mark tensors that hold values already.
        """
        if self.views is not None and name in self.views.wholes:
            return self.views.wholes[name]
        weight = next(weight for weight in self.weights if name in weight.tensors)
        leaf = "weight" if name == weight.name else "bias"
        rows: list[list[Tensor]] = [
            [getattr(expert.get_submodule(part), leaf) for expert in self.experts] for part in weight.parts
        ]
        whole = together([torch.stack(slices) for slices in rows], weight.groups, dim=1)
        if leaf == "weight":
            whole = whole.mT if weight.transposed else whole
            whole = torch.cat([whole, self._parameters[name + SURPLUS]]) if weight.surplus else whole  # type: ignore[list-item]
            whole = whole.flatten(0, 1) if weight.folded else whole
        marks = [vars(tensor) for slices in rows for tensor in slices]
        whole.__dict__.update({k: v for k, v in marks[0].items() if all(mark.get(k) is v for mark in marks)})
        return whole

    @property
    def reads_whole(self) -> bool:
        """Whether a call now would run on the stacked tensors, in whatever way the configuration asks for.

        That takes layers that are views of these, and nobody who could tell: no adapter, no hook, no gradients.
        """
        return self.views is not None and not torch.is_grad_enabled() and self.views.untouched(self)

    def share(self, wholes: Mapping[str, nn.Parameter], views: Mapping[str, Tensor]) -> None:
        """Makes the linear layers views of the stacked parameters `wholes`, which nobody else should hold.

        `views` are the very views, by the names that the layers' parameters have below this module.
        """
        places = tuple(Place.find(name, view, wholes) for name, view in views.items())
        self.__dict__["views"] = StackedViews(wholes, places).put_in(self)

    def unshare(self) -> Mapping[str, nn.Parameter] | None:
        """The stacked parameters, if all that the layers know is in them; the layers are left on meta then."""
        views = self._intact()
        if views is None or views.has_gradients:
            return None
        views.take_out(self)
        self.__dict__["views"] = None
        return views.wholes

    def restacked(self) -> nn.Module:
        """The original module again, its stacked tensors on meta."""
        first: Any = self.experts[0]._modules
        like: dict[str, Any] = {}
        for weight in self.weights:
            layer = first[weight.parts[0]]
            like |= {weight.name: layer.weight} | ({weight.bias: layer.bias} if weight.bias else {})
        return self.rebuilt(nested(like))

    def _intact(self) -> StackedViews | None:
        """The views, unless something has changed them; then they are only parameters from now on."""
        if self.views is not None and not self.views.untouched(self):
            self.__dict__["views"] = None
        return self.views

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> UnstackedExperts:
        """What `.to()` and the like are made of: the stacked tensors change, and the views with them."""
        views = self._intact()
        with torch.no_grad():
            fresh = {name: fn(whole) for name, whole in views.wholes.items()} if views is not None else {}
        if views is None or not views.can_move(fresh):
            self.__dict__["views"] = None
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            return self
        with views.hidden(self):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.__dict__["views"] = views.moved(self, fresh)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """What is copied and pickled: where there are views, the stacked tensors once and no views."""
        state, views = dict(vars(self)), self._intact()
        if views is None or views.has_gradients:
            return {**state, "views": None}
        state["_modules"] = {**self._modules, **{str(n): _twin(expert) for n, expert in enumerate(self.experts)}}
        own = {place.leaf for place in views.places if not place.part}
        state["_parameters"] = {
            name: on_meta(p.shape, p) if name in own and p is not None else p for name, p in self._parameters.items()
        }
        return {**state, "views": replace(views, made=None)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.views is not None:
            self.__dict__["views"] = self.views.put_in(self)

    def extra_repr(self) -> str:
        return f"{self.origin.kind.__name__}, {self.count} experts"


class _Overlaid:
    """A configuration, but for some values."""

    def __init__(self, config: Any, overlay: Mapping[str, Any]) -> None:
        self.__dict__.update(overlay, _config=config)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_config" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.__dict__["_config"], name)


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted names as mappings within a mapping.

    >>> nested({"down": 1, "mlp.w1": 2, "mlp.v1": 3})
    {'down': 1, 'mlp': {'w1': 2, 'v1': 3}}
    """
    found: dict[str, Any] = {}
    for name, value in values.items():
        *parents, leaf = name.split(".")
        place = found
        for parent in parents:
            place = place.setdefault(parent, {})
        place[leaf] = value
    return found


def _expert(original: nn.Module, weights: Sequence[StackedWeight]) -> Expert:
    """One expert, its layers on meta."""
    expert = Expert()
    for stacked in weights:
        weight = original.get_parameter(stacked.name)
        bias = None if stacked.bias is None else original.get_parameter(stacked.bias)
        for part, size in zip(stacked.parts, stacked.sizes, strict=True):
            layer = nn.Linear(stacked.in_features, size, False, device="meta", dtype=weight.dtype)
            layer.weight.requires_grad_(weight.requires_grad)
            if bias is not None:
                layer.bias = on_meta((size,), bias)
            expert._modules[part] = layer
    return expert


def _twin(expert: nn.Module) -> Expert:
    """Another expert like the first. There are thousands, and `nn.Module` takes its time to make one."""
    twin = _shallow(expert)
    for part, layer in expert._modules.items():
        twin._modules[part] = other = _shallow(layer)
        for leaf, parameter in layer._parameters.items():  # type: ignore[union-attr]
            other._parameters[leaf] = None if parameter is None else on_meta(parameter.shape, parameter)
    return twin  # type: ignore[no-any-return]


def _in_one_piece(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    """Of views that leave gaps a state dict holds copies: files of tensors take nothing else."""
    for name, tensor in state.items():
        if name.startswith(prefix) and not tensor.is_contiguous():
            state[name] = tensor.contiguous()


def _shallow(module: Any) -> Any:
    """A copy with the same tensors, the same children and the same hooks, but its own tables of them."""
    copy = module.__class__.__new__(module.__class__)
    copy.__dict__.update({name: v.copy() if isinstance(v, dict) else v for name, v in vars(module).items()})
    return copy
