"""Tiny models of every type, with weights strong enough that any mistake shows."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from rewire import hf_seam
from rewire.errors import CheckpointError
from rewire.proof.strong import fan_in
from rewire.zoo.shrink import shrink
from rewire.zoo.table import ENTRIES, UNAVAILABLE
from rewire.zoo.values import Config

GAIN = 1.2
"""How much a matrix makes of unit inputs: enough that attention is far from uniform."""

CONVOLUTION_GAIN = 0.8
"""How much a convolution makes of them: dozens stand one behind the other without a norm between."""


class Unavailable(CheckpointError):
    """No tiny model of this type can be made here; the message says why."""


def tiny_config(model_type: str) -> Config:
    """The default configuration of a model type, made small; the same at every call.

    Raises `Unavailable` where there is none.
    """
    if model_type in UNAVAILABLE:
        raise Unavailable(f"{model_type}: {UNAVAILABLE[model_type]}")
    entry = ENTRIES.get(model_type)
    config = hf_seam.model_config(model_type, copy.deepcopy(dict(entry.given)) if entry else {})
    shrink(config)
    for name, value in (entry.then if entry else {}).items():
        _set(config, name, copy.deepcopy(value))
    return config


def _set(config: Config, name: str, value: Any) -> None:
    *parents, last = name.split(".")
    for parent in parents:
        config = getattr(config, parent)
    setattr(config, last, value)


def tiny_model(model_type: str, seed: int = 0) -> hf_seam.PreTrainedModel:
    """A tiny model of a type in evaluation mode, with strong random weights; equal at every call.

    Raises `Unavailable`.

    >>> model = tiny_model("bert")
    >>> sum(parameter.numel() for parameter in model.parameters()) < 200_000
    True
    """
    config, entry = tiny_config(model_type), ENTRIES.get(model_type)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = hf_seam.build(config, architecture=entry.architecture if entry else None)
    draw(model, seed)
    model.eval()
    return model


@torch.no_grad()
def draw(model: nn.Module, seed: int = 0) -> None:
    """Draws every floating parameter anew: matrices that mix, norms around one, biases that are not zero.

    So are the codebooks of codecs, which are saved buffers of zeros.
    """
    generator = torch.Generator().manual_seed(seed)
    done: set[int] = set()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_floating_point() and id(parameter) not in done:
                done.add(id(parameter))
                parameter.copy_(_strong(module, name, parameter, generator))
        _assign_experts(module, generator)
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set and _is_codebook(buffer):
                buffer.normal_(generator=generator)


def _assign_experts(module: nn.Module, generator: torch.Generator) -> None:
    """Fills the table of a router that looks up the experts of each token; without a checkpoint it names the first."""
    table = module._buffers.get("tid2eid")
    if table is not None:
        order = torch.rand(len(table), int(module.num_experts), generator=generator).argsort(dim=1)  # type: ignore[arg-type]
        table.copy_(order[:, : table.shape[1]])


def _strong(module: nn.Module, name: str, old: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(old.shape, generator=generator)
    if old.ndim < 2 or name.endswith("bias") or _is_scale(old):
        # Around what it was: norms around one, biases around zero, decays and step sizes around their values.
        return old.float() + 0.2 * noise
    if isinstance(module, nn.Embedding):
        if module.padding_idx is not None:  # loaders may set this row to zero again
            noise[module.padding_idx] = 0
        return noise
    gain = CONVOLUTION_GAIN if hasattr(module, "kernel_size") else GAIN
    return noise * (gain / math.sqrt(fan_in(module, old)))


def _is_scale(old: Tensor) -> bool:
    """Whether all values are alike and not zero: a scale for each channel, in whatever shape."""
    return old.numel() > 0 and bool((old == old.flatten()[0]).all()) and bool(old.flatten()[0] != 0)


def _is_codebook(buffer: Tensor) -> bool:
    return buffer.is_floating_point() and buffer.ndim > 1 and not bool(buffer.any())
