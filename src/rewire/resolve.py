"""A plan and a model become changes and refusals, before anything is changed.

Resolving carries every change out on a skeleton of the model (all tensors on meta), so that a later edit is
decided on what the earlier ones leave, and a plan that would fail half-way fails here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from rewire import encoders, experts, families, hf_seam
from rewire.edits import HANDLERS, Match, Refusal, Scene
from rewire.errors import NoMatchError, RefusedError
from rewire.module_tree import skeleton
from rewire.plan import Cast, Edit, Freeze, Join, Plan, Split, Stack, Unfreeze, Unstack
from rewire.receipts import Decision, summarise
from rewire.surgery import Change, Swap, Undo
from rewire.targets import Target
from rewire.tensor_rules import Rule


@dataclass(frozen=True)
class Resolution:
    """A plan, decided for one model."""

    plan: Plan
    changes: tuple[Change, ...]
    decisions: tuple[Decision, ...]
    done: tuple[Undo, ...] = ()
    """How to take the first changes back, where these were carried out on the model itself."""

    @property
    def rule(self) -> Rule:
        """The tensor steps of all changes, from the names before to the names after."""
        return tuple(step for change in self.changes for step in change.rule)


def resolve(
    model: nn.Module,
    plan: Plan,
    *,
    allow_code: bool = False,
    given_adapters: Collection[str] = (),
    rehearse: bool = True,
) -> Resolution:
    """Decides what `plan` does to `model`; changes nothing.

    Args:
        model: any model, also on meta.
        plan: what to do.
        allow_code: whether classes that the plan names by import path may be imported.
        given_adapters: adapters whose weights come from a file.
        rehearse: False for a model on meta that is thrown away if resolving fails: changes that are swaps of
            modules are then carried out on the model itself, up to the first that is not.

    Raises:
        NoMatchError: a target matches nothing and its edit is not optional.
        RefusedError: an edit would be wrong at a place that it matched; the message lists all such places.
        ConsentError: the plan names code and `allow_code` is false.
    """
    scene = Scene(
        skeleton(model) if rehearse else model,
        model,
        allow_code,
        frozenset(given_adapters),
        hf_seam.declared_ties(model),
    )
    changes: list[Change] = []
    decisions: list[Decision] = []
    done: list[Undo] = []
    for number, edit in enumerate(plan.edits):
        for decision, change in _decide(edit, number, scene):
            decisions.append(decision)
            if change is None:
                continue
            if scene.model is model and not isinstance(change.surgeon, Swap):
                scene.model = skeleton(model)
            undo = change.surgeon(scene.model)
            changes.append(change)
            done += [undo] if scene.model is model else []
    _fail_on_refusals(plan, decisions)
    return Resolution(plan, tuple(changes), tuple(decisions), tuple(done))


def _decide(edit: Edit, number: int, scene: Scene) -> Iterator[tuple[Decision, Change | None]]:
    target = written(edit)
    matches = _matches(edit, number, scene)
    if not matches:
        yield Decision(number, edit.kind, target, "", "unmatched", "no module matches"), None
        return
    for outcome in HANDLERS[type(edit)](edit, number, matches, scene):
        if isinstance(outcome, Refusal):
            reason = _with_history(outcome, scene)
            yield Decision(number, edit.kind, target, outcome.path, "refused", reason), None
            continue
        scene.edited[outcome.path] = f"edits[{number}] ({edit.kind})"
        yield Decision(number, edit.kind, target, outcome.path, "changed", outcome.detail), outcome


def _with_history(refusal: Refusal, scene: Scene) -> str:
    earlier = scene.edited.get(refusal.path)
    return f"{refusal.reason}; {earlier} of this plan changes it already" if earlier else refusal.reason


def written(edit: Edit) -> str:
    """The target or targets of an edit as text."""
    return edit.target if isinstance(edit.target, str) else ", ".join(edit.target)


def _matches(edit: Edit, number: int, scene: Scene) -> tuple[Match, ...]:
    found: dict[str, Match] = {}
    texts = (edit.target,) if isinstance(edit.target, str) else edit.target
    for text, target in zip(texts, edit.targets, strict=True):
        matches = tuple(_find(edit, target, scene))
        if not matches and not edit.optional:
            raise NoMatchError(_no_match_message(edit, number, text, target, scene))
        found |= {match.path: match for match in matches}
    return tuple(found.values())


def _find(edit: Edit, target: Target, scene: Scene) -> Iterator[Match]:
    if target.structural:
        wanted = _structural(edit, target, scene)
        yield from (match for match in _modules(scene.model) if match.path in wanted)
        return
    for match in _modules(scene.model):
        if any(map(target.path_matches, (match.path, *match.aliases))) and _class_matches(target, match):
            yield match
    if isinstance(edit, Freeze | Unfreeze | Cast) and target.class_glob is None:
        for name, _ in scene.model.named_parameters(remove_duplicate=False):
            if target.path_matches(name):
                yield Match(name, None)


def _class_matches(target: Target, match: Match) -> bool:
    return target.class_matches([cls.__name__ for cls in type(match.module).__mro__])


def _modules(model: nn.Module) -> Iterator[Match]:
    """Every module once, with all its paths."""
    paths: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
        modules[id(module)] = module
    for key, module in modules.items():
        first, *others = paths[key]
        yield Match(first, module, tuple(others))


def _structural(edit: Edit, target: Target, scene: Scene) -> set[str]:
    """The places that detection finds for `@attention` and the like."""
    if target.structural == "encoder":
        places = {stack.path for stack in encoders.packable(scene.model)}
    else:
        places = _experts(edit, scene) if target.structural == "experts" else _projections(edit, target, scene)
    return set(filter(target.path_matches, places))


def _projections(edit: Edit, target: Target, scene: Scene) -> set[str]:
    """For a split the fused projections themselves, for everything else the modules that hold projections."""
    found = [f for f in families.fused_projections(scene.model) if not isinstance(f, families.Refusal)]
    fused = {f.path for f in found if f.kind == target.structural}
    if isinstance(edit, Split):
        return fused
    separate = [s for s in families.separate_projections(scene.model) if s.kind == target.structural]
    if isinstance(edit, Join):
        return {s.path for s in separate if set(edit.parts) <= set(s.parts)}
    return {s.path for s in separate} | {f.owner for f in found if f.kind == target.structural}


def _experts(edit: Edit, scene: Scene) -> set[str]:
    """For an unstack the stacked experts, for a stack the separate ones, for everything else all of them."""
    stacked = () if isinstance(edit, Stack) else experts.stacked_experts(scene.model)
    separate = () if isinstance(edit, Unstack) else experts.separate_experts(scene.model)
    return {found.path for found in (*stacked, *separate) if not isinstance(found, families.Refusal)}


def _no_match_message(edit: Edit, number: int, text: str, target: Target, scene: Scene) -> str:
    paths = [path for path, _ in scene.model.named_modules(remove_duplicate=False) if path]
    nearest = target.nearest(paths)
    hint = "; the nearest existing paths are " + ", ".join(nearest) if nearest else ""
    return (
        f"edits[{number}] ({edit.kind}): target {text!r} matches no module of {type(scene.source).__name__}{hint}. "
        "`rewire inspect` lists what can be edited; `optional: true` lets an edit match nothing"
    )


def _fail_on_refusals(plan: Plan, decisions: Sequence[Decision]) -> None:
    refused = [d for d in decisions if d.outcome == "refused" and not plan.edits[d.edit].optional]
    if not refused:
        return
    places = f"{len(refused)} places" if len(refused) > 1 else "1 place"
    lines = [_refusal_line(decision, count) for decision, count in summarise(refused)]
    raise RefusedError("\n".join([f"the plan is refused at {places}; nothing was changed", *lines]))


def _refusal_line(decision: Decision, count: int) -> str:
    where = f"{decision.path} ({count} of them)" if count > 1 else decision.path or "the model"
    return f"  edits[{decision.edit}] ({decision.kind}) {where}: {decision.detail}"
