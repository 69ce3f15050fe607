"""Which edit, commit or version broke it: planted breaks are found, flaky and missing checks are told apart."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli_runner import BERT, config, save_model, write_plan
from cli_runner import rewire as run
from rewire.errors import MeasureError
from rewire.measure.bisection import Memory, Point, Verdict, bisect

PYTHON = sys.executable


def points(count: int) -> list[Point]:
    return [Point(str(number), f"point {number}") for number in range(count)]


def broken_from(first_bad: int, skipped: Sequence[int] = ()) -> Callable[[Point], Verdict]:
    def check(point: Point) -> Verdict:
        number = int(point.id)
        if number in skipped:
            return Verdict("skipped")
        return Verdict("bad" if number >= first_bad else "good", f"output of {number}")

    return check


@given(count=st.integers(2, 300), share=st.floats(0, 1))
def test_the_first_bad_point_is_found_in_few_runs(count: int, share: float) -> None:
    first_bad = 1 + round(share * (count - 2))
    found = bisect("edit", points(count), broken_from(first_bad))
    assert (found.outcome, found.good.id, found.bad.id) == ("found", str(first_bad - 1), str(first_bad))
    assert (found.good_output, found.bad_output) == (f"output of {first_bad - 1}", f"output of {first_bad}")
    assert found.runs <= 2 + (count - 1).bit_length()


@given(count=st.integers(4, 60), data=st.data())
def test_points_that_cannot_be_tried_are_passed_over(count: int, data: st.DataObject) -> None:
    first_bad = data.draw(st.integers(1, count - 1))
    skipped = data.draw(st.sets(st.integers(1, count - 2)))
    found = bisect("commit", points(count), broken_from(first_bad, sorted(skipped)))
    good = max(n for n in range(first_bad) if n not in skipped)
    bad = min(n for n in range(first_bad, count) if n not in skipped)
    assert (int(found.good.id), int(found.bad.id)) == (good, bad)
    assert found.outcome == ("found" if bad - good == 1 else "narrowed")
    assert [int(point.id) for point in found.skipped] == list(range(good + 1, bad))


def test_both_ends_are_verified() -> None:
    with pytest.raises(MeasureError, match=r"point 0, the first point, is bad, not good.*output of 0"):
        bisect("edit", points(5), broken_from(0))
    with pytest.raises(MeasureError, match="point 4, the last point, is good, not bad"):
        bisect("edit", points(5), broken_from(9))
    with pytest.raises(MeasureError, match=r"cannot be run at point 0.*--overlay"):
        bisect("edit", points(5), broken_from(3, [0]))
    with pytest.raises(MeasureError, match="nothing to search"):
        bisect("edit", points(1), broken_from(0))


def test_a_check_that_contradicts_itself_is_flaky() -> None:
    tries: list[str] = []

    def check(point: Point) -> Verdict:
        tries.append(point.id)
        if point.id == "4":
            return Verdict("good" if tries.count("4") % 2 else "bad")
        return broken_from(6)(point)

    found = bisect("edit", points(9), check, repeats=3)
    assert (found.outcome, found.bad.id) == ("flaky", "4")
    assert "flaky" in found.summary()


def test_a_search_goes_on_where_it_was(tmp_path: Path) -> None:
    state, tries = tmp_path / "state.json", []

    def check(point: Point) -> Verdict:
        tries.append(point.id)
        if len(tries) == 4:
            raise KeyboardInterrupt
        return broken_from(13)(point)

    with pytest.raises(KeyboardInterrupt):
        bisect("edit", points(40), check, memory=Memory(state, points(40), "check"))
    found = bisect("edit", points(40), check, memory=Memory(state, points(40), "check"))
    assert found.bad.id == "13"
    assert len(tries) == found.runs + 1  # the one that was interrupted
    with pytest.raises(MeasureError, match="another search"):
        Memory(state, points(40), "another check")
    state.write_text("{")
    with pytest.raises(MeasureError, match="no record"):
        Memory(state, points(40), "check")


# ---------------------------------------------------------------- edits of a plan


def twelve_edits(folder: Path, wrong: int) -> Path:
    """Renames that change nothing, and one edit that does."""
    attention = "encoder.layer.{}.attention.self"
    good = [
        *(f"join: {{target: {attention.format(n)}, parts: [query, key, value], name: qkv}}" for n in (0, 1)),
        *(f"freeze: {{target: encoder.layer.{n}.output}}" for n in (0, 1)),
        *(f"unfreeze: {{target: encoder.layer.{n}.output}}" for n in (0, 1)),
        *(f"freeze: {{target: encoder.layer.{n}.attention}}" for n in (0, 1)),
        *(f"unfreeze: {{target: encoder.layer.{n}.attention}}" for n in (0, 1)),
        "freeze: {target: embeddings}",
    ]
    bad = "replace: {target: encoder.layer.1.output.dense, with: 'planted:Wrong'}"
    return write_plan(folder, *good[:wrong], bad, *good[wrong:])


PLANTED = '''
import torch

class Wrong(torch.nn.Linear):
    """A linear layer with a sign too many."""

    @classmethod
    def from_module(cls, old):
        return cls(old.in_features, old.out_features)

    def forward(self, rows):
        return -super().forward(rows)
'''


@pytest.mark.parametrize("wrong", [0, 7])
def test_the_wrong_edit_of_twelve_is_found(wrong: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "planted.py").write_text(PLANTED)
    monkeypatch.syspath_prepend(tmp_path)
    plan = twelve_edits(tmp_path, wrong)
    result = run("bisect", "plan", plan, *config("bert", BERT), "--allow-code", "--json")
    assert result.code == 0, result.err
    assert result.json["bad"]["id"] == str(wrong + 1)
    assert result.json["bad"]["label"].startswith(f"edits[{wrong}] (replace")
    assert result.json["bad_output"].startswith("FAILED")
    assert result.json["good_output"].startswith("passed")


def test_a_command_judges_the_edited_model(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "bert", "bert", BERT)
    casts = [f"cast: {{target: encoder.layer.{n}.output.dense, dtype: float16}}" for n in (0, 1)]
    plan = write_plan(tmp_path, "freeze: {target: embeddings}", *casts)
    look = (
        "import sys; from safetensors.torch import load_file; "
        "t = load_file(sys.argv[1] + '/model.safetensors')['encoder.layer.1.output.dense.weight']; "
        "print(t.dtype); sys.exit(str(t.dtype) != 'torch.float32')"
    )
    check = f'{PYTHON} -c "{look}" {{model}}'
    result = run("bisect", "plan", plan, folder, "--check", check, "--json")
    assert result.code == 0, result.err
    assert result.json["bad"]["id"] == "3"
    assert "float16" in result.json["bad_output"]
    assert "float32" in result.json["good_output"]


# ---------------------------------------------------------------- commits


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Ten commits; the sixth breaks `double`. The test came with the eighth."""
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "-q", "-b", "main")
    git(folder, "config", "user.name", "A. Uthor")
    git(folder, "config", "user.email", "author@example.org")
    for number in range(10):
        body = "return x + 2" if number >= 5 else "return x + x"
        (folder / "code.py").write_text(f"NUMBER = {number}\ndef double(x):\n    {body}\n")
        if number >= 7:
            (folder / "test_code.py").write_text(
                "from code import double\ndef test_double():\n    assert double(3) == 6\n"
            )
        git(folder, "add", ".")
        git(folder, "commit", "-q", "-m", f"change {number}")
    return folder


def git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


CHECK = f"{PYTHON} -c \"import runpy; assert runpy.run_path('code.py')['double'](3) == 6\""


def search(repository: Path, *more: str) -> Any:
    first = git(repository, "rev-list", "--max-parents=0", "HEAD")
    return run("bisect", "commits", "--repository", repository, "--good", first, *more)


def test_the_commit_is_found_with_author_and_subject(repository: Path) -> None:
    (repository / "code.py").write_text("work in progress")
    result = search(repository, "--check", CHECK, "--json")
    assert result.code == 0, result.err
    about = result.json["bad"]["about"]
    assert (about["subject"], about["author"]) == ("change 5", "A. Uthor")
    assert "AssertionError" in result.json["bad_output"]
    assert (repository / "code.py").read_text() == "work in progress"
    assert len(git(repository, "worktree", "list").splitlines()) == 1


def test_a_flaky_check_is_reported(repository: Path, tmp_path: Path) -> None:
    counter = tmp_path / "counter"
    counter.write_text("")
    flaky = f"echo x >> {counter}; test $(( $(wc -l < {counter}) % 2 )) = 1"
    result = search(repository, "--check", flaky, "--repeats", "2", "--json")
    assert result.code == 1
    assert result.json["outcome"] == "flaky"


def test_a_test_that_did_not_exist_at_the_good_commit(repository: Path) -> None:
    check = f"{PYTHON} -m pytest -q -p no:cacheprovider test_code.py"
    result = search(repository, "--check", check)
    assert result.code == 2
    assert "--overlay" in result.err
    result = search(repository, "--check", check, "--overlay", "test_code.py", "--json")
    assert result.code == 0, result.err
    assert result.json["bad"]["about"]["subject"] == "change 5"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--good", "nowhere", "--check", "true"], "nowhere"),
        (["--good", "HEAD", "--bad", "HEAD~3", "--check", "true"], "not among the first parents"),
        (["--good", "HEAD~3", "--check", "no-such-command-xyz"], "exit code 127"),
        (["--good", "HEAD~3", "--check", "true"], "is good, not bad"),
        (["--good", "HEAD~3", "--check", "true", "--overlay", "nowhere.py"], "is no file"),
    ],
)
def test_commits_with_bad_input(repository: Path, options: list[str], message: str) -> None:
    result = run("bisect", "commits", "--repository", repository, *options)
    assert result.code == 2
    assert message in " ".join(result.err.split())
    assert len(git(repository, "worktree", "list").splitlines()) == 1


def test_a_check_that_hangs_is_bad(repository: Path) -> None:
    hangs = f"{PYTHON} -c \"import code, time; time.sleep(60 * (open('code.py').read().count('x + 2')))\""
    result = search(repository, "--check", hangs, "--timeout", "3", "--repeats", "1", "--json")
    assert result.json["bad"]["about"]["subject"] == "change 5"
    assert "stopped after 3 s" in result.json["bad_output"]


# ---------------------------------------------------------------- versions


def wheel(folder: Path, version: str, value: int) -> None:
    """A package of one module, ready to be installed without a network."""
    name = f"planted_package-{version}"
    with zipfile.ZipFile(folder / f"{name}-py3-none-any.whl", "w") as file:
        file.writestr("planted_package.py", f"VALUE = {value}\n")
        about = f"{name}.dist-info"
        file.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: planted-package\nVersion: {version}\n")
        file.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{about}/RECORD", "")


def test_the_version_is_found_and_one_that_cannot_be_installed_passed_over(tmp_path: Path) -> None:
    for version, value in (("1.0", 1), ("1.1", 1), ("1.3", 2), ("2.0", 2)):
        wheel(tmp_path, version, value)
    check = f'{PYTHON} -c "import planted_package; assert planted_package.VALUE == 1"'
    options = ["--check", check, "--pip=--no-index", f"--pip=--find-links={tmp_path}", "--repeats", "1", "--json"]
    result = run("bisect", "versions", "planted-package", "1.0", "1.1", "1.3", "2.0", *options)
    assert result.code == 0, result.err
    assert result.json["bad"]["label"] == "planted-package 1.3"
    result = run("bisect", "versions", "planted-package", "1.0", "1.1", "1.2", "1.3", *options)
    assert result.code == 1, result.err
    assert json.loads(result.out)["outcome"] == "narrowed"
    result = run("bisect", "versions", "planted-package", "1.0", "1.0", *options)
    assert result.code == 2
    assert "listed twice" in result.err
