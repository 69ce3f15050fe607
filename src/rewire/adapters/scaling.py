"""The factor that peft multiplies `B @ A` with, as exact arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Scaling:
    """`alpha / rank`, or with `root` (rsLoRA) `alpha / sqrt(rank)`.

    >>> Scaling(16, 8).value, Scaling(16, 4, root=True).value
    (2.0, 8.0)
    """

    alpha: float
    rank: int
    root: bool = False

    @property
    def value(self) -> float:
        """The factor in the floating-point arithmetic of peft."""
        return self.alpha / (math.sqrt(self.rank) if self.root else self.rank)

    @property
    def square(self) -> Fraction:
        """The square of the factor, without rounding."""
        return Fraction(self.alpha) ** 2 / (self.rank if self.root else self.rank**2)

    def at(self, rank: int) -> Scaling:
        """The same factor at another rank: bit for bit the same value, or where no alpha gives that, the nearest.

        >>> Scaling(16, 8).at(24), Scaling(1, 3).at(9)
        (Scaling(alpha=48, rank=24, root=False), Scaling(alpha=3, rank=9, root=False))
        >>> Scaling(16, 8, root=True).at(32).alpha, Scaling(16, 8, root=True).at(24).alpha
        (32, 27.71281292110203)
        """
        if rank == self.rank:
            return self
        squared = self.square * (rank if self.root else rank**2)
        exact = _root(squared)
        if exact is not None and exact.denominator == 1:
            return Scaling(int(exact) if self.alpha > 0 else -int(exact), rank, self.root)
        start = self.value * (math.sqrt(rank) if self.root else rank)
        found = (Scaling(alpha, rank, self.root) for alpha in _around(start))
        return min(found, key=lambda one: (abs(one.value - self.value), abs(one.alpha - start)))

    def over(self, other: Scaling) -> Factor:
        """What B is multiplied with so that `other` may stand for this scaling.

        >>> Scaling(16, 4).over(Scaling(16, 8)), Scaling(24, 8).over(Scaling(16, 8))
        (Factor(value=2.0, exact=True), Factor(value=1.5, exact=False))
        """
        if self.square == other.square and (self.alpha < 0) == (other.alpha < 0):
            return Factor(1.0, True)
        ratio = self.square / other.square
        exact = _root(ratio)
        sign = -1.0 if (self.alpha < 0) != (other.alpha < 0) else 1.0
        if exact is not None and _is_power_of_two(exact.numerator) and _is_power_of_two(exact.denominator):
            return Factor(sign * float(exact), True)
        return Factor(self.value / other.value, False)


@dataclass(frozen=True)
class Factor:
    """A number that B is multiplied with; `exact`: a power of two, which changes no digit."""

    value: float
    exact: bool


def common(scalings: Sequence[Scaling]) -> Scaling:
    """The one of `scalings` that most of the others can be folded into without rounding; the first of these.

    >>> common([Scaling(8, 4), Scaling(3, 4), Scaling(6, 4), Scaling(12, 4)])
    Scaling(alpha=3, rank=4, root=False)
    """
    nonzero = [one for one in scalings if one.alpha] or list(scalings[:1])
    if not nonzero[0].alpha:
        return nonzero[0]
    return max(nonzero, key=lambda one: sum(other.over(one).exact for other in scalings))


def _root(square: Fraction) -> Fraction | None:
    """The rational root of a square; None if it has none."""
    top, bottom = math.isqrt(square.numerator), math.isqrt(square.denominator)
    return Fraction(top, bottom) if (top**2, bottom**2) == (square.numerator, square.denominator) else None


def _is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


def _around(number: float) -> list[float]:
    """`number` and its nearest neighbours among the floating-point numbers."""
    below = above = number
    found = [number]
    for _ in range(2):
        below, above = math.nextafter(below, -math.inf), math.nextafter(above, math.inf)
        found += [below, above]
    return found
