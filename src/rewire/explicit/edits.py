"""The edits of a resolved plan with nothing left open: every place named, every layout stated."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from rewire.edits.lora import AddAdapter
from rewire.explicit.globs import globs
from rewire.module_tree import skeleton
from rewire.plan import Cast, Edit, Freeze, Lora, Unfreeze
from rewire.resolve import Resolution
from rewire.surgery import Change, Swap


def explicit_edits(model: nn.Module, resolution: Resolution) -> list[Edit]:
    """Edits that do to `model` what the changes of `resolution` do.

    An edit becomes one for every glob and every layout that it needs. Those that came to nothing are left out.
    """
    edits: list[Edit] = []
    scene = skeleton(model)
    last = max((change.edit for change in resolution.changes), default=-1)
    for number, edit in enumerate(resolution.plan.edits):
        changes = [change for change in resolution.changes if change.edit == number]
        refused = any(one.edit == number and one.outcome == "refused" for one in resolution.decisions)
        if changes:
            edits += _explicit(edit, changes, scene, refused)
        for change in changes if number < last else ():
            change.surgeon(scene)
    return edits


def _explicit(edit: Edit, changes: Sequence[Change], scene: nn.Module, refused: bool) -> Iterator[Edit]:
    if isinstance(edit, Cast | Freeze | Unfreeze | Lora):
        yield _of_several_targets(edit, changes, scene, refused)
        return
    groups: dict[tuple[Any, ...], list[Change]] = {}
    for change in changes:
        groups.setdefault(tuple(change.settings.items()), []).append(change)
    for settings, alike in groups.items():
        for glob in _globs([change.path for change in alike], alike, scene):
            yield replace(edit, target=glob, optional=False, **dict(settings))


def _of_several_targets(
    edit: Cast | Freeze | Unfreeze | Lora, changes: Sequence[Change], scene: nn.Module, refused: bool
) -> Edit:
    """Edits that reach whatever a target matches keep their targets, unless these leave the places to detection."""
    if not (refused or any(target.structural for target in edit.targets)):
        return edit
    paths = [path for change in changes for path in _reached(change)]
    found = _globs(paths, changes, scene, parameters=not isinstance(edit, Lora))
    return replace(edit, target=found[0] if len(found) == 1 else tuple(found), optional=False)


def _reached(change: Change) -> Iterable[str]:
    """The modules that a change is about; that of an adapter is about several."""
    return change.surgeon.paths if isinstance(change.surgeon, AddAdapter) else (change.path,)


def _globs(paths: Sequence[str], changes: Sequence[Change], scene: nn.Module, *, parameters: bool = False) -> list[str]:
    """Globs for `paths` alone, though further names of the same modules may be matched too."""
    if "" in paths:  # the model itself: only its class tells it from what it holds
        rest = _globs([path for path in paths if path], changes, scene, parameters=parameters) if len(paths) > 1 else []
        return [f"**:{type(scene).__name__}", *rest]
    names: dict[str, Any] = dict(scene.named_modules(remove_duplicate=False))
    if parameters:
        names |= dict(scene.named_parameters(remove_duplicate=False))
    main = {other: change.path for change in changes for other in _twins(change)}
    return globs(paths, {name: id(names.get(main.get(name, name))) for name in names})


def _twins(change: Change) -> Collection[str]:
    """Where else the same is done because the tensors are the same."""
    return change.surgeon.twins.others if isinstance(change.surgeon, Swap) else ()


def same_changes(first: Resolution, second: Resolution) -> bool:
    """Whether two resolutions do the same, in whatever order."""
    first_done, second_done = ({(c.kind, c.path, c.rule) for c in one.changes} for one in (first, second))
    return first_done == second_done
