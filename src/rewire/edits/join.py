"""`Join`: separate projections become one matrix multiplication; the model's forward is not touched."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from rewire import linears
from rewire.edit_rules import join_rule, joined_name
from rewire.edits.base import Match, Outcome, Refusal, Scene, same_flags, swap_change, tie_reason, twins_of
from rewire.module_tree import submodule, under
from rewire.modules import JoinedProjection
from rewire.modules.joined import join_parts, joined_layer
from rewire.plan import Join
from rewire.surgery import Placements, Swap
from rewire.tensor_rules import Rule

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def decide(edit: Join, number: int, matches: Sequence[Match], scene: Scene) -> Iterator[Outcome]:
    """One outcome per parent matched."""
    done: set[str] = set()
    for match in matches:
        if match.path in done:
            continue
        outcome = _decide(edit, number, match, scene)
        done.update(twins_of(outcome))
        yield outcome


def _decide(edit: Join, number: int, match: Match, scene: Scene) -> Outcome:
    parent, name = match.module, edit.name or joined_name(edit.parts)
    if parent is None:
        return Refusal(match.path, "is a parameter; the target of a join is the parent module")
    reason = _parent_reason(parent, name, edit.parts)
    if reason:
        return Refusal(match.path, reason)
    modules = [parent.get_submodule(part) for part in edit.parts]
    found = {part: linears.linear_facts(module) for part, module in zip(edit.parts, modules, strict=True)}
    facts = [fact for fact in found.values() if not isinstance(fact, str)]
    if len(facts) < len(found):
        unfit = "; ".join(f"{part}: {fact}" for part, fact in found.items() if isinstance(fact, str))
        return Refusal(match.path, unfit)
    tensors = {
        under(match.path, f"{part}.{leaf}"): tensor
        for part, module in zip(edit.parts, modules, strict=True)
        for leaf, tensor in module.named_parameters()
    }
    reason = _shape_reason(edit.parts, facts) or _form_reason(modules, facts) or _kind_reason(tensors)
    twins = scene.twins(match, tuple(tensors))
    reason = reason or _shared_reason(modules) or tie_reason(scene, match, tuple(tensors), twins)
    if reason:
        return Refusal(match.path, reason)
    sizes = tuple(fact.out_features for fact in facts)
    swap = Swap(_rule(match.path, name, edit.parts, facts), _build(match.path, name, tuple(edit.parts), facts))
    detail = f"{', '.join(f'{p} {s}' for p, s in zip(edit.parts, sizes, strict=True))} → {name} {sum(sizes)}"
    # A shared parent is one module: its children are in place under every name it has.
    return swap_change(number, "join", match, detail, swap, twins=twins, settings={"name": name})


def _rule(path: str, name: str, parts: Sequence[str], facts: Sequence[linears.LinearFacts]) -> Rule:
    sizes = tuple(fact.out_features for fact in facts)
    biased, transposed = ([fact.has_bias for fact in facts], [fact.transposed for fact in facts])
    how = {"groups": facts[0].groups, "dim": facts[0].row_dim}
    return join_rule(path, name, parts, sizes, biased=biased, transposed=transposed, **how)


def _build(
    path: str, name: str, parts: tuple[str, ...], facts: Sequence[linears.LinearFacts]
) -> Callable[[nn.Module], Placements]:
    sizes, one = tuple(fact.out_features for fact in facts), facts[0]
    if one.form == "linear":
        return BuildJoin(path, name, one.in_features, parts, sizes, tuple(fact.has_bias for fact in facts))
    return BuildJoinedLayer(path, name, parts, sizes, one.groups, one.row_dim, one.axis)


def _parent_reason(parent: nn.Module, name: str, parts: Sequence[str]) -> str | None:
    if isinstance(parent, _CONTAINERS):
        return f"is a {type(parent).__name__}, whose order would change; target the module that calls the parts"
    below = {path for path, _ in parent.named_modules(remove_duplicate=False)}
    missing = [part for part in parts if part not in below]
    if missing:
        children = [child for child, _ in parent.named_children()]
        return f"has no child {', '.join(missing)}; its children are {', '.join(children) or 'none'}"
    if hasattr(parent, name):
        return f"has an attribute {name!r} already; give the joined projection another name"
    return None


def _shape_reason(parts: Sequence[str], facts: Sequence[linears.LinearFacts]) -> str | None:
    widths = {part: fact.in_features for part, fact in zip(parts, facts, strict=True)}
    if len(set(widths.values())) > 1:
        return f"the parts have inputs of different size ({widths}); join those that are alike"
    return None


def _form_reason(modules: Sequence[nn.Module], facts: Sequence[linears.LinearFacts]) -> str | None:
    """Why layers that are no `nn.Linear` cannot be joined: they must be alike in all but their rows."""
    first = facts[0]
    if {fact.form for fact in facts} == {"linear"}:
        return None
    if first.form == "multihead":
        return "a part is a whole attention; split it first"
    if len({type(module) for module in modules}) > 1 or len({(fact.form, fact.groups) for fact in facts}) > 1:
        kinds = ", ".join(f"{type(m).__name__} of {f.groups} groups" for m, f in zip(modules, facts, strict=True))
        return f"the parts are layers of different kinds ({kinds}); join those that are alike"
    if len({fact.has_bias for fact in facts}) > 1:
        return f"some of the parts have a bias, others not; only nn.Linear can be joined so, not {first.form} layers"
    shapes = {_without_rows(module, first.row_dim) for module in modules}
    return f"the weights of the parts differ in more than their rows: {sorted(shapes)}" if len(shapes) > 1 else None


def _without_rows(module: nn.Module, dim: int) -> tuple[int, ...]:
    """The shape of its weight but for the rows."""
    weight = module._parameters["weight"]
    assert weight is not None
    return tuple(size for place, size in enumerate(weight.shape) if place != dim)


def _kind_reason(tensors: Mapping[str, Tensor]) -> str | None:
    kinds = {(str(tensor.dtype), str(tensor.device)) for tensor in tensors.values()}
    if len(kinds) > 1:
        return f"the parts differ in type or device: {sorted(kinds)}; cast or move them first"
    if not same_flags(list(tensors.values())):
        frozen = [name for name, tensor in tensors.items() if not tensor.requires_grad]
        return f"some parts are frozen ({', '.join(frozen)}), others not; one joined weight cannot be both"
    return None


def _shared_reason(modules: Sequence[nn.Module]) -> str | None:
    if len({id(module) for module in modules}) < len(modules):
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


@dataclass(frozen=True)
class BuildJoinedLayer:
    """The same for parts that are no `nn.Linear`."""

    path: str
    name: str
    parts: tuple[str, ...]
    sizes: tuple[int, ...]
    groups: int
    row_dim: int
    axis: int

    def __call__(self, model: nn.Module) -> Placements:
        parent = submodule(model, self.path)
        old = parent.get_submodule(self.parts[0])
        how = {"groups": self.groups, "row_dim": self.row_dim, "axis": self.axis}
        joined, company = joined_layer(old, self.parts, self.sizes, **how)
        parts = join_parts(parent, self.name, joined, company)
        placements: Placements = {under(self.path, part): new.train(old.training) for part, new in parts.items()}
        return {**placements, under(self.path, self.name): joined}
