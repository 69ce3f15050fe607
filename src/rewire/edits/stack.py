"""`Stack`: the weights of all experts in one tensor per projection."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rewire import experts, families
from rewire.edit_rules import stack_rule, unstack_rule
from rewire.edits.base import Match, Outcome, Refusal, Scene, same_flags, swap_change, tie_reason, twins_of
from rewire.linears import linear_facts
from rewire.module_tree import submodule, under
from rewire.modules import StackedPart, UnstackedExperts
from rewire.modules.stacked import with_stacked
from rewire.plan import Stack
from rewire.surgery import Placements, Swap
from rewire.tensor_rules import Rule, invert


def decide(edit: Stack, number: int, matches: Sequence[Match], scene: Scene) -> Iterator[Outcome]:
    """One outcome per module of experts matched."""
    done: set[str] = set()
    for match in matches:
        if match.path in done:
            continue
        outcome = _decide(number, match, scene)
        done.update(twins_of(outcome))
        yield outcome


def _decide(number: int, match: Match, scene: Scene) -> Outcome:
    if match.module is None:
        return Refusal(match.path, "is a parameter; the target of a stack is the module that holds the experts")
    if isinstance(match.module, UnstackedExperts):
        return _restack(number, match, match.module, scene)
    found = experts.separate_at(scene.model, match.path)
    if isinstance(found, families.Refusal):
        return Refusal(match.path, found.reason)
    names = tuple(under(match.path, f"{expert}.{leaf}") for expert in found.experts for leaf in found.tensors)
    twins = scene.twins(match, names)
    reason = tie_reason(scene, match, names, twins)
    if reason:
        return Refusal(match.path, reason)
    build = BuildStacked(match.path, found)
    parts = ", ".join(f"{part} {size}" for part, size in found.sizes.items())
    detail = f"{len(found.experts)} experts, {parts} each → {', '.join(found.tensors.values())}"
    swap = Swap(stack_rule(match.path, found.experts, found.tensors), build)
    # The experts stay where they are under every name that a shared container has; only it is another module now.
    aliases = dict.fromkeys(match.aliases, match.path)
    return swap_change(number, "stack", match, detail, swap, alias_of=aliases, twins=twins)


def _restack(number: int, match: Match, module: UnstackedExperts, scene: Scene) -> Outcome:
    """Experts that an unstack has taken apart."""
    rule = invert(unstack_rule(match.path, module.count, module.weights))
    reason = _altered_reason(module)
    if reason:
        return Refusal(match.path, reason)
    twins = scene.twins(match, taken(rule))
    reason = tie_reason(scene, match, taken(rule), twins)
    if reason:
        return Refusal(match.path, reason)
    detail = f"{module.count} experts → {module.origin.kind.__name__}"
    swap = Swap(rule, BuildRestacked(match.path))
    aliases = dict.fromkeys(match.aliases, match.path)
    return swap_change(number, "stack", match, detail, swap, alias_of=aliases, twins=twins)


def taken(rule: Rule) -> tuple[str, ...]:
    """The tensors that `rule` starts from."""
    made = {name for step in rule for name in step.outputs}
    return tuple(name for step in rule for name in step.inputs if name not in made)


def _altered_reason(module: UnstackedExperts) -> str | None:
    """Why the layers of the experts cannot become slices of one tensor again."""
    for weight in module.weights:
        for part in weight.parts:
            layers = {str(n): module.get_submodule(f"{n}.{part}") for n in range(module.count)}
            for number, layer in layers.items():
                facts = linear_facts(layer)
                if isinstance(facts, str):
                    return f"{number}.{part}: {facts}"
            for leaf in ("weight", "bias") if weight.bias else ("weight",):
                reason = _unlike(part, [layer.get_parameter(leaf) for layer in layers.values()])
                if reason:
                    return reason
    return None


def _unlike(part: str, tensors: Sequence[Tensor]) -> str | None:
    if len({(tensor.dtype, tensor.device) for tensor in tensors}) > 1:
        return f"{part} differs in type or device from expert to expert; cast or move them first"
    if not same_flags(tensors):
        return f"{part} is frozen in some experts and trained in others; one stacked tensor cannot be both"
    return None


@dataclass(frozen=True)
class BuildRestacked:
    """Makes the module with stacked tensors again that was taken apart at `path`."""

    path: str

    def __call__(self, model: nn.Module) -> Placements:
        module = submodule(model, self.path)
        assert isinstance(module, UnstackedExperts)
        return {self.path: module.restacked()}


@dataclass(frozen=True)
class BuildStacked:
    """Makes the container with stacked tensors, and the stand-ins for the linear layers of its experts."""

    path: str
    found: experts.SeparateExperts

    def __call__(self, model: nn.Module) -> Placements:
        container = submodule(model, self.path)
        first = container.get_submodule(self.found.experts[0])
        stacked: dict[str, Tensor] = {}
        for leaf, name in self.found.tensors.items():
            like = first.get_parameter(leaf)
            empty = torch.empty((len(self.found.experts), *like.shape), dtype=like.dtype, device="meta")
            stacked[name] = nn.Parameter(empty, requires_grad=like.requires_grad)
        holder = with_stacked(container, stacked)
        placements: Placements = {self.path: holder}
        for index, expert in enumerate(self.found.experts):
            for part in self.found.sizes:
                weight, bias = self.found.tensors[f"{part}.weight"], self.found.tensors.get(f"{part}.bias")
                placements[under(self.path, f"{expert}.{part}")] = StackedPart(holder, weight, bias, index)
        return placements
