"""`rewire inspect`."""

from __future__ import annotations

from pathlib import Path

from cli_runner import BERT, GPT2, SPLIT, config, rewire, save_model, write_plan
from rewire.plan import Plan


def test_a_configuration() -> None:
    done = rewire("inspect", *config("bert", BERT))
    assert (done.code, done.err) == (0, "")
    for text in ("BertModel (bert)", "0, 1 · 2 × BertLayer", "encoder.layer.*.attention.self × 2", "- join:"):
        assert text in done.out


def test_a_folder_keeps_the_class_that_was_saved(tmp_path: Path) -> None:
    done = rewire("inspect", save_model(tmp_path / "m", "gpt2", GPT2), "--json")
    assert done.json["model"] == "GPT2Model"
    assert done.json["families"][0]["path"] == "h.*.attn.c_attn"


def test_weights_are_not_read(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m", "gpt2", GPT2)
    (folder / "model.safetensors").unlink()
    assert rewire("inspect", folder).code == 0


def test_nested_values_of_a_composite_configuration() -> None:
    values = {"vision_config.num_hidden_layers": 3, "vision_config.global_attn_indexes": "[1]"}
    done = rewire("inspect", *config("sam", values), "--json")
    assert done.json["families"][0]["count"] == 3


def test_aliases_of_values() -> None:
    assert (
        rewire("inspect", *config("gpt2", {**GPT2, "num_hidden_layers": 1}), "--json").json["families"][0]["count"] == 1
    )


def test_the_plan_offered_can_be_written_and_applied(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    assert rewire("inspect", *config("gpt2", GPT2), "--write-plan", path, "--quiet").code == 0
    assert Plan.read(path).edits[0].target == "h.*.attn.c_attn"
    assert rewire("apply", *config("gpt2", GPT2), "--plan", path, "--out", tmp_path / "out").code == 0
    again = rewire("inspect", *config("gpt2", GPT2), "--write-plan", path)
    assert again.code == 2
    assert "exists; name another file" in again.err


def test_a_folder_that_rewire_wrote_is_shown_edited(tmp_path: Path) -> None:
    plan = write_plan(tmp_path, SPLIT)
    assert rewire("apply", *config("gpt2", GPT2), "-p", plan, "-o", tmp_path / "out", "-q").code == 0
    done = rewire("inspect", tmp_path / "out")
    assert done.code == 0
    assert f"edited by plan {Plan.read(plan).hash[:12]}" in done.out
    assert "SplitProjection" in done.out


def test_quiet() -> None:
    done = rewire("inspect", *config("bert", BERT), "-q")
    assert (done.code, done.out, done.err) == (0, "", "")
