"""A run as it goes into the store, and as it comes out."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from rewire.measure.store.store import Store

Data = Mapping[str, Any]


@dataclass(frozen=True)
class RunFacts:
    """What is known of a run when it begins.

    Attributes:
        model: as it was named.
        device: what it runs on, as `cpu` or `cuda:0`, with its name.
        suites: names of the suites.
        settings: how it measures.
        machine: facts about the machine and the libraries.
        plan: the plan as data, where there is one.
        plan_hash: its hash.
        branch: git branch, where in a repository.
        commit: git commit, with `-changed` where files differ from it.
        message: subject of the commit.
    """

    model: str
    device: str
    suites: Sequence[str]
    settings: Data
    machine: Data
    plan: Data | None = None
    plan_hash: str | None = None
    branch: str | None = None
    commit: str | None = None
    message: str | None = None


@dataclass(frozen=True)
class DeviceSample:
    """What the machine was doing at one moment.

    Attributes:
        time: when, in UTC.
        cpu: use of the processor by this process in per cent of one core: 200 is two cores in full use.
        memory: resident memory of this process in bytes.
        gpu: use of the GPU in per cent; None without one.
        gpu_memory: memory in use on the GPU in bytes; None without one.
    """

    time: datetime
    cpu: float
    memory: int
    gpu: float | None = None
    gpu_memory: int | None = None


@dataclass(frozen=True)
class Run:
    """A run in the store.

    Attributes:
        id: its number.
        facts: what was known when it began.
        status: `running`, `done` or `failed`.
        error: what went wrong.
        created_at: when it began, in UTC.
        finished_at: when it ended; None while it runs, and for one whose process was killed.
        measurements: what was measured, in this order; only where asked for.
        devices: samples of the machine; only where asked for.
    """

    id: int
    facts: RunFacts
    status: str
    error: str | None
    created_at: datetime
    finished_at: datetime | None
    measurements: tuple[Data, ...] = field(default=(), repr=False)
    devices: tuple[DeviceSample, ...] = field(default=(), repr=False)

    @property
    def name(self) -> str:
        """For people: the number, and the commit where it is known."""
        commit = f" ({self.facts.commit[:10]})" if self.facts.commit else ""
        return f"run {self.id}{commit}"

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data."""
        data = asdict(self)
        facts = data.pop("facts")
        data |= {key: _text(data[key]) for key in ("created_at", "finished_at")}
        data["devices"] = [{**one, "time": _text(one["time"])} for one in data["devices"]]
        head = {key: data.pop(key) for key in ("id", "status", "error", "created_at", "finished_at")}
        return {**head, **facts, **data}


def _text(moment: datetime | None) -> str | None:
    return moment.isoformat() if moment is not None else None


class Recorder:
    """Writes one run into a store while it goes on. Anything that is written is there at once."""

    def __init__(self, store: Store, number: int) -> None:
        self.store = store
        self.id = number

    def measured(self, measurement: Data) -> None:
        """Adds something that was measured."""
        self.store.add_measurement(self.id, measurement)

    def sampled(self, samples: Sequence[DeviceSample]) -> None:
        """Adds samples of the machine; also says that the run is alive."""
        self.store.add_samples(self.id, samples)


# ---------------------------------------------------------------- is the process of a run still there?


def this_host() -> str:
    """Where process numbers mean the same: the machine, and the namespace of processes on it."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return f"{platform.node()} {namespace}".strip()


def this_process() -> tuple[int, float]:
    """Number of this process, and when it was started (numbers are used again)."""
    process = psutil.Process()
    return process.pid, process.create_time()


def is_alive(number: int, started: float) -> bool:
    """Whether the process `number` that was `started` then still runs on this machine."""
    try:
        process = psutil.Process(number)
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - started) < 2.0
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def now() -> datetime:
    """The time in UTC."""
    return datetime.now(UTC)
