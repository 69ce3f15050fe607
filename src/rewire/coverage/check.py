"""One model type: its tiny model is built, run, edited in every way, and each edit is proven."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rewire import hf_seam
from rewire.coverage.plans import PLACES, Places
from rewire.coverage.proofs import prove_everywhere
from rewire.coverage.record import EDITS, Finding, TypeReport
from rewire.errors import RefusedError, RewireError
from rewire.live import apply_, revert_
from rewire.loading import load
from rewire.plan import Plan
from rewire.proof import Case
from rewire.proof.execution import forward
from rewire.proof.guard import untouched
from rewire.proof.weights import same_bits
from rewire.saving import save
from rewire.zoo import Unavailable, example_inputs, tiny_model

SEEDS = (0, 1)
"""Of the inputs. Models that take a speech or a text get one with the first, the other with the second."""


def check_type(model_type: str, edits: Sequence[str] = EDITS) -> TypeReport:
    """Builds the tiny model of a type and tries every edit on it. Never raises for what a model or an edit does.

    >>> report = check_type("bert", ["join"])
    >>> report.finding("join").outcome, report.finding("join").places
    ('proven', 2)
    """
    start = time.perf_counter()
    try:
        model = tiny_model(model_type)
    except Unavailable as error:
        return _without(model_type, edits, str(error), start)
    except Exception as error:  # foreign code on a configuration it may never have seen
        return _without(model_type, edits, f"the tiny model cannot be built: {_told(error)}", start)
    try:
        with untouched(model):
            cases = [example_inputs(model_type, model, seed) for seed in SEEDS]
            for case in cases:
                forward(model, case)
    except Exception as error:
        return _without(model_type, edits, f"the tiny model does not run: {_told(error)}", start)
    subject = _Subject(model, cases)
    findings = tuple(_finding(subject, edit) for edit in edits)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return TypeReport(
        model_type,
        type(model).__name__,
        parameters,
        tuple(sorted({name for case in cases for name in case.kwargs})),
        findings,
        seconds=round(time.perf_counter() - start, 2),
    )


def _without(model_type: str, edits: Sequence[str], problem: str, start: float) -> TypeReport:
    findings = tuple(Finding(edit, "unavailable", detail=problem) for edit in edits)
    seconds = round(time.perf_counter() - start, 2)
    return TypeReport(model_type, findings=findings, problem=problem, seconds=seconds)


def _told(error: BaseException) -> str:
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first[:300]}"


class _Subject:
    """A tiny model with inputs. Never changed: edits are made on copies."""

    def __init__(self, model: hf_seam.PreTrainedModel, cases: Sequence[Case]) -> None:
        self.model = model
        self.cases = cases
        self.state = _state(model)

    def copy(self) -> hf_seam.PreTrainedModel:
        return copy.deepcopy(self.model)


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return list(first) == list(second) and all(same_bits(tensor, second[name]) for name, tensor in first.items())


def _tree(model: nn.Module) -> list[tuple[str, type]]:
    return [(name, type(module)) for name, module in model.named_modules(remove_duplicate=False)]


# ---------------------------------------------------------------- one edit


class _Wrong(Exception):
    """Something differs; the message says what."""


def _finding(subject: _Subject, edit: str) -> Finding:
    """What comes of one edit."""
    try:
        places = PLACES[edit](subject.model)
        _check_refusals(subject, places)
        if not places.count:
            _check_general(subject, places)
            return _nothing(edit, places)
        return _proven(subject, edit, places)
    except _Wrong as wrong:
        return Finding(edit, "failed", detail=str(wrong))
    except RewireError as error:
        return Finding(edit, "failed", detail=str(error))
    except Exception as error:  # an edit must not raise anything else, and if it does the others still count
        return Finding(edit, "failed", detail=_told(error))


def _nothing(edit: str, places: Places) -> Finding:
    if places.refusals:
        return Finding(edit, "refused", detail=_reasons(places.refusals))
    return Finding(edit, "not applicable", detail=_reasons(places.others) or f"nothing to {edit}")


def _reasons(refusals: Sequence[Any]) -> str:
    return "; ".join(dict.fromkeys(one.reason for one in refusals))


def _check_refusals(subject: _Subject, places: Places) -> None:
    """A plan for a refused place must be refused, and leave the model as it was; alike places are tried once."""
    seen: dict[str, Any] = {one.reason: one for one in (*places.refusals, *places.others)}
    for refused in seen.values():
        model = subject.copy()
        try:
            apply_(model, Plan([places.attempt(refused.path)]))
        except RefusedError:
            _demand(_equal(_state(model), subject.state), f"{refused.path} was refused, but tensors changed")
        else:
            raise _Wrong(f"{refused.path} is reported as refused, but the edit was made")


def _check_general(subject: _Subject, places: Places) -> None:
    """A plan that finds its places itself finds none, and leaves the model as it was."""
    model = subject.copy()
    apply_(model, places.general)
    _demand(_equal(_state(model), subject.state), "the plan changed tensors though it has no place")
    _demand(_tree(model) == _tree(subject.model), "the plan changed modules though it has no place")


def _demand(holds: bool, otherwise: str) -> None:
    if not holds:
        raise _Wrong(otherwise)


def _proven(subject: _Subject, edit: str, places: Places) -> Finding:
    """All that can be compared, or `_Wrong`."""
    after = subject.copy()
    apply_(after, places.plan)
    verdict = prove_everywhere(subject.model, after, subject.cases, places.modules)
    _demand(not verdict.wrong, "; ".join(verdict.wrong))
    left = [*verdict.left, *_folder_gaps(subject, after, places.plan)]
    revert_(after)
    _demand(_equal(_state(after), subject.state), "tensors differ after the way back")
    _demand(_tree(after) == _tree(subject.model), "modules differ after the way back")
    notes = [f"{len(places.refusals)} places refused: {_reasons(places.refusals)}"] if places.refusals else []
    outcome = "in part" if left else "proven"
    return Finding(edit, outcome, places.count, verdict.difference, "; ".join([*left, *notes]))


def _folder_gaps(subject: _Subject, after: hf_seam.PreTrainedModel, plan: Plan) -> Iterator[str]:
    """Saves in the original layout and loads again, plainly and edited. Yields what could not be compared."""
    with tempfile.TemporaryDirectory(prefix="rewire-coverage-") as folder:
        plain, edited = Path(folder, "plain"), Path(folder, "edited")
        try:
            subject.copy().save_pretrained(plain)
            back = type(subject.model).from_pretrained(plain)
        except Exception as error:
            yield f"the untouched model cannot be saved and loaded: {_told(error)}"
            return
        save(after, edited)
        _demand(
            _same_files(hf_seam.read_tensors(plain), hf_seam.read_tensors(edited)),
            "the original layout was saved with other tensors than the untouched model's",
        )
        if not _equal(_state(back.eval()), subject.state):
            yield "Transformers itself does not bring the untouched model back bit for bit"
            return
        again = type(subject.model).from_pretrained(edited)
        _demand(_equal(_state(again), subject.state), "from_pretrained of the saved folder gives other tensors")
        loaded = load(edited, plan, model_class=type(subject.model))
        _demand(_equal(_state(loaded), _state(after)), "rewire.load gives other tensors than apply_")


def _same_files(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return sorted(first) == sorted(second) and all(same_bits(tensor, second[name]) for name, tensor in first.items())


@contextmanager
def single_threaded() -> Iterator[None]:
    """One thread for torch: tiny tensors gain nothing from more, and workers run side by side."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
