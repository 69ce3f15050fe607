"""Resolves a plan for a checkpoint, so that it can be carried out without the model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from rewire import hf_conversions, hf_seam
from rewire.artefact import Record, read_record
from rewire.checkpoint import open_checkpoint
from rewire.errors import CheckpointError, ResolveError, RevertError
from rewire.explicit.edits import explicit_edits, same_changes
from rewire.explicit.origins import Origin, on_meta, open_origin, run_dtypes
from rewire.explicit.steps import base_steps, present, stored_steps
from rewire.module_tree import skeleton
from rewire.plan import Edit, FrozenMapping, Plan, Resolved
from rewire.resolve import Resolution, resolve
from rewire.step_patterns import compress
from rewire.tensor_rules import Cast, Drop, KeepRows, Rule, invert, run_shapes


def resolve_plan(plan: Plan | Edit, source: str | os.PathLike[str] | Any, *, allow_code: bool = False) -> Plan:
    """The plan as it is for one model, with all that was left to detection stated, and the tensor steps it comes to.

    Nothing is loaded but configuration and headers; the model is built without weights.

    Args:
        plan: a plan, or a single edit. A plan of tensor steps alone (no edits) comes back as it is.
        source: a checkpoint folder; `config:TYPE` or a configuration (the tensors are then those that Transformers
            would write for it); or a model's name on the Hub.
        allow_code: whether classes that the plan names by import path may be imported and run.

    Returns:
        A plan whose edits do the same to the model, with globs that match the places changed and no others, and
        whose `resolved` holds the steps. Its own hash differs from that of `plan`, which `resolved.plan` keeps.

    Raises:
        ResolveError: as for `rewire.apply_`.
        CheckpointError: the checkpoint lacks tensors that the plan changes, or does not fit its configuration.

    >>> from rewire.plan import Split
    >>> plan = resolve_plan(Split("@attention"), "config:gpt2")
    >>> plan.edits[0]
    Split(target='h.*.attn.c_attn', into=('q_proj', 'k_proj', 'v_proj'), layout='stacked', sizes=(768, 768, 768))
    >>> [(step["step"], step["each"]) for step in plan.resolved.steps]
    [('transpose', ('0..11',)), ('split', ('0..11',)), ('split', ('0..11',))]
    """
    plan = plan if isinstance(plan, Plan) else Plan([plan])
    if not plan.edits and plan.resolved is not None:
        return plan
    origin = open_origin(source)
    resolution = resolve(origin.model, plan, allow_code=allow_code)
    edits = explicit_edits(origin.model, resolution)
    _check_same(origin.model, edits, resolution, allow_code)
    steps = stored_steps(resolution.changes, origin)
    resolved = Resolved(
        model=type(origin.model).__name__,
        plan=(plan.resolved and plan.resolved.plan) or plan.hash,
        reading=_records(origin.reading),
        steps=_records(steps),
        config=FrozenMapping(_config_values(origin, resolution, steps)),
    )
    return Plan(edits, plan.name, plan.description, resolved)


def _records(rule: Rule) -> tuple[FrozenMapping, ...]:
    return tuple(map(FrozenMapping, compress(rule)))


def _check_same(model: nn.Module, edits: list[Edit], resolution: Resolution, allow_code: bool) -> None:
    """The explicit plan is what `rewire.load` will carry out on the result, so it has to do the same."""
    again = resolve(model, Plan(edits), allow_code=allow_code)
    if not same_changes(resolution, again):
        raise ResolveError(
            "the plan made explicit would do something else than the plan; that is a mistake of Rewire, please report "
            "it. Until it is mended, name the places of every edit by their paths"
        )


def _config_values(origin: Origin, resolution: Resolution, steps: Rule) -> dict[str, Any]:
    """Values of `config.json` that are others now: the type of the model, which is that of its first parameter."""
    if not any(isinstance(step, Cast) for step in steps):
        return {}
    edited = skeleton(origin.model)
    for change in resolution.changes:
        change.surgeon(edited)
    dtypes = run_dtypes(steps, origin.read_dtypes)
    names = (name for name, parameter in edited.named_parameters() if parameter.is_floating_point())
    after = next((dtypes[name] for name in names if dtypes.get(name)), None)
    before = str(origin.model.config.dtype).removeprefix("torch.")
    return {origin.dtype_key: after} if after and after != before else {}


def written_rule(folder: str | os.PathLike[str], record: Record | None = None, *, allow_code: bool = False) -> Rule:
    """The steps that lead from a checkpoint of the untouched model to the tensors of an edited folder.

    For folders that `rewire.save(model, folder, layout="edited")` wrote; one whose plan is resolved says it itself.
    Casts are left out, as they stay when a model is saved in its original layout.

    Args:
        folder: the edited folder.
        record: what its `rewire.json` says, if it was read already.
        allow_code: whether classes that the plan names by import path may be imported and run.

    Raises:
        RevertError: the plan dropped tensors, so that there is no way back.
        CheckpointError: the folder is not in the edited layout.
    """
    folder = Path(folder)
    record = record or read_record(folder)
    if record is None or record.layout != "edited":
        raise CheckpointError(f"{folder} is not in the edited layout, so nothing leads to it")
    plan = Plan.from_dict(record.plan)
    shapes = {name: info.shape for name, info in open_checkpoint(folder).tensors.items()}
    model = on_meta(hf_seam.read_config(folder))
    changes = resolve(model, plan, allow_code=allow_code).changes
    steps = tuple(step for step in base_steps(changes) if not isinstance(step, Cast))
    if lost := [step.source for step in steps if isinstance(step, Drop | KeepRows)]:
        raise RevertError(f"{folder} cannot be brought back: its plan dropped (parts of) {', '.join(lost[:4])}")
    back, _ = present(invert(steps), shapes)
    known = set(model.state_dict())
    before = {name: shape for name, shape in run_shapes(back, shapes).items() if name in known}
    return (*invert(hf_conversions.writing_rule(model, before)), *invert(back))
