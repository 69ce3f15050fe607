"""The conversion benchmark: its edits give what it says they must, and its programs run."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import rewire
from rewire.plan import Plan

ROOT = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def models() -> Iterator[ModuleType]:
    sys.path.insert(0, str(ROOT))
    try:
        yield importlib.import_module("suite.convert_models")
    finally:
        sys.path.remove(str(ROOT))


@pytest.fixture
def source(models: ModuleType, tmp_path: Path) -> Path:
    models.write_checkpoint(tmp_path / "source", models.TINY)
    return tmp_path / "source"


def test_the_checkpoint_has_the_size_that_the_aims_speak_of(models: ModuleType, source: Path) -> None:
    assert models.Size().bytes == 4_018_108_416
    assert len(list(models.Size().shapes())) == 111
    tensors = models.read_checkpoint(source)
    assert {name: array.shape for name, array in tensors.items()} == dict(models.TINY.shapes())
    assert len(list(source.glob("*.safetensors"))) == 2


def test_every_edit_gives_what_the_benchmark_expects(models: ModuleType, source: Path, tmp_path: Path) -> None:
    before = models.read_checkpoint(source)
    for number, edit in enumerate(models.EDITS):
        rewire.convert(source, tmp_path / str(number), Plan.from_dict(edit.plan(models.TINY)))
        text, is_right = edit.check(models.TINY, before, models.read_checkpoint(tmp_path / str(number)))
        assert is_right, f"{edit.name}: {text}"


def test_a_wrong_result_is_seen(models: ModuleType, source: Path) -> None:
    before = models.read_checkpoint(source)
    after = dict(models.IN_ORDER.result(models.TINY, before))
    name = next(name for name in after if name.endswith(".b"))
    assert models.IN_ORDER.check(models.TINY, before, after)[1]
    assert not models.IN_ORDER.check(models.TINY, before, {**after, name: np.roll(after[name], 1, 0)})[1]
    assert not models.IN_ORDER.check(models.TINY, before, {**after, "one too many": after[name]})[1]


@pytest.mark.parametrize("what", ["rewire", "by-shard"])
def test_its_programs_split_alike(models: ModuleType, source: Path, tmp_path: Path, what: str) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(models.IN_ORDER.plan(models.TINY)), "utf-8")
    command = [
        sys.executable,
        "-m",
        "suite.convert_work",
        what,
        str(source),
        str(tmp_path / "out"),
        "--plan",
        str(plan),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-1]) > 1 << 20  # bytes of memory
    text, is_right = models.IN_ORDER.check(
        models.TINY, models.read_checkpoint(source), models.read_checkpoint(tmp_path / "out")
    )
    assert is_right, text
