"""Running a model on a case, the same way every time."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rewire.proof.cases import Case
from rewire.proof.compare import flatten
from rewire.proof.guard import seed_all

WANTED_FLAGS = {"output_hidden_states": True, "return_dict": True}

Outputs = dict[str, Tensor]
"""The tensors of one forward by name, as `flatten` gives them."""


def forward_parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """The parameters of `model.forward` by name."""
    return inspect.signature(model.forward).parameters


def accepted_flags(model: nn.Module) -> dict[str, bool]:
    """The flags a proof would like to set and `forward` takes, by name or through `**kwargs`.

    >>> accepted_flags(nn.Linear(2, 2))
    {}
    """
    parameters = forward_parameters(model)
    takes_any = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
    return {name: value for name, value in WANTED_FLAGS.items() if takes_any or name in parameters}


def placement(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where inputs belong and of which floating type they are: those of the first floating parameter."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            return parameter.device, parameter.dtype
    return torch.device("cpu"), torch.float32


def forward(model: nn.Module, case: Case) -> Outputs:
    """The outputs of `model` for `case`, without gradients.

    >>> forward(nn.ReLU(), Case("one", {"input": torch.tensor([-1.0, 2.0])}))
    {'output': tensor([0., 2.])}
    """
    with torch.no_grad():
        return forward_with_graph(model, case)


def forward_with_graph(model: nn.Module, case: Case) -> Outputs:
    """The outputs of `model` for `case` as autograd is set up around the call."""
    outputs = _outputs(model, case, model)
    inside = getattr(type(model).forward, "__wrapped__", None)
    if inside is None or not torch.is_grad_enabled() or any(tensor.requires_grad for tensor in outputs.values()):
        return outputs
    # Trackers of objects in videos wrap their forward into `torch.inference_mode`: what is inside has gradients.
    return _outputs(model, case, inside.__get__(model))


def _outputs(model: nn.Module, case: Case, call: Callable[..., Any]) -> Outputs:
    flags = {name: value for name, value in accepted_flags(model).items() if name not in case.kwargs}
    try:
        return flatten(_call(model, case, call, flags))
    except TypeError:
        if not flags:
            raise
    return flatten(_call(model, case, call, {}))  # `**kwargs` may be passed on to something that rejects the flags


def _call(model: nn.Module, case: Case, call: Callable[..., Any], flags: Mapping[str, bool]) -> Any:
    device, dtype = placement(model)
    kwargs = {name: _moved(value, device, dtype) for name, value in case.kwargs.items()}
    seed_all(case.seed)
    if case.continuation is None:
        return _with_changes(case, kwargs, call(**kwargs, **flags))
    first = call(**kwargs, **flags, use_cache=True)
    more = {name: _moved(value, device, dtype) for name, value in case.continuation.items()}
    # The cache grows in place, so what the first call gave is copied before the second.
    copies = {name: tensor.clone() for name, tensor in flatten(first).items()}
    return {"first": copies, "second": call(**more, **flags, past_key_values=first.past_key_values, use_cache=True)}


def _with_changes(case: Case, kwargs: Mapping[str, Any], output: Any) -> Any:
    """What forward gave, and what it wrote into values that it changes."""
    changes = {name: value.changes(kwargs[name]) for name, value in case.kwargs.items() if hasattr(value, "fresh")}
    return {"output": output, **changes} if changes else output


def _moved(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A fresh copy of a tensor on `device`, floating ones as `dtype`; other values as they are.

    Values that forward changes have a method `fresh(device, dtype)` that makes them anew, and a method
    `changes(made)` that gives the tensors which forward wrote.
    """
    if hasattr(value, "fresh"):
        return value.fresh(device, dtype)
    if not isinstance(value, Tensor):
        return value
    return value.to(device, dtype if value.is_floating_point() else value.dtype, copy=True)
