"""Median, quartiles, and intervals by the bootstrap."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

DRAWS = 2000
FEWEST = 3
"""Samples of which an interval can be told."""


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of some numbers."""

    median: float
    lower: float
    upper: float

    @staticmethod
    def of(numbers: Sequence[float]) -> Spread:
        """
        >>> Spread.of([1.0, 2.0, 3.0])
        Spread(median=2.0, lower=1.5, upper=2.5)
        """
        if len(numbers) < 2:
            return Spread(numbers[0], numbers[0], numbers[0])
        lower, median, upper = statistics.quantiles(numbers, n=4, method="inclusive")
        return Spread(median, lower, upper)


@dataclass(frozen=True)
class Ratio:
    """A ratio of medians with its 95 % interval; `low` and `high` are None where too few samples tell it."""

    value: float
    low: float | None = None
    high: float | None = None


def paired_ratio(over: Sequence[float], under: Sequence[float], *, seed: int = 0) -> Ratio:
    """The ratio of two medians, of samples that were taken in the same rounds.

    Rounds are drawn, so that whatever slowed a round down is in both samples of it. Percentiles of the bootstrap: Efron
    and Tibshirani, An Introduction to the Bootstrap (1993), ch. 13.

    >>> paired_ratio([2.0, 4.0, 6.0, 4.0], [1.0, 2.0, 3.0, 2.0])
    Ratio(value=2.0, low=2.0, high=2.0)
    """
    import numpy as np

    drawn = np.random.default_rng(seed).integers(len(over), size=(DRAWS, len(over)))
    return _ratio(over, under, _medians(over, drawn), _medians(under, drawn))


def unpaired_ratio(over: Sequence[float], under: Sequence[float], *, seed: int = 0) -> Ratio:
    """The ratio of two medians, of samples from different runs.

    >>> unpaired_ratio([3.0, 3.0, 3.0], [2.0, 2.0, 2.0])
    Ratio(value=1.5, low=1.5, high=1.5)
    """
    import numpy as np

    random = np.random.default_rng(seed)
    medians = (_medians(some, random.integers(len(some), size=(DRAWS, len(some)))) for some in (over, under))
    return _ratio(over, under, *medians)


def _medians(samples: Sequence[float], drawn: NDArray[np.int64]) -> NDArray[np.float64]:
    import numpy as np

    medians: NDArray[np.float64] = np.median(np.asarray(samples, dtype=np.float64)[drawn], axis=1)
    return medians


def _ratio(
    over: Sequence[float], under: Sequence[float], overs: NDArray[np.float64], unders: NDArray[np.float64]
) -> Ratio:
    import numpy as np

    value = statistics.median(over) / statistics.median(under)
    if min(len(over), len(under)) < FEWEST:
        return Ratio(value)
    low, high = np.quantile(overs / unders, (0.025, 0.975))
    return Ratio(value, float(low), float(high))
