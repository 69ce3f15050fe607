"""Measures for real what was predicted, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace

from rewire.errors import MeasureError
from rewire.measure.anatomy.building import Blueprint
from rewire.measure.anatomy.record import Anatomy, Measured
from rewire.measure.anatomy.settings import Settings

_HEAP = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
"""Has GNU's C library give every larger block back as soon as it is freed; else gaps between blocks count as used."""


def is_possible() -> bool:
    """Whether this system tells the peak of a process anew for each run."""
    return sys.platform == "linux" and os.access("/proc/self/clear_refs", os.W_OK)


def measure(found: Anatomy, blueprint: Blueprint) -> Anatomy:
    """`found` with what a run of the model on the CPU, with random weights, really takes.

    Raises `MeasureError` where the system does not tell, or where the run fails, as when memory is not enough.
    """
    if not is_possible():
        raise MeasureError("only Linux tells the peak memory of a run; leave --measure out here")
    taken = _run(blueprint, found.settings)
    wanted = found.training is not None
    note = f"torch has no {found.settings.optimizer}" if wanted and "training" not in taken else ""
    return replace(found, measured=Measured(taken["load"], taken["inference"], taken.get("training"), note))


def _run(blueprint: Blueprint, settings: Settings) -> dict[str, int]:
    with tempfile.TemporaryDirectory(prefix="rewire-anatomy-") as folder:
        blueprint.config.save_pretrained(folder)
        request = {
            "folder": folder,
            "architecture": blueprint.architecture,
            "plan": None if blueprint.plan is None else blueprint.plan.to_dict(),
            "allow_code": blueprint.allow_code,
            "settings": settings.to_dict(),
        }
        process = subprocess.run(
            [sys.executable, "-m", "rewire.measure.anatomy.child"],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            env={**os.environ, **_HEAP},
            check=False,
        )
    if process.returncode:
        raise MeasureError(f"the run of {blueprint.name} has failed: {_reason(process)}")
    taken: dict[str, int] = json.loads(process.stdout.splitlines()[-1])
    return taken


def _reason(process: subprocess.CompletedProcess[str]) -> str:
    if process.returncode < 0:
        return f"the system has ended it (signal {-process.returncode}); memory was perhaps not enough"
    lines = process.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit code {process.returncode}"
