"""Interleaved timing: every round runs all variants once, so that whatever slows the machine down hits all."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Effort:
    """How long to measure."""

    quick: bool = False

    def seconds(self, full: float) -> float:
        """The time for one case that takes `full` seconds in a full run."""
        return full / 8 if self.quick else full


@dataclass(frozen=True)
class Variant:
    """One thing to time: `run` is timed, `before` is not; what `run` returns lives until the clock has stopped."""

    name: str
    run: Callable[[], object]
    before: Callable[[], object] = lambda: None


Samples = Mapping[str, Sequence[float]]


def interleave(
    variants: Sequence[Variant], seconds: float, *, least: int = 5, most: int = 200, warm_up: bool = True
) -> Samples:
    """Seconds per variant and round: as many rounds as fit into `seconds`, `least` at least.

    With `warm_up` a first round is not counted. Each round begins with another variant.
    """
    samples: dict[str, list[float]] = {variant.name: [] for variant in variants}
    with _standing_objects_set_aside():
        for variant in variants if warm_up else ():
            _time(variant)
        end = time.perf_counter() + seconds
        count = 0
        while count < least or (count < most and time.perf_counter() < end):
            shift = count % len(variants)
            for variant in (*variants[shift:], *variants[:shift]):
                samples[variant.name].append(_time(variant))
            count += 1
    return samples


@contextmanager
def _standing_objects_set_aside() -> Iterator[None]:
    """Has the collector of garbage leave out all that exists by now, for it runs before every timing."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _time(variant: Variant) -> float:
    variant.before()
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        result = variant.run()
        seconds = time.perf_counter() - start
    finally:
        gc.enable()
    del result
    return seconds


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of some numbers."""

    median: float
    lower: float
    upper: float
    count: int

    @staticmethod
    def of(numbers: Sequence[float]) -> Spread:
        """
        >>> Spread.of([1.0, 2.0, 3.0])
        Spread(median=2.0, lower=1.5, upper=2.5, count=3)
        """
        if len(numbers) < 2:
            return Spread(numbers[0], numbers[0], numbers[0], len(numbers))
        lower, median, upper = statistics.quantiles(numbers, n=4, method="inclusive")
        return Spread(median, lower, upper, len(numbers))


def ratios(samples: Sequence[float], base: Sequence[float]) -> Spread:
    """How many times as long as the baseline, round by round."""
    return Spread.of([one / other for one, other in zip(samples, base, strict=True)])
