"""How a benchmark measures."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Settings:
    """How much is measured, and how often.

    Attributes:
        batch: batch sizes; empty for those of each suite.
        tokens: tokens that `decode` generates, and length of the sequences of the other suites; None for the values of
            each suite.
        prompt: tokens in the prompt of `decode`.
        padding: shares of padding in the batches of `encode`, from 0 to less than 1.
        repeats: rounds of each case at least.
        seconds: rounds go on for so long.
        warm_ups: rounds that are not counted.
        threads: threads of torch; None for as many as it takes by itself.
        device: as torch calls it.
        backend: what `torch.compile` compiles with; None for no compilation.
        seed: of all random inputs.
    """

    batch: tuple[int, ...] = ()
    tokens: int | None = None
    prompt: int = 64
    padding: tuple[float, ...] = (0.0, 0.5)
    repeats: int = 7
    seconds: float = 3.0
    warm_ups: int = 2
    threads: int | None = None
    device: str = "cpu"
    backend: str | None = "inductor"
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
