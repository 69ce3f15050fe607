"""A tensor rule, run on what an adapter holds instead of on the tensors themselves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from rewire.adapters.lowrank import LowRank, cannot, cut, join
from rewire.errors import RefusedError, RuleError
from rewire.tensor_rules import (
    Cast,
    CastBack,
    Drop,
    JoinRows,
    Rename,
    Restore,
    RestoreRows,
    Stack,
    Step,
    run,
    visible,
)

Held = LowRank | Tensor
"""What an adapter holds of a tensor: a change of low rank, or the whole trained tensor."""


def advance(rule: Iterable[Step], held: Mapping[str, Held], what: str = "adapter") -> dict[str, Held]:
    """What an adapter (or an optimizer) holds after `rule`, by the names after it.

    Steps on tensors of which it holds nothing are passed over. Raises `RefusedError`, naming the step and its
    tensors, where there is nothing that does exactly the same afterwards.
    """
    current = dict(held)
    for step in rule:
        inputs = {name: current.pop(name) for name in step.inputs if name in current}
        if not inputs:
            continue
        try:
            current.update(_after(step, inputs))
        except RuleError as error:
            raise RefusedError(f"the {what} cannot be carried across this plan: {error}. Nothing was written") from None
    return current


def _after(step: Step, inputs: Mapping[str, Held]) -> Mapping[str, Held]:
    changes = {name: one for name, one in inputs.items() if isinstance(one, LowRank)}
    if not changes:
        return _whole(step, {name: one for name, one in inputs.items() if isinstance(one, Tensor)})
    if len(changes) < len(inputs):
        raise cannot(step, "puts together a tensor that was trained as a whole and one changed by low rank")
    return _changed(step, changes)


def _changed(step: Step, changes: Mapping[str, LowRank]) -> Mapping[str, LowRank]:
    first = next(iter(changes.values()))
    match step:
        case Rename() | Cast() | CastBack():  # an adapter has a type of its own
            return {step.target: first}
        case JoinRows() | Stack():
            return {step.whole: join(step, changes)}
        case Drop() | RestoreRows() | Restore():
            raise cannot(step, _LOSSY[step.kind])
        case _:
            return cut(step, first)  # type: ignore[arg-type]  # the steps are a closed set


_LOSSY = {
    "drop": "drops a tensor that the adapter changes; take it out of the adapter first",
    "restore_rows": "brings rows back whose changes the adapter does not have; use the adapter as it was trained",
    "restore": "brings a tensor back whose changes the adapter does not have",
}


def _whole(step: Step, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    match step:
        case Rename() | Cast() | CastBack():
            return {step.target: next(iter(tensors.values()))}
        case Drop() | RestoreRows() | Restore():
            raise cannot(step, _LOSSY[step.kind])
    missing = [name for name in step.inputs if name not in tensors]
    if missing:
        raise cannot(step, f"needs what was trained of all parts; there is nothing of {', '.join(missing[:3])}")
    return visible(run((step,), tensors, torch))
