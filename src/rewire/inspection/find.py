"""Going through a model: what detection finds, and what resolving says about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from rewire import experts, families, linears
from rewire.inspection.packing import encoder_reports
from rewire.inspection.patterns import patterns, skeleton
from rewire.inspection.record import Family, Inspection
from rewire.inspection.tree import class_name, tree
from rewire.plan import Edit, Join, Plan, Split, Stack, Unstack
from rewire.receipts import Counts, edited
from rewire.resolve import resolve
from rewire.targets import Target


def inspect(model: nn.Module, *, pack: bool = False) -> Inspection:
    """Finds where `model` keeps its projections and what a plan could do with them; changes nothing.

    Only names, shapes and the configuration are looked at, so a model on meta of any size will do. With `pack` it is
    also found out which encoders can run without padding, on a small copy of the model, which takes seconds.

    >>> attention = nn.Module()
    >>> for name in ("q_proj", "k_proj", "v_proj"):
    ...     attention.add_module(name, nn.Linear(8, 8))
    >>> (family,) = inspect(nn.ModuleDict({"layers": nn.ModuleList([attention])})).families
    >>> family.kind, family.path
    ('separate attention', 'layers.0')
    >>> family.edit
    {'join': {'target': 'layers.0', 'parts': ['q_proj', 'k_proj', 'v_proj']}}
    """
    found = list(_decided(model, [*_fused(model), *_separate(model), *_experts(model)]))
    paths = [path for path, _ in model.named_modules()]
    state = edited(model)
    return Inspection(
        model=type(model).__name__,
        model_type=getattr(getattr(model, "config", None), "model_type", None) or None,
        counts=Counts.of(model),
        dtypes=_dtypes(model),
        families=tuple(_families(found, paths)),
        plan_hash=state.receipt.plan_hash if state else None,
        tree=tree(model, _notes(found)),
        encoders=encoder_reports(model) if pack else None,
    )


@dataclass(frozen=True)
class _Place:
    """One place, described as a family of its own."""

    path: str
    family: Family

    @property
    def key(self) -> tuple[str, str]:
        """Kind of the edit and path, as a decision has them."""
        edit = _edit(self.family, self.path)
        return edit.kind if edit else "", self.path

    @property
    def group(self) -> tuple[Any, ...]:
        """What places must have in common to be one family."""
        return skeleton(self.path), *vars(self.family).values()


def _fused(model: nn.Module) -> Iterator[_Place]:
    for found in families.fused_projections(model):
        owner, module = _around(model, found.path)
        if isinstance(found, families.Refusal):
            yield _Place(found.path, Family("fused", "", 1, module, owner, refusal=found.reason))
            continue
        linear = linears.linear_facts(model.get_submodule(found.path))
        assert not isinstance(linear, str)
        family = Family(
            kind=f"fused {found.kind}",
            path="",
            count=1,
            module=module,
            owner=owner,
            in_features=linear.in_features,
            parts=tuple(found.names),
            roles=tuple(found.roles),
            sizes=tuple(found.sizes),
            layout=found.layout,
            groups=found.groups,
            transposed=linear.transposed,
            evidence=tuple(found.evidence),
        )
        yield _Place(found.path, family)


def _around(model: nn.Module, path: str) -> tuple[str, str]:
    """Classes of the owner and of the module itself."""
    owner = model.get_submodule(path.rpartition(".")[0])
    return class_name(owner), class_name(model.get_submodule(path))


def _separate(model: nn.Module) -> Iterator[_Place]:
    for found in families.separate_projections(model):
        parent = model.get_submodule(found.path)
        seen = [linears.linear_facts(parent.get_submodule(part)) for part in found.parts]
        facts = [linear for linear in seen if not isinstance(linear, str)]
        family = Family(
            kind=f"separate {found.kind}",
            path="",
            count=1,
            module=class_name(parent.get_submodule(found.parts[0])),
            owner=class_name(parent),
            in_features=facts[0].in_features,
            parts=tuple(found.parts),
            roles=tuple(found.roles),
            sizes=tuple(fact.out_features for fact in facts),
            transposed=facts[0].transposed,
            evidence=tuple(found.evidence),
        )
        yield _Place(found.path, family)
    for refusal in families.separate_refusals(model):
        owner, module = _around(model, refusal.path)
        yield _Place(refusal.path, Family("separate", "", 1, module, owner, refusal=refusal.reason))


def _experts(model: nn.Module) -> Iterator[_Place]:
    """Experts, stacked or one module each."""
    for found in experts.stacked_experts(model):
        owner, module = _around(model, found.path)
        if isinstance(found, families.Refusal):
            yield _Place(found.path, Family("stacked experts", "", 1, module, owner, refusal=found.reason))
            continue
        family = _of_experts("stacked experts", module, owner, found.count, found.parts, found.evidence)
        first = found.weights[0]
        family = replace(family, in_features=first.in_features, transposed=first.transposed)
        yield _Place(found.path, family)
    for apart in experts.separate_experts(model):
        owner, module = _around(model, apart.path)
        if isinstance(apart, families.Refusal):
            yield _Place(apart.path, Family("separate experts", "", 1, module, owner, refusal=apart.reason))
            continue
        number = len(apart.experts)
        yield _Place(apart.path, _of_experts("separate experts", module, owner, number, apart.sizes, apart.evidence))


def _of_experts(
    kind: str, module: str, owner: str, number: int, sizes: Mapping[str, int], evidence: Sequence[str]
) -> Family:
    return Family(
        kind=kind,
        path="",
        count=1,
        module=module,
        owner=owner,
        parts=tuple(sizes),
        roles=tuple(part.removesuffix("_proj") for part in sizes),
        sizes=tuple(sizes.values()),
        evidence=tuple(evidence),
        experts=number,
    )


def _decided(model: nn.Module, places: Sequence[_Place]) -> Iterator[_Place]:
    """The places, with the refusals that carrying the edits out would meet with."""
    tried = _tried(places)
    together = _reasons(model, tried.values())
    alone = _reasons(model, [place for place in tried.values() if place.key in together]) if together else {}
    for place in places:
        key = tried[place.group].key if place.family.experts else place.key
        reason = place.family.refusal or alone.get(key)
        clashes = reason is None and key in together
        yield _Place(place.path, replace(place.family, refusal=reason, alone=clashes))


def _tried(places: Iterable[_Place]) -> dict[Any, _Place]:
    """The places to resolve edits for: all of them, but of experts that are alike in everything only the first.

    Thousands of experts would take long, and what may differ from layer to layer has been looked at by detection.
    """
    found: dict[Any, _Place] = {}
    for place in places:
        found.setdefault(place.group if place.family.experts else (place.path, place.family.parts), place)
    return found


def _reasons(model: nn.Module, places: Iterable[_Place]) -> dict[tuple[str, str], str]:
    """Kind of edit and path, with the reason why it would be refused."""
    edits = [edit for place in places if (edit := _edit(place.family, place.path)) is not None]
    plan = Plan([replace(edit, optional=True) for edit in edits])
    return {(d.kind, d.path): d.detail for d in resolve(model, plan).decisions if d.outcome == "refused"}


def _edit(family: Family, target: str) -> Edit | None:
    """What a plan could do with such projections."""
    if family.refusal is not None:
        return None
    if family.experts is not None:
        return Unstack(target) if family.kind == "stacked experts" else Stack(target)
    return Split(target, into=family.parts) if family.layout else Join(target, parts=family.parts)


def _families(places: Iterable[_Place], everything: Sequence[str]) -> Iterator[Family]:
    groups: dict[tuple[Any, ...], list[_Place]] = {}
    for place in places:
        groups.setdefault(place.group, []).append(place)
    for alike in groups.values():
        family, paths = alike[0].family, [place.path for place in alike]
        targets = patterns(paths, everything)
        for target in targets:
            edit = _edit(family, target)
            count = len(paths) if len(targets) == 1 else len(_covered(target, paths))
            yield replace(family, path=target, count=count, edit=edit.to_dict() if edit else None)


def _covered(target: str, paths: Iterable[str]) -> list[str]:
    return [path for path in paths if Target.parse(target).path_matches(path)]


def _notes(places: Iterable[_Place]) -> dict[str, str]:
    """What the tree says beside a module."""
    return {place.path: note(place.family) for place in places}


def note(family: Family) -> str:
    """A family in a few words.

    >>> note(Family("fused attention", "qkv", 1, "Linear", "", parts=("q", "k"), sizes=(4, 4), layout="stacked"))
    'fused attention: q 4, k 4 (stacked)'
    """
    if not family.parts:
        return f"{family.kind}, cannot be edited"
    parts = ", ".join(f"{part} {size}" for part, size in zip(family.parts, family.sizes, strict=True))
    number = f"{family.experts} × " if family.experts else ""
    return f"{family.kind}: {number}{parts}" + (f" ({family.layout})" if family.layout else "")


def _dtypes(model: nn.Module) -> tuple[str, ...]:
    sizes: Counter[str] = Counter()
    for parameter in model.parameters():
        sizes[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
    return tuple(dtype for dtype, _ in sizes.most_common())
