"""What is to be done to a checkpoint: the rule that a plan, or the record of an edited folder, comes to.

Nothing here reads a tensor, and nothing imports torch unless a plan is not resolved yet.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewire.artefact import ADAPTERS, Record, read_record
from rewire.errors import CheckpointError, PlanError, ResolveError, RevertError
from rewire.step_patterns import expand
from rewire.tensor_rules import KEPT, Cast, Drop, KeepRows, Rename, Rule, Step, invert

if TYPE_CHECKING:
    from rewire.plan import Plan

SHOWN = 4
"""How many names a message lists."""


@dataclass(frozen=True)
class Task:
    """A rule and what belongs to it.

    Attributes:
        rule: from the tensors of the source to those of the result.
        identity: stands for the plan and the direction; equal on all machines.
        plan: the plan, resolved.
        revert: whether this is the way back.
        config: values of `config.json` to set.
        unset: keys of `config.json` to take out.
        passed_over: reading steps left out because the checkpoint does not hold what they rename.
        losses: steps whose input cannot be had back from the result, as sentences.
        signature: of the tensors that the way back has to lead to, where it is known.
    """

    rule: Rule = field(repr=False)
    identity: str
    plan: Plan
    revert: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)
    unset: tuple[str, ...] = ()
    passed_over: tuple[str, ...] = ()
    losses: tuple[str, ...] = ()
    signature: str | None = None


def make_task(source: Path, names: Iterable[str], plan: Plan | None, *, revert: bool, allow_code: bool) -> Task:
    """What `plan`, or the way back, means for a folder with tensors of these names.

    Raises:
        PlanError: there is no plan, or it has nothing to do.
        ResolveError: the plan does not fit the checkpoint.
        RevertError: the folder cannot be brought back.
        CheckpointError: the folder holds what this command does not convert.
    """
    record = read_record(source)
    _check_adapters(source, record, revert)
    if revert:
        return _backward(source, record, plan, allow_code)
    if record is not None and record.layout == "edited":
        raise CheckpointError(
            f"{source} was edited already (rewire.json). Bring it back first (revert=True, --revert) and convert the "
            "original with one plan that holds all edits"
        )
    return _forward(source, names, plan, allow_code)


def check_names(names: Iterable[str], source: Path) -> None:
    """Raises `CheckpointError` for names that mean something else to the steps of a rule."""
    if aside := [name for name in names if name.startswith(KEPT)]:
        raise CheckpointError(
            f"{source} holds tensors whose names begin with {KEPT}, which stands for what an edit puts aside: "
            f"{some(aside)}. Rename them first"
        )


def some(names: Sequence[str]) -> str:
    """A few of the names, and how many there are.

    >>> some(["a", "b"]), some(list("abcdef"))
    ('a, b', 'a, b, c, d, … (6)')
    """
    return ", ".join(names[:SHOWN]) + (f", … ({len(names)})" if len(names) > SHOWN else "")


def _check_adapters(source: Path, record: Record | None, revert: bool) -> None:
    folder = source / ADAPTERS
    found = [path.name for path in (folder, source / "adapter_config.json") if path.exists()]
    if found or (record is not None and record.adapters):
        shown = found[0] if found else ", ".join(record.adapters if record else ())
        way = "save the model with merge_adapters=True" if revert else "carry them across (rewire adapters)"
        raise CheckpointError(
            f"{source} holds adapters ({shown}), which fit the model as it is and not as it will be; take them out of "
            f"the folder, and {way}"
        )


# ---------------------------------------------------------------- there


def _forward(source: Path, names: Iterable[str], plan: Plan | None, allow_code: bool) -> Task:
    if plan is None or not (plan.edits or plan.resolved):
        raise PlanError("there is no plan, so there is nothing to do; give one (plan=…, --plan FILE)")
    if plan.resolved is None:
        from rewire.explicit import resolve_plan

        plan = resolve_plan(plan, source, allow_code=allow_code)
    assert plan.resolved is not None
    reading, passed_over = present(expand(plan.resolved.reading), names)
    rule = (*reading, *expand(plan.resolved.steps))
    return Task(
        rule,
        _identity(plan, revert=False),
        plan,
        config=_plain(plan.resolved.config),
        passed_over=passed_over,
        losses=tuple(losses(rule)),
    )


def _identity(plan: Plan, *, revert: bool) -> str:
    said = {"edits": plan.hash, "resolved": plan.resolved.hash if plan.resolved else "", "revert": revert}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode("ascii")).hexdigest()


def present(reading: Rule, names: Iterable[str]) -> tuple[Rule, tuple[str, ...]]:
    """`reading` without the renamings of tensors that are not there (tied ones are stored once), and their names.

    >>> present((Rename("a", "b"), Rename("b", "c"), Rename("x", "y")), ["x"])
    ((Rename(source='x', target='y'),), ('a', 'b'))
    """
    there, kept, absent = set(names), [], []
    for step in reading:
        if isinstance(step, Rename) and step.source not in there:
            absent.append(step.source)
            continue
        kept.append(step)
        there -= set(step.inputs)
        there |= set(step.outputs)
    return tuple(kept), tuple(absent)


def check_sources(rule: Rule, names: Iterable[str], source: Path) -> None:
    """Raises `ResolveError` where steps take tensors that are not there; it names all such tensors."""
    there, absent = set(names), []
    for step in rule:
        if not (step.inputs and step.outputs) and not isinstance(step, Drop):
            raise ResolveError(f"{step.kind} {', '.join((*step.inputs, *step.outputs))}: it names no parts")
        absent += [name for name in step.inputs if name not in there]
        there -= set(step.inputs)
        there |= set(step.outputs)
    if any(name.startswith(KEPT) for name in absent):
        raise ResolveError(
            "the plan holds steps that bring back what others put aside; a checkpoint keeps nothing aside"
        )
    if absent:
        raise ResolveError(
            f"the plan takes {len(absent)} tensor{'s' * (len(absent) != 1)} that {source} does not hold: "
            f"{some(absent)}. It was resolved for another model or another layout of its checkpoint; resolve it for "
            "this one (rewire plan resolve)"
        )


def losses(rule: Rule) -> Iterator[str]:
    """What the result of a rule no longer holds, one sentence for each kind of loss.

    >>> list(losses((Drop("a"), Drop("b"), Cast("c", "c", "float32", "bfloat16"))))
    ['drop: a, b']
    """
    found: dict[str, list[str]] = {}
    for step in rule:
        if isinstance(step, Drop | KeepRows) or (isinstance(step, Cast) and not step.exact):
            kind = f"{step.kind} to {step.dtype}" if isinstance(step, Cast) else step.kind
            found.setdefault(kind, []).append(step.inputs[0])
    yield from (f"{kind}: {some(names)}" for kind, names in found.items())


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    from rewire.plan.data import thaw

    plain: dict[str, Any] = thaw(values)
    return plain


# ---------------------------------------------------------------- and back


def _backward(source: Path, record: Record | None, plan: Plan | None, allow_code: bool) -> Task:
    from rewire.plan import Plan

    if record is None or record.layout != "edited":
        raise RevertError(
            f"{source} is in its original layout already"
            if record
            else f"{source} has no record of an edit (rewire.json), so there is nothing to bring back"
        )
    recorded = Plan.from_dict(record.plan)
    origin = None if recorded.resolved is None else recorded.resolved.plan
    if plan is not None and plan.hash not in (recorded.hash, origin):
        raise RevertError(f"{source} was edited by another plan than the one given; leave the plan out")
    forward, before = recorded_rule(recorded, record, source, allow_code)
    if lost := list(losses(forward)):
        raise RevertError(f"{source} cannot be brought back, because the edit lost something: {'; '.join(lost)}")
    rule = invert(forward)
    return Task(
        rule,
        _identity(recorded, revert=True),
        recorded,
        revert=True,
        config=before.get("set", {}),
        unset=tuple(map(str, before.get("unset", ()))),
        signature=said_of(record).get("signature"),
    )


def recorded_rule(plan: Plan, record: Record, source: Path, allow_code: bool) -> tuple[Rule, Mapping[str, Any]]:
    """The rule that made an edited folder out of its source, and what `config.json` held before."""
    if plan.resolved is None:
        from rewire.explicit import written_rule

        return written_rule(source, record, allow_code=allow_code), {}
    said = said_of(record)
    skipped, before = said.get("passed_over", []), said.get("config_before", {})
    if not (isinstance(skipped, list) and isinstance(before, Mapping) and isinstance(before.get("set", {}), Mapping)):
        raise CheckpointError(f"rewire.json of {source} is damaged: what it says of its conversion cannot be read")
    reading = (step for step in expand(plan.resolved.reading) if not _is_skipped(step, skipped))
    return (*reading, *expand(plan.resolved.steps)), before


def said_of(record: Record) -> Mapping[str, Any]:
    """What `convert` wrote of itself into the record of a folder; nothing in one that `save` wrote."""
    receipt: Any = record.receipt  # as it was found in the file
    said = receipt.get("convert", {}) if isinstance(receipt, Mapping) else {}
    return said if isinstance(said, Mapping) else {}


def _is_skipped(step: Step, skipped: Sequence[str]) -> bool:
    return isinstance(step, Rename) and step.source in skipped
