"""What a model object says about the inputs it takes: its config, its forward, its embedding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rewire.proof.execution import forward_parameters

LENGTH_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "max_target_positions",
)
IMAGE_KEYS = ("image_size", "max_img_size", "resolution")
SMALL_PAD_ID = 8
"""Pad ids up to here may shift learned positions (RoBERTa); larger ones are ordinary rows of the vocabulary."""


def sub_configs(config: Any) -> Iterator[Any]:
    """The configs inside a config, in their order."""
    if config is not None and hasattr(config, "__dict__"):
        yield from (value for value in vars(config).values() if hasattr(value, "to_dict"))


def lookup(config: Any, *names: str) -> Any:
    """The first attribute of these names that is set, in `config` or else in the configs inside it."""
    for name in names:
        value = getattr(config, name, None)
        if value is not None and not callable(value):
            return value
    return next((found for sub in sub_configs(config) if (found := lookup(sub, *names)) is not None), None)


def text_config(config: Any) -> Any:
    """The config of the text part, or `config` itself, also where it has several texts, read and written."""
    get = getattr(config, "get_text_config", None)
    try:
        return get() if get is not None else config
    except ValueError:
        return config


def vision_config(config: Any) -> Any:
    """The config of the vision part, or `config` itself."""
    found = (getattr(config, name, None) for name in ("vision_config", "encoder"))
    return next((sub for sub in found if sub is not None), config)


def pair(size: Any) -> tuple[int, int]:
    """A size given as one number, a sequence or a mapping, as (height, width).

    >>> pair(224), pair([32, 64]), pair({"height": 8, "width": 9})
    ((224, 224), (32, 64), (8, 9))
    """
    if isinstance(size, Mapping):
        edge = size.get("shortest_edge", 0)
        return int(size.get("height", edge)), int(size.get("width", edge))
    if isinstance(size, list | tuple):
        return int(size[0]), int(size[-1])
    return int(size), int(size)


@dataclass(frozen=True, eq=False)
class Facts:
    """What inputs are made from. `accepts` holds the names that forward takes."""

    model: nn.Module
    accepts: frozenset[str]
    config: Any

    @classmethod
    def of(cls, model: nn.Module) -> Facts:
        """The facts of a model; `config` is None for a bare module."""
        return cls(model, frozenset(forward_parameters(model)), getattr(model, "config", None))

    @property
    def is_encoder_decoder(self) -> bool:
        return "decoder_input_ids" in self.accepts

    @property
    def continues(self) -> bool:
        """Whether forward takes up where an earlier call left off, by a cache of keys and values."""
        can_generate = getattr(self.model, "can_generate", None)
        is_decoder = {"input_ids", "past_key_values"} <= self.accepts and not self.is_encoder_decoder
        return is_decoder and callable(can_generate) and bool(can_generate())

    @property
    def vocab_size(self) -> int:
        """Rows of the vocabulary that may be asked for."""
        names = ("vocab_size", "num_hash_buckets")  # models of characters may have buckets in place of a vocabulary
        size = lookup(text_config(self.config), *names) or lookup(self.config, *names) or 0
        try:
            rows = getattr(self.model.get_input_embeddings(), "num_embeddings", None)  # type: ignore[operator]
        except (AttributeError, NotImplementedError):
            rows = None
        known = [int(value) for value in (size, rows) if isinstance(value, int) and value > 0]
        return min(known, default=0)

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids with a meaning of their own: every `…_token_id`, `…_token_ids`, `…_token_index` of the configs."""
        return frozenset(_special_ids(self.config))

    @property
    def pad_id(self) -> int:
        """What stands at padded positions."""
        value = lookup(text_config(self.config), "pad_token_id")
        return value if isinstance(value, int) and 0 <= value < max(self.vocab_size, 1) else 0

    @property
    def start_id(self) -> int:
        """What a decoder starts with."""
        found = lookup(self.config, "decoder_start_token_id", "bos_token_id")
        return found if isinstance(found, int) and 0 <= found < self.vocab_size else self.pad_id

    @property
    def end_id(self) -> int | None:
        """What ends a sequence, if the config says so."""
        found = lookup(text_config(self.config), "eos_token_id")
        return found if isinstance(found, int) and found < self.vocab_size else None

    @property
    def token_ids(self) -> Tensor:
        """The ids that random text is made of."""
        special = self.special_ids
        ordinary = [index for index in range(self.vocab_size) if index not in special]
        return torch.tensor(ordinary if len(ordinary) > 1 else range(max(self.vocab_size, 1)))

    @property
    def max_length(self) -> int:
        """The longest text to try; positions start behind the pad id in some models."""
        limits = [lookup(text_config(self.config), *LENGTH_KEYS)]
        numbers = [value for value in limits if isinstance(value, int) and value > 0]
        offset = self.pad_id if self.pad_id <= SMALL_PAD_ID else 0
        return max(2, min(numbers, default=1 << 20) - 2 - offset)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of an image in pixels: the model's full size, 64 where it takes any."""
        size = lookup(vision_config(self.config), "image_size") or lookup(self.config, *IMAGE_KEYS)
        return pair(size or 64)

    @property
    def channels(self) -> int:
        """Colour channels of an image."""
        found = lookup(vision_config(self.config), "num_channels", "in_channels", "in_chans")
        return found if isinstance(found, int) else 3

    @property
    def patch_size(self) -> int:
        """Side of an image patch in pixels."""
        found = lookup(vision_config(self.config), "patch_size")
        return max(1, pair(found)[0]) if isinstance(found, int | list | tuple) else 16

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters())


def _special_ids(config: Any) -> Iterator[int]:
    for name, value in vars(config).items() if hasattr(config, "__dict__") else ():
        if name.endswith(("_token_id", "_token_ids", "_token_index", "_patch_id")):
            yield from (one for one in (value if isinstance(value, list | tuple) else [value]) if isinstance(one, int))
    for sub in sub_configs(config):
        yield from _special_ids(sub)
