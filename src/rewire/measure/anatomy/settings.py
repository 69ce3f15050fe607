"""What memory is asked for."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from rewire.errors import MeasureError

Cache = Literal["dynamic", "static", "none"]
Optimizer = Literal["adamw", "adamw-8bit", "sgd-momentum", "sgd"]

LENGTH = 128
"""Tokens of a sequence where nobody says."""


@dataclass(frozen=True)
class Settings:
    """The sizes of the inputs, and how the model runs on them.

    Attributes:
        batch: sequences, images or recordings at once.
        length: tokens of each sequence; without meaning for images.
        cache: how keys and values are kept at inference: in tensors that grow, in tensors of full size, or not at all.
        train: whether a training step is run as well.
        optimizer: of the training step.
        mixed_precision: weights stay as they are, matrix products are in bfloat16 (`torch.autocast`).
        gradient_checkpointing: activations inside the layers are computed once more instead of being kept.

    >>> Settings(batch=0)
    Traceback (most recent call last):
    rewire.errors.MeasureError: batch is 0; it must be at least 1
    """

    batch: int = 1
    length: int = LENGTH
    cache: Cache = "dynamic"
    train: bool = False
    optimizer: Optimizer = "adamw"
    mixed_precision: bool = False
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in ("batch", "length"):
            if getattr(self, name) < 1:
                raise MeasureError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name, known in (("cache", get_args(Cache)), ("optimizer", get_args(Optimizer))):
            if getattr(self, name) not in known:
                raise MeasureError(f"unknown {name} {getattr(self, name)!r}; known are {', '.join(known)}")

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data."""
        return asdict(self)
