"""What it takes to load a model, to run it and to train it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from rewire.measure.anatomy.running import Run
from rewire.measure.anatomy.settings import Optimizer, Settings


@dataclass(frozen=True)
class Figure:
    """A number of bytes, or the reason why it is not known.

    >>> Figure(5) + Figure(2), Figure(5) + Figure(None, "no run")
    (Figure(bytes=7, reason=''), Figure(bytes=None, reason='no run'))
    """

    bytes: int | None
    reason: str = ""

    def __add__(self, other: Figure) -> Figure:
        if self.bytes is None or other.bytes is None:
            return self if self.bytes is None else other
        return Figure(self.bytes + other.bytes)


@dataclass(frozen=True)
class Inference:
    """Bytes of one forward.

    Attributes:
        weights: parameters and buffers.
        cache: keys and values that are kept, part of `tensors`.
        tensors: the most that everything beside the weights takes at once.
        total: weights and tensors.
    """

    weights: int
    cache: Figure
    tensors: Figure

    @property
    def total(self) -> Figure:
        """The peak."""
        return Figure(self.weights) + self.tensors

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data."""
        return {**asdict(self), "total": asdict(self.total)}


@dataclass(frozen=True)
class Training:
    """Bytes of one training step: forward, backward, optimizer.

    Attributes:
        weights: parameters and buffers.
        copies: with mixed precision, copies of the weights in two bytes, part of `tensors`.
        gradients: of the trainable parameters, part of `tensors`.
        optimizer: what the optimizer keeps from step to step.
        activations: what the forward keeps for backward, part of `tensors`.
        tensors: the most that everything but weights and optimizer takes at once.
        total: weights, optimizer and tensors.
    """

    weights: int
    copies: int
    gradients: int
    optimizer: int
    activations: Figure
    tensors: Figure

    @property
    def total(self) -> Figure:
        """The peak."""
        return Figure(self.weights + self.optimizer) + self.tensors

    @property
    def states(self) -> int:
        """What does not depend on the input: weights with their copies, gradients and optimizer."""
        return self.weights + self.copies + self.gradients + self.optimizer

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data."""
        return {**asdict(self), "states": self.states, "total": asdict(self.total)}


def optimizer_bytes(optimizer: Optimizer, elements: int, itemsize: int = 4) -> int:
    """What an optimizer keeps for `elements` trained numbers of `itemsize` bytes.

    AdamW keeps two moments and SGD with momentum one, as large as the parameters; 8-bit AdamW keeps two bytes.

    >>> [optimizer_bytes(kind, 1) for kind in ("adamw", "adamw-8bit", "sgd-momentum", "sgd")]
    [8, 2, 4, 0]
    """
    return elements * {"adamw": 2 * itemsize, "adamw-8bit": 2, "sgd-momentum": itemsize, "sgd": 0}[optimizer]


def weight_bytes(model: nn.Module) -> int:
    """Parameters and buffers, each once."""
    tensors = {id(one): one.numel() * one.itemsize for one in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())


def inference(model: nn.Module, run: Run | str, cache: Figure) -> Inference:
    """Of a model and a pretended forward, or the reason why there is none."""
    tensors = Figure(None, run) if isinstance(run, str) else Figure(run.peak)
    return Inference(weight_bytes(model), cache, tensors)


def training(model: nn.Module, run: Run | str, settings: Settings) -> Training:
    """Of a model and a pretended step, or the reason why there is none."""
    parameters = list(model.parameters())
    trained = [one for one in parameters if one.requires_grad]
    copied = sum(2 * one.numel() for one in parameters if one.is_floating_point() and one.itemsize > 2)
    if isinstance(run, str):
        activations = tensors = Figure(None, run)
    else:
        activations = Figure(sum(run.kept.values()))
        tensors = Figure(max(run.peak, run.end + _during_step(model, settings)))
    return Training(
        weights=weight_bytes(model),
        copies=copied if settings.mixed_precision else 0,
        gradients=sum(one.numel() * one.itemsize for one in trained),
        optimizer=sum(optimizer_bytes(settings.optimizer, one.numel(), one.itemsize) for one in trained),
        activations=activations,
        tensors=tensors,
    )


def _during_step(model: nn.Module, settings: Settings) -> int:
    """What the optimizer needs to change one parameter: AdamW the root of a moment, before and after a division."""
    largest = max((one.numel() * one.itemsize for one in model.parameters() if one.requires_grad), default=0)
    return 2 * largest if settings.optimizer.startswith("adamw") else 0
