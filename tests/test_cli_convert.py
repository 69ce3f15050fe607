"""`rewire convert`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cli_runner import rewire
from convert_kit import SPLIT, assert_same, expected, model_tensors, plan_of, read_tensors, write_checkpoint
from rewire import stream

PLAN = plan_of(SPLIT, config={"heads": 8})


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source", model_tensors(), shards=3)


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    PLAN.write(tmp_path / "plan.yaml")
    return tmp_path / "plan.yaml"


def test_there_and_back(source: Path, plan: Path, tmp_path: Path) -> None:
    done = rewire("convert", source, tmp_path / "out", "--plan", plan, "--verify", "--jobs", 2)
    assert (done.code, done.err) == (0, "")
    assert "config.json: heads changed" in done.out
    assert "all bytes read again" in done.out
    assert "done: 3 of 3 shards written" in done.out
    assert_same(read_tensors(tmp_path / "out"), expected(model_tensors(), PLAN))
    assert rewire("convert", tmp_path / "out", tmp_path / "back", "--revert", "-q").out == ""
    assert_same(read_tensors(tmp_path / "back"), model_tensors())


def test_dry_run_as_a_table(source: Path, plan: Path, tmp_path: Path) -> None:
    done = rewire("convert", source, tmp_path / "out", "-p", plan, "--dry-run")
    assert done.code == 0
    lines = [line.split() for line in done.out.splitlines()]
    assert ["h.*.qkv.weight", "h.*.q.weight", "12×6", "BF16", "4", "576", "8"] in lines
    assert "nothing was written" in done.out
    assert not (tmp_path / "out").exists()


def test_dry_run_as_json(source: Path, plan: Path, tmp_path: Path) -> None:
    done = rewire("convert", source, tmp_path / "out", "-p", plan, "--dry-run", "--json").json
    assert done["state"] == "planned"
    assert {fate["name"] for fate in done["fates"]} == set(expected(model_tensors(), PLAN))
    assert done["needed_bytes"] > sum(fate["bytes"] for fate in done["fates"]) == done["bytes"][1]


def test_json(source: Path, plan: Path, tmp_path: Path) -> None:
    done = rewire("convert", source, tmp_path / "out", "-p", plan, "--json", "--manifest", tmp_path / "SUMS").json
    assert (done["state"], done["written"], done["config"]) == ("done", 3, ["heads"])
    assert "fates" not in done
    assert (tmp_path / "SUMS").exists()


def test_parts(source: Path, plan: Path, tmp_path: Path) -> None:
    for number in (1, 2):
        done = rewire("convert", source, tmp_path / "out", "-p", plan, "--shards", f"{number}/2")
        assert "when all are, --finish publishes the result" in done.out
    assert "done: 3 kept" in rewire("convert", source, tmp_path / "out", "-p", plan, "--finish").out


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--revert"], "no record"),
        ([], "there is no plan"),
        (["--plan", "{plan}", "--shards", "3"], "no part of the shards"),
        (["--plan", "{plan}", "--resume", "--restart"], "choose one"),
        (["--plan", "{plan}", "--max-shard-size", "x"], "no size"),
        (["--plan", "nowhere.yaml"], "No such file"),
        (["--plan", "{plan}", "--jobs", "x"], "--jobs"),
    ],
)
def test_what_is_refused_exits_with_2(
    source: Path, plan: Path, tmp_path: Path, options: list[str], reason: str
) -> None:
    done = rewire("convert", source, tmp_path / "out", *(option.format(plan=plan) for option in options))
    assert done.code == 2
    assert reason in done.err
    assert done.out == ""


def test_an_interruption_says_how_to_go_on(
    source: Path, plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rewire.stream.run.write_shard", interrupt)
    done = rewire("convert", source, tmp_path / "out", "-p", plan)
    assert done.code == 130
    assert "--resume" in done.err


def test_neither_torch_nor_transformers_is_loaded_and_memory_is_small(source: Path, plan: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom rewire.cli import main\n"
        f"sys.argv = ['rewire', 'convert', {str(source)!r}, {str(tmp_path / 'out')!r}, '-p', {str(plan)!r}, '-q']\n"
        "try:\n    main()\nfinally:\n"
        "    print(sorted({'torch', 'transformers', 'safetensors', 'peft'} & set(sys.modules)))\n"
        "    print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    loaded, memory = done.stdout.splitlines()
    assert (done.returncode, loaded) == (0, "[]")
    assert int(memory) < 64 * 1024


def test_the_progress_bar_shows_bytes_on_a_terminal(source: Path, plan: Path, tmp_path: Path) -> None:
    code = (
        "import os, pty, sys\n"
        "status = pty.spawn([sys.executable, '-m', 'rewire', 'convert', *sys.argv[1:]])\n"
        "sys.exit(os.waitstatus_to_exitcode(status))\n"
    )
    command = [sys.executable, "-c", code, source, tmp_path / "out", "-p", plan]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 0
    assert "converting" in done.stdout


def test_the_names_that_the_package_offers() -> None:
    assert sorted(stream.__all__) == ["Conversion", "Fate", "convert"]
    assert json.loads(json.dumps(stream.__all__)) == stream.__all__
