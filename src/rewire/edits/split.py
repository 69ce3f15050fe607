"""`Split`: a fused projection becomes its parts, each an `nn.Linear` of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from rewire import families
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
from rewire.surgery import Placements, Swap, submodule


def decide(edit: Split, number: int, matches: Sequence[Match], scene: Scene) -> Iterator[Outcome]:
    """One outcome per fused projection matched."""
    for match in matches:
        yield _decide(edit, number, match, scene)


def _decide(edit: Split, number: int, match: Match, scene: Scene) -> Outcome:
    module = match.module
    if module is None:
        return Refusal(match.path, "is a parameter; the target of a split is a linear module")
    linear = families.linear_facts(module)
    if isinstance(linear, str):
        return Refusal(match.path, linear)
    fused = families.fused_projection(
        scene.model, match.path, layout=edit.layout, into=edit.into, sizes=edit.sizes, groups=edit.groups
    )
    if isinstance(fused, families.Refusal):
        return Refusal(match.path, fused.reason)
    names = tensor_names(match.path, module)
    reason = tie_reason(scene, match, names) or _flags_reason(module)
    if reason:
        return Refusal(match.path, reason)
    parts, sizes = edit.into or fused.names, fused.sizes
    rule = split_rule(match.path, parts, sizes, fused.groups, bias=linear.has_bias, transposed=linear.transposed)
    build = BuildSplit(match.path, linear.in_features, tuple(parts), tuple(sizes), fused.groups, linear.has_bias)
    rows = ", ".join(f"{name} {size}" for name, size in zip(parts, sizes, strict=True))
    detail = f"{linear.out_features} rows → {rows} ({fused.layout}{', transposed' * linear.transposed})"
    aliases = dict.fromkeys(match.aliases, match.path)
    return swap_change(number, "split", match, detail, Swap(rule, build), alias_of=aliases)


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
