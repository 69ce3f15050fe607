"""Carries out one resolved change on a model, and undoes it.

The same code works on the meta skeleton that `resolve` rehearses on, on the meta model inside
`from_pretrained`, and on a live model: a change is some tensor steps and some modules to be put in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rewire import tensor_rules
from rewire.errors import RevertError
from rewire.module_tree import get_tensor, meta_like, place, set_tensor, split_path, submodule, under
from rewire.modules import RenamedModule
from rewire.tensor_rules import KEPT, Rule, Step, with_names

Placements = dict[str, nn.Module | None]
"""Module path to the module that stands there afterwards; None: nothing does."""


class Undo(Protocol):
    """What is needed to take one change back."""

    @property
    def originals(self) -> Placements:
        """The modules that this brings back."""

    def check(self, view: View) -> None:
        """Raises `RevertError` if the change cannot be taken back on what `view` shows. Changes nothing."""

    def __call__(self, model: nn.Module) -> None:
        """Brings `model` back to before the change, after `check` has passed."""


class View:
    """A model as it will be once some of its changes are taken back."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._back: Placements = {}

    def take_back(self, undo: Undo) -> None:
        """Shows the model as if `undo` had been carried out."""
        self._back |= undo.originals

    def module(self, path: str) -> nn.Module | None:
        """The module at `path`; None if there is none."""
        current: nn.Module | None = self._model
        parts = path.split(".") if path else []
        for stop, leaf in enumerate(parts, 1):
            so_far = ".".join(parts[:stop])
            if current is None:
                return None
            current = self._back[so_far] if so_far in self._back else current._modules.get(leaf)
        return current

    def has_tensor(self, name: str) -> bool:
        """Whether there is a parameter or buffer called `name`."""
        parent, leaf = split_path(name)
        owner = self.module(parent)
        return owner is not None and (owner._parameters.get(leaf) is not None or owner._buffers.get(leaf) is not None)


def check_undos(model: nn.Module, undos: Sequence[Undo]) -> None:
    """Raises `RevertError` unless all of `undos` can be carried out, the last first. Changes nothing."""
    view = View(model)
    for undo in reversed(undos):
        undo.check(view)
        view.take_back(undo)


class Surgeon(Protocol):
    """Carries out a change."""

    def __call__(self, model: nn.Module) -> Undo:
        """Changes `model` and says how to take it back."""


@dataclass(frozen=True)
class Change:
    """One place that a plan changes.

    Attributes:
        edit: number of the edit in the plan.
        kind: its kind, `"split"` for instance.
        path: the module path that the target matched.
        detail: what becomes of it, for people.
        rule: tensor steps over full tensor names, one set for every name that a shared module has.
        surgeon: carries it out.
        settings: what the edit left open, as it was settled here: keys of the edit's record.
    """

    edit: int
    kind: str
    path: str
    detail: str
    rule: Rule
    surgeon: Surgeon
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Twins:
    """Modules of their own whose tensors are those of the module at `path` (Zamba's attention, for instance).

    An edit makes the same of all of them, and their tensors are the same again.

    Attributes:
        path: where the edit is made.
        others: paths of the twins.
        aliases: further paths of the very same module.
    """

    path: str = ""
    others: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()

    def built(self, build: Callable[[nn.Module], Placements], model: nn.Module) -> Placements:
        """The new modules of all; what `build` makes them of is a record with a `path`."""
        placements = build(model)
        for other in self.others:
            placements |= replace(build, path=other)(model)  # type: ignore[type-var]
        return placements

    def everywhere(self, rule: Rule) -> Rule:
        """`rule` for the twins too."""
        return (*rule, *(step for other in self.others for step in aliased(rule, self.path, other)))

    def tie(self, model: nn.Module, rule: Rule) -> None:
        """Has the twins hold the tensors that `rule` gives."""
        for name in _taken(tensor_rules.invert(rule)) if self.others else ():
            for other in self.others:
                set_tensor(model, renamed(name, self.path, other), get_tensor(model, name))

    def shared(self, tensors: Mapping[str, Tensor], rule: Rule) -> dict[str, Tensor]:
        """What `rule` gives, under all other names."""
        names = [name for step in rule for name in step.outputs if name in tensors]
        return {renamed(n, self.path, o): tensors[n] for n in names for o in (*self.others, *self.aliases)}


@dataclass(frozen=True)
class Swap:
    """The surgeon of all edits that put modules in place of others and move tensors by a rule.

    Tensors of a replaced module that no step takes move over under their own name.

    Attributes:
        rule: tensor steps; every input is a tensor of the model, every output one of the new modules'.
        build: makes the new modules, on meta, given the model they go into.
        aliases: further paths of shared modules: path to the path in the placements whose module it is.
        old_names: names under which a renamed module's parent still finds it: old path to new leaf name.
        twins: where else the same happens.
    """

    rule: Rule
    build: Callable[[nn.Module], Placements]
    aliases: Mapping[str, str] = field(default_factory=dict)
    old_names: Mapping[str, str] = field(default_factory=dict)
    twins: Twins = field(default_factory=Twins)

    def __call__(self, model: nn.Module) -> Undo:
        # Everything that can fail comes before the first change.
        results = _run(self.rule, _inputs(model, self.rule))
        placements = self.twins.built(self.build, model)
        placements |= {alias: placements[path] for alias, path in self.aliases.items()}
        originals = {path: _child(model, path) for path in placements}
        orders = {split_path(path)[0]: _child_names(model, path) for path in placements}
        everywhere = self.twins.everywhere(self.rule)
        carried = _tensors_below(model, originals, everywhere)

        _strip(model, everywhere)
        for path, module in placements.items():
            _keep_hooks(originals[path], module)
            place(model, path, module)
        for old, new in self.old_names.items():
            parent, leaf = split_path(old)
            owner = submodule(model, parent)
            owner.__dict__[leaf] = RenamedModule(owner, new)
        aside = _give(model, results)
        _hand_over(model, carried)
        self.twins.tie(model, self.rule)
        return SwapBack(self.rule, originals, placements, orders, tuple(self.old_names), aside, self.twins)

    def settle(self, model: nn.Module) -> None:
        """Does what had to wait for values, on a `model` that was changed on meta and has its weights now: nothing."""


@dataclass(frozen=True)
class SwapBack:
    """Takes a `Swap` back.

    Attributes:
        rule: the swap's.
        originals: the modules that stood there, the tensors that the rule took on meta.
        placed: the modules that stand there now.
        orders: the names of the children of every parent concerned, in their original order.
        old_names: paths of the stand-ins of renamed modules.
        aside: tensors that the rule put aside.
        twins: where else the same was done.
    """

    rule: Rule
    originals: Placements
    placed: Placements
    orders: Mapping[str, tuple[str, ...]]
    old_names: tuple[str, ...]
    aside: Mapping[str, Tensor]
    twins: Twins = field(default_factory=Twins)

    def check(self, view: View) -> None:
        what = f"the edit of {next(iter(self.placed))}"
        for path, module in self.placed.items():
            if view.module(path) is not module:
                raise RevertError(f"cannot take {what} back: {path} is another module; {_REMOVE_FIRST}")
        for name in _taken(tensor_rules.invert(self.twins.everywhere(self.rule))):
            if not view.has_tensor(name):
                raise RevertError(f"cannot take {what} back: there is no tensor {name}; {_REMOVE_FIRST}")

    def __call__(self, model: nn.Module) -> None:
        inverse = tensor_rules.invert(self.rule)
        results = _run(inverse, _inputs(model, inverse), self.aside)
        carried = _tensors_below(model, self.placed, self.twins.everywhere(inverse))

        for old in self.old_names:
            parent, leaf = split_path(old)
            del submodule(model, parent).__dict__[leaf]
        for path, module in self.originals.items():
            place(model, path, module)
        for parent, names in self.orders.items():
            children = submodule(model, parent)._modules
            ordered = {name: children[name] for name in names}
            children.clear()
            children.update(ordered)
        _give(model, results)
        _hand_over(model, carried)
        self.twins.tie(model, inverse)


def renamed(name: str, path: str, other: str) -> str:
    """The name of a tensor below the module at `other` that is called `name` below `path`.

    >>> renamed("a.qkv.weight", "a", "b"), renamed("c.weight", "a", "b")
    ('b.qkv.weight', 'c.weight')
    """
    return other + name.removeprefix(path) if name.startswith(f"{path}.") else name


def aliased(rule: Rule, path: str, alias: str) -> Rule:
    """`rule` for the other name of the module at `path`."""
    return tuple(with_names(step, lambda name: renamed(name, path, alias)) for step in rule)


_REMOVE_FIRST = "something else replaced it since the edit (an adapter, a quantiser?), remove that first"


@dataclass(frozen=True)
class SetFlags:
    """The surgeon that makes parameters trainable or not: parameter name to flag."""

    flags: Mapping[str, bool]

    def __call__(self, model: nn.Module) -> Undo:
        before = {name: get_tensor(model, name).requires_grad for name in self.flags}
        for name, flag in self.flags.items():
            get_tensor(model, name).requires_grad_(flag)
        return FlagsBack(before)


@dataclass(frozen=True)
class FlagsBack:
    """Takes `SetFlags` back."""

    flags: Mapping[str, bool]

    @property
    def originals(self) -> Placements:
        return {}

    def check(self, view: View) -> None:
        for name in self.flags:
            if not view.has_tensor(name):
                raise RevertError(f"cannot restore whether {name} is trained: there is none; {_REMOVE_FIRST}")

    def __call__(self, model: nn.Module) -> None:
        for name, flag in self.flags.items():
            get_tensor(model, name).requires_grad_(flag)


@dataclass(frozen=True)
class CastTensors:
    """The surgeon that gives tensors another type, one after the other; ties and identities are kept.

    Attributes:
        casts: the steps, each with the tensor's name as source and target.
        keep: whether wide originals are kept for the way back.
    """

    casts: tuple[tensor_rules.Cast, ...]
    keep: bool

    def __call__(self, model: nn.Module) -> Undo:
        aside: dict[str, Tensor] = {}
        done: set[int] = set()
        for cast in self.casts:
            tensor = get_tensor(model, cast.source)
            if id(tensor) in done:  # tied, or of a shared module
                continue
            done.add(id(tensor))
            aside |= _retype(tensor, cast, {})
        return CastsBack(self.casts, aside if self.keep else {}, tuple(aside))


@dataclass(frozen=True)
class CastsBack:
    """Takes `CastTensors` back: bit for bit, except that values changed since are widened as they are."""

    casts: tuple[tensor_rules.Cast, ...]
    aside: Mapping[str, Tensor]
    needed: tuple[str, ...]

    @property
    def originals(self) -> Placements:
        return {}

    def check(self, view: View) -> None:
        if set(self.needed) - set(self.aside):
            raise RevertError(
                "a cast to a narrower type cannot be taken back, because the originals were not kept; "
                "use `keep_original: true`, or load the model again"
            )
        for cast in self.casts:
            if not view.has_tensor(cast.target):
                raise RevertError(f"cannot take the cast of {cast.target} back: there is none; {_REMOVE_FIRST}")

    def __call__(self, model: nn.Module) -> None:
        done: set[int] = set()
        for cast in self.casts:
            tensor = get_tensor(model, cast.target)
            if id(tensor) not in done:
                done.add(id(tensor))
                _retype(tensor, cast.inverse(), self.aside)


def _retype(tensor: Tensor, step: Step, aside: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Runs a cast on the data of `tensor`, in place; returns what it puts aside."""
    (name,) = step.outputs
    results = tensor_rules.run((step,), {name: tensor.data, **aside}, torch)
    gradient, tensor.grad = tensor.grad, None
    tensor.data = results[name]
    if gradient is not None:
        tensor.grad = gradient.to(tensor.dtype)
    return {key: value for key, value in results.items() if key.startswith(KEPT) and key not in aside}


@dataclass(frozen=True)
class OriginalNames:
    """A hook that has `load_state_dict` of an edited model take tensors of the untouched one too.

    Where all tensors that a part of the rule starts from are there, they are put in the places that they have now;
    all others, those of the edited model among them, are left as they are.
    """

    rule: Rule

    def __call__(self, module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
        for part in tensor_rules.components(self.rule):
            names = {f"{prefix}{name}": name for name in part.sources}
            if all(name in state_dict for name in names):
                tensors = {short: state_dict.pop(name) for name, short in names.items()}
                results = tensor_rules.visible(tensor_rules.run(part.steps, tensors, torch))
                state_dict.update({f"{prefix}{name}": tensor for name, tensor in results.items()})


def accept_original_names(model: nn.Module, rule: Rule) -> None:
    """Lets `model.load_state_dict` (and so `Trainer`, when it resumes) take the names before `rule`; none: no more."""
    hooks = model._load_state_dict_pre_hooks
    for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "hook", None), OriginalNames)]:
        del hooks[key]
    if rule:
        model.register_load_state_dict_pre_hook(OriginalNames(rule))


_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def _keep_hooks(old: nn.Module | None, new: nn.Module | None) -> None:
    """Whoever listens to `old` listens to `new`, which gets the same inputs and gives the same outputs.

    The two share their hooks, so that a handle given out earlier still removes its hook.
    """
    if old is not None and new is not None and old is not new:
        new.__dict__.update({name: old.__dict__[name] for name in _HOOKS})


def _child(model: nn.Module, path: str) -> nn.Module | None:
    parent, leaf = split_path(path)
    return submodule(model, parent)._modules.get(leaf)


def _child_names(model: nn.Module, path: str) -> tuple[str, ...]:
    """The names of the children of the parent of `path`."""
    return tuple(submodule(model, split_path(path)[0])._modules)


def _taken(rule: Rule) -> tuple[str, ...]:
    """The tensors that `rule` starts from, those put aside left out."""
    made: set[str] = set()
    taken: list[str] = []
    for step in rule:
        taken += [name for name in step.inputs if name not in made and not name.startswith(KEPT)]
        made.update(step.outputs)
    return tuple(taken)


def _inputs(model: nn.Module, rule: Rule) -> dict[str, Tensor]:
    return {name: get_tensor(model, name) for name in _taken(rule)}


@dataclass(frozen=True)
class _Results:
    """What a rule gives: tensors and, where every input had one, gradients."""

    tensors: dict[str, Tensor]
    gradients: dict[str, Tensor]


def _run(rule: Rule, inputs: Mapping[str, Tensor], aside: Mapping[str, Tensor] | None = None) -> _Results:
    if all(tensor.is_meta for tensor in inputs.values()):
        # The new modules have their tensors on meta already: all there is to do is to see that they fit.
        tensor_rules.run_shapes(rule, {name: tuple(tensor.shape) for name, tensor in inputs.items()})
        return _Results({}, {})
    with torch.no_grad():
        values = {name: tensor.detach() for name, tensor in inputs.items()}
        tensors = tensor_rules.run(rule, {**values, **(aside or {})}, torch)
        gradients = {name: tensor.grad for name, tensor in inputs.items() if tensor.grad is not None}
        if len(gradients) < len(inputs) or aside:
            return _Results(tensors, {})
        return _Results(tensors, tensor_rules.visible(tensor_rules.run(rule, gradients, torch)))


def _give(model: nn.Module, results: _Results) -> dict[str, Tensor]:
    """Puts the results into the model and returns what was put aside."""
    for name, tensor in tensor_rules.visible(results.tensors).items():
        set_tensor(model, name, _own(tensor))
    for name, gradient in results.gradients.items():
        get_tensor(model, name).grad = _own(gradient)
    return {name: tensor for name, tensor in results.tensors.items() if name.startswith(KEPT)}


def _strip(model: nn.Module, rule: Rule) -> None:
    """Leaves the modules that `rule` takes tensors from with tensors on meta, so that memory is freed."""
    for name in _taken(rule):
        tensor = get_tensor(model, name)
        if not tensor.is_meta:
            set_tensor(model, name, meta_like(tensor))


def _own(tensor: Tensor) -> Tensor:
    """`tensor`, contiguous and in a storage of its own, so that the one it was cut from can be freed."""
    if tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _tensors_below(model: nn.Module, modules: Placements, rule: Rule) -> dict[str, Tensor]:
    """The tensors of `modules` that no step of `rule` takes."""
    taken = set(_taken(rule))
    names = (name for path, module in modules.items() if module for name in _names_below(path, module))
    return {name: get_tensor(model, name) for name in names if name not in taken}


def _names_below(path: str, module: nn.Module) -> Iterator[str]:
    for name, _ in module.named_parameters(remove_duplicate=False):
        yield under(path, name)
    for name, _ in module.named_buffers(remove_duplicate=False):
        yield under(path, name)


def _hand_over(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Puts `tensors` where the model has a tensor of that name."""
    for name, tensor in tensors.items():
        try:
            get_tensor(model, name)
        except (AttributeError, KeyError):
            continue
        set_tensor(model, name, tensor)
