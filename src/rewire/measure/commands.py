"""Checks that are commands."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rewire.errors import MeasureError
from rewire.measure.bisection import State, Verdict

CANNOT_RUN = 125
"""Exit code of a command that cannot tell, as for `git bisect run`."""

_NOT_THERE = frozenset({126, 127})
_NO_TESTS = frozenset({4, 5})
"""pytest's: the file is not there, and no test was collected."""

_KEPT = 4000
"""Characters of the output that are kept, from the end."""


def run_check(
    command: str, folder: Path, *, environment: Mapping[str, str] | None = None, timeout: float | None = None
) -> Verdict:
    """Runs a command in a folder: 0 is good, 125 means that it cannot tell there, anything else is bad.

    Of pytest, no such file and no test count as not to be told. A command that takes too long is bad.

    Raises `MeasureError` if there is no such command.
    """
    try:
        done = subprocess.run(
            command,
            shell=True,
            cwd=folder,
            env={**os.environ, **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout,
            text=True,
            errors="replace",
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raw: Any = error.stdout or b""  # bytes, whatever was asked for
        text = raw if isinstance(raw, str) else raw.decode("utf-8", "replace")
        return Verdict("bad", f"{text[-_KEPT:]}\n(stopped after {timeout:.0f} s)")
    if done.returncode in _NOT_THERE:
        raise MeasureError(f"the check cannot be run (exit code {done.returncode}): {done.stdout.strip()[-500:]}")
    return Verdict(_state(done.returncode, command), done.stdout[-_KEPT:])


def _state(code: int, command: str) -> State:
    if code == 0:
        return "good"
    return "skipped" if code == CANNOT_RUN or ("pytest" in command and code in _NO_TESTS) else "bad"
