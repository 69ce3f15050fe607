"""Kills a conversion at every system call, in children of its own, and looks at what is left.

Run as a program: `kill_lab.py SOURCE PLAN REFERENCE WORK FROM STEP`. It prints, as JSON, how many kills there were and
what the destination was afterwards; it fails at the first result that is neither absent nor whole, or that a resumed
run does not complete to the reference, byte by byte.
"""

from __future__ import annotations

import builtins
import io
import json
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rewire.plan import Plan
from rewire.stream import convert

CALLS = (
    "open", "close", "read", "write", "pread", "preadv", "pwrite", "pwritev", "copy_file_range", "sendfile", "rename",
    "replace", "fsync", "fdatasync", "mkdir", "rmdir", "unlink", "remove", "ftruncate", "posix_fallocate", "chmod",
    "posix_fadvise", "utime", "link",
)  # fmt: skip


class Killer:
    """Counts the calls of this process and ends it at the chosen one, before or after it."""

    def __init__(self, at: int) -> None:
        self.left = at

    def tick(self) -> None:
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1

    def wrap(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            result = call(*args, **kwargs)
            self.tick()
            return result

        return wrapped

    def install(self) -> None:
        for name in CALLS:
            setattr(os, name, self.wrap(getattr(os, name)))
        builtins.open = io.open = self.wrap(builtins.open)  # type: ignore[assignment]


def run_child(at: int, run: Callable[[], object]) -> bool:
    """Runs a conversion that is killed at call number `at`; whether it was."""
    child = os.fork()
    if not child:
        try:
            Killer(at).install()
            run()
            os._exit(0)
        except BaseException as error:
            sys.stderr.write(f"kill {at}: {type(error).__name__}: {error}\n")
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    assert os.WEXITSTATUS(status) == 0, f"the child that was to be killed at {at} failed"
    return False


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def main(source: Path, plan: Path, reference: Path, work: Path, first: int, step: int) -> None:
    wanted, read = files(reference), Plan.read(plan)
    destination = work / "out"
    states: Counter[str] = Counter()
    at = first
    while True:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        killed = run_child(at, lambda: convert(source, destination, read, verify=True))
        if destination.exists():
            assert files(destination) == wanted, f"kill {at}: a mixture lies at the destination"
        if not killed:
            break
        states["whole" if destination.exists() else "absent"] += 1
        # A second death, in the middle of going on, must be no worse.
        run_child(at // 2, lambda: convert(source, destination, read, resume=True, verify=True))
        convert(source, destination, read, resume=True, verify=True)
        assert files(destination) == wanted, f"kill {at}: the resumed result differs"
        assert sorted(os.listdir(work)) == ["out"], f"kill {at}: something is left beside the result"
        at += step
    print(json.dumps(states))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:5]), int(sys.argv[5]), int(sys.argv[6]))
