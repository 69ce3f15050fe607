"""A forward and a training step, the same with pretended tensors and with real ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from rewire import hf_seam
from rewire.errors import MeasureError
from rewire.measure.anatomy.settings import Settings
from rewire.proof.execution import forward_parameters


def infer(model: nn.Module, inputs: dict[str, Tensor], settings: Settings) -> Any:
    """The output of a forward without gradients, with the cache asked for."""
    with torch.no_grad(), _precision(settings):
        return model(**inputs, **_cache(model, inputs, settings))


def _cache(model: nn.Module, inputs: dict[str, Tensor], settings: Settings) -> dict[str, Any]:
    if not keeps_cache(model):
        return {}
    if settings.cache == "static" and "input_ids" in inputs:
        return {"use_cache": True, "past_key_values": hf_seam.static_cache(model, inputs["input_ids"].shape[1])}
    return {"use_cache": settings.cache != "none"}


def keeps_cache(model: nn.Module) -> bool:
    """Whether a forward of this model can keep keys and values for the next."""
    config = getattr(model, "config", None)
    is_encoder = getattr(config, "is_decoder", True) is False and not getattr(config, "is_encoder_decoder", False)
    takes = "past_key_values" in forward_parameters(model)
    return takes and not (is_encoder and getattr(config, "add_cross_attention", None) is not None)


def prepare_training(model: nn.Module, settings: Settings) -> None:
    """Training mode, and gradient checkpointing where that is asked for. Raises `MeasureError` where there is none."""
    model.train()
    if not settings.gradient_checkpointing:
        return
    enable: Any = getattr(model, "gradient_checkpointing_enable", None)
    if enable is None or not getattr(model, "supports_gradient_checkpointing", False):
        raise MeasureError(f"{type(model).__name__} has no gradient checkpointing")
    # Random states cannot be saved where tensors only pretend; they are a few kilobytes.
    enable(gradient_checkpointing_kwargs={"use_reentrant": False, "preserve_rng_state": False})
    if all(not parameter.requires_grad for parameter in model.get_input_embeddings().parameters()):  # type: ignore[operator]
        model.enable_input_require_grads()  # type: ignore[operator]


def learn(model: nn.Module, inputs: dict[str, Tensor], settings: Settings, between: Callable[[], None]) -> Any:
    """Forward and backward; `between` is called after the forward. Gives the output, which lives on."""
    with _precision(settings):
        output = model(**inputs, **({"use_cache": False} if keeps_cache(model) else {}))
        loss = _loss(output)
    between()
    loss.backward()
    return output


def _loss(output: Any) -> Tensor:
    """The model's own loss where it gives one, else the mean of its first output."""
    loss = getattr(output, "loss", None)
    if isinstance(loss, Tensor) and loss.requires_grad:
        return loss
    values: Iterable[Any] = output.values() if isinstance(output, dict) else output
    for value in [output] if isinstance(output, Tensor) else values:
        if isinstance(value, Tensor) and value.requires_grad:
            return value.float().mean()
    raise MeasureError("no output depends on a trainable parameter, so there is nothing to train")


def _precision(settings: Settings) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16) if settings.mixed_precision else nullcontext()
