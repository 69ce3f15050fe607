"""A stack of encoder layers that runs on the real tokens of a batch alone.

The modules stay what they are: their forwards are wrapped, instance by instance. The first layer called leaves the
padding out, the last puts it back, and where anybody looks at what passes between them, every layer does both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from rewire.modules.packed.attend import AttentionFacts, KnownAttention, RegistryAttention
from rewire.modules.packed.capture import any_watched, is_traced, recorded
from rewire.modules.packed.layer import LayerForward
from rewire.modules.packed.recipe import LayerFacts
from rewire.modules.packed.run import Broken, PackedStack, Run, Wrapped


class OwnerForward(Wrapped):
    """The forward of the module that calls the layers: tokens stay packed from its first layer to its last."""

    def __init__(self, module: nn.Module, stack: PackedStack, layers: Iterable[nn.Module]) -> None:
        super().__init__(module, stack)
        self.layers = list(layers)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        runs = self.stack.runs
        if runs.now is not None or not self._may_chain(kwargs):
            return self.own(*args, **kwargs)
        run = runs.now = Run()
        try:
            answer = self.own(*args, **kwargs)
        except Broken:
            answer, run.sent = None, None
            run.called = -1
        finally:
            runs.now = None
        if run.sent is not None or run.called < 0:  # a layer was left out, or something was done in between
            return self.own(*args, **kwargs)
        if run.called:
            self.stack.chained = self.stack.layers == run.called
            self.stack.layers = run.called
        return answer

    def _may_chain(self, kwargs: Mapping[str, Any]) -> bool:
        if not self.stack.facts.chains or is_traced():
            return False
        if self.module.training and (_drops_layers(self.module) or _checkpoints(self.layers)):
            return False
        if kwargs.get("output_hidden_states") or _asks(self.module, "output_hidden_states"):
            return False
        return "hidden_states" not in recorded() and not any_watched(self.layers)


def _drops_layers(owner: nn.Module) -> bool:
    rates = (getattr(place, "layerdrop", 0) for place in (owner, getattr(owner, "config", None)))
    return any(rate for rate in rates if isinstance(rate, int | float))


def _checkpoints(layers: Iterable[nn.Module]) -> bool:
    return any(getattr(layer, "gradient_checkpointing", False) for layer in layers)


def _asks(module: nn.Module, name: str) -> bool:
    return getattr(getattr(module, "config", None), name, False) is True


def wrap(
    owner: nn.Module,
    layers: Sequence[nn.Module],
    attentions: Sequence[Sequence[tuple[nn.Module, AttentionFacts | None]]],
    stack: PackedStack,
    facts: LayerFacts | None,
    config: Any,
) -> tuple[nn.Module, ...]:
    """Wraps the forwards of a stack, instance by instance; returns the modules for `unwrap`.

    Args:
        owner: the module that calls the layers.
        layers: the layers; one that stands there twice is wrapped once.
        attentions: the attention modules of each layer, with what is known of those that have code of their own.
        stack: what the wrapped forwards share.
        facts: where the layers have their parts, if they may run by the recipe.
        config: what the model is configured by.
    """
    wrapped: list[nn.Module] = []
    for layer, inside in zip(layers, attentions, strict=True):
        for module, known in inside:
            forward: Any = RegistryAttention(module, stack.visits)
            _set(module, forward if known is None else KnownAttention(module, stack.visits, known), wrapped)
        _set(layer, LayerForward(layer, stack, [module for module, _ in inside], facts, config), wrapped)
    _set(owner, OwnerForward(owner, stack, layers), wrapped)
    return tuple(wrapped)


def _set(module: nn.Module, forward: Any, wrapped: list[nn.Module]) -> None:
    if "forward" not in module.__dict__:
        module.__dict__["forward"] = forward
        wrapped.append(module)


def unwrap(modules: Iterable[nn.Module]) -> None:
    """Gives modules that `wrap` returned the forwards of their classes again."""
    for module in modules:
        module.__dict__.pop("forward", None)
