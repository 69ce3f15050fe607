"""`Join`: separate projections become one matrix multiplication; the model's forward is not touched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from rewire import linears
from rewire.edit_rules import join_rule, joined_name
from rewire.edits.base import Match, Outcome, Refusal, Scene, same_flags, swap_change, tie_reason
from rewire.modules import JoinedProjection
from rewire.modules.joined import join_parts
from rewire.plan import Join
from rewire.surgery import Placements, Swap, submodule, under

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def decide(edit: Join, number: int, matches: Sequence[Match], scene: Scene) -> Iterator[Outcome]:
    """One outcome per parent matched."""
    for match in matches:
        yield _decide(edit, number, match, scene)


def _decide(edit: Join, number: int, match: Match, scene: Scene) -> Outcome:
    parent, name = match.module, edit.name or joined_name(edit.parts)
    reason = _parent_reason(parent, name, edit.parts)
    if parent is None or reason:
        return Refusal(match.path, reason or "is a parameter; the target of a join is the parent module")
    found = {part: linears.linear_facts(parent.get_submodule(part)) for part in edit.parts}
    facts = [fact for fact in found.values() if not isinstance(fact, str)]
    if len(facts) < len(found):
        unfit = "; ".join(f"{part}: {fact}" for part, fact in found.items() if isinstance(fact, str))
        return Refusal(match.path, unfit)
    tensors = {
        under(match.path, f"{part}.{leaf}"): tensor
        for part in edit.parts
        for leaf, tensor in parent.get_submodule(part).named_parameters()
    }
    reason = _shape_reason(edit.parts, facts) or _kind_reason(tensors) or _shared_reason(parent, edit.parts)
    reason = reason or tie_reason(scene, match, tuple(tensors))
    if reason:
        return Refusal(match.path, reason)
    sizes = tuple(fact.out_features for fact in facts)
    biased = tuple(fact.has_bias for fact in facts)
    rule = join_rule(match.path, name, edit.parts, sizes, biased=biased, transposed=[fact.transposed for fact in facts])
    build = BuildJoin(match.path, name, facts[0].in_features, tuple(edit.parts), sizes, biased)
    detail = f"{', '.join(f'{p} {s}' for p, s in zip(edit.parts, sizes, strict=True))} → {name} {sum(sizes)}"
    # A shared parent is one module: its children are in place under every name it has.
    return swap_change(number, "join", match, detail, Swap(rule, build))


def _parent_reason(parent: nn.Module | None, name: str, parts: Sequence[str]) -> str | None:
    if parent is None:
        return None
    if isinstance(parent, _CONTAINERS):
        return f"is a {type(parent).__name__}, whose order would change; target the module that calls the parts"
    children = [child for child, _ in parent.named_children()]
    missing = [part for part in parts if part not in children]
    if missing:
        return f"has no child {', '.join(missing)}; its children are {', '.join(children) or 'none'}"
    if hasattr(parent, name):
        return f"has an attribute {name!r} already; give the joined projection another name"
    return None


def _shape_reason(parts: Sequence[str], facts: Sequence[linears.LinearFacts]) -> str | None:
    widths = {part: fact.in_features for part, fact in zip(parts, facts, strict=True)}
    if len(set(widths.values())) > 1:
        return f"the parts have inputs of different size ({widths}); join those that are alike"
    return None


def _kind_reason(tensors: Mapping[str, Tensor]) -> str | None:
    kinds = {(str(tensor.dtype), str(tensor.device)) for tensor in tensors.values()}
    if len(kinds) > 1:
        return f"the parts differ in type or device: {sorted(kinds)}; cast or move them first"
    if not same_flags(list(tensors.values())):
        frozen = [name for name, tensor in tensors.items() if not tensor.requires_grad]
        return f"some parts are frozen ({', '.join(frozen)}), others not; one joined weight cannot be both"
    return None


def _shared_reason(parent: nn.Module, parts: Sequence[str]) -> str | None:
    children = [parent.get_submodule(part) for part in parts]
    if len({id(child) for child in children}) < len(children):
        return "two of the parts are one and the same module"
    return None


@dataclass(frozen=True)
class BuildJoin:
    """Makes the joined projection and the stand-ins for the parts, in the parent at `path`."""

    path: str
    name: str
    in_features: int
    parts: tuple[str, ...]
    sizes: tuple[int, ...]
    biased: tuple[bool, ...]

    def __call__(self, model: nn.Module) -> Placements:
        parent = submodule(model, self.path)
        old = parent.get_submodule(self.parts[0])
        weight = next(old.parameters())
        joined = JoinedProjection(
            self.in_features, self.parts, self.sizes, self.biased, device="meta", dtype=weight.dtype
        )
        joined.requires_grad_(weight.requires_grad).train(old.training)
        parts = {part: new.train(old.training) for part, new in join_parts(parent, self.name, joined).items()}
        placements: Placements = {under(self.path, part): new for part, new in parts.items()}
        return {**placements, under(self.path, self.name): joined}
