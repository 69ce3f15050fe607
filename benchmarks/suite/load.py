"""`rewire.load` with a plan against plain `from_pretrained`, from a warm page cache."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import rewire
from rewire import hf_seam
from rewire.tensor_rules import run as run_rule
from rewire.tensor_rules import visible
from suite import subjects
from suite.results import Result, Verdict, results
from suite.subjects import Subject
from suite.timing import Effort, Variant, interleave

GROUP = "load"
PLAIN, EMPTY, PLANNED = "from_pretrained", "rewire.load, no plan", "rewire.load, plan"
AIM = 1.10

SUBJECTS = (
    Subject("SAM-base, split", subjects.sam, subjects.SAM_SPLIT),
    Subject("fused decoder of 1 GB, split", subjects.phi3, subjects.PHI3_SPLIT),
    Subject("Llama-like of 1 GB, join", subjects.llama, subjects.LLAMA_JOIN),
)
AIMS = {"SAM-base, split": AIM}


def run(effort: Effort) -> Iterator[Result]:
    for subject in SUBJECTS:
        with tempfile.TemporaryDirectory(prefix="rewire-bench-") as folder, hf_seam.quiet():
            yield from _run(subject, Path(folder), effort)


def _run(subject: Subject, folder: Path, effort: Effort) -> Iterator[Result]:
    model = subject.make()
    model_class = type(model)
    model.save_pretrained(folder)
    del model
    variants = (
        Variant(PLAIN, lambda: model_class.from_pretrained(folder)),
        Variant(EMPTY, lambda: rewire.load(folder)),
        Variant(PLANNED, lambda: rewire.load(folder, subject.plan)),
    )
    samples = interleave(variants, effort.seconds(20), least=7)
    verdicts = {PLANNED: _judge(model_class.from_pretrained(folder), rewire.load(folder, subject.plan))}
    aims = {PLANNED: AIMS[subject.name]} if subject.name in AIMS else {}
    moved = _copied_bytes(folder, subject)
    notes = {PLANNED: {"bytes that must be copied": f"{moved / 2**20:.0f} MiB"}}
    yield from results(GROUP, subject.name, samples, aims=aims, verdicts=verdicts, notes=notes)


def _judge(untouched: Any, loaded: Any) -> Verdict:
    expected = visible(run_rule(rewire.receipt(loaded).rules, untouched.state_dict(), torch))
    after = loaded.state_dict()
    same = all(name in expected and torch.equal(expected[name], tensor) for name, tensor in after.items())
    return Verdict("tensors bit-equal to the rule's", same)


def _copied_bytes(folder: Path, subject: Subject) -> int:
    """Parts of a fused tensor can stay where they are in the file's mapping; a joined tensor has to be written."""
    loaded = rewire.load(folder, subject.plan)
    joined = [module for module in loaded.modules() if type(module).__name__ == "JoinedProjection"]
    return sum(parameter.nbytes for module in joined for parameter in module.parameters())
