"""Batches by a budget of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

LARGEST = 1024
"""Sequences in one batch at most: beyond it nothing gets faster, and masks grow."""


def batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Numbers of sequences, put together so that each batch, padded, holds at most `budget` tokens.

    Sequences of like length come together, the longest first, so that padding is rare and a budget that is too
    large for the memory shows at once. A sequence longer than the budget is a batch of its own.

    >>> batches([3, 9, 4, 1, 4], budget=12)
    [[1], [2, 4, 0], [3]]
    """
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    return list(_cut(order, lengths, budget))


def _cut(order: Sequence[int], lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    start = 0
    while start < len(order):
        longest = max(lengths[order[start]], 1)
        stop = start + min(max(budget // longest, 1), LARGEST)
        yield list(order[start:stop])
        start = stop
