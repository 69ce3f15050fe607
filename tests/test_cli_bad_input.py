"""Bad input: one clear message on stderr, nothing on stdout, exit code 2, nothing written."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest
import torch

from cli_runner import BERT, GPT2, JOIN, Result, config, rewire, save_model, small, write_plan
from rewire.cli import inspect as inspect_command

JOINED = ["-p", "{plan}", "-o", "{out}"]


def refused(done: Result, *texts: str) -> None:
    assert (done.code, done.out) == (2, "")
    assert "Traceback" not in done.err
    for text in texts:
        assert text in " ".join(done.err.split())


def apply(folder: Path, source: list[str] | list[Path], *edits: str, more: tuple[str, ...] = ()) -> Result:
    """Applies these edits; whatever happens, nothing may have been written."""
    out = folder / "out"
    done = rewire("apply", *source, "-p", write_plan(folder, *edits), "-o", out, *more)
    assert not out.exists()
    return done


# ---------------------------------------------------------------- plans


def test_an_unknown_key(tmp_path: Path) -> None:
    done = apply(tmp_path, ["config:bert"], "split: {target: a, layuot: stacked}")
    refused(done, "plan.yaml:3", "unknown key 'layuot'; did you mean 'layout'?")


def test_a_wrong_type(tmp_path: Path) -> None:
    refused(apply(tmp_path, ["config:bert"], "split: {target: a, into: 3}"), "plan.yaml:3", "must be a list, but is 3")


def test_no_match_shows_the_nearest_paths(tmp_path: Path) -> None:
    edit = "join: {target: encoder.layers.*.attention.self, parts: [query, key, value]}"
    done = apply(tmp_path, config("bert", BERT), edit)
    refused(done, "matches no module of BertModel", "encoder.layer.0.attention.self", "rewire inspect")


def test_an_ambiguous_layout(tmp_path: Path) -> None:
    done = apply(tmp_path, config("bert", BERT), "split: {target: encoder.layer.*.intermediate.dense}")
    refused(done, "refused", "ambiguous layout", "stacked | per_head | grouped")


def test_a_plan_that_does_not_fit(tmp_path: Path) -> None:
    edit = "split: {target: h.*.attn.c_attn, into: [q, k, v], layout: stacked, sizes: [5, 5, 5]}"
    refused(apply(tmp_path, config("gpt2", GPT2), edit), "nothing was changed", "h.*.attn.c_attn")


def test_the_same_target_twice(tmp_path: Path) -> None:
    refused(apply(tmp_path, config("bert", BERT), JOIN, JOIN), "edits[1] (join)", "nothing was changed")


def test_code_needs_consent(tmp_path: Path) -> None:
    edit = "replace: {target: encoder.layer.*.attention.self, with: 'nowhere.module:Class'}"
    refused(apply(tmp_path, config("bert", BERT), edit), "'nowhere.module:Class'", "--allow-code")
    refused(
        apply(tmp_path, config("bert", BERT), edit, more=("--allow-code",)), "'nowhere.module:Class' cannot be imported"
    )


def test_no_edits(tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text("rewire: 1\nedits: []\n")
    refused(rewire("apply", "config:bert", "-p", plan, "-o", tmp_path / "out"), "has no edits")


def test_a_missing_plan_file(tmp_path: Path) -> None:
    done = rewire("apply", "config:bert", "-p", tmp_path / "no.yaml", "-o", tmp_path / "out")
    refused(done, "no.yaml", "No such file or directory")


# ---------------------------------------------------------------- models


@pytest.mark.parametrize("command", ["inspect", "apply", "prove"])
@pytest.mark.parametrize(
    ("model", "texts"),
    [
        ("config:bertt", ("unknown model type 'bertt'", "nearest: bert")),
        ("./nowhere/at/all", ("the folder nowhere/at/all does not exist",)),
        ("no/such-model", ("no/such-model is not a model folder, nor a known model on the Hub",)),
        ("{plan}", ("is a file; name the folder of a model",)),
        ("{empty}", ("it has no config.json",)),
    ],
    ids=["type", "path", "hub", "file", "empty"],
)
def test_no_such_model(tmp_path: Path, command: str, model: str, texts: tuple[str, ...]) -> None:
    plan, empty = write_plan(tmp_path, JOIN), tmp_path / "empty"
    empty.mkdir()
    name = model.format(plan=plan, empty=empty)
    more = {"inspect": [], "apply": ["-p", plan, "-o", tmp_path / "out"], "prove": [*config("bert", BERT)]}[command]
    refused(rewire(command, name, *more), *texts)


def test_a_folder_of_folders_names_them(tmp_path: Path) -> None:
    save_model(tmp_path / "checkpoint-1", "bert", BERT)
    refused(rewire("inspect", tmp_path), "it has no config.json; below it are checkpoint-1")


@pytest.mark.parametrize(
    ("value", "texts"),
    [
        ("hiden_size=3", ("--set hiden_size: BertConfig has no value of this name", "hidden_size")),
        ("hidden_size=abc", ("bert", "expected int, got str")),
        ("hidden_size=65", ("no model can be made of config:bert", "not a multiple")),
        ("hidden_size", ("--set hidden_size: expected KEY=VALUE",)),
        ("=3", ("--set =3: expected KEY=VALUE",)),
        ("vision_config.depth=3", ("--set vision_config: BertConfig has no value",)),
    ],
)
def test_bad_values(value: str, texts: tuple[str, ...]) -> None:
    done = rewire("inspect", "config:bert", "--set", value)
    refused(Result(done.code, done.out, done.err.replace("│", " ")), *texts)


def test_a_typo_in_a_nested_value() -> None:
    done = rewire("inspect", "config:sam", "--set", "vision_config.hiden_size=64")
    refused(done, "--set vision_config.hiden_size: SamVisionConfig has no value of this name", "hidden_size")


def test_values_are_for_configurations(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "bert", "bert", BERT)
    refused(rewire("inspect", folder, "--set", "hidden_size=3"), "--set is for config:TYPE")
    refused(rewire("prove", folder, folder, "--set", "hidden_size=3"), "--set is for config:TYPE")


def test_a_pickled_checkpoint(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "bert", "bert", BERT)
    (folder / "model.safetensors").unlink()
    torch.save(small("bert", BERT).state_dict(), folder / "pytorch_model.bin")
    refused(apply(tmp_path, [folder], JOIN), "holds no safetensors", "can run code")


def test_no_weights_at_all(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "bert", "bert", BERT)
    (folder / "model.safetensors").unlink()
    refused(apply(tmp_path, [folder], JOIN), "safetensors")


def test_a_damaged_checkpoint(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "bert", "bert", BERT)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    refused(apply(tmp_path, [folder], JOIN), f"{folder} has a damaged or cut off safetensors file")


def test_a_quantised_checkpoint(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "bert", "bert", BERT)
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (folder / "config.json").write_text(json.dumps(settings))
    refused(apply(tmp_path, [folder], JOIN), "holds quantised weights")
    refused(rewire("inspect", folder), "holds quantised weights")


def test_a_tensor_that_is_missing(tmp_path: Path) -> None:
    folder = tmp_path / "bert"
    model = small("bert", BERT)
    tensors = {name: value for name, value in model.state_dict().items() if "pooler" not in name}
    model.save_pretrained(folder, state_dict=tensors)
    refused(apply(tmp_path, [folder], JOIN), "2 missing: pooler.dense.bias", "--allow")
    out = tmp_path / "allowed"
    plan = write_plan(tmp_path, JOIN)
    assert rewire("apply", folder, "-p", plan, "-o", out, "--allow", "pooler.*", "-q").code == 0


def test_a_config_that_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    refused(rewire("inspect", tmp_path), "config.json")


# ---------------------------------------------------------------- usage


def test_an_output_that_is_taken(tmp_path: Path) -> None:
    plan = write_plan(tmp_path, JOIN)
    refused(rewire("apply", "config:bert", "-p", plan, "-o", tmp_path), "is not empty", "--overwrite")
    refused(rewire("apply", "config:bert", "-p", plan, "-o", plan), "is a file; name a folder")


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--layout", "sideways"], "'sideways' is not one of 'original', 'edited'"),
        (["--html", "proof.txt", "--prove"], "must end in .html"),
        (["--html", "/nowhere/at/all/proof.html", "--prove"], "the folder /nowhere/at/all does not exist"),
        (["--html", "proof.html"], "--html goes with --prove"),
        (["--dtype", "int3"], "'int3' is not one of"),
        (["--seed", "x"], "--seed"),
    ],
)
def test_wrong_options(tmp_path: Path, more: list[str], text: str) -> None:
    done = apply(tmp_path, ["config:bert"], JOIN, more=tuple(more))
    refused(Result(done.code, done.out, done.err.replace("│", " ")), text)


def test_an_unknown_command() -> None:
    refused(rewire("aply"), "No such command 'aply'")


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = rewire("inspect", tmp_path, "--debug")
    assert done.code == 2
    assert "Traceback (most recent call last)" in done.err
    assert "it has no config.json" in done.err


def test_a_mistake_of_our_own_is_told_from_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = types.SimpleNamespace(open=None)
    monkeypatch.setattr(inspect_command, "Source", lambda *_, **__: broken)
    done = rewire("inspect", "config:bert")
    assert (done.code, done.out) == (3, "")
    assert "unexpected error: AttributeError" in done.err
    assert "--debug" in done.err


def test_the_demo_gets_what_it_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[tuple[str, Path | None, bool]] = []

    def run(which: str, *, folder: Path | None, quiet: bool) -> int:
        calls.append((which, folder, quiet))
        return 1 if which == "sam" else 0

    monkeypatch.setitem(sys.modules, "rewire.demo", types.SimpleNamespace(run=run))
    assert rewire("demo").code == 0
    assert rewire("demo", "sam", "--quiet", "--folder", tmp_path).code == 1
    assert calls == [("all", None, False), ("sam", tmp_path, True)]
    refused(rewire("demo", "gpt"), "'gpt' is not one of 'sam', 'minilm', 'all'")
