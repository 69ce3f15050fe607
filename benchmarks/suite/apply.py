"""`apply_` and `revert_` on a model in memory, against a plain copy of its weights: time and peak memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import rewire
from rewire.receipts import edited, tensor_fact
from suite import subjects
from suite.results import Result, Verdict, results
from suite.subjects import Subject
from suite.timing import Effort, Variant, interleave

GROUP = "apply"
COPY, APPLY, HASHED, REVERT = "copy of the weights", "apply_", "apply_, hashes", "revert_"

SUBJECTS = (
    Subject("SAM-base, split", subjects.sam, subjects.SAM_SPLIT),
    Subject("BERT-base, join", subjects.bert, subjects.BERT_JOIN),
    Subject("MiniLM, join", subjects.minilm, subjects.BERT_JOIN),
    Subject("GPT-2, split (transposed)", subjects.gpt2, subjects.GPT2_SPLIT),
)


def run(effort: Effort) -> Iterator[Result]:
    for subject in SUBJECTS:
        yield from _run(subject, effort)


def _run(subject: Subject, effort: Effort) -> Iterator[Result]:
    model = subject.make()
    original = _hashes(model)
    variants = (
        Variant(COPY, lambda: copy(model), lambda: _untouched(model)),
        Variant(APPLY, lambda: rewire.apply_(model, subject.plan, hashes=False), lambda: _untouched(model)),
        Variant(HASHED, lambda: rewire.apply_(model, subject.plan), lambda: _untouched(model)),
        Variant(REVERT, lambda: rewire.revert_(model), lambda: _edited(model, subject)),
    )
    samples = interleave(variants, effort.seconds(10))
    verdicts = {REVERT: _judge_revert(model, original)} | dict.fromkeys((APPLY, HASHED), _judge(model, subject))
    peaks = peak_memory(subject)
    notes = {name: {"peak extra memory": f"{peak / 2**20:.1f} MiB"} for name, peak in peaks.items()}
    yield from results(GROUP, subject.name, samples, verdicts=verdicts, notes=notes)


def copy(model: Any) -> dict[str, Any]:
    """What the edit is measured against: every tensor once more."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _untouched(model: Any) -> None:
    if edited(model) is not None:
        rewire.revert_(model)


def _edited(model: Any, subject: Subject) -> None:
    if edited(model) is None:
        rewire.apply_(model, subject.plan, hashes=False)


def _hashes(model: Any) -> dict[str, str | None]:
    return {name: tensor_fact(name, tensor).hash for name, tensor in model.state_dict().items()}


def _judge_revert(model: Any, original: dict[str, str | None]) -> Verdict:
    _untouched(model)
    return Verdict("tensors bit-equal to the original", _hashes(model) == original)


def _judge(model: Any, subject: Subject) -> Verdict:
    """The weights of a proof: rules on the untouched tensors give the edited ones; no forward is run here."""
    from rewire.tensor_rules import run as run_rule
    from rewire.tensor_rules import visible

    _untouched(model)
    before = copy(model)
    receipt = rewire.apply_(model, subject.plan, hashes=False)
    import torch

    expected = visible(run_rule(receipt.rules, before, torch))
    after = model.state_dict()
    same = all(name in expected and torch.equal(expected[name], tensor) for name, tensor in after.items())
    return Verdict("tensors bit-equal to the rule's", same)


# ---------------------------------------------------------------- memory, in a process of its own


def peak_memory(subject: Subject) -> dict[str, int]:
    """Largest resident memory above what the model itself takes, in bytes, for every variant."""
    return {name: peak for part in ("plain", "hashed") for name, peak in _peaks(subject, part).items()}


def _peaks(subject: Subject, part: str) -> dict[str, int]:
    command = [sys.executable, "-m", "suite.memory", subject.name, part]
    # Every tensor gets memory of its own from the system and gives it back, so that what is measured is what is
    # held, and not what the C library keeps for later.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**16)}
    done = subprocess.run(command, cwd=Path(__file__).parents[1], env=env, capture_output=True, text=True, check=True)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found
