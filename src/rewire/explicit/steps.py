"""The tensor steps of a resolved plan, for the tensors that a checkpoint really holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from torch import nn

from rewire import hf_seam
from rewire.errors import CheckpointError
from rewire.explicit.origins import Origin
from rewire.surgery import Change
from rewire.tensor_rules import KEPT, Cast, Rename, Rule, Step, with_names


def stored_steps(changes: Iterable[Change], origin: Origin) -> Rule:
    """The steps of `changes` on the tensors that are stored.

    A tensor with several names is stored under one of them; steps on the others fall away. Adapters change no
    stored tensor. Casts start from the type that is stored, and those to it fall away too.

    Raises `CheckpointError` where a tensor that the plan changes is not there under any name.
    """
    dtypes = origin.read_dtypes
    steps, absent = present(base_steps(changes), dtypes)
    _check_absent(absent, origin)
    return tuple(_with_stored_types(steps, dtypes))


def base_steps(changes: Iterable[Change]) -> Rule:
    """The steps of `changes` as they would be if no adapter were put on meanwhile."""
    steps: list[Step] = []
    plain: dict[str, str] = {}
    for change in changes:
        if change.kind == "lora":
            plain |= {step.outputs[0]: plain.get(step.inputs[0], step.inputs[0]) for step in change.rule}
        else:
            steps += [with_names(step, _renaming(plain)) for step in change.rule]
    return tuple(steps)


def _renaming(names: Mapping[str, str]) -> Callable[[str], str]:
    return lambda name: names.get(name, name)


def present(steps: Iterable[Step], names: Iterable[str]) -> tuple[Rule, tuple[str, ...]]:
    """Those of `steps` whose tensors are there, given the names before, and the names that others would take.

    Raises `CheckpointError` for a step some of whose tensors are there and some not.

    >>> present((Rename("a", "b"), Rename("c", "d"), Rename("b", "e")), ["c"])
    ((Rename(source='c', target='d'),), ('a', 'b'))
    """
    there = set(names)
    kept: list[Step] = []
    absent: list[str] = []
    for step in steps:
        missing = [name for name in step.inputs if name not in there and not name.startswith(KEPT)]
        if missing and len(missing) < len(step.inputs):
            raise CheckpointError(
                f"the checkpoint lacks {_some(missing)}, without which {step.inputs[0]} cannot be edited"
            )
        if missing:
            absent += missing
            continue
        kept.append(step)
        there = (there - set(step.inputs)) | set(step.outputs)
    return tuple(kept), tuple(absent)


def _check_absent(absent: Sequence[str], origin: Origin) -> None:
    names = _other_names(origin.model)
    stored = set(origin.read_dtypes)
    lost = [name for name in absent if name in names and not names[name] & stored]
    if lost:
        raise CheckpointError(
            f"the checkpoint has no {_some(lost)}, which the plan changes; resolve the plan for the whole checkpoint, "
            "or leave these out of its targets"
        )


def _other_names(model: nn.Module) -> dict[str, set[str]]:
    """Every stored tensor of `model`, with all names that it has."""
    by_id: dict[int, set[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        by_id.setdefault(id(tensor), set()).add(name)
    names = {name: group for group in by_id.values() for name in group}
    for name, others in hf_seam.declared_ties(model).items():
        names[name] = names.get(name, {name}).union(*(names.get(other, {other}) for other in others))
    return names


def _with_stored_types(steps: Iterable[Step], dtypes: Mapping[str, str | None]) -> Iterator[Step]:
    current = dict(dtypes)
    for step in steps:
        before = [current.pop(name) for name in step.inputs if name in current]
        dtype = before[0] if before else None
        if isinstance(step, Cast):
            step, dtype = replace(step, from_dtype=dtype or step.from_dtype), step.dtype
        current |= dict.fromkeys(step.outputs, dtype)
        if not isinstance(step, Cast) or step.dtype != step.from_dtype:
            yield step
        elif step.source != step.target:
            yield Rename(step.source, step.target)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f", … ({len(names)})" if len(names) > 4 else "")
