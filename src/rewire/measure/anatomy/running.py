"""Runs that are only pretended: peaks, activations and operations without a weight in memory."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from rewire.measure.anatomy.building import Blueprint, pretended
from rewire.measure.anatomy.inputs import inputs_for, positions, with_labels
from rewire.measure.anatomy.meter import Meter
from rewire.measure.anatomy.settings import Settings
from rewire.measure.anatomy.steps import infer, learn, prepare_training
from rewire.proof.compare import flatten


@dataclass(frozen=True)
class Run:
    """What a pretended run found, in bytes beside the weights.

    Attributes:
        peak: the most that tensors took at once.
        end: what is left when it is over and the output is still held.
        kept: bytes at the end of the forward by path of the module that made them: for a training step what backward
            needs, with the output.
        flops: floating-point operations of the forward by path of the module.
        cache: bytes of the keys and values that were kept; None if there are none.
        count: how many tokens, images or recordings went through.
        unit: which of these.
    """

    peak: int
    end: int
    kept: Mapping[str, int] = field(repr=False)
    flops: Mapping[str, int] = field(repr=False)
    cache: int | None
    count: int
    unit: str


Act = Callable[[nn.Module, dict[str, Tensor], Meter], Any]


def pretend_inference(blueprint: Blueprint, settings: Settings) -> Run | str:
    """A forward; the reason where it cannot be pretended."""

    def act(model: nn.Module, inputs: dict[str, Tensor], meter: Meter) -> Any:
        output = infer(model, inputs, settings)
        return output, meter.kept(), dict(meter.flops)

    return _pretend(blueprint, settings, act)


def pretend_training(blueprint: Blueprint, settings: Settings) -> Run | str:
    """Forward and backward; the reason where they cannot be pretended."""
    found: list[Any] = []

    def act(model: nn.Module, inputs: dict[str, Tensor], meter: Meter) -> Any:
        prepare_training(model, settings)
        output = learn(
            model, with_labels(model, inputs), settings, lambda: found.extend((meter.kept(), dict(meter.flops)))
        )
        return output, *found

    return _pretend(blueprint, settings, act)


def _pretend(blueprint: Blueprint, settings: Settings, act: Act) -> Run | str:
    model = blueprint.on_meta()
    try:
        real = inputs_for(model, settings)
        with _quietly(), pretended(model) as mode:
            return _metered(model, _faked(real, mode), act)
    except Exception as error:  # data decide what happens, or an operation is unknown: each says so in its own way
        return _reason(error)


@contextmanager
def _quietly() -> Iterator[None]:
    """Torch logs what it cannot pretend; here it becomes the reason of a figure. Warnings are about no real run."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    was_disabled, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = was_disabled


def _faked(inputs: Mapping[str, Tensor], mode: FakeTensorMode) -> dict[str, Tensor]:
    return {name: mode.from_tensor(value) for name, value in inputs.items()}


def _metered(model: nn.Module, inputs: dict[str, Tensor], act: Act) -> Run:
    count, unit = positions(inputs)
    meter = Meter([*model.parameters(), *model.buffers(), *inputs.values()])
    with meter, meter.watching(model):
        output, kept, flops = act(model, inputs, meter)
        end = meter.now
    return Run(meter.peak, end, kept, flops, cached_bytes(output), count, unit)


def cached_bytes(output: Any) -> int | None:
    """Bytes of the keys, values and states in the cache of an output; None without one."""
    cache = getattr(output, "past_key_values", None)
    cache = getattr(output, "cache_params", None) if cache is None else cache
    if cache is None:
        return None
    return sum(tensor.numel() * tensor.itemsize for tensor in cache_tensors(cache))


def cache_tensors(cache: Any) -> Iterator[Tensor]:
    """Tensors that a cache keeps one value per position, or one state, in."""
    parts = [getattr(cache, name) for name in ("self_attention_cache", "cross_attention_cache") if hasattr(cache, name)]
    for part in parts or [cache]:
        for layer in getattr(part, "layers", ()):
            yield from _tensors([getattr(layer, name, None) for name in KEPT])


KEPT = ("keys", "values", "indexer_keys", "conv_states", "recurrent_states")
"""Where the layers of a cache keep what grows with the batch or the length."""


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif value is not None:
            yield from flatten(value).values()


def _reason(error: Exception) -> str:
    """Why a run cannot be pretended."""
    if isinstance(error, DataDependentOutputException | DynamicOutputShapeException):
        return f"what the model computes depends on the values of tensors ({error.func})"
    return f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else "no message"
