"""Which of several ways is fastest here: measured once per machine, remembered in a small file.

The file is a convenience. It lies in the user's cache folder (`XDG_CACHE_HOME`, else `~/.cache`), is replaced as a
whole, and is passed over when it cannot be read or written or says something unknown.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import torch

ROUNDS = 5
SECONDS = 0.1
"""Measuring goes on for both: that many rounds and that long, so that quick ways are seen often enough."""
MARGIN = 0.97
"""A way takes the place of one before it if it needs at most this share of its time: noise must not decide."""


def fastest(case: str, ways: Mapping[str, Callable[[], object]], path: Path | None = None) -> str:
    """The name of the fastest way in this case; an earlier one where a later one does not beat it clearly.

    Args:
        case: what is measured, a shape class and a type; the key under which the answer is remembered.
        ways: what to time, by name.
        path: the file; the user's own unless given.

    >>> fastest("one way", {"only": lambda: None})
    'only'
    """
    if len(ways) == 1:
        return next(iter(ways))
    path = default_path() if path is None else path
    key = f"{case} | {' '.join(sorted(ways))} | {machine()} {torch.get_num_threads()} threads"
    return _remembered(path).get_or_measure(key, ways)


def machine() -> str:
    """What makes this machine and this torch differ from others, as a short hash."""
    text = "\n".join([_processor(), torch.__version__, torch.__config__.show()])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def _processor() -> str:
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        wanted = ("model name", "flags", "Features", "CPU part")
        return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
    return f"{platform.machine()} {platform.processor()}"


def default_path() -> Path:
    """The file in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "rewire" / "fastest.json"


@functools.cache
def _remembered(path: Path) -> _Answers:
    return _Answers(path)


class _Answers:
    """The file at `path` and what this process has found out since."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known = self._read()

    def get_or_measure(self, key: str, ways: Mapping[str, Callable[[], object]]) -> str:
        if self.known.get(key) not in ways:
            self.known[key] = _measure(ways)
            self._write()
        return self.known[key]

    def _read(self) -> dict[str, str]:
        try:
            content = json.loads(self.path.read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        if not isinstance(content, dict):
            return {}
        return {key: value for key, value in content.items() if isinstance(value, str)}

    def _write(self) -> None:
        """With what other processes have written meanwhile; readers see the old file or the new one."""
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.path.parent, encoding="utf-8", delete=False) as file:
                json.dump({**self._read(), **self.known}, file, indent=0, sort_keys=True)
            os.replace(file.name, self.path)


def _measure(ways: Mapping[str, Callable[[], object]]) -> str:
    """Each way in turn, several times over; the least time counts, as it was disturbed least."""
    times = {name: float("inf") for name in ways}
    for way in ways.values():  # the first call of each sets things up
        way()
    rounds, end = 0, time.perf_counter() + SECONDS
    while rounds < ROUNDS or time.perf_counter() < end:
        rounds += 1
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            times[name] = min(times[name], time.perf_counter() - begin)
    best, *others = times
    for name in others:
        best = name if times[name] <= times[best] * MARGIN else best
    return best
