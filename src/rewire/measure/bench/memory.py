"""Peak memory of the phases of a trial."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Protocol

import psutil
import torch
from torch import Tensor, nn

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
_INTERVAL = 0.001


Holder = nn.Module | torch.optim.Optimizer
"""Something that holds tensors."""


class Peaks:
    """Peak bytes of each phase of one trial: all that this side holds, and the most that it takes besides at any time.

    Counted from the beginning of the first phase on, where a trial holds what it names there (its weights, the state of
    its optimizer), so that what one phase leaves behind counts in the next. Other models that happen to be in the
    process, as that of the other side, do not count. On a GPU it is what torch has allocated there, else resident
    memory.
    """

    def __init__(self, device: str) -> None:
        self.meter = _meter(torch.device(device))
        self.bytes: dict[str, int] = {}
        self._before: int | None = None

    @contextmanager
    def phase(self, name: str, *holders: Holder) -> Iterator[None]:
        """Watches the block. The garbage of before is given back first, or the block would use it again."""
        gc.collect()
        _give_back()
        if self._before is None:
            self._before = self.meter.now() - held_bytes(*holders)
        with self.meter.watching() as peak:
            yield
        self.bytes[name] = max(self.bytes.get(name, 0), peak[0] - self._before)


def held_bytes(*holders: Holder) -> int:
    """Bytes of parameters, buffers, gradients and states of optimizers, each storage once.

    >>> held_bytes(nn.Linear(10, 5))
    220
    """
    tensors = (tensor for holder in holders for tensor in _tensors(holder))
    return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}.values())


def _tensors(holder: Holder) -> Iterator[Tensor]:
    if isinstance(holder, torch.optim.Optimizer):
        states = (value for state in holder.state.values() for value in state.values())
        yield from (value for value in states if isinstance(value, Tensor))
        return
    yield from holder.buffers()
    for parameter in holder.parameters():
        yield parameter
        if parameter.grad is not None:
            yield parameter.grad


# ---------------------------------------------------------------- meters


class _Meter(Protocol):
    """Knows how much memory is in use, and how much was at most while something ran."""

    def now(self) -> int:
        """Bytes in use."""

    def watching(self) -> AbstractContextManager[list[int]]:
        """Gives a list whose only element is the peak of the block when the block has ended."""


def _meter(device: torch.device) -> _Meter:
    if device.type == "cuda":
        return _Allocated(device)
    return _Counted() if _reset_peak() else _Polled()


class _Allocated:
    """What torch has allocated on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def now(self) -> int:
        torch.cuda.synchronize(self.device)
        return torch.cuda.memory_allocated(self.device)

    @contextmanager
    def watching(self) -> Iterator[list[int]]:
        peak = [self.now()]
        torch.cuda.reset_peak_memory_stats(self.device)
        yield peak
        torch.cuda.synchronize(self.device)
        peak[0] = torch.cuda.max_memory_allocated(self.device)


class _Counted:
    """Resident memory, whose peak Linux keeps."""

    def now(self) -> int:
        return _bytes("VmRSS")

    @contextmanager
    def watching(self) -> Iterator[list[int]]:
        peak = [self.now()]
        _reset_peak()
        yield peak
        peak[0] = _bytes("VmHWM")


class _Polled:
    """Resident memory where nobody keeps the peak: a thread looks every millisecond."""

    def __init__(self) -> None:
        self.process = psutil.Process()

    def now(self) -> int:
        return int(self.process.memory_info().rss)

    @contextmanager
    def watching(self) -> Iterator[list[int]]:
        peak, stop = [self.now()], threading.Event()

        def watch() -> None:
            while not stop.wait(_INTERVAL):
                peak[0] = max(peak[0], self.now())

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield peak
        finally:
            peak[0] = max(peak[0], self.now())
            stop.set()
            thread.join()


def _reset_peak() -> bool:
    """Has Linux count the peak of this process anew; says whether it does."""
    try:
        _CLEAR.write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def _bytes(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def _give_back() -> None:
    """Returns freed memory to the system, so that using it again shows."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library than GNU's
            ctypes.CDLL(None).malloc_trim(0)
