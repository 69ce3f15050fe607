"""Figures as people read them."""

from __future__ import annotations

UNITS = ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k"))


def short(number: int | None, unit: str = "") -> str:
    """Three digits and a unit; a dash for what is not known.

    >>> short(22_713_216), short(140_000_000_000, "B"), short(17), short(None, "B")
    ('22.7 M', '140 GB', '17', '–')
    """
    if number is None:
        return "–"
    for size, prefix in UNITS:
        if abs(number) >= size:
            return f"{number / size:#.3g}".rstrip(".") + f" {prefix}{unit}"
    return f"{number} {unit}".rstrip()


def percent(share: float | None) -> str:
    """A share with its sign.

    >>> percent(-0.0312), percent(0.5), percent(None)
    ('−3.1 %', '+50.0 %', '–')
    """
    return "–" if share is None else f"{share * 100:+.1f} %".replace("-", "−")
