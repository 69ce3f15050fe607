"""`python -m suite.memory SUBJECT PART`: how much more memory some variants take at their peak, as JSON.

Each part has a process of its own: what an earlier variant has freed would be at hand for a later one.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path

import rewire
from suite.apply import APPLY, COPY, HASHED, REVERT, SUBJECTS, Subject, copy

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"


def main(name: str, part: str) -> None:
    (subject,) = (one for one in SUBJECTS if one.name == name)
    _warm_up()
    print(json.dumps(PARTS[part](subject)))


def plain(subject: Subject) -> dict[str, int]:
    """There and back."""
    model = subject.make()
    there = peak_of(lambda: rewire.apply_(model, subject.plan, hashes=False))
    return {APPLY: there, REVERT: peak_of(lambda: rewire.revert_(model))}


def hashed(subject: Subject) -> dict[str, int]:
    """With hashes in the receipt; and the copy, what the others are measured against."""
    model = subject.make()
    there = peak_of(lambda: rewire.apply_(model, subject.plan))
    return {HASHED: there, COPY: peak_of(lambda: copy(model))}


PARTS = {"plain": plain, "hashed": hashed}


def _warm_up() -> None:
    """Imports what is imported late, so that it does not count."""
    from torch import nn

    from rewire.plan import Join, Split

    model = nn.ModuleDict({"attn": nn.ModuleDict({"qkv": nn.Linear(4, 12)})})
    rewire.apply_(model, Split("attn.qkv", into=("q", "k", "v"), layout="stacked"))
    rewire.apply_(nn.Sequential(nn.ModuleDict()), Join("none", parts=("a", "b"), optional=True))


def peak_of(run: Callable[[], object]) -> int:
    """The largest resident memory while `run` runs, less that before, in bytes. Linux only."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR.write_text(RESET_PEAK)
    before = _kilobytes("VmRSS")
    result = run()
    peak = _kilobytes("VmHWM")
    del result
    return 1024 * max(0, peak - before)


def _kilobytes(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1])


if __name__ == "__main__":
    main(*sys.argv[1:])
