"""For a model, the plan of one kind of edit at every place where it can be made, and why not elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from rewire import experts, families
from rewire.plan import Edit, Join, Plan, Split, Stack, Unstack


@dataclass(frozen=True)
class Places:
    """Where an edit can be made.

    Attributes:
        plan: makes it at all of these places.
        count: how many places these are.
        modules: the modules that must run for a comparison of outputs to see the edit.
        attempt: the edit of one place, for those where it is refused.
        general: the same kind of edit at whatever detection finds.
        refusals: places where it is refused, with the reason.
        others: places that look alike and are something else, with the reason.
    """

    plan: Plan
    count: int
    modules: tuple[str, ...]
    attempt: Callable[[str], Edit]
    general: Plan
    refusals: tuple[families.Refusal, ...] = ()
    others: tuple[families.Refusal, ...] = ()


def split_places(model: nn.Module) -> Places:
    """Every fused projection."""
    found = families.fused_projections(model)
    fused = [one for one in found if isinstance(one, families.FusedProjection)]
    edits = [Split(one.path) for one in fused]
    general = [Split(target, optional=True) for target in ("@attention", "@mlp")]
    return _places(edits, [one.path for one in fused], Split, general, found)


def join_places(model: nn.Module) -> Places:
    """Every group of separate projections."""
    found = families.separate_projections(model)
    edits = [Join(one.path, parts=one.parts, name=_joined_name(one.parts)) for one in found]
    parts = [f"{one.path}.{part}" if one.path else part for one in found for part in one.parts]
    general = [
        Join("@attention", parts=("q_proj", "k_proj", "v_proj"), optional=True),
        Join("@mlp", parts=("gate_proj", "up_proj"), optional=True),
    ]
    return _places(edits, parts, _join_of(model), general, families.separate_refusals(model))


def _joined_name(parts: Sequence[str]) -> str:
    """A name that no other join in the same parent has."""
    return "joined_" + "_".join(parts).replace(".", "_")


def _join_of(model: nn.Module) -> Callable[[str], Edit]:
    """The join that somebody would try at a place where nothing can be joined: of all that is named like parts."""

    def attempt(path: str) -> Edit:
        children = [name for name, _ in model.get_submodule(path).named_children()]
        return Join(path, parts=(*children, "q_proj", "k_proj")[:3])

    return attempt


def unstack_places(model: nn.Module) -> Places:
    """Every module of stacked experts."""
    found = tuple(experts.stacked_experts(model))
    paths = [one.path for one in found if isinstance(one, experts.StackedExperts)]
    return _places([Unstack(path) for path in paths], paths, Unstack, [Unstack("@experts", optional=True)], found)


def stack_places(model: nn.Module) -> Places:
    """Every container of separate experts; and stacked ones, which are unstacked first."""
    stacked = [one.path for one in experts.stacked_experts(model) if isinstance(one, experts.StackedExperts)]
    found = tuple(experts.separate_experts(model))
    separate = [one for one in found if isinstance(one, experts.SeparateExperts)]
    paths = [*stacked, *(one.path for one in separate)]
    edits = [*map(Unstack, stacked), *map(Stack, paths)]
    inside = [f"{one.path}.{expert}" for one in separate for expert in one.experts]
    places = _places(edits, [*stacked, *inside], Stack, [Stack("@experts", optional=True)], found)
    return Places(places.plan, len(paths), places.modules, Stack, places.general, places.refusals, places.others)


def _places(
    edits: Sequence[Edit],
    modules: Iterable[str],
    attempt: Callable[[str], Edit],
    general: Sequence[Edit],
    found: Iterable[object],
) -> Places:
    refused = [one for one in found if isinstance(one, families.Refusal)]
    others = tuple(one for one in refused if one.is_other)
    refusals = tuple(one for one in refused if not one.is_other)
    return Places(Plan(edits), len(edits), tuple(modules), attempt, Plan(general), refusals, others)


PLACES: Mapping[str, Callable[[nn.Module], Places]] = {
    "split": split_places,
    "join": join_places,
    "unstack": unstack_places,
    "stack": stack_places,
}
"""For every edit, how its places are found."""
