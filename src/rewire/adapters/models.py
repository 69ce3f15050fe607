"""The model that an adapter or a run belongs to, without weights, before and after the edits."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from rewire import hf_seam
from rewire.errors import CheckpointError, ResolveError
from rewire.module_tree import skeleton
from rewire.plan import Freeze, Lora, Plan, Unfreeze
from rewire.receipts import edited
from rewire.resolve import resolve
from rewire.tensor_rules import Rule

Model = str | os.PathLike[str] | nn.Module
"""A folder, a name on the Hub, or an untouched model."""


@dataclass(frozen=True)
class Edited:
    """A model before and after a plan, both on meta, and the rule from its tensors before to those after."""

    before: nn.Module
    after: nn.Module
    rule: Rule
    name: str


def edit(model: nn.Module, plan: Plan, *, allow_code: bool = False) -> Edited:
    """Resolves `plan` for `model` and carries it out on a copy without weights.

    Adapters that the plan adds, and what it freezes, are left out: they store nothing of the model.
    """
    kept = Plan([edit for edit in plan.edits if not isinstance(edit, Lora | Freeze | Unfreeze)])
    before = skeleton(model)
    resolution = resolve(before, kept, allow_code=allow_code)
    after = skeleton(before)
    for change in resolution.changes:
        change.surgeon(after)
    return Edited(before, after, resolution.rule, type(model).__name__)


def find(
    model: Model, hints: Mapping[str, Any], plan: Plan, fits: Callable[[Edited], str | None], *, allow_code: bool
) -> Edited:
    """The model of the class that `fits`, edited.

    Args:
        model: what to make it of.
        hints: `adapter_config.json`, which may name the class or the task.
        plan: the edits.
        fits: says of a model what is wrong with it; None if it is the right one.
        allow_code: as for `rewire.apply_`.

    Raises:
        CheckpointError: no class fits; with what is wrong with the first.
        ResolveError: the plan does not fit.
    """
    problems: list[Exception] = []
    for candidate in _candidates(model, hints):
        try:
            found = edit(candidate, plan, allow_code=allow_code)
        except ResolveError as error:
            problems.append(error)
            continue
        problem = fits(found)
        if problem is None:
            return found
        problems.append(CheckpointError(problem))
    raise next((one for one in problems if isinstance(one, ResolveError)), problems[0])


def _candidates(model: Model, hints: Mapping[str, Any]) -> Iterator[nn.Module]:
    if isinstance(model, nn.Module):
        if edited(model) is not None:
            raise ResolveError("the model is edited already; give the untouched one, without weights if you like")
        yield model
        return
    config = hf_seam.read_config(model)
    mapping = hints.get("auto_mapping") or {}
    names = [
        mapping.get("base_model_class"),
        hf_seam.task_architecture(config, hints.get("task_type")),
        *(config.architectures or ()),
    ]
    known = [name for name in dict.fromkeys(names) if name and hf_seam.is_model_class(name)]
    for name in [*known, None]:
        built = hf_seam.build(config, architecture=name, meta=True)
        built.tie_weights()
        yield built
