"""Sizes of sound as models take it: samples, or spectrograms with the bins or the frames first."""

from __future__ import annotations

import math

from torch import nn

from rewire.proof.facts import Facts, lookup

AUDIO_FRAMES = 12
"""Frames that an encoder sees of a short sound, after what it does to shorten it."""

SAMPLES = 320
"""Samples for each frame, where nothing else is known."""

SHORTENING = 4
"""Frames of a spectrogram for each of those, where nothing else is known."""

BIN_KEYS = (
    "feature_projection_input_dim",
    "num_mel_bins",
    "mel_bins",
    "input_feat_size",
    "input_dim",
    "feature_size",
    "audio_embed_dim",
)
"""Config values that say how many numbers a frame of a spectrogram has."""

RATIO_KEYS = ("upsampling_ratios", "downsampling_ratios")
"""Config values of codecs whose product says how many samples make a frame."""

FIRST_LAYERS = ("conv1", "mel_conv")
"""Convolutions over time that read a spectrogram whose bins come before its frames."""

LINEAR_INPUT = "input_linear"
"""The linear layer that reads a spectrogram of stacked frames."""


def spectrogram_shape(facts: Facts, batch: int) -> tuple[int, ...] | None:
    """The shape of `input_features` for `batch` sounds; None where the number of bins is not known."""
    bins = bins_of(facts)
    if bins is None:
        return None
    frames = frames_of(facts)
    if isinstance(lookup(facts.config, "spec_size"), int):
        return batch, 1, frames, bins
    return (batch, bins, frames) if has_bins_first(facts) else (batch, frames, bins)


def bins_of(facts: Facts) -> int | None:
    """How many numbers a frame of a spectrogram has."""
    config = facts.config
    for path, module in facts.model.named_modules():
        if path.rpartition(".")[2] == LINEAR_INPUT and isinstance(module, nn.Linear):
            return module.in_features
    if lookup(config, "input_feat_per_channel"):
        return int(lookup(config, "input_feat_per_channel")) * int(lookup(config, "input_channels") or 1)
    bins, channels = lookup(config, *BIN_KEYS), lookup(config, "subsampling_conv_channels")
    if bins is None and isinstance(channels, list | tuple):  # Gemma's tower has as many as its first convolution
        return int(channels[0])
    return bins * int(lookup(config, "num_stacked_frames") or 1) if isinstance(bins, int) else None


def has_bins_first(facts: Facts) -> bool:
    """Whether a spectrogram is (batch, bins, frames), as convolutions over time read it."""
    bins = bins_of(facts)
    is_told = "chunk_sample_lengths" in facts.accepts or isinstance(lookup(facts.config, "n_window"), int)
    return is_told or any(
        path.rpartition(".")[2] in FIRST_LAYERS and isinstance(module, nn.Conv1d) and module.in_channels == bins
        for path, module in facts.model.named_modules()
    )


def frames_of(facts: Facts) -> int:
    """Frames of a spectrogram: as many as the model has positions for, two whole windows, or a few."""
    window, positions = lookup(facts.config, "n_window"), lookup(facts.config, "max_source_positions")
    spectrum = lookup(facts.config, "spec_size")
    if isinstance(spectrum, int):
        return 2 * spectrum
    if "input_values" in facts.accepts:  # the same sound in two forms: the samples say how long it is
        return AUDIO_FRAMES
    if isinstance(window, int):
        return 4 * window
    if isinstance(positions, int) and has_bins_first(facts):
        return 2 * positions
    return SHORTENING * AUDIO_FRAMES


def takes_samples(facts: Facts) -> bool:
    """Whether sound comes as samples that convolutions turn into frames."""
    return lookup(facts.config, "conv_kernel") is not None


def channels_of(facts: Facts) -> int | None:
    """Channels of sound where they have a dimension of their own, as in codecs; None where they have none."""
    channels = lookup(facts.config, "audio_channels")
    if isinstance(channels, int):
        return channels
    return 1 if lookup(facts.config, *RATIO_KEYS) else None


def samples_of(facts: Facts, frames: int = AUDIO_FRAMES) -> int:
    """How many samples make `frames` frames of a codec, or give them after the convolutions of the config."""
    ratios = lookup(facts.config, *RATIO_KEYS)
    if isinstance(ratios, list | tuple):
        return frames * math.prod(ratios)
    kernels, strides = lookup(facts.config, "conv_kernel"), lookup(facts.config, "conv_stride")
    if not isinstance(kernels, list | tuple) or not isinstance(strides, list | tuple):
        return frames * SAMPLES
    for kernel, stride in zip(reversed(kernels), reversed(strides), strict=True):
        frames = (frames - 1) * stride + kernel
    return int(frames)
