"""How large the cache of keys and values is, from the configuration alone.

One formula for all kinds of attention: `batch x positions x heads x (width of a key + width of a value)` values in
every layer that has a cache. Kinds of attention differ in the number of heads (grouped and multi-query), in positions
(sliding windows) and in widths (latent attention keeps one latent and one rotated key for all heads).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from rewire import hf_seam
from rewire.measure.anatomy.settings import Settings

_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads")
_GROUPS = ("kv_n_heads", "num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_head_kv", "multi_query_group_num")
_WIDTHS = ("hidden_size", "n_embd", "d_model", "dim")
_HEAD_WIDTHS = ("head_dim", "d_kv", "kv_channels", "attention_head_size")

_IN_FRONT = "an image comes in front of the text and takes positions of its own"
_UNTOLD = {
    "cpmant": "a prompt that belongs to the model comes in front of the text and takes positions of its own",
    "git": _IN_FRONT,
    "mimo_v2_flash": "layers with a window have twice the heads that the configuration tells",
    "mistral_large4": "some layers keep no rotated key",
    "mistral_large4_text": "some layers keep no rotated key",
    "mllama": "layers that look at images keep one position for each of their pieces",
    "seamless_m4t": "how long sounds are for the decoder depends on the recording",
    "seamless_m4t_v2": "how long sounds are for the decoder depends on the recording",
    "udop": _IN_FRONT,
}
"""Model types whose configuration says nothing of something that the size depends on."""


@dataclass(frozen=True)
class LayerCache:
    """The cache of one layer for one sequence.

    >>> LayerCache(positions=16_000, heads=48, key=128, value=128).values
    196608000
    """

    positions: int
    heads: int
    key: int
    value: int
    index: int = 0
    """Width of one more key for each position, by which some models choose what to attend to."""

    @property
    def values(self) -> int:
        """Numbers kept."""
        return self.positions * (self.heads * (self.key + self.value) + self.index)


@dataclass(frozen=True)
class CacheSize:
    """The cache of all layers.

    Attributes:
        layers: of each layer; those of attention to an encoder after those of the decoder itself.
        batch: sequences.
        itemsize: bytes of a value.
        kind: how heads share keys and values, as `grouped (8 of 64 heads)`.
    """

    layers: tuple[LayerCache, ...]
    batch: int
    itemsize: int
    kind: str

    @property
    def values(self) -> int:
        """Numbers kept in all."""
        return self.batch * sum(layer.values for layer in self.layers)

    @property
    def bytes(self) -> int:
        """Bytes kept in all."""
        return self.values * self.itemsize


_NOTHING = LayerCache(0, 0, 0, 0)


class UnknownCache(Exception):
    """The configuration does not tell how large the cache is."""


def cache_size(config: Any, settings: Settings, dtype: torch.dtype) -> CacheSize:
    """Of a model with this configuration, when `settings.length` positions have gone through it.

    Raises `UnknownCache` with the reason.
    """
    reason = _UNTOLD.get(config.model_type)
    if reason:
        raise UnknownCache(reason)
    try:
        layers = tuple(_layers(config, settings))
    except UnknownCache:
        raise
    except Exception as error:  # a configuration may lack anything
        raise UnknownCache(f"the configuration does not tell: {error}") from error
    return CacheSize(layers, settings.batch, dtype.itemsize, _kinds(config))


def _decoder(config: Any) -> Any:
    return config.get_text_config(decoder=True)


def _layers(config: Any, settings: Settings) -> Iterator[LayerCache]:
    decoder = _decoder(config)
    length = settings.length if settings.cache == "static" else None
    kept = hf_seam.cache_layers(config, length)
    parts = decoder.per_layer_config
    if len(kept) != len(parts):
        raise UnknownCache(f"{len(kept)} caches for {len(parts)} layers")
    choosers = getattr(decoder, "indexer_types", None) or ["full"] * len(parts)
    sharing = getattr(decoder, "kv_sharing_modes", None) or [""] * len(parts)
    for layer, part, chooser, shared in zip(kept, parts, choosers, sharing, strict=True):
        found = _NOTHING if (shared or "").startswith("reuse") else _layer(layer, part, settings)
        has_index = layer.kind == "indexed" and chooser != "shared"
        yield replace(found, positions=settings.length, index=part.index_head_dim) if has_index else found
    if getattr(config, "is_encoder_decoder", False):
        yield from (_attention(part, settings.length) for part in parts)


def _layer(kept: hf_seam.CacheLayer, config: Any, settings: Settings) -> LayerCache:
    if kept.kind == "none":
        return _NOTHING
    if kept.kind == "other":
        raise UnknownCache(f"a layer keeps its state in a {kept.name}, whose size only a run tells")
    return _attention(config, _positions(kept, settings))


def _positions(kept: hf_seam.CacheLayer, settings: Settings) -> int:
    """A window that grows keeps one position less than it sees: the newest comes with the next token."""
    if kept.window is None:
        return settings.length
    window = kept.window if settings.cache == "static" else max(kept.window - 1, 1)
    return min(settings.length, window)


def _attention(config: Any, positions: int) -> LayerCache:
    if _is_latent(config):
        return LayerCache(positions, 1, config.kv_lora_rank, config.qk_rope_head_dim)
    width = _first(config, _HEAD_WIDTHS) or _width(config)
    return LayerCache(positions, _groups(config), width, _first(config, ("v_head_dim",)) or width)


def _is_latent(config: Any) -> bool:
    return bool(getattr(config, "kv_lora_rank", None)) and hasattr(config, "qk_rope_head_dim")


def _groups(config: Any) -> int:
    """Heads of keys and values."""
    if getattr(config, "new_decoder_architecture", False) is False:  # Falcon's word: without it, one head or all
        if getattr(config, "multi_query", False):
            return 1
        if hasattr(config, "new_decoder_architecture"):
            return _heads(config)
    return _first(getattr(config, "attn_config", None), _GROUPS) or _first(config, _GROUPS) or _heads(config)


def _heads(config: Any) -> int:
    found = _first(config, _HEADS)
    if not found:
        raise UnknownCache("the configuration tells no number of heads")
    return found


def _width(config: Any) -> int:
    width = _first(config, _WIDTHS)
    if not width:
        raise UnknownCache("the configuration tells no width")
    return width // _heads(config)


def _first(config: Any, names: tuple[str, ...]) -> int:
    """The first value of these names that is a number; 0 if there is none."""
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if isinstance(value, int) and value), 0)


def _kinds(config: Any) -> str:
    """Of all layers, each kind once."""
    return "; ".join(dict.fromkeys(filter(None, map(_kind, _decoder(config).per_layer_config))))


def _kind(config: Any) -> str:
    if _is_latent(config):
        return "latent"
    try:
        heads, groups = _heads(config), _groups(config)
    except UnknownCache:
        return ""
    if groups == heads:
        return f"multi-head ({heads})"
    return f"multi-query (1 of {heads} heads)" if groups == 1 else f"grouped ({groups} of {heads} heads)"
