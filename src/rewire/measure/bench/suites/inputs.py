"""Inputs of given sizes, made from the model alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rewire.errors import MeasureError
from rewire.measure.bench.bench import Bench
from rewire.proof.cases import Case
from rewire.proof.execution import placement
from rewire.proof.facts import Facts
from rewire.proof.fields import Shape, text
from rewire.proof.inputs import MAKERS, build_case, cases_for, needs_placeholders, wanted_names

FEW = 4


def check_cases(bench: Bench) -> tuple[Case, ...]:
    """A few small inputs of several shapes to compare two models with."""
    return cases_for(bench.model(), (bench.settings.seed,))[:FEW]


def sized(model: nn.Module, batch: int, length: int, seed: int = 0) -> Case:
    """An input without padding: `batch` texts of `length` tokens, or `batch` inputs of the model's own size.

    Raises `MeasureError` where the model takes no texts of this length.
    """
    facts = Facts.of(model)
    check_length(facts, length)
    if needs_placeholders(facts):
        return cases_for(model, (seed,))[0]
    return build_case(facts, Shape(batch, length, "none", seed), wanted_names(facts))


def padded(model: nn.Module, lengths: Sequence[int], seed: int = 0) -> Case:
    """Texts of these lengths, padded on the right to the longest."""
    facts, longest = Facts.of(model), max(lengths)
    case = sized(model, len(lengths), longest, seed)
    mask = torch.arange(longest)[None] < torch.tensor(lengths)[:, None]
    ids = torch.where(mask, case.kwargs["input_ids"], torch.full_like(case.kwargs["input_ids"], facts.pad_id))
    kwargs = {**case.kwargs, "input_ids": ids, "attention_mask": mask.long()}
    return Case(f"{len(lengths)} texts of up to {longest} tokens", kwargs, mask, seed)


def lengths_for(batch: int, longest: int, padding: float) -> list[int]:
    """Lengths of a batch of which about this share is padding: one is whole, the others get shorter and shorter.

    >>> lengths_for(4, 100, 0.5), lengths_for(3, 100, 0.0), lengths_for(2, 100, 0.9)
    ([100, 71, 26, 3], [100, 100, 100], [100, 1])
    """
    others = batch - 1
    wanted = (1 - padding) * batch * longest - longest  # tokens of all the others together
    if others == 0 or wanted <= others:
        return [longest, *[1] * others]
    power = others * longest / wanted - 1  # so that the mean of (1 - x)**power over 0 to 1 is what each should have
    shares = [(1 - (row + 0.5) / others) ** power for row in range(others)]
    return [longest, *(min(longest, max(1, round(wanted * share / sum(shares)))) for share in shares)]


def prompts(model: nn.Module, batch: int, length: int, seed: int = 0) -> Tensor:
    """Random ordinary tokens `[batch, length]`, on the model's device."""
    facts = Facts.of(model)
    return text(facts, Shape(batch, length, "none", seed), batch, length, "input_ids").to(placement(model)[0])


def check_length(facts: Facts, length: int) -> None:
    """Raises `MeasureError` where texts of so many tokens are too long for the model."""
    if "input_ids" in facts.accepts and length > facts.max_length:
        raise MeasureError(
            f"{length} tokens are more than {type(facts.model).__name__} takes ({facts.max_length}); ask for fewer "
            "with --tokens (and --prompt, in decode)"
        )


def on_device(model: nn.Module, case: Case) -> dict[str, Any]:
    """The arguments of a case for the forward of `model`."""
    device, dtype = placement(model)
    return {
        name: value.to(device, dtype if value.is_floating_point() else value.dtype)
        if isinstance(value, Tensor)
        else value
        for name, value in case.kwargs.items()
    }


def forwards(model: nn.Module, kwargs: Mapping[str, Any]) -> Callable[[], Any]:
    """A forward without gradients, to be called again and again."""

    def run() -> Any:
        with torch.inference_mode():
            return model(**kwargs)

    return run


def takes_texts(model: nn.Module) -> bool:
    """Whether the model takes texts, alone."""
    facts = Facts.of(model)
    return "input_ids" in facts.accepts and "input_ids" in MAKERS and not needs_placeholders(facts)
