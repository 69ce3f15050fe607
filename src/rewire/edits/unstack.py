"""`Unstack`: every expert gets linear layers of its own; the experts' own forward is not touched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from rewire import experts, families, tensor_rules
from rewire.edit_rules import unstack_rule
from rewire.edits.base import Match, Outcome, Refusal, Scene, swap_change, tie_reason, twins_of
from rewire.module_tree import get_tensor, meta_like, set_tensor, submodule, under
from rewire.modules import StackedWeight, UnstackedExperts
from rewire.plan import Unstack
from rewire.surgery import Placements, Swap, SwapBack, Undo


def decide(edit: Unstack, number: int, matches: Sequence[Match], scene: Scene) -> Iterator[Outcome]:
    """One outcome per module of experts matched."""
    tried, done = experts.Trials(), set[str]()
    for match in matches:
        if match.path in done:
            continue
        outcome = _decide(edit, number, match, scene, tried)
        done.update(twins_of(outcome))
        yield outcome


def _decide(edit: Unstack, number: int, match: Match, scene: Scene, tried: experts.Trials) -> Outcome:
    if match.module is None:
        return Refusal(match.path, "is a parameter; the target of an unstack is the module that holds the experts")
    found = experts.stacked_at(scene.model, match.path, tried)
    if isinstance(found, families.Refusal):
        return Refusal(match.path, found.reason)
    rule = unstack_rule(match.path, found.count, found.weights)
    wholes = tuple(name for weight in found.weights for name in weight.tensors)
    names = tuple(under(match.path, name) for name in wholes)
    twins = scene.twins(match, names)
    reason = tie_reason(scene, match, names, twins)
    if edit.views and twins:
        reason = f"its tensors are also those of {', '.join(twins)}, which cannot have the same views; leave views out"
    if reason:
        return Refusal(match.path, reason)
    build = BuildUnstacked(match.path, found.weights, found.count)
    swap = SharedSwap(rule, build, path=match.path, wholes=wholes) if edit.views else Swap(rule, build)
    parts = ", ".join(f"{part} {size}" for part, size in found.parts.items())
    aliases = dict.fromkeys(match.aliases, match.path)
    detail = f"{found.count} experts → {parts} each" + (" (views)" if edit.views else "")
    return swap_change(number, "unstack", match, detail, swap, alias_of=aliases, twins=twins)


@dataclass(frozen=True)
class BuildUnstacked:
    """Makes the module with separate experts that stands in for the one at `path`."""

    path: str
    weights: tuple[StackedWeight, ...]
    count: int

    def __call__(self, model: nn.Module) -> Placements:
        return {self.path: UnstackedExperts(submodule(model, self.path), self.weights, self.count)}


@dataclass(frozen=True)
class SharedSwap(Swap):
    """A swap after which the experts' layers are views of the stacked tensors, which are kept.

    On a model without weights it is a plain swap; once they are there, `settle` makes the layers views.

    Attributes:
        path: the module of experts.
        wholes: names of the stacked tensors in it.
    """

    path: str = ""
    wholes: tuple[str, ...] = ()

    def __call__(self, model: nn.Module) -> SharedBack:
        names = {name: under(self.path, name) for name in self.wholes}
        found = {name: cast(nn.Parameter, get_tensor(model, full)) for name, full in names.items()}
        if any(tensor.is_meta for tensor in found.values()):
            return self._back(super().__call__(model))
        # Where nothing but shapes is to be moved, a swap leaves the new layers on meta and copies no value.
        for name, full in names.items():
            set_tensor(model, full, meta_like(found[name]))
        undo = super().__call__(model)
        self._share(model, found)
        return self._back(undo)

    def _back(self, undo: Undo) -> SharedBack:
        return SharedBack(**vars(undo), path=self.path)

    def settle(self, model: nn.Module) -> None:
        """Puts the layers' weights, which have come meanwhile, into stacked tensors."""
        back = tensor_rules.invert(self.rule)
        made = {name for step in back for name in step.outputs}
        names = [name for step in back for name in step.inputs if name not in made]
        tensors = tensor_rules.run(back, {name: get_tensor(model, name).detach() for name in names}, torch)
        flags = _unstacked(model, self.path).restacked()
        self._share(
            model,
            {
                name: nn.Parameter(
                    tensors[under(self.path, name)].contiguous(), requires_grad=flags.get_parameter(name).requires_grad
                )
                for name in self.wholes
            },
        )

    def _share(self, model: nn.Module, wholes: Mapping[str, nn.Parameter]) -> None:
        named = {under(self.path, name): whole.detach() for name, whole in wholes.items()}
        views = tensor_rules.run(self.rule, named, torch)
        prefix = under(self.path, "x").removesuffix("x")
        below = {name.removeprefix(prefix): view for name, view in views.items()}
        _unstacked(model, self.path).share(wholes, below)


@dataclass(frozen=True)
class SharedBack(SwapBack):
    """Takes a `SharedSwap` back; the stacked tensors themselves return if the layers are still views of them.

    Attributes:
        path: the module of experts.
    """

    path: str = ""

    def __call__(self, model: nn.Module) -> None:
        kept = _unstacked(model, self.path).unshare()
        super().__call__(model)
        for name, whole in (kept or {}).items():
            set_tensor(model, under(self.path, name), whole)


def _unstacked(model: nn.Module, path: str) -> UnstackedExperts:
    module = submodule(model, path)
    assert isinstance(module, UnstackedExperts)
    return module
