"""Runs a resolved plan on a model in memory, and takes it back."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType
from typing import Any

import psutil
import torch
from torch import nn

from rewire import hf_seam
from rewire.errors import ResolveError, RevertError, RuleError
from rewire.module_tree import get_tensor
from rewire.plan import Edit, Plan
from rewire.receipts import (
    Counts,
    Decision,
    Done,
    Edited,
    Progress,
    Receipt,
    TensorChange,
    TensorFact,
    combine,
    edited,
    plan_record,
    set_edited,
    tensor_fact,
    versions,
)
from rewire.resolve import Resolution, resolve
from rewire.surgery import Change, accept_original_names, check_undos
from rewire.tensor_rules import Rule, invert, run


def apply_(
    model: nn.Module,
    plan: Plan | Edit,
    *,
    allow_code: bool = False,
    hashes: bool = True,
    progress: Progress | None = None,
) -> Receipt:
    """Changes `model` in place as `plan` says; all of it, or nothing.

    The weights are moved layer by layer, so that no more than the largest edited layer is in memory twice.

    Args:
        model: a model in memory; a `PreTrainedModel` stays one.
        plan: a plan, or a single edit.
        allow_code: whether classes that the plan names by import path may be imported and run.
        hashes: whether the receipt holds hashes of the tensors before and after.
        progress: called after every change.

    Raises:
        NoMatchError: a target matches nothing.
        RefusedError: an edit would be wrong somewhere; nothing was changed.
        ConsentError: the plan names code and `allow_code` is false.
        ResolveError: the model is on meta, offloaded or compiled.

    >>> import torch
    >>> from rewire.plan import Split
    >>> model = torch.nn.ModuleDict({"attn": torch.nn.ModuleDict({"qkv": torch.nn.Linear(4, 12)})})
    >>> receipt = apply_(model, Split("attn.qkv", into=("q", "k", "v"), layout="stacked"))
    >>> model["attn"]["qkv"].q
    Linear(in_features=4, out_features=4, bias=True)
    """
    plan = plan if isinstance(plan, Plan) else Plan([plan])
    _check_live(model)
    start = time.perf_counter()
    resolution = resolve(model, plan, allow_code=allow_code)
    before = Counts.of(model)
    done, tensors = carry_out(model, resolution.changes, hashes=hashes, progress=progress)
    receipt = make_receipt("apply", model, noted(resolution, done), before, tensors, time.perf_counter() - start)
    remember(model, Edited(plan, receipt, done))
    return receipt


def noted(resolution: Resolution, done: Sequence[Done]) -> Resolution:
    """`resolution` with what its changes found out when they were carried out, in the details of the decisions."""
    notes = iter([getattr(one.undo, "note", "") for one in done])
    decisions = [
        replace(d, detail=f"{d.detail}; {note}") if d.outcome == "changed" and (note := next(notes, "")) else d
        for d in resolution.decisions
    ]
    return replace(resolution, decisions=tuple(decisions))


def remember(model: nn.Module, state: Edited) -> None:
    """Lets `model` know of its edits, so that they can be shown, taken back, and undone when it is saved."""
    state = combine(edited(model), state)
    set_edited(model, state)
    hf_seam.revert_on_save(model, layout_rule(state.done))
    hf_seam.declare_ties(model)
    accept_original_names(model, layout_rule(state.done))


def hashed(model: nn.Module) -> Receipt | None:
    """The receipt of `model`, with the hashes that it does not have yet; those before by the inverse rule."""
    state = edited(model)
    if state is None:
        return None
    if any(fact.hash is None for change in state.receipt.tensors for fact in (*change.before, *change.after)):
        tensors = tuple(_hash_change(model, change, state.receipt.rules) for change in state.receipt.tensors)
        state.receipt = replace(state.receipt, tensors=tensors)
    return state.receipt


def _hash_change(model: nn.Module, change: TensorChange, rule: Rule) -> TensorChange:
    """Exact as long as no tensor was changed since: the tensors before are made from those now."""
    names = {fact.name for fact in (*change.before, *change.after)}
    steps = tuple(step for step in rule if names.intersection((*step.inputs, *step.outputs)))
    try:
        now = {fact.name: get_tensor(model, fact.name).detach() for fact in change.after}
        then = run(invert(steps), now, torch)
    except (RuleError, KeyError, AttributeError):
        return change  # edited further by a later edit, or put aside: its hash cannot be had any more
    before = tuple(tensor_fact(fact.name, then[fact.name]) for fact in change.before if fact.name in then)
    return replace(change, before=before, after=tuple(tensor_fact(f.name, now[f.name]) for f in change.after))


def layout_rule(done: Sequence[Done]) -> Rule:
    """The part of a rule that concerns names and places of values. A cast stays when a model is saved."""
    return tuple(step for one in done if one.kind != "cast" for step in one.rule)


def revert_(model: nn.Module) -> Receipt:
    """Takes all edits of `model` back: module tree, classes and names, and bit-equal tensors.

    Tensors that were trained since come back trained. Raises `RevertError` where something replaced an
    edited module since (nothing is changed then) or where originals were not kept.
    """
    state = edited(model)
    if state is None:
        raise RevertError("this model has no edits to take back (it was not made by rewire.apply_ or rewire.load)")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise RevertError("some weights are offloaded, so they cannot be moved; load the model without a plan instead")
    start = time.perf_counter()
    before = Counts.of(model)
    check_undos(model, [one.undo for one in state.done])
    _take_back(model, state.done)
    set_edited(model, None)
    hf_seam.revert_on_save(model, ())
    hf_seam.declare_ties(model)
    accept_original_names(model, ())
    return Receipt(
        how="revert",
        model=type(model).__name__,
        plan=state.receipt.plan,
        plan_hash=state.receipt.plan_hash,
        promise="exact",
        decisions=tuple(_reverted(decision) for decision in state.receipt.decisions),
        tensors=(),
        rules=invert(state.receipt.rules),
        before=before,
        after=Counts.of(model),
        seconds=time.perf_counter() - start,
        largest_change_bytes=state.receipt.largest_change_bytes,
        peak_rss_bytes=peak_rss_bytes(),
        versions=versions(),
    )


def _reverted(decision: Decision) -> Decision:
    detail = f"reverted: {decision.detail}" if decision.outcome == "changed" else decision.detail
    return Decision(decision.edit, decision.kind, decision.target, decision.path, decision.outcome, detail)


def _check_live(model: nn.Module) -> None:
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ResolveError(
            "the model has parameters on meta (not loaded, or offloaded), so there is nothing to move; use "
            "rewire.load(path, plan), which edits the model while its weights are loaded"
        )
    if hasattr(model, "_orig_mod"):
        raise ResolveError("the model is compiled; apply the plan first, then call torch.compile")


def carry_out(
    model: nn.Module, changes: Sequence[Change], *, hashes: bool, progress: Progress | None = None
) -> tuple[list[Done], tuple[TensorChange, ...]]:
    """Carries out all changes, or none: what was done is taken back if anything fails."""
    done: list[Done] = []
    tensors: list[TensorChange] = []
    try:
        for number, change in enumerate(changes):
            before = facts(model, names_before(change), hashes)
            with uninterrupted():
                done.append(Done(change.kind, change.rule, change.surgeon(model)))
            tensors.append(TensorChange(change.edit, change.path, before, facts(model, names_after(change), hashes)))
            if progress:
                progress(f"{change.kind} {change.path}", number + 1, len(changes))
    except BaseException:
        _take_back(model, done)
        raise
    return done, tuple(record for record in tensors if record.before or record.after)


def _take_back(model: nn.Module, done: list[Done]) -> None:
    """Takes changes back, the last first; those that were taken back are removed from the list."""
    while done:
        with uninterrupted():
            done[-1].undo(model)
            done.pop()


def names_before(change: Change) -> Iterator[str]:
    """The tensors that a change takes."""
    made: set[str] = set()
    for step in change.rule:
        yield from (name for name in step.inputs if name not in made)
        made.update(step.outputs)


def names_after(change: Change) -> Iterable[str]:
    """The tensors that a change gives."""
    given: dict[str, None] = {}
    for step in change.rule:
        for name in step.inputs:
            given.pop(name, None)
        given |= dict.fromkeys(step.outputs)
    return given


def facts(model: nn.Module, names: Iterable[str], hashes: bool) -> tuple[TensorFact, ...]:
    """Describes the tensors called `names`, each once."""
    tensors = {name: get_tensor(model, name) for name in names}
    first = {id(tensor): name for name, tensor in reversed(tensors.items())}
    return tuple(tensor_fact(n, t, hashed=hashes) for n, t in tensors.items() if first[id(t)] == n)


def make_receipt(
    how: str,
    model: nn.Module,
    resolution: Resolution,
    before: Counts,
    tensors: tuple[TensorChange, ...],
    seconds: float,
    after: Counts | None = None,
) -> Receipt:
    """The receipt of a plan that has just been carried out on `model`."""
    data, digest = plan_record(resolution.plan)
    return Receipt(
        how=how,
        model=type(model).__name__,
        plan=data,
        plan_hash=digest,
        promise=resolution.plan.promise,
        decisions=resolution.decisions,
        tensors=tensors,
        rules=resolution.rule,
        before=before,
        after=after or Counts.of(model),
        seconds=seconds,
        largest_change_bytes=max((_bytes(change.after) for change in tensors), default=0),
        peak_rss_bytes=peak_rss_bytes(),
        versions=versions(),
    )


def _bytes(facts: Sequence[TensorFact]) -> int:
    return sum(torch.Size(f.shape).numel() * getattr(torch, f.dtype).itemsize for f in facts)


def peak_rss_bytes() -> int:
    """The largest resident memory of this process so far."""
    try:
        import resource
    except ImportError:  # Windows
        memory: Any = psutil.Process().memory_info()
        return int(memory.peak_wset)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Holds Ctrl-C back until the block is done, so that nothing is left half changed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[tuple[int, FrameType | None]] = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: held.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if held and callable(previous):
            previous(*held[0])
