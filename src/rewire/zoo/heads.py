"""Attention heads of a small model: how many, how wide, and how their features rotate."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rewire.zoo.values import Config, is_numbers, numbers

HEADS, HEAD = 4, 16
"""Heads of a small attention, features of a head."""

_HEADS = re.compile(
    r"(\w+_)?(num|n)_(\w+_)?heads|(en|de)coder_(\w+_)?heads|(\w+_)?attention_heads|num_heads|resampler_heads|n_head"
)
_KV_HEADS = re.compile(r"(\w+_)?(num|n)_(\w+_)?(key_value|kv)(_\w+)?_heads|kv_n_heads|n_head_kv")
_HEAD_SIZE = re.compile(r"(\w+_)?head_dim|d_kv|kv_channels|linear_(key|value)_head_dim")
_STATE_SPACE = (
    ("mamba_n_heads", "mamba_d_head", "mamba_expand"),
    ("mamba_num_heads", "mamba_head_dim", "expand"),
    ("n_mamba_heads", "mamba_headdim", "mamba_expand"),
    ("num_heads", "head_dim", "expand"),
)
"""Names of the heads, their size and the widening of state-space layers: heads fill the widened model."""


def few_heads(config: Config) -> None:
    """Four heads, and key-value heads in proportion: as many, one, or two."""
    values = {name: value for name, value in numbers(config).items() if _HEADS.fullmatch(name)}
    most = max((value for name, value in values.items() if not _KV_HEADS.fullmatch(name)), default=0)
    for name, value in values.items():
        others = values.get(name.replace("key", "value"), value) if "key_value" not in name else value
        is_fewer = value < most if _KV_HEADS.fullmatch(name) else value < others
        if value > 2:
            setattr(config, name, 2 if is_fewer else HEADS)
    for name, value in vars(config).items():
        if _KV_HEADS.fullmatch(name.removesuffix("_per_layer")) and is_numbers(value):
            setattr(config, name, type(value)(min(one, HEADS if one == most else 2) for one in value))


def fill_state_spaces(config: Config, hidden: int) -> None:
    """Gives state-space layers as many heads as fill their width, `hidden` widened; expects their small sizes."""
    found = numbers(config)
    for heads, size, widening in _STATE_SPACE:
        if {heads, size, widening} <= found.keys():
            setattr(config, heads, max(1, hidden * found[widening] // found[size]))


@dataclass(frozen=True)
class HeadSizes:
    """Which original size of a head becomes which small one: all in proportion.

    Attributes:
        common: what all original sizes are multiples of.
        unit: what it becomes.
    """

    common: int
    unit: int

    @classmethod
    def of(cls, configs: list[Config]) -> HeadSizes:
        """The sizes in a configuration and in those of its layers.

        >>> from types import SimpleNamespace
        >>> sizes = HeadSizes.of([SimpleNamespace(head_dim=64, qk_nope_head_dim=128)])
        >>> sizes.small(64), sizes.small(128)
        (16, 32)
        """
        found = [value for config in configs for value in _head_sizes(config).values()]
        common = math.gcd(*found)
        main = numbers(configs[0]).get("head_dim", max(found, default=0))
        return cls(common, HEAD if main == common else HEAD // 2)

    def small(self, value: int) -> int:
        """The small size for an original one."""
        return value // self.common * self.unit if value > self.unit else value

    def apply(self, config: Config) -> None:
        """Makes all sizes of heads in a configuration small."""
        for name, value in _head_sizes(config).items():
            setattr(config, name, self.small(value))


def is_head_size(name: str) -> bool:
    """Whether this is the name of the size of a head."""
    return _HEAD_SIZE.fullmatch(name) is not None


def _head_sizes(config: Config) -> dict[str, int]:
    return {name: value for name, value in numbers(config).items() if is_head_size(name)}


# ---------------------------------------------------------------- rotation


def split_rotation(config: Config) -> None:
    """Where positions have several axes, shares out the features of the small heads among them."""
    if "mrope_section" not in (getattr(config, "ignore_keys_at_rope_validation", None) or ()):
        return
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for parameters in _rotations(getattr(config, "rope_parameters", None)):
        pairs = int(size * parameters.get("partial_rotary_factor", 1.0)) // 2
        third = (pairs + 1) // 3
        parameters["mrope_section"] = [third, third, pairs - 2 * third]


def _rotations(parameters: Any) -> Iterator[dict[str, Any]]:
    """The parameters of rotations: one for all layers, or one for each kind."""
    if not isinstance(parameters, Mapping):
        return
    if "rope_type" in parameters:
        yield dict(parameters) if not isinstance(parameters, dict) else parameters
    for value in parameters.values():
        yield from _rotations(value)
