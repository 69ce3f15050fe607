"""Loads a model with a plan applied while its weights come in."""

from __future__ import annotations

import fnmatch
import math
import os
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rewire import hf_seam
from rewire.artefact import ADAPTERS, Record, read_record
from rewire.checkpoint import check_format
from rewire.errors import CheckpointError, RewireError
from rewire.live import apply_, carry_out, facts, hashed, make_receipt, names_after, names_before, noted, remember
from rewire.plan import Edit, Plan
from rewire.receipts import Counts, Done, Edited, Progress, TensorChange, TensorFact
from rewire.resolve import Resolution, resolve
from rewire.surgery import Change, Swap
from rewire.tensor_rules import Rule, invert, run_shapes


def load(
    source: str | os.PathLike[str],
    plan: Plan | Edit | None = None,
    *,
    model_class: type[hf_seam.PreTrainedModel] | None = None,
    allow_code: bool = False,
    allow: Sequence[str] = (),
    hashes: bool = False,
    progress: Progress | None = None,
    **kwargs: Any,
) -> hf_seam.PreTrainedModel:
    """Loads a checkpoint as the model that `plan` makes of it.

    The plan is applied to the model while it has no weights yet, and the weights take their new places as
    Transformers loads them, so `dtype`, `device_map`, sharded checkpoints and the like work as ever.

    Args:
        source: a folder, or a model's name on the Hub. Only safetensors are read.
        plan: what to change; by default what the folder itself records (see `rewire.save`).
        model_class: the class to load; by default the one that was saved.
        allow_code: whether classes that the plan names by import path may be imported and run.
        allow: globs of tensor names that may be missing or superfluous (a new head: `("classifier.*",)`).
        hashes: whether the receipt holds hashes of the tensors. `rewire.receipt(model)` adds them later.
        progress: called after every change made after loading.
        **kwargs: for `from_pretrained`.

    Raises:
        CheckpointError: tensors are missing, superfluous or of the wrong shape; or the checkpoint is
            pickled or quantised.
        ResolveError: as for `rewire.apply_`. Nothing was loaded.
    """
    folder = Path(source)
    record = read_record(folder) if folder.is_dir() else None
    check_format(folder)
    plan = _plan(plan, record)
    adapters = record.adapters if record is not None and plan == Plan.from_dict(record.plan) else ()
    start = time.perf_counter()
    in_place = record is not None and record.layout == "edited"
    try:
        job = _Job(plan, allow_code, in_place, adapters) if plan.edits else None
        model, report = hf_seam.from_pretrained(source, model_class, job, as_is=in_place, **kwargs)
    except hf_seam.DoorOccupied as occupied:
        if in_place:
            raise CheckpointError(f"{source}: Transformers converts {occupied}, which the plan edits too") from None
        model, report = hf_seam.from_pretrained(source, model_class, None, **kwargs)
        _check_report(source, report, allow)
        apply_(model, plan, allow_code=allow_code, hashes=hashes, progress=progress)
    else:
        _check_report(source, report, allow)
        if job is not None:
            _finish(model, job, start, hashes, progress)
    for name in adapters:
        hf_seam.load_adapter(model, folder / ADAPTERS / name, name)
    return model


def _plan(plan: Plan | Edit | None, record: Record | None) -> Plan:
    if record is not None:
        recorded = Plan.from_dict(record.plan)
        given = plan if isinstance(plan, Plan) or plan is None else Plan([plan])
        if given is None or given.hash in _hashes(recorded):
            return recorded
        if record.adapters and given.edits:
            raise CheckpointError(
                f"the folder holds adapters ({', '.join(record.adapters)}) that belong to its own plan; load it "
                "without a plan, or save it with merge_adapters=True (--merge-adapters) first"
            )
        if record.layout == "edited":
            raise CheckpointError(
                "the folder holds a model edited by another plan; load it without a plan, or apply this plan to the "
                "original"
            )
        return given
    if plan is None:
        return Plan([])
    return plan if isinstance(plan, Plan) else Plan([plan])


def _hashes(plan: Plan) -> set[str]:
    """The hashes that a recorded plan goes by: its own, and that of the plan which it was resolved from."""
    origin = plan.resolved.plan if plan.resolved is not None else None
    return {plan.hash} if origin is None else {plan.hash, origin}


class _Job:
    """What is done to the model on meta, and what remains to be done when it has its weights."""

    def __init__(self, plan: Plan, allow_code: bool, in_place: bool, adapters: Collection[str]) -> None:
        self.plan = plan
        self.allow_code = allow_code
        self.in_place = in_place
        self.adapters = adapters
        self.resolution: Resolution | None = None
        self.done: list[Done] = []
        self.early: tuple[Change, ...] = ()
        self.later: tuple[Change, ...] = ()

    def __call__(self, model: nn.Module) -> Rule:
        self.resolution = resolve(
            model, self.plan, allow_code=self.allow_code, given_adapters=self.adapters, rehearse=False
        )
        self.early = self.resolution.changes[: len(self.resolution.done)]
        self.later = self.resolution.changes[len(self.early) :]
        self.done = [
            Done(change.kind, change.rule, undo) for change, undo in zip(self.early, self.resolution.done, strict=True)
        ]
        # In the edited layout the tensors have their new names in the file already.
        return () if self.in_place else tuple(step for one in self.done for step in one.rule)

    def tensors(self, model: nn.Module) -> tuple[TensorChange, ...]:
        """What the changes made before loading took and gave, without hashes."""
        taken: dict[str, TensorFact] = {}
        found: list[TensorChange] = []
        for change in reversed([_once(change) for change in self.early]):
            found.append(_shapes(model, change, taken))
            given = dict.fromkeys(names_after(change))
            taken = {name: fact for name, fact in taken.items() if name not in given}
            taken |= {fact.name: fact for fact in found[-1].before}
        return tuple(reversed(found))


def _once(change: Change) -> Change:
    """A change made before loading without what it does under further names of the same tensors."""
    assert isinstance(change.surgeon, Swap)
    return replace(change, rule=change.surgeon.rule)


def _shapes(model: nn.Module, change: Change, taken: Mapping[str, TensorFact]) -> TensorChange:
    """`taken` are tensors that later changes have made others of."""
    there = facts(model, (name for name in names_after(change) if name not in taken), hashes=False)
    known = {**taken, **{fact.name: fact for fact in there}}
    after = tuple(known[name] for name in names_after(change) if name in known)
    shapes = run_shapes(invert(change.rule), {fact.name: fact.shape for fact in after})
    dtype = after[0].dtype if after else ""
    before = tuple(TensorFact(n, shapes[n], dtype, None) for n in names_before(change) if n in shapes)
    return TensorChange(change.edit, change.path, before, after)


def _finish(model: hf_seam.PreTrainedModel, job: _Job, start: float, hashes: bool, progress: Progress | None) -> None:
    assert job.resolution is not None
    for change in job.early:
        assert isinstance(change.surgeon, Swap)
        change.surgeon.settle(model)
    early = job.tensors(model)
    loaded = Counts.of(model)
    before = _counts_before(loaded, early)
    later, tensors = carry_out(model, job.later, hashes=hashes, progress=progress)
    seconds = time.perf_counter() - start
    done = [*job.done, *later]
    resolution = noted(job.resolution, done)
    receipt = make_receipt("load", model, resolution, before, early + tensors, seconds, None if later else loaded)
    remember(model, Edited(job.plan, receipt, done))
    if hashes:
        hashed(model)


def _counts_before(loaded: Counts, changes: Sequence[TensorChange]) -> Counts:
    """The counts without the changes made while loading. (The model on meta is no guide: it is not tied yet.)"""
    gone = [fact for change in changes for fact in change.before]
    new = [fact for change in changes for fact in change.after]
    elements = sum(map(_elements, gone)) - sum(map(_elements, new))
    size = sum(map(_bytes, gone)) - sum(map(_bytes, new))
    return Counts(loaded.parameters + elements, loaded.trainable + elements, loaded.bytes + size)


def _elements(fact: TensorFact) -> int:
    return math.prod(fact.shape)


def _bytes(fact: TensorFact) -> int:
    itemsize: int = getattr(torch, fact.dtype).itemsize
    return _elements(fact) * itemsize


def _check_report(source: object, report: hf_seam.LoadReport, allow: Sequence[str]) -> None:
    def wanted(names: Sequence[str]) -> list[str]:
        return [name for name in names if not any(fnmatch.fnmatchcase(name, glob) for glob in allow)]

    problems = {
        "missing": wanted(report.missing),
        "not wanted": wanted(report.unexpected),
        "of another shape": wanted(report.mismatched),
        "not converted": list(report.errors),
    }
    found = [f"{len(names)} {what}: {_some(names)}" for what, names in problems.items() if names]
    if found:
        raise CheckpointError(
            f"the tensors of {source} do not fit the model: {'; '.join(found)}. Missing ones would stay random. If "
            "that is meant (a new head, say), name them: allow=('classifier.*',)"
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f", … ({len(names)})" if len(names) > 4 else "")


def receipt(model: nn.Module) -> Any:
    """The receipt of an edited model, with hashes. Raises `RewireError` for a model without edits."""
    found = hashed(model)
    if found is None:
        raise RewireError("this model has no receipt: it was not made by rewire.apply_ or rewire.load")
    return found
