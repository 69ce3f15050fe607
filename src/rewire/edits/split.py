"""`Split`: a fused projection becomes its parts, each a layer of its own: an `nn.Linear` in all but a few models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from torch import Tensor, nn

from rewire import families, linears
from rewire.edit_rules import multihead_rule, split_rule
from rewire.edits.base import (
    Match,
    Outcome,
    Refusal,
    Scene,
    same_flags,
    swap_change,
    tie_reason,
    twins_of,
)
from rewire.module_tree import split_path, submodule, under
from rewire.modules import SplitLayer, SplitMultiheadAttention, SplitProjection
from rewire.modules.rows import with_rows
from rewire.plan import Split
from rewire.surgery import Placements, Swap
from rewire.tensor_rules import Rule


def decide(edit: Split, number: int, matches: Sequence[Match], scene: Scene) -> Iterator[Outcome]:
    """One outcome per fused projection matched."""
    known: _Known = {}
    done: set[str] = set()
    for match in matches:
        if match.path in done:
            continue
        outcome = _decide(edit, number, match, scene, known)
        done.update(twins_of(outcome))
        yield outcome


_Known = dict[tuple[Any, ...], families.FusedProjection | families.Refusal]
"""What fused projections hold, for every kind of place: layers alike are looked at once."""


def _decide(edit: Split, number: int, match: Match, scene: Scene, known: _Known) -> Outcome:
    module = match.module
    if module is None:
        return Refusal(match.path, "is a parameter; the target of a split is a linear module")
    linear = linears.linear_facts(module)
    if isinstance(linear, str):
        return Refusal(match.path, linear)
    key = _kind_of_place(scene.model, match.path, linear)
    if key not in known:
        known[key] = _fused(edit, match.path, scene)
    fused = known[key]
    if isinstance(fused, families.Refusal):
        return Refusal(match.path, fused.reason)
    tensors = _row_tensors(module, linear)
    names = tuple(under(match.path, name) for name in tensors)
    twins = scene.twins(match, names)
    reason = (
        tie_reason(scene, match, names, twins) or _flags_reason(list(tensors.values())) or _names_reason(fused, linear)
    )
    if reason:
        return Refusal(match.path, reason)
    # In the order of the rows; names that say their role are put in order by detection.
    rows = ", ".join(f"{name} {size}" for name, size in zip(fused.names, fused.sizes, strict=True))
    detail = f"{linear.out_features} rows → {rows} ({fused.layout}{', transposed' * linear.transposed})"
    aliases = dict.fromkeys(match.aliases, match.path)
    swap = Swap(_rule(match.path, fused, linear), _build(match.path, fused, linear))
    found = {"into": fused.names, "layout": fused.layout, "sizes": fused.sizes}
    settings = found | ({"groups": fused.groups} if fused.groups > 1 else {})
    return swap_change(number, "split", match, detail, swap, alias_of=aliases, twins=twins, settings=settings)


def _row_tensors(module: nn.Module, linear: linears.LinearFacts) -> dict[str, Tensor]:
    """The tensors whose rows are dealt out."""
    prefix = "in_proj_" if linear.form == "multihead" else ""
    found = {f"{prefix}{leaf}": module._parameters.get(f"{prefix}{leaf}") for leaf in ("weight", "bias")}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _rule(path: str, fused: families.FusedProjection, linear: linears.LinearFacts) -> Rule:
    if linear.form == "multihead":
        return multihead_rule(path, fused.names, fused.sizes, bias=linear.has_bias)
    how = {"bias": linear.has_bias, "transposed": linear.transposed}
    return split_rule(path, fused.names, fused.sizes, fused.groups, **how, dim=linear.row_dim)


def _build(
    path: str, fused: families.FusedProjection, linear: linears.LinearFacts
) -> Callable[[nn.Module], Placements]:
    if linear.form == "multihead":
        return BuildMultihead(path, fused.names)
    if linear.form == "linear":
        return BuildSplit(path, linear.in_features, fused.names, fused.sizes, fused.groups, linear.has_bias)
    return BuildLayer(path, fused.names, fused.sizes, fused.groups, linear.row_dim, linear.axis)


def _kind_of_place(model: nn.Module, path: str, linear: linears.LinearFacts) -> tuple[Any, ...]:
    """Equal for places that must hold the same: alike in path, owner, the owner's numbers, and size."""
    owner = submodule(model, split_path(path)[0])
    numbers = tuple(
        (name, value)
        for name, value in vars(owner).items()
        if isinstance(value, int | float | str) and "idx" not in name and "index" not in name
    )
    pattern = tuple("*" if part.isdigit() else part for part in path.split("."))
    return pattern, type(owner), id(vars(owner).get("config")), numbers, linear


def _fused(edit: Split, path: str, scene: Scene) -> families.FusedProjection | families.Refusal:
    stated = families.fused_projection(
        scene.model, path, layout=edit.layout, into=edit.into, sizes=edit.sizes, groups=edit.groups
    )
    if edit.layout == "auto" or isinstance(stated, families.Refusal):
        return stated
    return _contradiction(stated, families.known_projection(scene.model, path)) or stated


def _contradiction(stated: families.FusedProjection, known: families.FusedProjection | None) -> families.Refusal | None:
    """Why what the plan states cannot be, where the family is known. A coarser or finer cut is no contradiction."""
    if known is None:
        return None
    swapped = stated.roles != known.roles and sorted(stated.roles) == sorted(known.roles)
    if stated.groups == known.groups and _nested(_cuts(stated), _cuts(known)) and not swapped:
        return None
    return families.Refusal(
        stated.path,
        f"the plan states {_in_words(stated)}, but it holds {_in_words(known)}: {'; '.join(known.evidence)}; the parts "
        "would not be what they are called. Leave layout, sizes and groups out",
    )


def _cuts(fused: families.FusedProjection) -> set[int]:
    return set(accumulate(size // fused.groups for size in fused.sizes))


def _nested(first: set[int], second: set[int]) -> bool:
    return first <= second or second <= first


def _in_words(fused: families.FusedProjection) -> str:
    sizes = ", ".join(f"{role} {size}" for role, size in zip(fused.roles, fused.sizes, strict=True))
    return f"{fused.layout} rows ({sizes} in {fused.groups} group{'s' * (fused.groups > 1)})"


def _flags_reason(tensors: Sequence[Tensor]) -> str | None:
    if same_flags(tensors):
        return None
    return "weight and bias are not both trainable or both frozen; make them alike, split, then freeze the parts"


def _names_reason(fused: families.FusedProjection, linear: linears.LinearFacts) -> str | None:
    """Why the parts cannot be called so: they stand beside what an attention has already."""
    taken = {"out_proj", "bias_k", "bias_v"} & set(fused.names) if linear.form == "multihead" else set()
    return f"into names a part {min(taken)!r}, which an nn.MultiheadAttention has already" if taken else None


@dataclass(frozen=True)
class BuildSplit:
    """Makes the split projection that stands in for the linear at `path`."""

    path: str
    in_features: int
    parts: tuple[str, ...]
    sizes: tuple[int, ...]
    groups: int
    bias: bool

    def __call__(self, model: nn.Module) -> Placements:
        old = submodule(model, self.path)
        weight = next(old.parameters())
        new = SplitProjection(
            self.in_features,
            self.parts,
            self.sizes,
            self.groups,
            self.bias,
            device="meta",
            dtype=weight.dtype,
        )
        return {self.path: new.requires_grad_(weight.requires_grad).train(old.training)}


@dataclass(frozen=True)
class BuildLayer:
    """Makes what stands in for a fused layer at `path` that is no `nn.Linear`."""

    path: str
    parts: tuple[str, ...]
    sizes: tuple[int, ...]
    groups: int
    row_dim: int
    axis: int

    def __call__(self, model: nn.Module) -> Placements:
        old = submodule(model, self.path)
        parts = {name: with_rows(old, size, self.row_dim) for name, size in zip(self.parts, self.sizes, strict=True)}
        new = SplitLayer(parts, self.groups, self.row_dim, self.axis)
        return {self.path: new.train(old.training)}


@dataclass(frozen=True)
class BuildMultihead:
    """Makes what stands in for the `nn.MultiheadAttention` at `path`."""

    path: str
    parts: tuple[str, ...]

    def __call__(self, model: nn.Module) -> Placements:
        old = submodule(model, self.path)
        assert isinstance(old, nn.MultiheadAttention)
        new = SplitMultiheadAttention(old, self.parts)
        new.training = old.training
        for name in self.parts:
            new.get_submodule(name).requires_grad_(old.in_proj_weight.requires_grad).train(old.training)
        return {self.path: new}
