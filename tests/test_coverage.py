"""Every edit on tiny models of many types, against the committed table; and the machinery that makes the table.

`make sweep` goes through all types and writes the table anew; an ordinary run takes a stratified sample of it.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch import Tensor, nn

from rewire import families, saving
from rewire.coverage import EDITS, Coverage, Finding, TypeReport, measure_coverage
from rewire.coverage.check import check_type
from rewire.coverage.markdown import read_outcomes, to_markdown
from rewire.edits.split import BuildSplit
from rewire.errors import CheckpointError
from rewire.surgery import SwapBack

TABLE = read_outcomes((Path(__file__).parents[1] / "docs" / "coverage.md").read_text("utf-8"))

#: The cases that the library promises by name; they are in every sample.
NAMED = (
    "sam", "sam2", "gpt2", "gpt_neox", "bloom", "falcon", "phi3", "phimoe", "glm", "moshi", "zamba", "mixtral",
    "qwen2_moe", "qwen3_next", "deepseek_v3", "gpt_oss", "llama4", "vit", "swin", "clip", "whisper", "wav2vec2", "bart",
    "t5", "modernbert", "deberta", "albert", "mamba", "jamba", "qwen2_vl", "codegen", "siglip",
)  # fmt: skip
PER_STRATUM = 6


def sample() -> list[str]:
    """The named types, and some of every combination of outcomes, evenly spaced."""
    strata: dict[tuple[str, ...], list[str]] = {}
    for model_type, outcomes in TABLE.items():
        strata.setdefault(tuple(outcomes.values()), []).append(model_type)
    chosen = dict.fromkeys(NAMED)
    for types in strata.values():
        step = max(1, len(types) // PER_STRATUM)
        chosen |= dict.fromkeys(types[step // 2 :: step][:PER_STRATUM])
    return sorted(chosen)


@pytest.mark.parametrize("model_type", sample())
def test_the_table_is_true(model_type: str) -> None:
    report = check_type(model_type)
    found = {edit: report.finding(edit).outcome for edit in EDITS}
    assert found == TABLE[model_type], [one.detail for one in report.findings]


def test_the_sample_is_large_enough() -> None:
    assert len(sample()) >= 60


def test_nothing_in_the_table_failed() -> None:
    assert [name for name, outcomes in TABLE.items() if "failed" in outcomes.values()] == []


def test_the_table_keeps_its_promises() -> None:
    available = [name for name, outcomes in TABLE.items() if "unavailable" not in outcomes.values()]
    refused = [name for name, outcomes in TABLE.items() if outcomes["split"] == "refused"]
    assert len(TABLE) == 605
    assert len(available) >= 560
    assert len(refused) <= 5


# ---------------------------------------------------------------- the machinery


def test_a_planted_mistake_in_an_edit_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts are put together as if their rows were stacked, though they are per head."""
    right = BuildSplit.__call__
    monkeypatch.setattr(BuildSplit, "__call__", lambda self, model: right(replace(self, groups=1), model))
    found = check_type("gpt_neox", ["split"]).finding("split")
    assert found.outcome == "failed"
    assert "outputs" in found.detail


def test_a_planted_mistake_on_the_way_back_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SwapBack, "__call__", lambda self, model: None)
    found = check_type("gpt2", ["split"]).finding("split")
    assert (found.outcome, found.detail) == ("failed", "tensors differ after the way back")


def test_a_planted_mistake_in_saving_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def negated(tensors: dict[str, Tensor], rule: object, aside: object) -> dict[str, Tensor]:
        return {name: -tensor for name, tensor in right(tensors, rule, aside).items()}

    right: Any = saving._rewritten
    monkeypatch.setattr(saving, "_rewritten", negated)
    assert "saved with other tensors" in check_type("gpt2", ["split"]).finding("split").detail


def test_an_edit_where_a_refusal_is_reported_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(model: nn.Module) -> tuple[families.Refusal, ...]:
        return (families.Refusal("h.0.attn.c_attn", "not today"),)

    monkeypatch.setattr(families, "fused_projections", refusing)
    found = check_type("gpt2", ["split"]).finding("split")
    assert (found.outcome, found.detail) == (
        "failed",
        "h.0.attn.c_attn is reported as refused, but the edit was made",
    )


def test_types_that_are_done_are_not_done_again(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    first = measure_coverage(["bert"], edits=["join"], state=log)
    seen: list[str] = []

    def note(name: str, done: int, total: int) -> None:
        seen.append(f"{name} {done}/{total}")

    second = measure_coverage(["bert", "gpt2"], edits=["join"], state=log, progress=note)
    assert seen == ["gpt2 2/2"]
    assert second.types[0] == first.types[0]


def test_a_line_that_a_crash_cut_off_is_done_again(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    measure_coverage(["bert"], edits=["join"], state=log)
    whole = log.read_text("utf-8")
    log.write_text(whole[:-40], "utf-8")
    found = measure_coverage(["bert"], edits=["join"], state=log)
    assert found.types[0].finding("join").outcome == "proven"


def test_a_log_of_other_versions_is_begun_anew(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    old = TypeReport("bert", findings=(Finding("join", "failed"),))
    head = {"rewire_coverage_log": 1, "versions": {"torch": "0.4"}}
    log.write_text(f"{json.dumps(head)}\n{json.dumps(old.to_dict())}\n", "utf-8")
    found = measure_coverage(["bert"], edits=["join"], state=log)
    assert found.types[0].finding("join").outcome == "proven"


def test_another_file_is_not_taken_for_a_log(tmp_path: Path) -> None:
    other = tmp_path / "notes.txt"
    other.write_text("mine\n", "utf-8")
    with pytest.raises(CheckpointError, match="name another file"):
        measure_coverage(["bert"], edits=["join"], state=other)
    assert other.read_text("utf-8") == "mine\n"


def test_a_process_that_dies_takes_nothing_along() -> None:
    def kill(name: str, done: int, total: int) -> None:
        for child in psutil.Process().children() if name == "bert" else ():
            if any("spawn_main" in word for word in child.cmdline()):
                child.kill()

    found = measure_coverage(["bert", "gpt2", "t5"], edits=["join"], progress=kill)
    outcomes = [one.finding("join") for one in found.types]
    assert outcomes[0].outcome == "proven"
    assert sorted(one.outcome for one in outcomes[1:]) in (["failed", "proven"], ["failed", "not applicable"])
    assert any("the process died" in one.detail for one in outcomes)


def test_a_type_that_takes_too_long_is_given_up() -> None:
    found = measure_coverage(["bert"], edits=["join"], max_seconds=0.0)
    assert found.types[0].finding("join").detail == "not done after 0 s"


def test_the_page_says_what_was_found() -> None:
    reports = (
        TypeReport("a|b", findings=tuple(Finding(edit, "proven", 1, 0.0) for edit in EDITS)),
        TypeReport("mamba", findings=tuple(Finding(edit, "not applicable", detail="no\n|attention") for edit in EDITS)),
        TypeReport("timm", problem="needs timm"),
    )
    page = to_markdown(Coverage(reports))
    assert read_outcomes(page)["mamba"] == dict.fromkeys(EDITS, "not applicable")
    assert "2 of 3 model types are built and run" in page
    assert "| `timm` | all | unavailable | needs timm |" in page


def test_what_is_written_can_be_read() -> None:
    reports = (TypeReport("bert", "BertModel", 9, ("input_ids",), (Finding("join", "proven", 2, 1e-7),), "", 0.5),)
    found = Coverage(reports, {"torch": "1"}, "2026-01-01")
    assert Coverage.read(json.dumps(found.to_dict())) == found
    with pytest.raises(CheckpointError):
        Coverage.read("{}")
