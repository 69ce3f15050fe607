"""Searching the commits of a git repository, in a working tree of its own."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rewire.errors import MeasureError
from rewire.measure.bisection import Check, Point, Verdict
from rewire.measure.commands import run_check


def commits(repository: Path, good: str, bad: str) -> list[Point]:
    """The commits from `good` to `bad` along first parents, both included.

    Raises `MeasureError` where one of them does not exist, or `good` is no ancestor of `bad`.
    """
    first, last = (_git(repository, "rev-parse", "--verify", f"{name}^{{commit}}") for name in (good, bad))
    found = _git(repository, "rev-list", "--first-parent", "--reverse", f"{first}..{last}").split()
    parents = _git(repository, "rev-list", "--first-parent", last).split()
    if first not in parents:
        raise MeasureError(
            f"{good} is not among the first parents of {bad}; name a good commit on the same line of history"
        )
    return [_point(repository, commit) for commit in (first, *found)]


def _point(repository: Path, commit: str) -> Point:
    author, date, subject = _git(repository, "show", "-s", "--format=%an%x00%aI%x00%s", commit).split("\0")
    return Point(commit, commit[:10], {"subject": subject, "author": author, "date": date})


@contextmanager
def commit_check(
    repository: Path, command: str, *, overlay: Sequence[Path] = (), timeout: float | None = None
) -> Iterator[Check]:
    """A check that runs a command in a checkout of each commit; the repository's own working tree is not touched.

    Files of `overlay` (relative to the repository, as they are in its working tree now) are put on top: a new test,
    which old commits do not have.
    """
    missing = [str(path) for path in overlay if not (repository / path).is_file()]
    if missing:
        raise MeasureError(f"--overlay: {', '.join(missing)} is no file in {repository}")
    with tempfile.TemporaryDirectory(prefix="rewire-bisect-") as place:
        tree = Path(place) / "tree"
        _git(repository, "worktree", "add", "--detach", "--force", str(tree), "HEAD")
        try:
            yield lambda point: _check(repository, tree, point, command, overlay, timeout)
        finally:
            _git(repository, "worktree", "remove", "--force", str(tree))


def _check(
    repository: Path, tree: Path, point: Point, command: str, overlay: Sequence[Path], timeout: float | None
) -> Verdict:
    _git(tree, "checkout", "--quiet", "--force", "--detach", point.id)
    _git(tree, "clean", "-fdxq")
    for path in overlay:
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(repository / path, tree / path)
    return run_check(command, tree, environment={"PYTHONDONTWRITEBYTECODE": "1"}, timeout=timeout)


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    except FileNotFoundError as error:
        raise MeasureError("git is not installed") from error
    except subprocess.CalledProcessError as error:
        raise MeasureError(f"git {' '.join(arguments[:3])}: {error.stderr.strip()}") from error
    return done.stdout.strip()
