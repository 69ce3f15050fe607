"""The tensors that forward functions of audio models take, one maker per argument name."""

from __future__ import annotations

import torch
from torch import Tensor

from rewire.proof.facts import Facts, lookup
from rewire.proof.fields import Maker, Shape
from rewire.proof.placeholders import AUDIO, arguments, mixed
from rewire.proof.sound import (
    AUDIO_FRAMES,
    bins_of,
    channels_of,
    frames_of,
    samples_of,
    spectrogram_shape,
    takes_samples,
)

TRANSLATING = frozenset({"input_ids", "input_features", "decoder_input_ids"})
"""Arguments of models that read a text or a sound and write a text."""


def input_features(facts: Facts, shape: Shape) -> Tensor | None:
    """Spectrograms, (batch, bins, frames) or (batch, frames, bins).

    Models that translate take a text or a sound: odd seeds and padding leave the sound out.
    """
    if facts.accepts >= TRANSLATING and (shape.seed % 2 or shape.padding != "none"):
        return None
    size = spectrogram_shape(facts, shape.batch)
    return None if size is None else torch.randn(*size, generator=shape.generator("input_features"))


def input_features_mask(facts: Facts, shape: Shape) -> Tensor | None:
    """True at the frames that count, which are all; (batch, frames)."""
    return _frames_mask(facts, shape, "input_features_mask")


def feature_attention_mask(facts: Facts, shape: Shape) -> Tensor | None:
    """True at the frames that count, which are all; (batch, frames)."""
    return _frames_mask(facts, shape, "feature_attention_mask")


def _frames_mask(facts: Facts, shape: Shape, name: str) -> Tensor | None:
    # A mask that what reads the spectrogram does not take masks something else: what comes out of it.
    if bins_of(facts) is None or (AUDIO in mixed(facts) and name not in arguments(facts, AUDIO)):
        return None
    return torch.ones(shape.batch, frames_of(facts), dtype=torch.bool)


def audio_mel_mask(facts: Facts, shape: Shape) -> Tensor:
    """True at the frames that do not count, which are none; (batch, frames)."""
    return torch.zeros(shape.batch, frames_of(facts), dtype=torch.bool)


def padding_mask(facts: Facts, shape: Shape) -> Tensor | None:
    """True at the samples that count, which are all; (batch, samples). Codecs do without."""
    if AUDIO not in mixed(facts) or "padding_mask" not in arguments(facts, AUDIO):
        return None
    return torch.ones(shape.batch, samples_of(facts), dtype=torch.bool)


def input_values(facts: Facts, shape: Shape) -> Tensor:
    """Sound: samples (batch, [channels,] samples), or spectrograms (batch, frames, mel bins) for AST."""
    config, generator = facts.config, shape.generator("input_values")
    bins, frames = lookup(config, "num_mel_bins"), lookup(config, "max_length")
    if isinstance(bins, int) and isinstance(frames, int) and not takes_samples(facts):
        return torch.randn(shape.batch, frames, bins, generator=generator)
    channels = channels_of(facts)
    lead = (shape.batch,) if channels is None else (shape.batch, channels)
    return torch.randn(*lead, samples_of(facts), generator=generator)


def latents(facts: Facts, shape: Shape) -> Tensor | None:
    """What a codec's decoder reads, (batch, hidden size, frames)."""
    width = lookup(facts.config, "hidden_size")
    size = (shape.batch, width, AUDIO_FRAMES)
    return torch.randn(*size, generator=shape.generator("latents")) if isinstance(width, int) else None


def inputs_embeds(facts: Facts, shape: Shape) -> Tensor | None:
    """Embeddings for models that take nothing else, (batch, frames, hidden size)."""
    width = lookup(facts.config, "hidden_size")
    if getattr(facts.model, "main_input_name", None) != "inputs_embeds" or not isinstance(width, int):
        return None
    return torch.randn(shape.batch, AUDIO_FRAMES, width, generator=shape.generator("inputs_embeds"))


def video_second_per_grid(facts: Facts, shape: Shape) -> Tensor:
    """Seconds from one step in time of a video to the next, to set beside those of a sound; (batch,)."""
    return torch.ones(shape.batch)


MAKERS: dict[str, Maker] = {
    "input_features": input_features,
    "audio_mel": input_features,
    "audio_mel_mask": audio_mel_mask,
    "input_features_mask": input_features_mask,
    "feature_attention_mask": feature_attention_mask,
    "input_values": input_values,
    "padding_mask": padding_mask,
    "latents": latents,
    "inputs_embeds": inputs_embeds,
    "video_second_per_grid": video_second_per_grid,
}
