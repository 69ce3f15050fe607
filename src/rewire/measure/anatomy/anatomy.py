"""Takes a model apart on paper: modules, operations and memory, from the configuration alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from rewire.errors import MeasureError
from rewire.measure.anatomy import memory
from rewire.measure.anatomy.building import Blueprint
from rewire.measure.anatomy.cache import CacheSize, UnknownCache, cache_size
from rewire.measure.anatomy.inputs import inputs_for
from rewire.measure.anatomy.memory import Figure
from rewire.measure.anatomy.record import Anatomy
from rewire.measure.anatomy.running import Run, pretend_inference, pretend_training
from rewire.measure.anatomy.settings import Settings
from rewire.measure.anatomy.steps import keeps_cache
from rewire.measure.anatomy.tree import tree


def anatomy(blueprint: Blueprint, settings: Settings | None = None) -> Anatomy:
    """What the model of a blueprint is made of, and what memory it takes. No weights are allocated.

    Parameters, bytes and (for plain attention) the cache follow from the configuration. Operations, activations and
    peaks come from a run with tensors that only pretend to be there; where that cannot be, each of these figures
    carries the reason.

    Raises:
        CheckpointError: no model can be made of the configuration.
        ResolveError: the plan does not fit the model.
        MeasureError: the settings do not fit the model.
    """
    settings = settings or Settings()
    model = blueprint.on_meta()
    settings = _settled(model, settings)
    run = pretend_inference(blueprint, settings)
    step = pretend_training(blueprint, settings) if settings.train else None
    cache, kind, notes = _cache(model, run, settings)
    best = next((one for one in (step, run) if isinstance(one, Run)), None)
    return Anatomy(
        name=blueprint.name,
        model=type(model).__name__,
        model_type=str(getattr(blueprint.config, "model_type", "")),
        dtypes=_dtypes(model),
        settings=settings,
        tree=tree(model, best.flops if best else None, step.kept if isinstance(step, Run) else None),
        count=best.count if best else 0,
        unit=best.unit if best else "token",
        cache_kind=kind,
        inference=memory.inference(model, run, cache),
        training=None if step is None else memory.training(model, step, settings),
        notes=notes,
    )


def _settled(model: nn.Module, settings: Settings) -> Settings:
    """With the length that the inputs really have: a text with images in it may have to be longer."""
    if settings.cache == "static" and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise MeasureError(
            f"{type(model).__name__} has a decoder after an encoder; a static cache is for decoders alone"
        )
    try:
        tokens = inputs_for(model, settings).get("input_ids")
    except MeasureError:
        return settings  # every figure that needs a run will say so
    return settings if tokens is None else replace(settings, length=tokens.shape[-1])


def _cache(model: nn.Module, run: Run | str, settings: Settings) -> tuple[Figure, str, tuple[str, ...]]:
    """The cache as the run has it, else by the formula; its kind; and a note where the two differ."""
    if settings.cache == "none" or not keeps_cache(model):
        return Figure(0), "", ()
    formula: CacheSize | str
    try:
        formula = _by_formula(model, settings)
    except UnknownCache as error:
        formula = str(error)
    kind = formula.kind if isinstance(formula, CacheSize) else ""
    if isinstance(run, str):
        return Figure(formula.bytes) if isinstance(formula, CacheSize) else Figure(None, formula), kind, ()
    if run.cache is None:
        return Figure(0), "", ()
    differs = isinstance(formula, CacheSize) and formula.bytes != run.cache
    note = f"the formula for the cache gives {formula.bytes:,} bytes" if differs else ""  # type: ignore[union-attr]
    return Figure(run.cache), kind, (note,) if note else ()


def _by_formula(model: Any, settings: Settings) -> CacheSize:
    if model.config.is_encoder_decoder and model.main_input_name != "input_ids":
        raise UnknownCache("how much a decoder sees of its encoder depends on the recording or image")
    return cache_size(model.config, settings, _dtype(model, settings))


def _dtype(model: nn.Module, settings: Settings) -> torch.dtype:
    dtype: torch.dtype = getattr(model, "dtype", torch.float32)
    return torch.bfloat16 if settings.mixed_precision else dtype


def _dtypes(model: nn.Module) -> tuple[str, ...]:
    sizes: Counter[str] = Counter()
    for parameter in model.parameters():
        sizes[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
    return tuple(name for name, _ in sizes.most_common())
