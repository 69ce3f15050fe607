"""Formatting by ruff, with the settings of the Transformers repository and a version that gives its bytes."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from rewire.errors import RewireError

VERSION = "0.14.10"
"""The version that Transformers pins. 0.13.1 to 0.14.14 give the same bytes; 0.15 and later do not."""

SETTINGS = """\
target-version = "py311"
line-length = 119

[lint]
preview = true
explicit-preview-rules = true
select = [
    "E", "F", "I", "W", "UP", "FURB", "SIM", "S110", "C4", "C901", "RUF013", "PERF102", "PLC1802", "PLC0208",
    "PIE794", "PLW1514",
]
ignore = ["E501", "E741", "SIM1", "SIM905", "UP015", "UP031"]
extend-safe-fixes = ["UP006"]
external = ["NC"]

[lint.isort]
lines-after-imports = 2
known-first-party = ["transformers"]

[lint.mccabe]
max-complexity = 75
"""


class FormatterError(RewireError):
    """Ruff is missing, of an unsuitable version, or fails."""


def find_ruff(chosen: str | None = None) -> str:
    """The ruff to use: the one chosen, `REWIRE_RUFF`, the one beside this Python or the one on the path.

    Raises `FormatterError` where none of these is of a suitable version.
    """
    found = {one: ruff_version(one) for one in _candidates(chosen)}
    suitable = (one for one, version in found.items() if (0, 13, 1) <= version < (0, 15))
    ruff = next(suitable, None)
    if ruff is None:
        seen = ", ".join(f"{one} is {'.'.join(map(str, version))}" for one, version in found.items() if version)
        advice = f"pip install 'rewire[modular]' (ruff=={VERSION}), or name another ruff in REWIRE_RUFF"
        raise FormatterError(f"no ruff from 0.13.1 to 0.14 ({seen or 'none found'}); {advice}")
    return ruff


def _candidates(chosen: str | None) -> Iterator[str]:
    if only := chosen or os.environ.get("REWIRE_RUFF"):
        yield only
        return
    yield str(Path(sys.executable).with_name("ruff"))
    if on_path := shutil.which("ruff"):
        yield on_path


@cache
def ruff_version(ruff: str) -> tuple[int, ...]:
    """What `ruff --version` says; empty if it does not run."""
    try:
        done = subprocess.run([ruff, "--version"], capture_output=True, text=True, check=False)
    except OSError:
        return ()
    return tuple(map(int, re.findall(r"\d+", done.stdout)[:3]))


def tidy(texts: Mapping[str, str], ruff: str) -> dict[str, str]:
    """The texts by (relative) path, formatted in one run. Those that are not valid Python are missing."""
    with tempfile.TemporaryDirectory(prefix="rewire-") as folder:
        root = Path(folder)
        (root / "ruff.toml").write_text(SETTINGS, "utf-8")
        for name, text in texts.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text, "utf-8")
        commands = [["check", "--fix-only", "--quiet"], ["format", "--quiet"]]
        failed = [error for command in commands if (error := _run(ruff, command, root))]
        broken = {name for name, text in texts.items() if not _is_valid(text)} if failed else set()
        if failed and not broken:
            raise FormatterError("\n".join(failed))
        return {name: (root / name).read_text("utf-8") for name in texts if name not in broken}


def _run(ruff: str, command: list[str], folder: Path) -> str:
    """Runs ruff on a folder; returns what went wrong."""
    arguments = [ruff, *command, "--no-cache", "."]
    done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True, check=False)
    return f"ruff {command[0]} failed:\n{done.stderr.strip()}" if done.returncode else ""


def _is_valid(text: str) -> bool:
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True
