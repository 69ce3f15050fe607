"""Benchmarks: suites of things to time, before and after a plan, interleaved in one run.

Names are bound when they are first used: looking at results needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rewire.measure.bench.bench import Bench
    from rewire.measure.bench.records import Measurement
    from rewire.measure.bench.run import Outcome, run_bench
    from rewire.measure.bench.settings import Settings
    from rewire.measure.bench.suites import Suite, find_suites, suite_names

_HOME = {
    "Bench": "rewire.measure.bench.bench",
    "Measurement": "rewire.measure.bench.records",
    "Outcome": "rewire.measure.bench.run",
    "Settings": "rewire.measure.bench.settings",
    "Suite": "rewire.measure.bench.suites",
    "find_suites": "rewire.measure.bench.suites",
    "run_bench": "rewire.measure.bench.run",
    "suite_names": "rewire.measure.bench.suites",
}

__all__ = ["run_bench", "Outcome", "Bench", "Settings", "Measurement", "Suite", "find_suites", "suite_names"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'rewire.measure.bench' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value
