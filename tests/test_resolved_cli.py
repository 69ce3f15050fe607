"""`rewire plan resolve`, and what `rewire plan show` says of its result."""

from __future__ import annotations

from pathlib import Path

from cli_runner import BERT, GPT2, JOIN, config, rewire, save_model, write_plan
from rewire.explicit import resolve_plan
from rewire.plan import Plan

SPLIT = 'split: {target: "@attention"}'


def test_the_resolved_plan_is_printed_as_a_plan(tmp_path: Path) -> None:
    path, folder = write_plan(tmp_path, SPLIT), save_model(tmp_path / "model", "gpt2", GPT2)
    done = rewire("plan", "resolve", path, folder)
    assert done.code == 0
    assert Plan.from_yaml(done.out) == resolve_plan(Plan.read(path), folder)
    assert done.err == "1 edit, resolved for GPT2Model: 0 tensor steps to read, 6 tensor steps to edit\n"


def test_it_is_written_to_a_new_file(tmp_path: Path) -> None:
    path, out = write_plan(tmp_path, JOIN), tmp_path / "out.json"
    done = rewire("plan", "resolve", path, *config("bert", BERT), "--out", out, "--quiet")
    assert (done.code, done.out, done.err) == (0, "", "")
    resolved = Plan.read(out).resolved
    assert resolved is not None
    assert resolved.plan == Plan.read(path).hash
    again = rewire("plan", "resolve", path, *config("bert", BERT), "--out", out)
    assert again.code == 2
    assert "out.json exists; name another file" in again.err


def test_for_programs(tmp_path: Path) -> None:
    done = rewire("plan", "resolve", write_plan(tmp_path, JOIN), *config("bert", BERT), "--json")
    assert Plan.from_dict(done.json["plan"]).hash == done.json["hash"]


def test_the_class_can_be_chosen(tmp_path: Path) -> None:
    chosen = ["--set", 'architectures=["BertForMaskedLM"]']
    plan = write_plan(tmp_path, 'join: {target: "**.self", parts: [query, key, value]}')
    done = rewire("plan", "resolve", plan, *config("bert", BERT), *chosen)
    assert "resolved for BertForMaskedLM" in done.err
    assert "bert.encoder.layer.{0}.attention.self.query.weight" in done.out


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    done = rewire("plan", "resolve", write_plan(tmp_path, 'unstack: {target: "@experts"}'), *config("bert", BERT))
    assert done.code == 2
    assert "matches no module of BertModel" in done.err
    assert "--set is for config:TYPE" in rewire("plan", "resolve", write_plan(tmp_path, JOIN), "x", "--set", "a=1").err


def test_show_counts_the_steps(tmp_path: Path) -> None:
    out = tmp_path / "resolved.yaml"
    plan = write_plan(tmp_path, SPLIT, 'cast: {target: "**", dtype: bfloat16}')
    rewire("plan", "resolve", plan, *config("gpt2", GPT2), "--out", out)
    done = rewire("plan", "show", out)
    assert "resolved for GPT2Model: 0 tensor steps to read, 42 tensor steps to edit" in done.out
    assert 'config: {"dtype": "bfloat16"}' in done.out


def test_show_of_steps_alone(tmp_path: Path) -> None:
    plan = tmp_path / "steps.yaml"
    plan.write_text("rewire: 1\nedits: []\nresolved:\n  steps:\n  - {step: drop, source: a}\n", "utf-8")
    done = rewire("plan", "show", plan)
    assert "resolved for tensors by name: 0 tensor steps to read, 1 tensor step to edit" in done.out
