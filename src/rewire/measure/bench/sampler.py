"""What the machine does while a benchmark runs, sampled in a thread of its own."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from types import TracebackType
from typing import Any

import psutil

from rewire.measure.store.runs import DeviceSample, now

INTERVAL = 0.5
"""Seconds between samples."""

FLUSH = 5.0
"""Seconds between hand-overs of what was sampled."""

Sink = Callable[[Sequence[DeviceSample]], None]


class Sampler:
    """Samples this process from the beginning to the end of a `with` block, and hands the samples to `sink`.

    What goes wrong in the thread is raised when the block ends.
    """

    def __init__(self, sink: Sink, interval: float = INTERVAL, flush: float = FLUSH) -> None:
        self.sink, self.interval, self.flush = sink, interval, flush
        self._process = psutil.Process()
        self._gpu = Gpu.find()
        self._stop = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="rewire-sampler", daemon=True)

    def __enter__(self) -> Sampler:
        self._process.cpu_percent()  # the first call only begins to count
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        if self._gpu is not None:
            self._gpu.close()
        if self._error is not None and error is not None:
            error.add_note(f"The sampler had failed too: {self._error}")
        elif self._error is not None:
            raise self._error

    def _work(self) -> None:
        waiting: list[DeviceSample] = []
        since = time.monotonic()
        try:
            is_over = False
            while not is_over:
                is_over = self._stop.wait(self.interval)
                waiting.append(self._sample())
                if is_over or time.monotonic() - since > self.flush:
                    self.sink(waiting)
                    waiting, since = [], time.monotonic()
        except Exception as error:  # raised in the thread that waits for this one
            self._error = error

    def _sample(self) -> DeviceSample:
        gpu, gpu_memory = self._gpu.read() if self._gpu is not None else (None, None)
        return DeviceSample(now(), self._process.cpu_percent(), self._process.memory_info().rss, gpu, gpu_memory)


class Gpu:
    """The first GPU that this process may use, as NVIDIA's management library shows it."""

    def __init__(self, library: Any, number: int) -> None:
        self.library = library
        self.handle = library.nvmlDeviceGetHandleByIndex(number)

    @classmethod
    def find(cls) -> Gpu | None:
        """The GPU; None without one, or without the package `nvidia-ml-py`."""
        try:
            pynvml = import_module("pynvml")
        except ImportError:
            return None
        try:
            pynvml.nvmlInit()
            found = cls(pynvml, _visible()) if pynvml.nvmlDeviceGetCount() else None
            if found is not None:
                found.read()
        except pynvml.NVMLError:  # no driver, or a GPU that does not tell
            return None
        return found

    def read(self) -> tuple[float, int]:
        """Use in per cent, and memory in use in bytes (of all processes)."""
        use = self.library.nvmlDeviceGetUtilizationRates(self.handle).gpu
        return float(use), int(self.library.nvmlDeviceGetMemoryInfo(self.handle).used)

    def close(self) -> None:
        """Lets go of the library."""
        self.library.nvmlShutdown()


def _visible() -> int:
    """The number of the first GPU in CUDA_VISIBLE_DEVICES; 0 where it names none by number."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    return int(first) if first.isdecimal() else 0
