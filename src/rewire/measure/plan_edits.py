"""Searching the edits of a plan: after which of them does a model no longer do what it should?"""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewire.errors import RewireError
from rewire.measure.bisection import Check, Point, Verdict
from rewire.measure.commands import run_check
from rewire.plan import Plan

if TYPE_CHECKING:
    from rewire.hf_seam import PreTrainedModel

Open = Callable[[Plan], "PreTrainedModel"]
"""Opens the model with a plan applied."""

PLACE = "{model}"
"""Stands for the folder of the edited model in a command."""


def edits(plan: Plan) -> list[Point]:
    """A point for the untouched model, and one after every edit."""
    found = [Point("0", "the untouched model")]
    for number, edit in enumerate(plan.edits):
        target = edit.target if isinstance(edit.target, str) else ", ".join(edit.target)
        label = f"edits[{number}] ({edit.kind} {target})"
        found.append(Point(str(number + 1), label, {"edit": str(edit.to_dict())}))
    return found


def first_edits(plan: Plan, point: Point) -> Plan:
    """The plan up to a point."""
    return Plan(plan.edits[: int(point.id)], name=plan.name)


def proof_check(plan: Plan, open_model: Open, **options: Any) -> Check:
    """A check that proves the edited model against the untouched one; `options` are those of `rewire.prove`."""

    def check(point: Point) -> Verdict:
        from rewire.proof import prove

        try:
            proof = prove(open_model(Plan([])), open_model(first_edits(plan, point)), **options)
        except RewireError as error:
            return Verdict("bad", str(error))
        return Verdict("good" if proof.passed else "bad", proof.summary())

    return check


def command_check(
    plan: Plan, open_model: Open, command: str, *, sides: Path | None = None, timeout: float | None = None
) -> Check:
    """A check that runs a command, in which `{model}` stands for a folder with the edited model.

    `sides` is a folder whose tokenizer and other side files are put beside it.
    """

    def check(point: Point) -> Verdict:
        from rewire.saving import save

        with tempfile.TemporaryDirectory(prefix="rewire-bisect-") as place:
            folder = Path(place) / "model"
            try:
                save(open_model(first_edits(plan, point)), folder, side_files_from=sides)
            except RewireError as error:
                return Verdict("bad", str(error))
            return run_check(command.replace(PLACE, shlex.quote(str(folder))), Path.cwd(), timeout=timeout)

    return check
