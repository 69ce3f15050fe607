"""Inputs for the tiny models: made from the model as for any proof, with what the table says on top."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rewire.proof import Case, cases_for
from rewire.zoo.entry import Draw
from rewire.zoo.table import ENTRIES


def example_inputs(model_type: str, model: nn.Module, seed: int = 0) -> Case:
    """One case for a tiny model of a type: batch 1, every modality that the model takes.

    Raises `ProofError` where no input is known.
    """
    entry = ENTRIES.get(model_type)
    if entry is None or not entry.inputs:
        return cases_for(model, (seed,))[0]
    made = {} if entry.only else dict(cases_for(model, (seed,))[0].kwargs)
    generator = torch.Generator().manual_seed(seed)
    for name, value in entry.inputs.items():
        made.pop(name, None)
        if value is not None:
            made[name] = _drawn(value, generator) if isinstance(value, Draw) else value
    return Case(f"{model_type}, seed {seed}", made, seed=seed)


def _drawn(draw: Draw, generator: torch.Generator) -> Tensor:
    if draw.values is not None:
        tensor = torch.tensor(draw.values)
    elif draw.of == "integers":
        tensor = torch.randint(int(draw.low), int(draw.high), draw.shape, generator=generator)
    elif draw.of == "uniform":
        tensor = draw.low + (draw.high - draw.low) * torch.rand(draw.shape, generator=generator)
    elif draw.of == "constant":
        tensor = torch.full(draw.shape, draw.low)
    else:
        tensor = torch.randn(draw.shape, generator=generator)
    return tensor if draw.dtype is None else tensor.to(_dtype(draw.dtype))


def _dtype(name: str) -> Any:
    return getattr(torch, name)
