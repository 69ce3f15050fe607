"""The record of a proof: JSON, files, the screen and the page."""

from __future__ import annotations

import copy
import io
import json
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from rewire.errors import OutputError, ProofError
from rewire.proof import Check, Divergence, ModuleDifference, Proof, prove
from rewire.proof.report import grouped
from test_proof_models import build

DIVERGENCE = Divergence("layers.0.qkv", "Linear", "Split", 0.25, 1e-5, "len 7 <seed> 0")
MODULES = (
    ModuleDifference("embed", "Embedding", 0.0, 0),
    ModuleDifference("layers.0.qkv", "Linear", 0.25, 1),
    ModuleDifference("layers.1.qkv", "Linear", math.inf, 2),
    ModuleDifference("layers.1.mlp", "Linear", 3e-8, 3),
    ModuleDifference("", "Tiny", 1e-3, 4),
)
CHECKS = (
    Check("weights", True, 0.0, 0.0, "3 of 3 tensors bit-equal"),
    Check("outputs · one", True, 1e-7, 1e-5, "fine"),
    Check("outputs · two", False, math.inf, 1e-5, "worst in <logits> & more"),
    Check("padded positions · two", True, 1.0, math.inf),
    Check("sensitivity", True, 0.5, 1e-4, "", at_least=True),
)
PROOF = Proof(
    "Tiny<Model>", "exact", CHECKS, math.inf, DIVERGENCE, ("one", "two"), ("three: ValueError: no",), MODULES, 1.25,
    {"torch": "2.13.0"},
)  # fmt: skip


def test_json_goes_there_and_back() -> None:
    text = PROOF.to_json()
    assert Proof.from_json(text) == PROOF
    assert json.loads(text)["passed"] is False
    assert json.loads(text)["max_difference"] == "inf"


def test_json_of_a_real_proof_goes_there_and_back() -> None:
    before = build("bert")
    proof = prove(before, copy.deepcopy(before))
    assert Proof.from_json(proof.to_json()) == proof
    assert proof.environment["torch"] == torch.__version__
    assert "transformers" in proof.environment


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rewire_proof": 99}', '{"rewire_proof": 1, "checks": 3}'])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(ProofError, match="not the JSON text of a proof"):
        Proof.from_json(text)


def test_files_are_written_whole(tmp_path: Path) -> None:
    path = PROOF.write(tmp_path / "proof.json")
    assert Proof.from_json(path.read_text("utf-8")) == PROOF
    assert PROOF.write(tmp_path / "proof.html").read_text("utf-8").startswith("<!doctype html>")
    assert sorted(os.listdir(tmp_path)) == ["proof.html", "proof.json"]


def test_a_file_that_cannot_be_written_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written"):
        PROOF.write(tmp_path / "absent" / "proof.json")
    (tmp_path / "taken").mkdir()
    with pytest.raises(OutputError):
        PROOF.write(tmp_path / "taken")
    assert os.listdir(tmp_path) == ["taken"]


def test_a_proof_passes_when_all_checks_do() -> None:
    assert not PROOF.passed
    assert [check.name for check in PROOF.failures] == ["outputs · two"]
    assert Proof("Tiny", "exact", CHECKS[:2], 0.0).passed
    assert not Proof("Tiny", "exact", (), 0.0).passed


def test_the_summary_is_one_line_with_the_first_divergence() -> None:
    assert "\n" not in PROOF.summary()
    assert PROOF.summary().startswith("FAILED: Tiny<Model>, exact, 4 of 5 checks over 2 inputs, largest difference ∞")
    assert "layers.0.qkv (Linear, now Split) differs by 2.5e-01" in PROOF.summary()


def test_limits_are_said_in_words() -> None:
    assert [check.limit for check in CHECKS] == ["bit-equal", "≤ 1.0e-05", "≤ 1.0e-05", "not judged", "≥ 1.0e-04"]


def test_checks_are_grouped_and_the_worst_is_shown() -> None:
    titles = [group.title for group in grouped(CHECKS)]
    assert titles == ["weights", "outputs, 1 of 2 inputs", "padded positions · two", "sensitivity"]
    assert grouped(CHECKS)[1].worst.name == "outputs · two"


def test_the_screen_shows_every_group() -> None:
    rich = pytest.importorskip("rich.console")
    console = rich.Console(width=120, record=True, file=io.StringIO())
    console.print(PROOF)
    text = console.export_text()
    assert "✗" in text
    assert "outputs, 1 of 2 inputs" in text
    assert "<logits>" in text


class Page(HTMLParser):
    """Tags and titles of a page; fails on tags that are not closed in order."""

    VOID = frozenset({"meta", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.titles: list[str] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.titles += [value or "" for key, value in attrs if key == "title"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_well_formed_and_needs_nothing_else() -> None:
    text = PROOF.to_html()
    page = Page(text)
    assert "script" not in page.tags
    assert not re.search(r"https?:|src=|@import|url\(", text)
    assert "Tiny<Model>" in page.text
    assert "worst in <logits> & more" in page.text
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text


def test_the_page_opens_what_failed() -> None:
    opened = re.findall(r"<details( open)?><summary><span class=\"\w+\">. ([^<]*)", PROOF.to_html())
    assert {name: bool(is_open) for is_open, name in opened} == {
        "weights": False,
        "outputs, 1 of 2 inputs": True,
        "padded positions · two": False,
        "sensitivity": False,
    }


def test_the_heat_map_has_a_cell_per_module_with_its_number() -> None:
    page = Page(PROOF.to_html())
    assert "layers.0.qkv (Linear): 2.5e-01" in page.titles
    assert "layers.1.mlp (Linear): 3.0e-08" in page.titles
    assert "embed (Embedding): 0" in page.titles
    assert "layers.1.qkv (Linear): ∞" in page.titles
    assert "−8" in page.text


def test_cells_beyond_the_tolerance_are_marked_by_more_than_colour() -> None:
    cells = re.findall(r'<td( class="beyond")? style="[^"]*" title="([^"]*)"', PROOF.to_html())
    assert {title for beyond, title in cells if beyond} == {
        "layers.0.qkv (Linear): 2.5e-01",
        "layers.1.qkv (Linear): ∞",
        "model (Tiny): 1.0e-03",
    }


def test_a_proof_without_modules_has_a_page_too() -> None:
    Page(Proof("Tiny", "exact", CHECKS, 0.0).to_html())
