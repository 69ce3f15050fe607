"""The inputs of a run: random tokens, images or sounds of the sizes asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rewire.errors import MeasureError, ProofError
from rewire.measure.anatomy.settings import Settings
from rewire.proof.facts import Facts
from rewire.proof.fields import Shape
from rewire.proof.inputs import AROUND, build_case, mixtures_for, needs_placeholders, wanted_names

_LANGUAGE = ("LMHeadModel", "ForCausalLM", "ForConditionalGeneration", "ForMaskedLM", "ForPreTraining")


def inputs_for(model: nn.Module, settings: Settings) -> dict[str, Tensor]:
    """Keyword arguments for `forward`; a text gets no padding, and both sides of an encoder-decoder the same length.

    Raises `MeasureError` where the model takes nothing that is known.
    """
    facts = Facts.of(model)
    try:
        names = wanted_names(facts)
        case = build_case(facts, _shape(facts, settings), names)
    except (ProofError, AttributeError, TypeError, ValueError) as error:
        raise MeasureError(f"no input can be made for {type(model).__name__}: {error}") from error
    made = {name: value for name, value in case.kwargs.items() if isinstance(value, Tensor)}
    if not made:
        raise MeasureError(f"no input can be made for {type(model).__name__}")
    _lengthen(made)
    return {name: _typed(value, model) for name, value in made.items()}


def _lengthen(made: dict[str, Tensor]) -> None:
    """Gives the decoder as many tokens as the encoder."""
    tokens, given = made.get("input_ids"), made.get("decoder_input_ids")
    if tokens is not None and given is not None and given.ndim == 2 and len(given) == len(tokens):
        made["decoder_input_ids"] = given[:, torch.arange(tokens.shape[1]) % given.shape[1]]


def _shape(facts: Facts, settings: Settings) -> Shape:
    if not needs_placeholders(facts):
        return Shape(settings.batch, settings.length)
    mixture = (mixtures_for(facts) or [()])[0]
    return Shape(settings.batch, max(settings.length, sum(run.count for run in mixture) + AROUND), placeholders=mixture)


def _typed(value: Tensor, model: nn.Module) -> Tensor:
    dtype: Any = getattr(model, "dtype", value.dtype)
    return value.to(dtype) if value.is_floating_point() else value


def with_labels(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a training step gets: language models learn to predict their tokens, others get no labels."""
    tokens = inputs.get("decoder_input_ids", inputs.get("input_ids"))
    is_language = type(model).__name__.endswith(_LANGUAGE) and "labels" in Facts.of(model).accepts
    return {**inputs, "labels": tokens} if is_language and tokens is not None else inputs


def positions(inputs: dict[str, Tensor]) -> tuple[int, str]:
    """How much work a batch is, and what it is counted in.

    >>> import torch
    >>> positions({"input_ids": torch.zeros(2, 8)}), positions({"pixel_values": torch.zeros(2, 3, 8, 8)})
    ((16, 'token'), (2, 'image'))
    """
    if "input_ids" in inputs:
        return inputs["input_ids"].numel(), "token"
    name, first = next(iter(inputs.items()))
    return first.shape[0], "image" if name.startswith("pixel") else "input"
