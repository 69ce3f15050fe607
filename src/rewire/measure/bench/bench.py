"""The models of a run, by side."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping

import torch
from torch import nn

from rewire.errors import MeasureError
from rewire.measure.bench.records import AFTER, BEFORE
from rewire.measure.bench.settings import Settings
from rewire.receipts import receipt_of

Opener = Callable[[], nn.Module]
"""Makes or loads a model anew."""


class Bench:
    """What suites work with: the models before and after the plan, loaded when they are first asked for.

    Args:
        openers: what loads the models, by side: `before` and, with a plan, `after`.
        settings: how to measure.
    """

    def __init__(self, openers: Mapping[str, Opener], settings: Settings) -> None:
        if BEFORE not in openers or set(openers) - {BEFORE, AFTER}:
            raise MeasureError(f"the sides of a benchmark are {BEFORE} and {AFTER}, but given are {', '.join(openers)}")
        check_device(settings.device)
        self.openers = openers
        self.settings = settings
        self._models: dict[str, nn.Module] = {}

    @property
    def sides(self) -> tuple[str, ...]:
        """`before`, and `after` where there is a plan."""
        return tuple(side for side in (BEFORE, AFTER) if side in self.openers)

    def model(self, side: str = BEFORE) -> nn.Module:
        """The model of a side, in evaluation mode, on its device."""
        if side not in self._models:
            self._models[side] = self.open(side)
        return self._models[side].eval()

    def open(self, side: str) -> nn.Module:
        """The model of a side, loaded anew."""
        return self.openers[side]().to(self.settings.device).eval()

    def release(self) -> None:
        """Lets go of the models; they are loaded again when they are asked for."""
        self._models.clear()
        gc.collect()

    @property
    def promise(self) -> str:
        """How near the outputs stay, as the plan says."""
        receipt = receipt_of(self.model(AFTER)) if AFTER in self.openers else None
        return receipt.promise if receipt is not None else "exact"

    def batches(self, default: tuple[int, ...]) -> tuple[int, ...]:
        """The batch sizes asked for, or those of the suite."""
        return self.settings.batch or default

    def tokens(self, default: int) -> int:
        """The tokens asked for, or those of the suite."""
        return self.settings.tokens or default


def check_device(name: str) -> None:
    """Raises `MeasureError` unless torch can use the device."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise MeasureError(f"--device {name}: torch knows no such device; use cpu, cuda, cuda:1 or mps") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise MeasureError(f"--device {name}: torch finds no GPU (or was built without CUDA); use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise MeasureError(f"--device {name}: there are {torch.cuda.device_count()} GPUs, numbered from 0")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise MeasureError(f"--device {name}: torch finds no such GPU here; use --device cpu")
    if device.type not in ("cpu", "cuda", "mps"):
        raise MeasureError(f"--device {name}: benchmarks run on cpu, cuda or mps")
