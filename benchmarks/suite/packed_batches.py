"""Batches of real text in three mixes of lengths, as tokens of a model's vocabulary."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor

SIZES = (1, 8, 32, 64)
MIXES = ("uniform", "short", "equal")
SINGLES = 8
"""Passages that are encoded one after the other for batch size 1."""

EQUAL = 128
"""Tokens of every passage in the mix without padding."""


@dataclass(frozen=True)
class Case:
    """What is encoded in one call: one batch, or several batches of one passage."""

    name: str
    batches: tuple[Mapping[str, Tensor], ...]

    @property
    def lengths(self) -> list[int]:
        """Real tokens of every sequence."""
        return [int(n) for batch in self.batches for n in _mask(batch).sum(1)]

    @property
    def tokens(self) -> int:
        """Real tokens in all."""
        return sum(self.lengths)

    @property
    def fill(self) -> float:
        """Real tokens as a share of all."""
        return self.tokens / sum(_mask(batch).numel() for batch in self.batches)


def _mask(batch: Mapping[str, Tensor]) -> Tensor:
    if "attention_mask" in batch:
        return batch["attention_mask"]
    pixels = batch["pixel_values"]
    return torch.ones(len(pixels), (pixels.shape[-1] // 16) ** 2 + 1)


def text_cases(tokenizer: Any, sizes: Sequence[int] = SIZES, mixes: Sequence[str] = MIXES) -> Iterator[Case]:
    """Every mix in every batch size."""
    for mix in mixes:
        for size in sizes:
            texts = passages(mix, SINGLES if size == 1 else size)
            rows = [tokenizer(text, truncation=True, max_length=_longest(mix))["input_ids"] for text in texts]
            groups = [[row] for row in rows] if size == 1 else [rows]
            yield Case(f"{mix}-{size}", tuple(map(padded, groups)))


def image_cases(sizes: Sequence[int] = SIZES) -> Iterator[Case]:
    """Images of noise, which are all equally long."""
    for size in sizes:
        generator = torch.Generator().manual_seed(size)
        images = torch.randn(SINGLES if size == 1 else size, 3, 224, 224, generator=generator)
        parts = images.split(1) if size == 1 else (images,)
        yield Case(f"equal-{size}", tuple({"pixel_values": part} for part in parts))


def padded(rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Rows of token numbers as one batch."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def passages(mix: str, count: int, seed: int = 0) -> list[str]:
    """Pieces of the standard library's documentation, of lengths as the mix says."""
    words = " ".join(topics[name] for name in sorted(topics)).split()
    drawn = random.Random(seed)
    lengths = {
        "uniform": lambda: drawn.randint(4, 180),
        "short": lambda: max(2, min(180, round(math.exp(drawn.gauss(math.log(20), 0.8))))),
        "equal": lambda: 200,
    }[mix]
    starts = [drawn.randrange(len(words) - 200) for _ in range(count)]
    return [" ".join(words[start : start + lengths()]) for start in starts]


def _longest(mix: str) -> int:
    return EQUAL if mix == "equal" else 512
