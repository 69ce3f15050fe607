"""`Pack`: an encoder runs on its real tokens alone. No tensor and no module changes, only how the layers are run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rewire import encoder_trial, encoders, linears
from rewire.edits.base import Match, Outcome, Refusal, Scene
from rewire.encoder_trial import Tried
from rewire.encoders import EncoderStack
from rewire.errors import RefusedError, RevertError
from rewire.module_tree import submodule
from rewire.modules.packed import Options, PackedStack, unwrap, wrap
from rewire.modules.packed.attention import attention_path
from rewire.modules.packed.linear import prepare
from rewire.plan import Pack
from rewire.probe import example_inputs, hosts
from rewire.surgery import Change, Placements, Undo, View

SMALLEST_COSINE = {"bfloat16": 0.999, "int8": 0.995}
"""How like the untouched model's the pooled hidden states must be, by the type of products."""

_TOKENS = 48
"""Positions of the input that the likeness is measured with."""


def decide(edit: Pack, number: int, matches: Sequence[Match], scene: Scene) -> Iterator[Outcome]:
    """One outcome per stack matched; a stack matched by its list and by the module that calls it is one."""
    done: set[str] = set()
    for match in matches:
        if match.module is None:
            yield Refusal(match.path, "is a parameter; the target is a list of layers, or the module that calls them")
            continue
        stack = encoders.encoder_stack(scene.model, match.path)
        if isinstance(stack, linears.Refusal):
            yield Refusal(match.path, stack.reason)
        elif stack.path not in done:
            done.add(stack.path)
            yield _decide(edit, number, stack, scene)


def _decide(edit: Pack, number: int, stack: EncoderStack, scene: Scene) -> Outcome:
    tried = encoder_trial.try_out(scene.model, stack)
    if isinstance(tried, str):
        return Refusal(stack.path, f"{stack.kind}: {tried}")
    detail = f"{len(stack.layers)} × {stack.kind} packed: {tried.how}"
    if edit.dtype is not None:
        detail = f"{detail}; products {edit.dtype}"
    return Change(number, "pack", stack.path, detail, (), WrapLayers(edit, stack, tried))


@dataclass(frozen=True)
class WrapLayers:
    """The surgeon that wraps the forwards of a stack of layers, instance by instance."""

    edit: Pack
    stack: EncoderStack
    tried: Tried

    def __call__(self, model: nn.Module) -> Undo:
        owner = submodule(model, self.stack.owner)
        layers = [submodule(model, path) for path in self.stack.layers]
        if next(owner.parameters()).is_meta:
            return LayersBack(self.stack, self._wrap(model, owner, layers)[1], layers)
        before = _pooled(model, self.stack) if self.edit.dtype else None
        shared, wrapped = self._wrap(model, owner, layers)
        try:
            note = self._note(model, shared, layers, before)
        except BaseException:
            unwrap(wrapped)
            raise
        return LayersBack(self.stack, wrapped, layers, note)

    def _wrap(
        self, model: nn.Module, owner: nn.Module, layers: Sequence[nn.Module]
    ) -> tuple[PackedStack, tuple[nn.Module, ...]]:
        shared = PackedStack(
            self.tried.facts,
            self._options(),
            original_padding=self.edit.padding == "original",
            layers=len(layers),
        )
        attentions = [[_known(submodule(layer, path)) for path in self.stack.attentions] for layer in layers]
        config = getattr(_host(model, self.stack), "config", None)
        return shared, wrap(owner, layers, attentions, shared, self.tried.layer, config)

    def _options(self) -> Options:
        dtype = torch.bfloat16 if self.edit.dtype == "bfloat16" else None
        return Options(dtype, int8=self.edit.dtype == "int8", prepare=self.edit.prepare)

    def _note(self, model: nn.Module, shared: PackedStack, layers: Sequence[nn.Module], before: Tensor | None) -> str:
        """What the receipt says about how this runs. Raises `RefusedError` where it is too inexact."""
        parameter = next(layers[0].parameters())
        said = []
        if self.stack.attentions:
            width = _head_width(submodule(layers[0], self.stack.attentions[0]))
            said.append(f"attention {attention_path(parameter.dtype, width, parameter.device)}")
        if self.edit.prepare and parameter.device.type == "cpu":
            said.append(f"products {self._way(layers[0])}")
        if self.edit.dtype is not None:
            said.append(self._likeness(model, before))
        return ", ".join(said)

    def _way(self, layer: nn.Module) -> str:
        """How products are computed, by the first of a layer's weights."""
        options = self._options()
        weight = next((one.weight for one in layer.modules() if isinstance(one, nn.Linear)), None)
        if weight is None:
            return "by the layers themselves"
        return prepare(weight, None, dtype=options.dtype, int8=options.int8).how

    def _likeness(self, model: nn.Module, before: Tensor | None) -> str:
        after = _pooled(model, self.stack)
        if before is None or after is None:
            raise RefusedError(
                f"pack {self.stack.path}: what {self.edit.dtype} loses cannot be measured, because no input for "
                f"{type(model).__name__} is known; nothing was changed. Leave dtype out"
            )
        cosine = float(torch.nn.functional.cosine_similarity(before, after, dim=-1).min())
        least = SMALLEST_COSINE[self.edit.dtype or ""]
        if not cosine >= least:
            raise RefusedError(
                f"pack {self.stack.path}: with {self.edit.dtype} products the pooled hidden states have a cosine of "
                f"{cosine:.4f} to the untouched model's, needed is {least}; nothing was changed. Leave dtype out, or "
                "use bfloat16"
            )
        return f"cosine {cosine:.6f} to the untouched model"


def _known(module: nn.Module) -> tuple[nn.Module, Any]:
    return module, encoders.attention_facts(module)


def _host(model: nn.Module, stack: EncoderStack) -> nn.Module:
    """The nearest model with a configuration around a stack."""
    return next((host for host, _ in hosts(model, stack.layers[0])), model)


def _head_width(attention: nn.Module) -> int:
    """The size of a head, as far as the module says."""
    for name in ("head_dim", "attention_head_size", "key_value_proj_dim"):
        found = getattr(attention, name, None)
        if isinstance(found, int) and found > 0:
            return found
    return 64


@torch.no_grad()
def _pooled(model: nn.Module, stack: EncoderStack) -> Tensor | None:
    """The mean hidden state that the stack gives for an example, `[rows, width]`; None where no input is known."""
    owner, kept = submodule(model, stack.layers[-1]), []
    handle = owner.register_forward_hook(lambda module, args, output: kept.append(output))
    try:
        host: Any = _host(model, stack)
        training = host.training
        try:
            host.eval()
            host(**example_inputs(host, _TOKENS))
        finally:
            host.train(training)
    except Exception:  # any code may stand in a model
        return None
    finally:
        handle.remove()
    output = kept[-1] if kept else None
    hidden = output[0] if isinstance(output, tuple) else output
    return hidden.float().mean(dim=1) if isinstance(hidden, Tensor) and hidden.ndim == 3 else None


@dataclass(frozen=True)
class LayersBack:
    """Takes `WrapLayers` back.

    Attributes:
        stack: the stack.
        wrapped: the modules whose forwards were wrapped.
        layers: the layers.
        note: how it runs, for the receipt.
    """

    stack: EncoderStack
    wrapped: tuple[nn.Module, ...]
    layers: Sequence[nn.Module]
    note: str = ""

    @property
    def originals(self) -> Placements:
        return {}

    def check(self, view: View) -> None:
        for path, layer in zip(self.stack.layers, self.layers, strict=True):
            if view.module(path) is not layer:
                raise RevertError(
                    f"cannot take the packing of {self.stack.path} back: {path} is another module; something else "
                    "replaced it since the edit, remove that first"
                )

    def __call__(self, model: nn.Module) -> None:
        unwrap(self.wrapped)
