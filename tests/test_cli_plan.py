"""`rewire plan`."""

from __future__ import annotations

import json
from pathlib import Path

from cli_runner import JOIN, rewire, write_plan
from rewire.plan import Plan, json_schema

BAD = ("split: {target: a.qkv, layuot: stacked}", "join: {target: a, parts: 3}")


def test_a_valid_plan(tmp_path: Path) -> None:
    path = write_plan(tmp_path, JOIN)
    done = rewire("plan", "check", path)
    assert (done.code, done.out, done.err) == (0, f"{path}: valid\n", "")


def test_every_error_at_once_with_file_line_and_choices(tmp_path: Path) -> None:
    bad, good = write_plan(tmp_path, *BAD, name="bad.yaml"), write_plan(tmp_path, JOIN)
    done = rewire("plan", "check", bad, good)
    first, second, third = done.out.splitlines()
    assert done.code == 2
    assert f"{bad}:3: edits[0].split.layuot: unknown key 'layuot'; did you mean 'layout'?" in first
    assert f"{bad}:4: edits[1].join.parts" in second
    assert third == f"{good}: valid"


def test_check_for_programs(tmp_path: Path) -> None:
    bad = write_plan(tmp_path, *BAD)
    done = rewire("plan", "check", bad, "--json")
    assert done.code == 2
    assert done.json["valid"] is False
    (file,) = done.json["files"]
    assert [issue["line"] for issue in file["issues"]] == [3, 4]
    assert file["file"] == str(bad)


def test_quiet_says_nothing_of_what_is_right(tmp_path: Path) -> None:
    done = rewire("plan", "check", write_plan(tmp_path, JOIN), "--quiet")
    assert (done.code, done.out, done.err) == (0, "", "")


def test_a_missing_plan(tmp_path: Path) -> None:
    done = rewire("plan", "check", tmp_path / "no.yaml")
    assert done.code == 2
    assert "no.yaml: cannot be read: No such file or directory" in done.out


def test_the_schema_is_json() -> None:
    done = rewire("plan", "schema")
    assert done.code == 0
    assert json.loads(done.out) == json_schema()


def test_show_names_edits_promises_and_hash(tmp_path: Path) -> None:
    path = write_plan(tmp_path, JOIN, "lora: {target: qkv, r: 16}")
    done = rewire("plan", "show", path)
    assert done.code == 0
    for text in (
        "join",
        "encoder.layer.*.attention.self",
        "lora",
        "r: 16",
        "additive",
        Plan.read(path).hash,
    ):
        assert text in done.out


def test_show_for_programs(tmp_path: Path) -> None:
    path = write_plan(tmp_path, JOIN)
    plan = Plan.read(path)
    assert rewire("plan", "show", path, "--json").json == {
        "plan": plan.to_dict(),
        "promise": plan.promise,
        "hash": plan.hash,
    }


def test_show_of_a_bad_plan_is_an_error(tmp_path: Path) -> None:
    done = rewire("plan", "show", write_plan(tmp_path, *BAD))
    assert (done.code, done.out) == (2, "")
    assert "is not valid (2 problems)" in done.err
