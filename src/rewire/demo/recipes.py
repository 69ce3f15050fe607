"""The two published ways to give SAM another attention, carried out as published, and what comes of them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import SamModel
from transformers.models.sam import modeling_sam

from rewire.demo.attention import PARTS, SplitSamAttention
from rewire.demo.training import Sam


@dataclass(frozen=True)
class Outcome:
    """What a recipe made.

    Attributes:
        model: the model.
        attention: the class of its attention modules.
        hook_calls: how often the hook ran that should split the fused tensors.
        right: how many of the wanted q, k and v tensors the model has, bit-equal to the checkpoint's rows.
        wanted: how many there should be.
        messages: what was logged or warned about meanwhile.
    """

    model: Sam
    attention: str
    hook_calls: int
    right: int
    wanted: int
    messages: tuple[str, ...]


def subclass_before_loading(checkpoint: Path) -> Outcome:
    """Recipe A: put a subclass in the place of the library's class, then load.

    The layers take their class from a dictionary that was filled when the library was imported, so they never
    see the new one.
    """
    new_class = _fresh_class()
    with _messages() as messages, _in_place_of_the_library_class(new_class):
        model = SamModel.from_pretrained(checkpoint)
    return _outcome(model, new_class, checkpoint, messages)


def swap_after_loading(checkpoint: Path) -> Outcome:
    """Recipe B: load, then overwrite every attention with a fresh instance.

    Nobody carries the weights over, and one window size is given to all layers.
    """
    new_class = _fresh_class()
    with _messages() as messages:
        model: Sam = SamModel.from_pretrained(checkpoint)
        config = model.config.vision_config
        for layer in model.vision_encoder.layers:
            layer.attn = new_class(config, config.window_size)
    return _outcome(model.eval(), new_class, checkpoint, messages)


def _fresh_class() -> type[SplitSamAttention]:
    """A class with a count of its own."""
    return type("GuideAttention", (SplitSamAttention,), {"hook_calls": 0})


@contextmanager
def _in_place_of_the_library_class(new_class: type[nn.Module]) -> Iterator[None]:
    original = modeling_sam.SamVisionAttention
    vars(modeling_sam)["SamVisionAttention"] = new_class
    try:
        yield
    finally:
        vars(modeling_sam)["SamVisionAttention"] = original


class _Collector(logging.Handler):
    """Keeps messages instead of showing them."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextmanager
def _messages() -> Iterator[list[str]]:
    """Everything from a warning upwards that Transformers logs, and all Python warnings, meanwhile."""
    logger, collector = logging.getLogger("transformers"), _Collector()
    before = logger.level, logger.handlers
    logger.handlers = [collector]
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield collector.messages
        collector.messages += [str(warning.message) for warning in caught]
    finally:
        logger.handlers = before[1]
        logger.setLevel(before[0])


def _outcome(model: Sam, new_class: type[SplitSamAttention], checkpoint: Path, messages: Sequence[str]) -> Outcome:
    wanted = separate_tensors(SamModel.from_pretrained(checkpoint))
    have = model.state_dict()
    right = sum(name in have and torch.equal(have[name], tensor) for name, tensor in wanted.items())
    attention = type(model.vision_encoder.layers[0].attn).__name__
    return Outcome(model, attention, new_class.hook_calls, right, len(wanted), tuple(messages))


def separate_tensors(untouched: Sam) -> dict[str, Tensor]:
    """The q, k and v tensors that an attention with separate projections should get, by their names there."""
    found: dict[str, Tensor] = {}
    for number, layer in enumerate(untouched.vision_encoder.layers):
        for leaf, fused in layer.attn.qkv.named_parameters():
            rows = fused.detach().chunk(len(PARTS), dim=0)
            prefix = f"vision_encoder.layers.{number}.attn"
            found |= {f"{prefix}.{part}.{leaf}": third for part, third in zip(PARTS, rows, strict=True)}
    return found
