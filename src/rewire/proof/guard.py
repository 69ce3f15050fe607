"""Leaving models as they were found: whatever happens inside, they come out unchanged."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Saved = list[tuple[dict[str, Any], dict[str, Any]]]
"""Dictionaries with a copy of what they held."""


@contextmanager
def untouched(*models: nn.Module) -> Iterator[None]:
    """Puts models into evaluation mode; afterwards everything is as before, also after an exception.

    Restored: training flags, `requires_grad`, hooks (Transformers installs lasting ones when asked for hidden
    states), attributes of modules and configs, and the random state of torch, Python and numpy.

    >>> layer = nn.Dropout()
    >>> with untouched(layer):
    ...     layer.training
    False
    >>> layer.training
    True
    """
    with ExitStack() as stack:
        stack.enter_context(random_state())
        for model in models:
            stack.callback(_restore, _dictionaries(model))
            stack.callback(_restore_flags, [(p, p.requires_grad) for p in model.parameters()])
        for model in models:
            model.eval()
        yield


@contextmanager
def random_state() -> Iterator[None]:
    """Restores the state of every random number generator."""
    numpy_random = getattr(sys.modules.get("numpy"), "random", None)
    python_state = random.getstate()
    numpy_state = numpy_random.get_state() if numpy_random else None
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python_state)
            if numpy_random:
                numpy_random.set_state(numpy_state)


def seed_all(seed: int) -> None:
    """Starts every random number generator at `seed`."""
    torch.manual_seed(seed)
    random.seed(seed)
    numpy_random = getattr(sys.modules.get("numpy"), "random", None)
    if numpy_random:
        numpy_random.seed(seed)


@contextmanager
def gradients_required(model: nn.Module) -> Iterator[None]:
    """Every floating parameter asks for a gradient inside; the flags return afterwards."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in flags:
            if parameter.is_floating_point():
                parameter.requires_grad_(True)
        yield
    finally:
        _restore_flags(flags)


@contextmanager
def replaced(parameters: Mapping[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Parameters show other values inside.

    `parameters` gives (parameter, values) by name. The storage of a parameter is exchanged and never written
    to, so that its own values return bit for bit.
    """
    originals = [(parameter, parameter.data) for parameter, _ in parameters.values()]
    try:
        for parameter, values in parameters.values():
            parameter.data = values
        yield
    finally:
        for parameter, data in originals:
            parameter.data = data


def _dictionaries(model: nn.Module) -> Saved:
    """The attributes of every module and config, with one more level for the dictionaries of a module."""
    saved: Saved = []
    seen: set[int] = set()
    for module in model.modules():
        inner = [value for value in vars(module).values() if isinstance(value, dict)]
        configs = [vars(value) for value in vars(module).values() if _is_config(value)]
        for found in (vars(module), *inner, *configs, *_inner_configs(configs)):
            if id(found) not in seen:
                seen.add(id(found))
                saved.append((found, dict(found)))
    return saved


def _inner_configs(configs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [vars(value) for config in configs for value in config.values() if _is_config(value)]


def _is_config(value: Any) -> bool:
    return hasattr(value, "to_dict") and hasattr(value, "__dict__") and not isinstance(value, type | nn.Module)


def _restore(saved: Saved) -> None:
    for found, copy in saved:
        for key in [key for key in found if key not in copy]:
            del found[key]
        for key, value in copy.items():
            if key not in found or found[key] is not value:
                found[key] = value


def _restore_flags(flags: list[tuple[nn.Parameter, bool]] | list[tuple[Tensor, bool]]) -> None:
    for parameter, required in flags:
        if parameter.requires_grad != required:
            parameter.requires_grad_(required)
