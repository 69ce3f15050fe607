"""Who is looking: outputs that Transformers is recording, and hooks on modules."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping

import torch
from torch import nn

_RECORDER = "transformers.utils.output_capturing"


def recorded() -> frozenset[str]:
    """The outputs (`hidden_states`, `attentions`, …) that Transformers is recording by hooks at this moment."""
    module = sys.modules.get(_RECORDER)
    collector = getattr(module, "_active_collector", None)
    found = collector.get() if collector is not None else None
    return frozenset(found) if isinstance(found, Mapping) else frozenset()


def is_traced() -> bool:
    """Whether a graph of the model is being made (`torch.compile`, export, tracing) instead of it being run."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


def is_watched(module: nn.Module) -> bool:
    """Whether anything listens to `module` that wants to see what the untouched model would show.

    Transformers' own recorders do not count: they stay for good, and `recorded` says whether they are at work.
    """
    if module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return True
    return bool(module._forward_hooks) and any(not _is_recorder(hook) for hook in module._forward_hooks.values())


def any_watched(modules: Iterable[nn.Module]) -> bool:
    """Whether anything listens to any of `modules`."""
    return any(map(is_watched, modules))


def _is_recorder(hook: object) -> bool:
    return getattr(hook, "__module__", None) == _RECORDER
