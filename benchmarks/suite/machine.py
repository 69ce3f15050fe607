"""The machine: what it is, what it is doing besides, and what it can do at most."""

from __future__ import annotations

import contextlib
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil
import torch

from rewire.receipts import versions
from suite.timing import Effort

MEGABYTES = 256
AUTOGROUP = Path("/proc/self/autogroup")
NICE = -10


@contextlib.contextmanager
def priority() -> Iterator[str]:
    """Raises the priority of this process where that is permitted; yields what it is. Undone afterwards."""
    nice, session = os.getpriority(os.PRIO_PROCESS, 0), _autogroup()
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, min(nice, NICE))
    with contextlib.suppress(OSError):
        # Linux shares the processor out among sessions first, and among the processes of one after that.
        AUTOGROUP.write_text(str(NICE))
    try:
        yield f"nice {os.getpriority(os.PRIO_PROCESS, 0)}, session {_autogroup() or 'unknown'}"
    finally:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, nice)
            AUTOGROUP.write_text(session or "0")


def _autogroup() -> str | None:
    """The nice value of this session; None where there is no such thing."""
    try:
        return AUTOGROUP.read_text().split()[-1]
    except (OSError, IndexError):
        return None


def load_average() -> str:
    """How busy the machine was in the last 1, 5 and 15 minutes."""
    return ", ".join(f"{one:.1f}" for one in os.getloadavg())


def facts(priority: str) -> dict[str, str]:
    """Everything about the machine that the results depend on."""
    now = datetime.now(UTC)
    return {
        "date": now.strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "processor": _processor(),
        "cores": f"{len(os.sched_getaffinity(0))} of {os.cpu_count()}, {torch.get_num_threads()} threads",
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "system": f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}",
        "priority": priority,
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "not set"),
        "load average at the start": load_average(),
        **versions(),
    }


def commit() -> str:
    """The commit that is measured, marked if files differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ":/src")
        return git("rev-parse", "--short", "HEAD") + ("-changed" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _processor() -> str:
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


# ---------------------------------------------------------------- what the machine can do at most


@dataclass(frozen=True)
class Limit:
    """A speed that nothing on this machine exceeds."""

    name: str
    value: float
    unit: str


SHAPES = {
    "SAM's qkv (4096 × 768 × 2304)": (4096, 768, 2304),
    "BERT-base's query (1024 × 768 × 768)": (1024, 768, 768),
    "MiniLM's query (1024 × 384 × 384)": (1024, 384, 384),
    "MiniLM's joined qkv (1024 × 384 × 1152)": (1024, 384, 1152),
}


def limits(effort: Effort) -> list[Limit]:
    """Copying and multiplying, at the speed of the machine as it is now."""
    rounds = 5 if effort.quick else 15
    return [*_copying(rounds), *(_multiplying(name, shape, rounds) for name, shape in SHAPES.items())]


def _copying(rounds: int) -> Iterator[Limit]:
    source = torch.ones(MEGABYTES * 2**18)
    target = torch.empty_like(source)
    gigabytes = source.nbytes / 1e9
    yield Limit("copy into memory in use", gigabytes / _best(lambda: target.copy_(source), rounds), "GB/s")
    yield Limit("copy into new memory", gigabytes / _best(source.clone, rounds), "GB/s")


def _multiplying(name: str, shape: tuple[int, int, int], rounds: int) -> Limit:
    rows, inner, columns = shape
    left, right = torch.randn(rows, inner), torch.randn(inner, columns)
    out = torch.empty(rows, columns)
    operations = 2 * rows * inner * columns
    seconds = _best(lambda: torch.mm(left, right, out=out), rounds * 2)
    return Limit(f"multiplication, {name}", operations / seconds / 1e9, "GFLOP/s")


def _best(run: Callable[[], object], rounds: int) -> float:
    """The lower quartile: a limit is what the machine can do, not what it did while others used it."""
    run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.quantiles(times, n=4, method="inclusive")[0]
