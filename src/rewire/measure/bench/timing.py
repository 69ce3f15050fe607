"""Timing in rounds: each runs every side once, so that whatever slows the machine down hits them all."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch

from rewire.measure.bench.memory import Holder

MOST = 1000
"""Rounds of a case at most."""


class Watch(Protocol):
    """Looks on while a trial runs: at the clock, or at the memory."""

    def phase(self, name: str, *holders: Holder) -> AbstractContextManager[None]:
        """A part of a trial that is measured, at whose beginning these models and optimizers are in memory."""


Trial = Callable[[Watch], None]
"""Does once what is measured. What it does outside of phases is not."""

Samples = Mapping[str, Mapping[str, list[float]]]
"""Seconds by side, phase and round."""


class Clock:
    """Seconds of each phase."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.seconds: dict[str, list[float]] = {}

    @contextmanager
    def phase(self, name: str, *holders: Holder) -> Iterator[None]:
        """Times the block, with the collector of garbage off and the device idle before and after it."""
        gc.collect()
        gc.disable()
        try:
            synchronise(self.device)
            start = time.perf_counter()
            yield
            synchronise(self.device)
            seconds = time.perf_counter() - start
        finally:
            gc.enable()
        self.seconds.setdefault(name, []).append(seconds)


def synchronise(device: torch.device) -> None:
    """Waits until the device has done all that it was told; a processor has already."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def interleave(
    trials: Mapping[str, Trial],
    device: str,
    *,
    repeats: int,
    seconds: float,
    warm_ups: int,
    tick: Callable[[], None] = lambda: None,
) -> Samples:
    """Seconds by side, phase and round: `repeats` rounds at least, and as many as `seconds` allow.

    Each round begins with another side. `warm_ups` rounds are not counted. `tick` is called after every round.
    """
    with _standing_objects_set_aside():
        for _ in range(warm_ups):
            _round(trials, {side: Clock(device) for side in trials}, 0)
            tick()
        clocks = {side: Clock(device) for side in trials}
        end = time.perf_counter() + seconds
        count = 0
        while count < repeats or (count < MOST and time.perf_counter() < end):
            _round(trials, clocks, count)
            count += 1
            tick()
    return {side: clock.seconds for side, clock in clocks.items()}


def _round(trials: Mapping[str, Trial], clocks: Mapping[str, Clock], number: int) -> None:
    sides = list(trials)
    shift = number % len(sides)
    for side in (*sides[shift:], *sides[:shift]):
        trials[side](clocks[side])


@contextmanager
def _standing_objects_set_aside() -> Iterator[None]:
    """Has the collector of garbage leave out all that exists by now, for it runs before every timing."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
