"""`src/rewire` keeps the rules of `layering.py`, and that checker finds every kind of breach."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from layering import (
    DOORS,
    FORBIDDEN_UNITS,
    HEAVY,
    LOADS_LIGHT,
    PACKAGE,
    ROWS,
    SELF_CONTAINED,
    top,
    violations,
)

SOURCE = Path(__file__).resolve().parents[1] / "src"

# ---------------------------------------------------------------- the tree as it is


def test_the_source_keeps_the_rules() -> None:
    found = violations(SOURCE)
    assert not found, "\n".join(["", *found])


HELP = "import runpy; sys.argv[1:] = ['--help']; runpy.run_module('rewire', run_name='__main__', alter_sys=True)"
LIGHT_COMMANDS = {"python -m rewire --help": HELP} | {
    f"import {name}": f"import {name}"
    for unit in sorted(LOADS_LIGHT - {"__main__"})
    for name in [PACKAGE if unit == PACKAGE else f"{PACKAGE}.{unit}"]
}


@pytest.mark.parametrize("command", LIGHT_COMMANDS)
def test_starts_without_heavy_packages(command: str) -> None:
    assert heavy_after(LIGHT_COMMANDS[command]) == []


def heavy_after(code: str) -> list[str]:
    """Heavy packages in memory once `code` has run in an interpreter of its own."""
    script = SCRIPT.format(code=code, heavy=sorted(HEAVY))
    env = os.environ | {"PYTHONPATH": str(SOURCE)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, check=False, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    report: dict[str, list[str] | str] = json.loads(done.stdout.splitlines()[-1])
    if missing := report["missing"]:
        pytest.skip(f"{missing} is not written yet")
    return list(report["heavy"])


SCRIPT = """
import json, sys
missing = ""
try:
    {code}
except SystemExit as stop:
    assert not stop.code, stop.code
except ModuleNotFoundError as error:
    missing = error.name or ""
    if not missing.startswith("rewire"):
        raise
except ImportError as error:  # runpy's wording of the same
    if "rewire.__main__" not in str(error):
        raise
    missing = "rewire.__main__"
print("\\n" + json.dumps({{"missing": missing, "heavy": [name for name in {heavy} if name in sys.modules]}}))
"""


# ---------------------------------------------------------------- the checker, on trees made for it


def broken(tmp_path: Path, files: Mapping[str, str]) -> str:
    """Breaches in a package of these files, one per line."""
    for name, text in files.items():
        path = tmp_path / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return "\n".join(violations(tmp_path))


ALLOWED = {
    "downwards": {"plan.py": "", "live.py": "from rewire.plan import Plan\nimport torch"},
    "sideways": {"errors.py": "", "plan.py": "from rewire.errors import PlanError"},
    "inside a unit": {
        "source/__init__.py": "from .gather import gather\nfrom . import gather",
        "source/gather.py": "",
    },
    "modules with torch": {"modules/split.py": "import math\nfrom torch import nn\nfrom rewire.modules import norm"},
    "the seam": {"hf_seam.py": "import transformers, peft, safetensors.torch"},
    "lora has a door": {"edits/lora.py": "def add():\n    from peft import LoraConfig"},
    "types only": {"live.py": "import typing as t\nif t.TYPE_CHECKING:\n    from transformers import PreTrainedModel"},
    "heavy when called": {
        "cli/__init__.py": "def run():\n    import torch",
        "checkpoint.py": "def f():\n    import torch",
    },
    "cli calls the public face": {
        "__init__.py": "",
        "cli/__init__.py": "import rewire\nfrom rewire import load",
    },
    "units not written yet": {
        "__init__.py": "",
        "stream.py": "from rewire.resolve import resolve\nfrom rewire import receipts",
    },
}

FORBIDDEN = {
    "upwards": (
        {"plan.py": "from rewire.live import apply_", "live.py": ""},
        "rewire.plan, line 1: imports rewire.live (when loaded): live lies above plan",
    ),
    "upwards to a unit not written yet": (
        {"plan.py": "from rewire.live import apply_"},
        "live lies above plan",
    ),
    "upwards inside a function": (
        {"edits/split.py": "def f():\n    import rewire.live"},
        "live lies above edits",
    ),
    "upwards by relative import": ({"edits/split.py": "from ..live import apply_"}, "live lies above edits"),
    "upwards for type checkers": (
        {"edits/split.py": "import typing\nif typing.TYPE_CHECKING:\n    import rewire.live"},
        "live lies above edits",
    ),
    "the face from inside": (
        {"__init__.py": "", "live.py": "from rewire import Plan"},
        "rewire lies above live",
    ),
    "a unit without a place": ({"helpers.py": ""}, "helpers has no place in LAYERS"),
    "proof knows edits": (
        {"proof/compare.py": "from rewire.edits import split"},
        "proof must not know edits",
    ),
    "proof knows resolve": ({"proof/__init__.py": "import rewire.resolve"}, "proof must not know resolve"),
    "modules need more than torch": (
        {"modules/split.py": "import numpy"},
        "modules imports nothing but torch",
    ),
    "modules need rewire": (
        {"errors.py": "", "modules/split.py": "from rewire.errors import RuleError"},
        "modules imports nothing but torch",
    ),
    "transformers past the seam": (
        {"live.py": "import transformers.utils"},
        "only hf_conversions, hf_seam may import transformers",
    ),
    "transformers by string": (
        {"live.py": "import importlib\nimportlib.import_module('transformers')"},
        "only hf_conversions, hf_seam may import transformers",
    ),
    "transformers in the cli": (
        {"cli/run.py": "def f():\n    from transformers import AutoModel"},
        "only hf_conversions, hf_seam may import transformers",
    ),
    "peft elsewhere": ({"edits/split.py": "import peft"}, "only edits.lora, hf_seam may import peft"),
    "safetensors elsewhere": ({"stream.py": "from safetensors import safe_open"}, "may import safetensors"),
    "torch in source": ({"source/render.py": "def f():\n    import torch"}, "source has no use for torch"),
    "torch in tensor rules": ({"tensor_rules.py": "import torch.nn"}, "tensor_rules has no use for torch"),
    "torch when stream loads": ({"stream.py": "import torch"}, "rewire.stream must load without torch"),
    "torch in a class body of the cli": (
        {"cli/run.py": "class A:\n    import torch"},
        "must load without torch",
    ),
    "torch round about": (
        {
            "stream.py": "import rewire.resolve",
            "resolve.py": "from rewire.edits import TABLE",
            "edits/__init__.py": "from rewire.families import FAMILIES",
            "families.py": "from torch import nn",
        },
        "rewire.stream -> rewire.resolve -> rewire.edits -> rewire.families -> torch.nn",
    ),
    "torch through a package": (
        {
            "cli/__init__.py": "import rewire.measure.table",
            "measure/__init__.py": "import torch",
            "measure/table.py": "",
        },
        "rewire.cli -> rewire.measure -> torch",
    ),
    "units in a circle": (
        {"live.py": "import rewire.stream", "stream.py": "def f():\n    import rewire.live"},
        "live and stream import each other",
    ),
}


@pytest.mark.parametrize("files", ALLOWED.values(), ids=ALLOWED.keys())
def test_checker_allows(tmp_path: Path, files: dict[str, str]) -> None:
    assert broken(tmp_path, files) == ""


@pytest.mark.parametrize(("files", "expected"), FORBIDDEN.values(), ids=FORBIDDEN.keys())
def test_checker_finds(tmp_path: Path, files: dict[str, str], expected: str) -> None:
    assert expected in broken(tmp_path, files)


def test_every_rule_speaks_of_known_units() -> None:
    doors = {top(door) for units in DOORS.values() for door in units}
    assert LOADS_LIGHT | SELF_CONTAINED.keys() | FORBIDDEN_UNITS.keys() | doors <= ROWS.keys()


def test_heavy_packages_are_noticed() -> None:
    assert heavy_after("sys.modules['torch'] = None") == ["torch"]
