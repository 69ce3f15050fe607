"""Comparing the weights of two model folders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open


@dataclass(frozen=True)
class Comparison:
    """How many tensors two folders have alike, bit for bit, and the names that only one of them has."""

    same: int
    shared: int
    lone: tuple[str, ...]

    @property
    def all_same(self) -> bool:
        """Whether both folders hold the same tensors."""
        return self.same == self.shared and not self.lone


def compare(first: Path, second: Path) -> Comparison:
    """Compares the `model.safetensors` of two folders."""
    with (
        safe_open(first / "model.safetensors", "pt") as one,
        safe_open(second / "model.safetensors", "pt") as other,
    ):
        names, others = set(one.keys()), set(other.keys())
        same = sum(torch.equal(one.get_tensor(name), other.get_tensor(name)) for name in names & others)
        return Comparison(same, len(names & others), tuple(sorted(names ^ others)))
