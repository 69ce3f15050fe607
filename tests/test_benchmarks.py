"""The benchmarks: their arithmetic, what they write, and one small case of every group for real."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tiny import tiny

ROOT = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def on_the_path() -> Iterator[None]:
    sys.path.insert(0, str(ROOT))
    try:
        yield
    finally:
        sys.path.remove(str(ROOT))


def suite(name: str) -> ModuleType:
    return importlib.import_module(f"suite.{name}")


# ---------------------------------------------------------------- timing


def test_every_round_runs_every_variant_once() -> None:
    timing, calls = suite("timing"), []
    variants = [
        timing.Variant(name, partial(calls.append, name), partial(calls.append, f"before {name}")) for name in "abc"
    ]
    samples = timing.interleave(variants, seconds=0, least=2)
    runs = [call for call in calls if not call.startswith("before")]
    assert runs == [*"abc", *"abc", *"bca"]  # the first round warms up
    assert [calls[index - 1] for index, call in enumerate(calls) if call in "abc"] == [f"before {run}" for run in runs]
    assert {name: len(numbers) for name, numbers in samples.items()} == {"a": 2, "b": 2, "c": 2}


def test_rounds_fill_the_time_but_no_more_than_the_most() -> None:
    timing = suite("timing")
    samples = timing.interleave([timing.Variant("a", lambda: None)], seconds=60, most=7)
    assert len(samples["a"]) == 7


def test_ratios_are_taken_round_by_round() -> None:
    timing = suite("timing")
    found = timing.ratios([2.0, 8.0, 3.0], [1.0, 4.0, 2.0])
    assert (found.median, found.count) == (2.0, 3)


def test_spread_of_one_number() -> None:
    assert suite("timing").Spread.of([3.0]) == suite("timing").Spread(3.0, 3.0, 3.0, 1)


def test_quick_takes_less_time() -> None:
    timing = suite("timing")
    assert timing.Effort(quick=True).seconds(80) < timing.Effort().seconds(80) == 80


# ---------------------------------------------------------------- results and reports


def made_up_run() -> Any:
    results, report, machine = suite("results"), suite("report"), suite("machine")
    samples = {"plain": [0.1, 0.1], "planned": [0.11, 0.12]}
    verdicts = {"planned": results.Verdict("tensors | equal", True)}
    found = list(results.results("load", "SAM", samples, aims={"planned": 1.1}, verdicts=verdicts))
    facts = {"date": "2030-01-02 03:04 UTC", "commit": "abc1234"}
    return report.Run(facts, [machine.Limit("copy", 10.0, "GB/s")], found, 12.0, False)


@pytest.mark.parametrize(
    ("ratios", "outcome"),
    [([1.0, 1.05, 1.104], "met"), ([1.0, 1.0, 1.3, 1.3, 1.3], "undecided"), ([1.2, 1.3, 1.4], "MISSED")],
)
def test_outcome(ratios: list[float], outcome: str) -> None:
    samples = {"plain": [1.0] * len(ratios), "planned": ratios}
    plain, planned = suite("results").results("load", "SAM", samples, aims={"planned": 1.1})
    assert (plain.outcome, planned.outcome) == ("", outcome)


def test_report_is_written_and_never_over_another(tmp_path: Path) -> None:
    report, run = suite("report"), made_up_run()
    first, second = report.write(run, tmp_path), report.write(run, tmp_path)
    assert [path.name for path in first] == ["2030-01-02-abc1234.json", "2030-01-02-abc1234.md"]
    assert [path.name for path in second] == ["2030-01-02-abc1234-2.json", "2030-01-02-abc1234-2.md"]
    data = json.loads(first[0].read_text())
    assert [(one["variant"], one["outcome"]) for one in data["results"]] == [("plain", ""), ("planned", "MISSED")]
    page = first[1].read_text()
    assert "| SAM | planned | 115 |" in page
    assert "≤ 1.10 MISSED" in page
    assert "tensors / equal" in page  # a bar would end the cell


# ---------------------------------------------------------------- the machine


def test_priority_is_given_back() -> None:
    machine = suite("machine")
    before = os.getpriority(os.PRIO_PROCESS, 0), machine._autogroup()
    with machine.priority() as text:
        assert "nice" in text
    assert (os.getpriority(os.PRIO_PROCESS, 0), machine._autogroup()) == before


def test_facts_and_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, timing = suite("machine"), suite("timing")
    monkeypatch.setattr(machine, "MEGABYTES", 1)
    monkeypatch.setattr(machine, "SHAPES", {"tiny": (8, 8, 8)})
    assert machine.facts("nice 0").keys() >= {"commit", "processor", "cores", "torch", "load average at the start"}
    limits = machine.limits(timing.Effort(quick=True))
    assert [limit.unit for limit in limits] == ["GB/s", "GB/s", "GFLOP/s"]
    assert all(limit.value > 0 for limit in limits)


# ---------------------------------------------------------------- the groups, on tiny models


def quick() -> Any:
    class Instant:
        quick = True

        def seconds(self, full: float) -> float:
            return 0.0

    return Instant()


@pytest.mark.parametrize(("model_type", "plan"), [("sam", "SAM_SPLIT"), ("bert", "BERT_JOIN"), ("gpt2", "GPT2_SPLIT")])
def test_apply(model_type: str, plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    apply, subjects = suite("apply"), suite("subjects")
    monkeypatch.setattr(apply, "peak_memory", lambda subject: {apply.APPLY: 2**20})
    subject = subjects.Subject("tiny", partial(tiny, model_type), getattr(subjects, plan))
    found = list(apply._run(subject, quick()))
    assert [one.variant for one in found] == [apply.COPY, apply.APPLY, apply.HASHED, apply.REVERT]
    assert all(one.is_right for one in found)
    assert found[1].notes == {"peak extra memory": "1.0 MiB"}


def test_apply_notices_a_wrong_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    apply, subjects = suite("apply"), suite("subjects")
    subject = subjects.Subject("tiny", partial(tiny, "bert"), subjects.BERT_JOIN)
    model, real = subject.make(), apply.rewire.apply_

    def wrong(changed: Any, *args: Any, **kwargs: Any) -> Any:
        receipt = real(changed, *args, **kwargs)
        with torch.no_grad():
            next(changed.parameters()).add_(1)
        return receipt

    monkeypatch.setattr(apply.rewire, "apply_", wrong)
    assert not apply._judge(model, subject).is_right


def test_peak_of_counts_what_is_held_and_freed() -> None:
    memory = suite("memory")
    if not memory.CLEAR.exists():
        pytest.skip("peaks are read from /proc")
    megabytes = 64
    assert memory.peak_of(lambda: torch.ones(megabytes * 2**18).sum()) > 0.9 * megabytes * 2**20
    assert memory.peak_of(lambda: None) < 8 * 2**20


def test_memory_process() -> None:
    apply = suite("apply")
    (subject,) = (one for one in apply.SUBJECTS if one.name == "MiniLM, join")
    peaks = apply._peaks(subject, "plain")
    assert peaks.keys() == {apply.APPLY, apply.REVERT}
    assert all(0 < peak < 10 * 2**20 for peak in peaks.values())  # of the model's 87 MiB


def test_load(tmp_path: Path) -> None:
    load, subjects = suite("load"), suite("subjects")
    subject = subjects.Subject("tiny", partial(tiny, "llama", head=True), subjects.LLAMA_JOIN)
    with load.hf_seam.quiet():
        found = list(load._run(subject, tmp_path, quick()))
    assert [one.variant for one in found] == [load.PLAIN, load.EMPTY, load.PLANNED]
    assert all(one.is_right for one in found)
    assert set(found[2].notes) == {"bytes that must be copied"}


def test_forward_and_decoding() -> None:
    forward, subjects = suite("forward"), suite("subjects")
    step = forward.Decoding(past=8)
    model = partial(tiny, "gpt2", vocab_size=30_000)
    case = forward.Case("tiny", model, subjects.GPT2_SPLIT, forward.SPLIT, step, prepare=step.remember, least=2)
    found = list(forward._run(case, quick()))
    assert [one.variant for one in found] == [forward.UNTOUCHED, forward.CONTROL, forward.SPLIT, forward.REVERTED]
    assert all(one.is_right for one in found)
    assert found[2].aim == 1.03


def test_forward_notices_a_wrong_model() -> None:
    forward, subjects = suite("forward"), suite("subjects")
    call = partial(forward.encode, batch=2, length=5)
    make = partial(tiny, "bert", vocab_size=30_000)
    case = forward.Case("tiny", make, subjects.BERT_JOIN, forward.JOIN, call)
    wanted, operations = forward._counted(case, make())
    assert operations > 0
    assert forward._judge(case, wanted, make(), forward.JOIN).is_right
    assert not forward._judge(case, wanted, make(seed=1), forward.JOIN).is_right


def test_every_case_is_well_formed() -> None:
    forward = suite("forward")
    cases = list(forward.cases())
    assert len({case.name for case in cases}) == len(cases)
    assert sum(case.seconds for case in cases) < 240
    assert {case.edited for case in cases} == {forward.SPLIT, forward.JOIN, forward.UNSTACK}


# ---------------------------------------------------------------- the command


def test_unknown_group_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "run.py", "--only", "nonsense"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "choose from apply, load, forward" in done.stderr
