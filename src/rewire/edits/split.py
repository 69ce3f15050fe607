"""`Split`: a fused projection becomes its parts, each an `nn.Linear` of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from torch import nn

from rewire import families, linears
from rewire.edit_rules import split_rule
from rewire.edits.base import (
    Match,
    Outcome,
    Refusal,
    Scene,
    same_flags,
    swap_change,
    tensor_names,
    tie_reason,
)
from rewire.modules import SplitProjection
from rewire.plan import Split
from rewire.surgery import Placements, Swap, split_path, submodule


def decide(edit: Split, number: int, matches: Sequence[Match], scene: Scene) -> Iterator[Outcome]:
    """One outcome per fused projection matched."""
    known: _Known = {}
    for match in matches:
        yield _decide(edit, number, match, scene, known)


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
    names = tensor_names(match.path, module)
    reason = tie_reason(scene, match, names) or _flags_reason(module)
    if reason:
        return Refusal(match.path, reason)
    # In the order of the rows; names that say their role are put in order by detection.
    parts, sizes = fused.names, fused.sizes
    rule = split_rule(match.path, parts, sizes, fused.groups, bias=linear.has_bias, transposed=linear.transposed)
    build = BuildSplit(match.path, linear.in_features, tuple(parts), tuple(sizes), fused.groups, linear.has_bias)
    rows = ", ".join(f"{name} {size}" for name, size in zip(parts, sizes, strict=True))
    detail = f"{linear.out_features} rows → {rows} ({fused.layout}{', transposed' * linear.transposed})"
    aliases = dict.fromkeys(match.aliases, match.path)
    return swap_change(number, "split", match, detail, Swap(rule, build), alias_of=aliases)


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


def _flags_reason(module: nn.Module) -> str | None:
    if same_flags(list(module.parameters())):
        return None
    return "weight and bias are not both trainable or both frozen; make them alike, split, then freeze the parts"


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
