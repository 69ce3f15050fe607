"""Searching the versions of a package, each installed into a folder of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rewire.errors import MeasureError
from rewire.measure.bisection import Check, Point, Verdict
from rewire.measure.commands import run_check


def versions(package: str, listed: Sequence[str]) -> list[Point]:
    """A point for each version, in the order given: from good to bad."""
    twice = sorted({version for version in listed if listed.count(version) > 1})
    if twice:
        raise MeasureError(f"version {', '.join(twice)} is listed twice")
    return [Point(f"{package}=={version}", f"{package} {version}") for version in listed]


@contextmanager
def version_check(
    folder: Path, command: str, *, pip: Sequence[str] = (), timeout: float | None = None
) -> Iterator[Check]:
    """A check that runs a command with one version of the package in front of everything installed.

    The version is installed without its dependencies into a folder that `PYTHONPATH` names first; the environment
    itself is not touched. One that cannot be installed is passed over.
    """
    with tempfile.TemporaryDirectory(prefix="rewire-bisect-") as place:
        yield lambda point: _check(Path(place), folder, point, command, pip, timeout)


def _check(place: Path, folder: Path, point: Point, command: str, pip: Sequence[str], timeout: float | None) -> Verdict:
    target = place / point.id
    if not target.is_dir():
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), *pip]
        done = subprocess.run([*install, point.id], capture_output=True, text=True, check=False)
        if done.returncode:
            return Verdict("skipped", f"pip cannot install {point.id}: {done.stderr.strip()[-2000:]}")
    before = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([str(target), *([before] if before else [])])
    return run_check(command, folder, environment={"PYTHONPATH": path}, timeout=timeout)
