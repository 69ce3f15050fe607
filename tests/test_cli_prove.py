"""`rewire prove`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import rewire as library
from cli_runner import BERT as TWO_LAYERS
from cli_runner import GPT2 as TWO_BLOCKS
from cli_runner import JOIN, SPLIT, config, rewire, save_model, small, write_plan
from rewire.plan import Plan
from rewire.proof import Proof

BERT = {**TWO_LAYERS, "num_hidden_layers": 1}
GPT2 = {**TWO_BLOCKS, "n_layer": 1}
FAST = ("--no-gradients", "--seeds", "0")


def applied(folder: Path, edit: str, source: list[str] | list[Path], *more: str) -> Path:
    """A folder made by `rewire apply`."""
    out = folder / f"out{len(list(folder.iterdir()))}"
    assert rewire("apply", *source, "-p", write_plan(folder, edit), "-o", out, "-q", *more).code == 0
    return out


@pytest.mark.parametrize("layout", ["original", "edited"])
def test_a_folder_is_edited_again_as_it_records(tmp_path: Path, layout: str) -> None:
    source = save_model(tmp_path / "bert", "bert", BERT)
    out = applied(tmp_path, JOIN, [source], "--layout", layout)
    done = rewire("prove", source, out, *FAST)
    assert (done.code, done.err) == (0, "")
    assert "passed: BertModel" in done.out


def test_all_of_it_as_json(tmp_path: Path) -> None:
    out = applied(tmp_path, SPLIT, config("gpt2", GPT2))
    done = rewire("prove", *config("gpt2", GPT2), out, "--json")
    assert done.code == 0
    proof = Proof.from_json(done.out)
    assert proof.passed
    assert any("gradients" in check.name for check in proof.checks)
    assert any("seed 1" in case for case in proof.cases)


def test_other_weights_fail(tmp_path: Path) -> None:
    page = tmp_path / "proof.html"
    out = applied(tmp_path, JOIN, config("bert", BERT), "--seed", "7")
    done = rewire("prove", *config("bert", BERT), out, *FAST, "--html", page)
    assert done.code == 1
    assert "FAILED" in done.out
    assert "FAILED" in page.read_text("utf-8") or "failed" in page.read_text("utf-8")


def test_a_model_damaged_by_hand_fails(tmp_path: Path) -> None:
    source = save_model(tmp_path / "bert", "bert", BERT)
    model = small("bert", BERT)
    with torch.no_grad():
        model.encoder.layer[0].attention.self.query.weight[0, 0] += 1.0
    model.save_pretrained(tmp_path / "damaged")
    done = rewire("prove", source, tmp_path / "damaged", *FAST, "-q")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("proof failed: BertModel")
    assert "first divergence: encoder.layer.0.attention.self.query" in done.err


def test_two_models_edited_alike(tmp_path: Path) -> None:
    out = applied(tmp_path, JOIN, config("bert", BERT))
    assert rewire("prove", out, out, *FAST, "-q").code == 0


def test_an_edited_model_is_no_original(tmp_path: Path) -> None:
    out = applied(tmp_path, JOIN, config("bert", BERT))
    done = rewire("prove", out, *config("bert", BERT), *FAST)
    assert done.code == 2
    assert "A is an edited model itself" in done.err


def test_seeds_are_numbers() -> None:
    done = rewire("prove", "a", "b", "--seeds", "one")
    assert done.code == 2
    assert "is not a list of numbers" in done.err


def test_the_same_as_in_python(tmp_path: Path) -> None:
    model = small("gpt2", GPT2)
    library.apply_(model, Plan.from_yaml(f"rewire: 1\nedits:\n- {SPLIT}\n"))
    library.save(model, tmp_path / "out")
    args = ("--no-gradients", "--seeds", "5", "--json")
    found = Proof.from_json(rewire("prove", *config("gpt2", GPT2), tmp_path / "out", *args).out)
    expected = library.prove(small("gpt2", GPT2), model, seeds=(5,), gradients=False)
    assert (found.checks, found.cases) == (expected.checks, expected.cases)
    assert all("seed 5" in case for case in found.cases)
