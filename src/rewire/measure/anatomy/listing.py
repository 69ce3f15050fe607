"""The figures of memory as a table, for the screen and for the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rewire.measure.anatomy.memory import Figure
from rewire.measure.anatomy.record import Anatomy, saving
from rewire.measure.anatomy.words import percent, short

COUNTED = (
    "Peaks are weights and tensors, on the CPU, at the moment when they take most. Python, the libraries and their "
    "work space are not counted."
)
"""What the figures mean."""


@dataclass(frozen=True)
class Line:
    """What memory is needed for, with a cell for each column; the lines that say what a peak is made of follow it."""

    name: str
    cells: tuple[str, ...]
    is_peak: bool


@dataclass(frozen=True)
class Listing:
    """The whole table; `sizes` says for which inputs it holds."""

    sizes: str
    heads: tuple[str, ...]
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class _Entry:
    """A figure of one model; `peak` names the peak that it is, and is empty for a part of one."""

    name: str
    figure: Figure
    peak: str = ""


def listing(found: Anatomy, after: Anatomy | None = None) -> Listing:
    """The figures of a model, or of a model before and after a plan."""
    models = [found] if after is None else [found, after]
    lines = [_line(models, entries) for entries in zip(*(_entries(model) for model in models), strict=True)]
    settings = found.settings
    length = f", length {settings.length}" if found.unit == "token" else ""
    return Listing(f"batch {settings.batch}{length}", tuple(_heads(models)), tuple(lines))


def _heads(models: Sequence[Anatomy]) -> list[str]:
    heads = ["predicted"] if len(models) == 1 else ["before", "after", "saving"]
    for model, when in zip(models, ("", " before", " after")[len(models) > 1 :], strict=False):
        heads += [f"measured{when}", "deviation"] if model.measured is not None else []
    return heads


def _line(models: Sequence[Anatomy], entries: Sequence[_Entry]) -> Line:
    sizes = [entry.figure.bytes for entry in entries]
    cells = [short(size, "B") for size in sizes]
    cells += [percent(saving(*sizes))] if len(sizes) == 2 else []
    peak = entries[0].peak
    for model in models:
        if model.measured is not None:
            real = short(getattr(model.measured, peak), "B") if peak else ""
            cells += [real, percent(model.deviation(peak)) if peak else ""]
    return Line(entries[0].name, tuple(cells), bool(peak))


def _entries(found: Anatomy) -> list[_Entry]:
    inference, training = found.inference, found.training
    kind = f", {found.cache_kind}" if found.cache_kind else ""
    entries = [
        _Entry("load: weights", Figure(inference.weights), "load"),
        _Entry("inference: peak", inference.total, "inference"),
        _Entry("tensors beside the weights", inference.tensors),
        _Entry(f"of these the cache{kind}", inference.cache),
    ]
    if training is None:
        return entries
    return [
        *entries,
        _Entry("training: peak", training.total, "training"),
        *([_Entry("copies in bfloat16", Figure(training.copies))] if training.copies else []),
        _Entry("gradients", Figure(training.gradients)),
        _Entry(f"optimizer, {found.settings.optimizer}", Figure(training.optimizer)),
        _Entry("kept for backward", training.activations),
    ]


def notes(*all_found: Anatomy | None) -> list[str]:
    """What a reader ought to know, with the reasons of what is not known; each once."""
    return list(dict.fromkeys(text for found in all_found if found is not None for text in _notes(found)))


def _notes(found: Anatomy) -> list[str]:
    figures = {"peak of inference": found.inference.tensors, "cache": found.inference.cache}
    if found.training is not None:
        figures["peak of training"] = found.training.tensors
    texts = [f"{what} not known: {one.reason}" for what, one in figures.items() if one.bytes is None]
    not_measured = found.measured.note if found.measured is not None else ""
    return [*texts, *found.notes, *([f"training not measured: {not_measured}"] if not_measured else [])]
