"""`rewire apply`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

import rewire as library
from cli_runner import BERT, GPT2, JOIN, SPLIT, config, rewire, save_model, small, write_plan
from rewire import hf_seam
from rewire.proof import Check, Proof

LORA = "lora: {target: [q, v], r: 2, init_lora_weights: false}"


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    folder = save_model(tmp_path / "bert", "bert", BERT)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def join(tmp_path: Path) -> Path:
    return write_plan(tmp_path, JOIN)


def failed(*_: object, **__: object) -> Proof:
    return Proof("BertModel", "rounding", (Check("outputs", False, 1.0, 1e-5, "they differ"),), 1.0)


def test_the_folder_loads_with_plain_transformers_and_brings_side_files(bert: Path, join: Path, tmp_path: Path) -> None:
    done = rewire("apply", bert, "--plan", join, "--out", tmp_path / "out")
    assert (done.code, done.err) == (0, "")
    assert f"saved to {tmp_path / 'out'} (original layout)" in done.out
    assert "query 32, key 32, value 32 → qkv 96" in done.out
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    plain, original = AutoModel.from_pretrained(tmp_path / "out"), AutoModel.from_pretrained(bert)
    assert all(torch.equal(value, original.state_dict()[name]) for name, value in plain.state_dict().items())


def test_the_edited_layout(bert: Path, join: Path, tmp_path: Path) -> None:
    assert rewire("apply", bert, "-p", join, "-o", tmp_path / "out", "--layout", "edited").code == 0
    model = library.load(tmp_path / "out")
    assert "encoder.layer.0.attention.self.qkv.weight" in model.state_dict()


def test_json_is_all_there_is_on_stdout(bert: Path, join: Path, tmp_path: Path) -> None:
    out, page = tmp_path / "out", tmp_path / "proof.html"
    args = ["apply", bert, "-p", join, "-o", out, "--prove", "--json", "--html", page]
    done = subprocess.run(
        [sys.executable, "-m", "rewire", *map(str, args)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    data = json.loads(done.stdout)
    assert data["out"] == str(out)
    assert data["proof"]["passed"] is True
    assert all(fact["hash"] for change in data["receipt"]["tensors"] for fact in change["after"])
    assert page.read_text("utf-8").startswith("<!doctype html>")


def test_quiet_says_nothing(bert: Path, join: Path, tmp_path: Path) -> None:
    done = rewire("apply", bert, "-p", join, "-o", tmp_path / "out", "-q")
    assert (done.code, done.out, done.err) == (0, "", "")


def test_a_configuration_gives_the_same_weights_for_the_same_seed(join: Path, tmp_path: Path) -> None:
    for number, seed in enumerate((3, 3, 4)):
        args = ["-p", join, "-o", tmp_path / str(number), "--seed", seed, "-q"]
        assert rewire("apply", *config("bert", BERT), *args).code == 0
    first, same, other = [(tmp_path / str(n) / "model.safetensors").read_bytes() for n in range(3)]
    assert first == same != other
    expected = small("bert", BERT, seed=3).state_dict()
    loaded = AutoModel.from_pretrained(tmp_path / "0").state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.items())


@pytest.mark.parametrize("model", ["folder", "config"])
def test_dtype(bert: Path, join: Path, tmp_path: Path, model: str) -> None:
    source = [bert] if model == "folder" else config("bert", BERT)
    assert rewire("apply", *source, "-p", join, "-o", tmp_path / "out", "--dtype", "bfloat16", "-q").code == 0
    assert library.load(tmp_path / "out").dtype is torch.bfloat16


def test_a_failed_proof_writes_no_folder(
    bert: Path, join: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "prove", failed)
    done = rewire("apply", bert, "-p", join, "-o", tmp_path / "out", "--prove", "--json")
    assert done.code == 1
    assert "proof failed: nothing was written" in done.err
    assert done.json["out"] is None
    assert done.json["proof"]["passed"] is False
    assert not (tmp_path / "out").exists()


WRONG = """
from torch import nn

class Louder(nn.Linear):
    \"\"\"Looks like the layer that it replaces, and computes something else.\"\"\"

    def forward(self, x):
        return super().forward(x) * 1.01
"""


def test_a_wrong_edit_fails_its_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wrong_edit.py").write_text(WRONG)
    monkeypatch.syspath_prepend(tmp_path)
    plan = write_plan(tmp_path, "replace: {target: 'encoder.layer.*.output.dense', with: 'wrong_edit:Louder'}")
    args = [*config("bert", BERT), "-p", plan, "-o", tmp_path / "out", "--allow-code"]
    done = rewire("apply", *args, "--prove", "-q")
    assert done.code == 1
    assert "first divergence: encoder.layer.0.output.dense" in done.err
    assert not (tmp_path / "out").exists()
    assert rewire("apply", *args, "-q").code == 0  # unproven, nothing is amiss


def test_adapters_beside_and_merged(tmp_path: Path) -> None:
    plan = write_plan(tmp_path, SPLIT, LORA)
    beside, merged = tmp_path / "beside", tmp_path / "merged"
    assert rewire("apply", *config("gpt2", GPT2), "-p", plan, "-o", beside, "-q").code == 0
    assert rewire("apply", *config("gpt2", GPT2), "-p", plan, "-o", merged, "-q", "--merge-adapters").code == 0
    assert (beside / "adapter" / "default" / "adapter_model.safetensors").is_file()
    assert not (merged / "adapter").exists()
    base, changed = (AutoModel.from_pretrained(folder).state_dict() for folder in (beside, merged))
    differing = {name for name in base if not torch.equal(base[name], changed[name])}
    assert differing == {"h.0.attn.c_attn.weight", "h.1.attn.c_attn.weight"}


def test_a_folder_with_adapters_takes_no_other_plan(tmp_path: Path) -> None:
    both = write_plan(tmp_path, SPLIT, LORA)
    only_split = write_plan(tmp_path, SPLIT, name="split.yaml")
    source = tmp_path / "source"
    assert rewire("apply", *config("gpt2", GPT2), "-p", both, "-o", source, "-q").code == 0
    done = rewire("apply", source, "-p", only_split, "-o", tmp_path / "out")
    assert done.code == 2
    assert "adapters (default) that belong to its own plan" in done.err
    assert rewire("apply", source, "-p", both, "-o", tmp_path / "out", "-q").code == 0


def test_overwriting_keeps_what_is_not_the_models(bert: Path, join: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    refused = rewire("apply", bert, "-p", join, "-o", out)
    assert refused.code == 2
    assert "not empty" in refused.err
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    assert rewire("apply", bert, "-p", join, "-o", out, "--overwrite", "-q").code == 0
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / "model.safetensors").is_file()


def test_ctrl_c_leaves_nothing_half_written(
    bert: Path, join: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(model: object, folder: Path, *_: Any, **__: Any) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(hf_seam, "write_pretrained", interrupted)
    there = sorted(tmp_path.iterdir())
    done = rewire("apply", bert, "-p", join, "-o", tmp_path / "out")
    assert done.code == 130
    assert "interrupted: nothing half-written" in done.err
    assert sorted(tmp_path.iterdir()) == there


def test_a_full_disk_is_one_message(bert: Path, join: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device", "model.safetensors")

    monkeypatch.setattr(hf_seam, "write_pretrained", full)
    done = rewire("apply", bert, "-p", join, "-o", tmp_path / "out")
    assert done.code == 2
    assert "the disk is full" in done.err
    assert not (tmp_path / "out").exists()


def test_sentence_transformers_keep_their_modules(minilm_path: Path, tmp_path: Path) -> None:
    plan = write_plan(tmp_path, "join: {target: encoder.layer.*.attention.self, parts: [query, key, value]}")
    assert rewire("apply", minilm_path, "-p", plan, "-o", tmp_path / "out", "-q").code == 0
    for name in ("modules.json", "tokenizer.json", "1_Pooling/config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (minilm_path / name).read_bytes()
