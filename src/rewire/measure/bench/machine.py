"""Facts about the machine and the code that results depend on."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from rewire.receipts import versions

_SETS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "sve", "bf16", "i8mm")
"""Instruction sets that matter for models, as Linux calls them."""


def machine_facts() -> dict[str, str]:
    """The processor, the memory, the GPU and the libraries."""
    return {
        "processor": processor(),
        "instruction sets": ", ".join(instruction_sets()) or "unknown",
        "cores": f"{available_cores()} of {os.cpu_count()}",
        "threads": str(torch.get_num_threads()),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "gpu": gpu_name(),
        "system": f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}",
        **versions(),
    }


def processor() -> str:
    """The name of the processor."""
    names = [line.partition(":")[2].strip() for line in _cpu_lines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def instruction_sets() -> list[str]:
    """Those of `_SETS` that the processor has; empty where the system does not tell."""
    lines = (line for line in _cpu_lines() if line.lower().startswith(("flags", "features")))
    known = set(next(lines, "").partition(":")[2].split())
    return [name for name in _SETS if name in known]


def available_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpu_name() -> str:
    """The name of the GPU, or `none`."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none"


def _cpu_lines() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []


@dataclass(frozen=True)
class Revision:
    """What a git repository says of the code that is measured; all None outside of one.

    Attributes:
        branch: None also where no branch is checked out.
        commit: with `-changed` where files that git knows differ from it.
        message: the first line.
    """

    branch: str | None = None
    commit: str | None = None
    message: str | None = None


def revision(folder: Path) -> Revision:
    """The revision of the repository that `folder` lies in.

    >>> revision(Path("/"))
    Revision(branch=None, commit=None, message=None)
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit, _, message = git("log", "-1", "--format=%H%n%s").partition("\n")
        changed = "-changed" if git("status", "--porcelain", "--untracked-files=no") else ""
        branch = git("rev-parse", "--abbrev-ref", "HEAD")
        return Revision(None if branch == "HEAD" else branch, commit + changed, message)
    except (OSError, subprocess.CalledProcessError):
        return Revision()
