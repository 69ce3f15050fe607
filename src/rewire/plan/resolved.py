"""What a plan comes to for one model: tensor steps, which need neither the model nor torch to be carried out."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any, ClassVar

from pydantic import PlainValidator, WithJsonSchema

from rewire.errors import RuleError
from rewire.plan.data import FrozenMapping, canonical, text
from rewire.plan.fields import Sequenced, Text
from rewire.plan.messages import show
from rewire.plan.record import Record, record
from rewire.step_patterns import count_names, expand
from rewire.tensor_rules import STEPS, Rule


def _mapping(value: object) -> FrozenMapping:
    if not isinstance(value, Mapping):
        raise ValueError(f"must be a mapping, but is {show(value)}")
    return FrozenMapping(value)


def _step(value: object) -> FrozenMapping:
    found = _mapping(value)
    try:
        count_names(found)
    except RuleError as error:
        raise ValueError(str(error)) from None
    return found


def _hash(value: object) -> str:
    if not re.fullmatch("[0-9a-f]{64}", text(value)):
        raise ValueError(f"must be the hash of a plan, 64 hexadecimal digits, but is {show(value)}")
    return str(value)


_STEP_SCHEMA = {
    "type": "object",
    "properties": {"step": {"enum": list(STEPS)}, "each": {"type": "array", "items": {"type": "string"}}},
    "required": ["step"],
}

Steps = Annotated[tuple[Annotated[FrozenMapping, PlainValidator(_step), WithJsonSchema(_STEP_SCHEMA)], ...], Sequenced]
Hash = Annotated[str, PlainValidator(_hash), WithJsonSchema({"type": "string", "pattern": "^[0-9a-f]{64}$"})]
Values = Annotated[FrozenMapping, PlainValidator(_mapping), WithJsonSchema({"type": "object"})]


@record
class Resolved(Record):
    """What a plan comes to for the checkpoints of one model; made by `rewire plan resolve`, or written by hand.

    Steps are records of `rewire.step_patterns`, in which one record may stand for many steps. Names that no step
    takes stay as they are.

    Attributes:
        model: class of the model, for people.
        plan: hash of the plan that was resolved, in which places may have been left to detection.
        reading: from the tensors of the checkpoint to those of the untouched model, as Transformers' loader reads
            them.
        steps: from the tensors of the untouched model to those of the edited one.
        config: values of `config.json` that the edits make untrue, as they are afterwards.

    >>> found = Resolved(steps=[{"step": "rename", "source": "h.{0}.a", "target": "h.{0}.b", "each": ["0..1"]}])
    >>> [step.outputs for step in found.rule]
    [('h.0.b',), ('h.1.b',)]
    """

    kind: ClassVar[str] = "resolved"
    model: Text | None = None
    plan: Hash | None = None
    reading: Steps = ()
    steps: Steps = ()
    config: Values = field(default_factory=FrozenMapping)

    @property
    def rule(self) -> Rule:
        """All steps, from the tensors of the checkpoint to those of the edited model. Raises `RuleError`."""
        return (*expand(self.reading), *expand(self.steps))

    @property
    def hash(self) -> str:
        """SHA-256 (hex) of what is done to a checkpoint: of reading, steps and configuration values.

        A plan's own hash says nothing of this: it is that of the edits.

        >>> Resolved(model="A").hash == Resolved(model="B").hash
        True
        """
        data: dict[str, Any] = {"reading": self.reading, "steps": self.steps, "config": self.config}
        return hashlib.sha256(canonical(data).encode("ascii")).hexdigest()
