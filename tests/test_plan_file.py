"""Plans as files: what is read, what is written, and what is said about a file with mistakes."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from plan_strategies import JSON, PLANS
from rewire.errors import OutputError, PlanError
from rewire.plan import (
    Cast,
    Freeze,
    Join,
    JoinTensor,
    Lora,
    Plan,
    Rename,
    RenameTensor,
    Replace,
    Split,
    SplitTensor,
    Stack,
    Unstack,
    check,
    json_schema,
)
from rewire.plan.data import canonical
from rewire.plan.text import to_yaml

EXAMPLES = sorted((Path(__file__).parents[1] / "examples/plans").glob("*.yaml"))

FULL = """\
rewire: 1
name: everything
description: |
  Two lines,
  the second of them here.
edits:
- split:
    target: vision_encoder.layers.*.attn.qkv
    into: [q, k, v]
    layout: per_head
    groups: 12
    optional: true
- join:
    target: encoder.layer.*.attention.self
    parts: [query, key, value]
    name: qkv
- unstack:
    target: model.layers.*.mlp.experts
    views: true
- stack:
    target: '@experts'
- replace:
    target: vision_encoder.layers.*.attn
    with: pkg.attention:Attention
    tensors:
    - split:
        from: qkv.*
        into: [q.*, k.*, v.*]
    - join:
        from: [a, b]
        into: c
        sizes: [1, 2]
    - rename:
        from: proj.*
        into: o.*
- lora:
    target: [q, v]
    adapter: mine
    r: 16
    lora_dropout: 0.1
    rank_pattern:
      q: 4
    modules_to_save: []
- freeze:
    target: '**:Embedding'
- cast:
    target: lm_head
    dtype: float16
    keep_original: false
- rename:
    target: layers.0
    to: '1'
"""

FULL_PLAN = Plan(
    [
        Split(
            "vision_encoder.layers.*.attn.qkv",
            into=("q", "k", "v"),
            layout="per_head",
            groups=12,
            optional=True,
        ),
        Join("encoder.layer.*.attention.self", parts=("query", "key", "value"), name="qkv"),
        Unstack("model.layers.*.mlp.experts", views=True),
        Stack("@experts"),
        Replace(
            "vision_encoder.layers.*.attn",
            with_="pkg.attention:Attention",
            tensors=(
                SplitTensor("qkv.*", into=("q.*", "k.*", "v.*")),
                JoinTensor(("a", "b"), into="c", sizes=(1, 2)),
                RenameTensor("proj.*", into="o.*"),
            ),
        ),
        Lora(("q", "v"), "mine", r=16, lora_dropout=0.1, rank_pattern={"q": 4}, modules_to_save=[]),
        Freeze("**:Embedding"),
        Cast("lm_head", "float16", keep_original=False),
        Rename("layers.0", to="1"),
    ],
    name="everything",
    description="Two lines,\nthe second of them here.\n",
)


# ---------------------------------------------------------------- there and back


def test_yaml_in_and_out() -> None:
    assert Plan.from_yaml(FULL) == FULL_PLAN
    assert FULL_PLAN.to_yaml() == FULL


@given(PLANS)
def test_nothing_is_lost_on_the_way(plan: Plan) -> None:
    for same in (
        Plan.from_yaml(plan.to_yaml()),
        Plan.from_json(plan.to_json()),
        Plan.from_dict(plan.to_dict()),
        Plan.from_dict(json.loads(plan.to_json())),
    ):
        assert same == plan
        assert same.hash == plan.hash
        assert same.to_yaml() == plan.to_yaml()
    assert check(plan.to_yaml()) == []


@given(PLANS)
def test_plain_readers_understand_what_is_written(plan: Plan) -> None:
    """PyYAML by itself (YAML 1.1) reads the same data."""
    assert canonical(yaml.safe_load(plan.to_yaml())) == canonical(plan.to_dict())


@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), JSON, max_size=3))
def test_yaml_holds_any_data(data: dict[str, Any]) -> None:
    written = to_yaml({"rewire": 1, "edits": [{"lora": {"target": "q", "r": data}}]})
    (edit,) = Plan.from_yaml(written)
    assert isinstance(edit, Lora)
    assert canonical(edit.peft_options()) == canonical({"r": data})


def test_defaults_are_left_out() -> None:
    given_all = {
        "rewire": 1,
        "name": None,
        "edits": [
            {"split": {"target": "a", "into": None, "layout": "auto", "sizes": None, "optional": False}},
            {"lora": {"target": "q", "adapter": "default", "optional": False}},
            {"replace": {"target": "a", "with": "a:B", "tensors": []}},
        ],
    }
    assert Plan.from_dict(given_all).to_dict() == {
        "rewire": 1,
        "edits": [
            {"split": {"target": "a"}},
            {"lora": {"target": "q"}},
            {"replace": {"target": "a", "with": "a:B"}},
        ],
    }


def test_yaml_is_read_as_version_1_2() -> None:
    (edit,) = Plan.from_yaml(
        "rewire: 1\nname: 2024-01-01\ndescription: 12:30\nedits:\n"
        "- lora: {target: q, r: 010, lora_alpha: 1e1, bias: no, lora_dropout: .5, task_type: 0x10, "
        "init_lora_weights: on, use_dora: True, revision: ~}\n"
    ).edits
    assert isinstance(edit, Lora)
    assert edit.peft_options() == {
        "r": 10,
        "lora_alpha": 10.0,
        "bias": "no",
        "lora_dropout": 0.5,
        "task_type": 16,
        "init_lora_weights": "on",
        "use_dora": True,
        "revision": None,
    }


def test_aliases_are_followed() -> None:
    plan = Plan.from_yaml(
        "rewire: 1\nedits:\n- split: &it {target: a.qkv, into: &parts [q, k]}\n- split: *it\n"
        "- join: {target: b, parts: *parts}\n"
    )
    assert list(plan) == [
        Split("a.qkv", into=("q", "k")),
        Split("a.qkv", into=("q", "k")),
        Join("b", parts=("q", "k")),
    ]


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("name", ["plan.yaml", "plan.yml", "plan.json", "plan.JSON", "plan"])
def test_files_by_suffix(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("what stood there before")
    FULL_PLAN.write(path)
    assert Plan.read(path) == FULL_PLAN == Plan.read(str(path))
    assert path.read_text("utf-8").startswith("{") == name.lower().endswith("json")
    assert os.listdir(tmp_path) == [name]
    assert check(path) == check(str(path)) == []


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"plan\.yaml: No space left"):
        FULL_PLAN.write(path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["plan.yaml"]
    with pytest.raises(OutputError, match="No such file"):
        FULL_PLAN.write(tmp_path / "nowhere" / "plan.yaml")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    missing = tmp_path / "no.yaml"
    with pytest.raises(PlanError, match=r"no\.yaml: cannot be read: No such file"):
        Plan.read(missing)
    (tmp_path / "latin.yaml").write_bytes(b"rewire: 1\nname: gr\xfcn\n")
    (tmp_path / "large.yaml").write_bytes(b"#" * (1 << 20) + b"\n")
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbfrewire: 1\r\nedits: []\r\n")
    assert [(issue.line, issue.message) for issue in check(tmp_path / "latin.yaml")] == [
        (2, "not UTF-8 text (invalid start byte)")
    ]
    assert "longer than 1048576 bytes" in check(tmp_path / "large.yaml")[0].message
    assert Plan.read(tmp_path / "bom.yaml") == Plan([])
    assert "Is a directory" in check(tmp_path)[0].message
    assert "No such file" in check("nowhere.yaml")[0].message
    assert [str(issue) for issue in check("rewire: 1")] == ["1: edits: missing key 'edits'; it has to be given"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples(path: Path) -> None:
    plan = Plan.read(path)
    assert plan.name == path.stem
    assert plan.description
    assert len(plan) > 0
    assert Plan.from_yaml(plan.to_yaml()) == plan


def test_the_example_of_the_design() -> None:
    assert len(EXAMPLES) >= 7
    plan = Plan.read(next(path for path in EXAMPLES if path.stem == "sam-qv-lora"))
    assert list(plan) == [
        Split("vision_encoder.layers.*.attn.qkv", into=("q", "k", "v")),
        Lora(target=("q", "v"), r=16, lora_alpha=32, lora_dropout=0.1),
    ]
    assert plan.promise == "additive"


# ---------------------------------------------------------------- mistakes

MISTAKES = """\
rewire: 1
nmae: x
edits:
  - split:
      target: a..b
      layuot: stacked
      layout:
        stackd
      into: [q]
      sizes: [0, "3"]
  - lora:
      target: [q, v]
      use_dorra: true
      target_modules: [q]
      lora_alpha: .inf
  - split:
    target: x
  - splt: {target: x}
  - replace:
      target: x
      with_: a.b
      tensors:
      - rename: {form: x, into: y.*}
      - renam: {from: x}
      - split:
          from: qkv.*
          into: [a, b]
      - 3
  - freeze
  - freeze:
  - cast:
      target: x
      dtype: int8
      target: z
  - rename: {target: x, to: 0}
  - rename: {target: x, to: !!python/object/apply:os.system [ls]}
  - rename: {target: x, 1: b}
  - lora: 5
"""

EXPECTED = [
    (2, "nmae", "unknown key 'nmae'; did you mean 'name'? (allowed: rewire, name, description, edits, resolved)"),
    (5, "edits[0].split.target", "empty level"),
    (
        6,
        "edits[0].split.layuot",
        "did you mean 'layout'? (allowed: target, into, layout, sizes, groups, optional)",
    ),
    (
        8,
        "edits[0].split.layout",
        "did you mean 'stacked'? (allowed: auto, stacked, per_head, grouped, interleaved)",
    ),
    (9, "edits[0].split.into", "must list at least two, but has 1"),
    (10, "edits[0].split.sizes[0]", "must be at least 1, but is 0"),
    (10, "edits[0].split.sizes[1]", 'must be a whole number, but is "3"'),
    (13, "edits[1].lora.use_dorra", "unknown key 'use_dorra'; did you mean 'use_dora'? (allowed: "),
    (14, "edits[1].lora.target_modules", "is peft's name; here use 'target'"),
    (15, "edits[1].lora.lora_alpha", '".inf" is no usable float'),
    (16, "edits[2]", "'split' must be the only key here; indent its settings below it"),
    (18, "edits[3].splt", "unknown key 'splt'; did you mean 'split'? (allowed: split, join, "),
    (19, "edits[4].replace.with", "missing key 'with'"),
    (21, "edits[4].replace.with_", "unknown key 'with_'; did you mean 'with'?"),
    (23, "edits[4].replace.tensors[0].rename.form", "did you mean 'from'? (allowed: from, into)"),
    (23, "edits[4].replace.tensors[0].rename.from", "missing key 'from'"),
    (24, "edits[4].replace.tensors[1].renam", "did you mean 'rename'? (allowed: split, join, rename, "),
    (27, "edits[4].replace.tensors[2].split.into", "`*` in every name"),
    (28, "edits[4].replace.tensors[3]", "must be a mapping with one key, the kind, but is 3"),
    (29, "edits[5]", 'must be a mapping with one key, the kind, but is "freeze"'),
    (30, "edits[6].freeze", "must be a mapping with keys (target, optional), but is empty"),
    (33, "edits[7].cast.dtype", 'is "int8" (allowed: float32, bfloat16, float16, float64)'),
    (34, "edits[7].cast.target", "the key is given twice, first on line 32"),
    (35, "edits[8].rename.to", 'must be text, but is 0; put it in quotes: "0"'),
    (36, "edits[9].rename.to", "is not allowed; a plan is plain data"),
    (37, "edits[10].rename.1", "keys must be text; put 1 in quotes"),
    (37, "edits[10].rename.to", "missing key 'to'"),
    (38, "edits[11].lora", "must be a mapping with keys (target, adapter, "),
]


def test_every_mistake_is_told_with_its_line() -> None:
    issues = check(MISTAKES, "my.yaml")
    assert [(issue.line, issue.where) for issue in issues] == [(line, where) for line, where, _ in EXPECTED]
    for issue, (_, _, message) in zip(issues, EXPECTED, strict=True):
        assert message in issue.message
        assert issue.file == "my.yaml"
        assert not set(issue.message.split()) & {"Input", "Value", "Field", "pydantic"}
    with pytest.raises(PlanError) as caught:
        Plan.from_yaml(MISTAKES)
    assert [issue.where for issue in caught.value.issues] == [where for _, where, _ in EXPECTED]
    assert str(caught.value).startswith(f"this plan is not valid ({len(EXPECTED)} problems):\n  2: nmae: unknown")


def test_read_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("rewire: 1\nedits:\n- split: {}\n")
    with pytest.raises(PlanError) as caught:
        Plan.read(path)
    assert str(caught.value) == (
        f"{path} is not valid (1 problem):\n  {path}:3: edits[0].split.target: missing key 'target'; it has to be given"
    )


def test_json_mistakes_have_lines_too(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(
        '{\n\t"rewire": 1,\n\t"edits": [\n\t\t{"split": {"target": "a",\n\t\t\t"layuot": "\\ud83d\\ude00"}}]}'
    )
    assert [(issue.line, issue.where) for issue in check(path)] == [(5, "edits[0].split.layuot")]
    path.write_text('{"rewire": 1,\n"edits": [],\n"edits": []}')
    assert [str(issue) for issue in check(path)] == [f"{path}:3: edits: the key is given twice, first on line 2"]
    path.write_text('{"rewire": 1,\n"edits": [}')
    assert [(issue.line, issue.message) for issue in check(path)] == [(2, "not readable as JSON: Expecting value")]
    path.write_text('{"rewire": 1, "edits": [{"lora": {"target": "q", "r": NaN}}]}')
    assert "NaN is no JSON" in check(path)[0].message


def test_json_escapes_are_characters() -> None:
    plan = Plan.from_json('{"rewire": 1, "name": "\\ud83d\\ude00", "edits": []}')
    assert plan.name == "\N{GRINNING FACE}"
    with pytest.raises(PlanError, match="surrogate"):
        Plan.from_json('{"rewire": 1, "name": "\\ud83d", "edits": []}')


@pytest.mark.parametrize("version", ["2", "'1'", "true", "1.5", "null", "[1]"])
def test_another_version_is_all_that_is_said(version: str) -> None:
    (issue,) = check(f"rewire: {version}\nedits: what version 2 has here\nmore: 3\n")
    assert (issue.line, issue.where) == (1, "rewire")
    assert "this Rewire reads version 1 only" in issue.message


def test_the_version_must_stand_there() -> None:
    assert [issue.message for issue in check("edits: []\n")] == ["missing key 'rewire'; it has to be given"]


BROKEN = {
    "": (None, "empty; a plan begins with `rewire: 1`"),
    "# only a comment\n": (None, "empty"),
    "rewire: 1\nedits:\n- split: {target: @attention}\n": (3, 'between quotes: "@attention"'),
    "rewire: 1\nedits:\n- split:\n    target: **.qkv\n": (4, "between quotes"),
    "rewire: 1\nedits:\n- split:\n    target: *.qkv\n": (4, "between quotes"),
    "rewire: 1\nedits:\n- split:\n    target: [0-5].qkv\n": (4, "between quotes"),
    "rewire: 1\nedits:\n\t- split: a\n": (3, "indent with spaces"),
    "rewire: 1\n--- \nrewire: 1\n": (2, "not readable as YAML"),
    "rewire: 1\nname: \x07\n": (2, "the character '\\x07' is not allowed"),
    "- a\n- b\n": (1, 'must be a mapping with keys (rewire, name, description, edits, resolved), but is ["a", "b"]'),
    "just a word\n": (1, "must be a mapping"),
    "rewire: 1\nedits: 3\n": (2, "must be a list, but is 3"),
    "rewire: 1\nedits: {a: &x [*x]}\n": (2, "too large or too deep"),
    "rewire: 1\nname: !!binary aGk=\nedits: []\n": (2, "is not allowed"),
    "rewire: 1\nname: !!int x\nedits: []\n": (2, "is no usable int"),
    "rewire: 1\nedits: [{lora: {target: q, r: 99999999999999999999}}]\n": (2, "64 bits"),
}


@pytest.mark.parametrize("text", BROKEN)
def test_broken_texts(text: str) -> None:
    line, message = BROKEN[text]
    (issue,) = check(text)
    assert (issue.line, message in issue.message) == (line, True), issue


HOSTILE = {
    "alias bomb": "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{f'*a{n - 1}, ' * 9}]\n" for n in range(1, 30)),
    "deep flow": "[" * 1_000_000,
    "deep mappings": "{" * 1_000_000,
    "deep lists": "- " * 500_000,
    "deep keys": "? " * 500_000,
    "deep options": "rewire: 1\nedits: [{lora: {target: q, r: " + "{a: " * 40 + "1" + "}" * 40 + "}}]\n",
    "balanced": "[" * 400 + "]" * 400,
    "long number": "rewire: " + "9" * 100_000 + "\nedits: []\n",
    "too long": "#" * 2_000_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_texts_end_soon(name: str) -> None:
    start = time.perf_counter()
    for as_file in ("x.yaml", "x.json"):
        assert check(HOSTILE[name], as_file)
    assert time.perf_counter() - start < 10


@given(st.text(max_size=60))
def test_any_text_gives_issues_or_a_plan(text: str) -> None:
    for file in ("x.yaml", "x.json"):
        assert all(issue.file == file for issue in check("\n" + text, file))


@given(JSON)
def test_any_data_gives_a_plan_or_an_error(data: Any) -> None:
    for shape in (
        data,
        {"rewire": 1, "edits": data},
        {"rewire": 1, "edits": [{"split": data}, {"lora": data}]},
    ):
        with contextlib.suppress(PlanError):
            Plan.from_dict(shape)


def test_reading_never_imports_what_a_plan_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil_module.py").write_text("raise SystemExit('it ran')")
    monkeypatch.syspath_prepend(tmp_path)
    plan = Plan.from_yaml("rewire: 1\nedits:\n- replace: {target: a, with: 'evil_module:Class'}\n")
    assert plan.hash == Plan.from_yaml(plan.to_yaml()).hash


# ---------------------------------------------------------------- schema


@functools.cache
def validator() -> Any:
    jsonschema = pytest.importorskip("jsonschema", reason="the schema is tried out with jsonschema")
    jsonschema.Draft202012Validator.check_schema(json_schema())
    return jsonschema.Draft202012Validator(json_schema())


@given(PLANS)
def test_the_schema_accepts_plans(plan: Plan) -> None:
    validator().validate(json.loads(plan.to_json()))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_schema_accepts_examples(path: Path) -> None:
    validator().validate(yaml.safe_load(path.read_text("utf-8")))


def one_edit(**edit: Any) -> dict[str, Any]:
    return {"rewire": 1, "edits": [edit]}


@pytest.mark.parametrize(
    "data",
    [
        [],
        {"rewire": 1},
        {"rewire": 2, "edits": []},
        {"rewire": 1, "edits": [], "nmae": "x"},
        {"rewire": 1, "edits": {}},
        one_edit(),
        one_edit(splt={"target": "a"}),
        one_edit(split={"target": "a"}, freeze={"target": "a"}),
        one_edit(split={}),
        one_edit(split={"target": ""}),
        one_edit(split={"target": 3}),
        one_edit(split={"target": "a", "layout": "stackd"}),
        one_edit(split={"target": "a", "into": ["q"]}),
        one_edit(split={"target": "a", "into": ["q", "q"]}),
        one_edit(split={"target": "a", "groups": 0}),
        one_edit(freeze={"target": []}),
        one_edit(lora={"target": "q", "target_modules": ["q"]}),
        one_edit(lora={"r": 4}),
        one_edit(replace={"target": "a", "with_": "a:B"}),
        one_edit(replace={"target": "a", "with": "a.B"}),
        one_edit(replace={"target": "a", "with": "a:B", "tensors": [{"renam": {"from": "a", "into": "b"}}]}),
        one_edit(replace={"target": "a", "with": "a:B", "tensors": [{"rename": {"source": "a", "into": "b"}}]}),
        one_edit(cast={"target": "a", "dtype": "int8"}),
        one_edit(rename={"target": "a", "to": "b.c"}),
    ],
    ids=str,
)
def test_the_schema_and_the_reader_refuse(data: Any) -> None:
    assert not validator().is_valid(data)
    with pytest.raises(PlanError):
        Plan.from_dict(data)


def test_the_schema_says_what_things_are_for() -> None:
    schema = json_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["additionalProperties"] is False
    assert "Cut a fused linear layer" in json.dumps(schema)
    assert ">>>" not in json.dumps(schema)
    kinds = [list(choice["properties"]) for choice in schema["properties"]["edits"]["items"]["oneOf"]]
    assert kinds == [
        ["split"],
        ["join"],
        ["unstack"],
        ["stack"],
        ["replace"],
        ["lora"],
        ["freeze"],
        ["unfreeze"],
        ["cast"],
        ["rename"],
        ["pack"],
    ]
