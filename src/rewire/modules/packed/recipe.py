"""A classic encoder layer, run by a recipe of our own: joined projections, fused activation and residual sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rewire.modules.packed.attend import Visit, attend, head_count
from rewire.modules.packed.linear import Prepared, prepare
from rewire.modules.packed.weights import Derived


@dataclass(frozen=True)
class LayerFacts:
    """Where a layer has its parts; paths within the layer.

    Attributes:
        attention: the module that knows the number of heads.
        q: the query projection.
        k: the key projection.
        v: the value projection.
        out: the projection after attention.
        norm_attention: the norm of the attention part.
        up: the first projection of the feed-forward part.
        act: its activation.
        down: the second projection.
        norm_output: the norm of the feed-forward part.
        first: whether the norms stand first in each part, instead of after the residual sum.
        activation: the fused activation that `act` is; None: the module itself is called.
        answer: how long the tuple is that the layer answers with; 0: a tensor.
    """

    attention: str
    q: str
    k: str
    v: str
    out: str
    norm_attention: str
    up: str
    act: str
    down: str
    norm_output: str
    first: bool = False
    activation: str | None = None
    answer: int = 0

    @property
    def linears(self) -> tuple[str, ...]:
        """The paths of all projections."""
        return self.q, self.k, self.v, self.out, self.up, self.down

    @property
    def norms(self) -> tuple[str, str]:
        """The paths of the norms."""
        return self.norm_attention, self.norm_output


@dataclass(frozen=True)
class Options:
    """How products are computed.

    Attributes:
        dtype: type of the products' operands; None: that of the weights.
        int8: whether weights and inputs of products are quantised, per channel and per token.
        prepare: whether weights are made ready for products, in a second copy.
    """

    dtype: torch.dtype | None = None
    int8: bool = False
    prepare: bool = True

    @property
    def narrow(self) -> torch.dtype | None:
        """Type of what passes between products within a layer; None: that of the hidden states."""
        return torch.bfloat16 if self.int8 or self.dtype == torch.bfloat16 else None


@dataclass(frozen=True, eq=False)
class _Ready:
    """The prepared products of a layer."""

    qkv: Prepared
    out: Prepared
    up: Prepared
    down: Prepared

    @property
    def nbytes(self) -> int:
        return sum(getattr(one, "nbytes", 0) for one in vars(self).values())

    @property
    def how(self) -> tuple[str, ...]:
        return tuple(one.how for one in vars(self).values())


class Recipe:
    """Runs one layer of which `LayerFacts` are known. Made for a layer as it is; `holds` says whether it still is.

    Attributes:
        facts: where its parts are.
        parts: these parts, by path.
        inside: all modules in the layer.
    """

    def __init__(self, layer: nn.Module, facts: LayerFacts) -> None:
        self.facts = facts
        paths = (*facts.linears, *facts.norms, facts.act)
        self.parts: dict[str, Any] = {path: layer.get_submodule(path) for path in paths}
        self.inside = [module for path, module in layer.named_modules() if path]
        self.heads = head_count(layer.get_submodule(facts.attention))
        self._places = [_place(layer, path) for path, _ in layer.named_modules() if path]
        self._tensors = [(self.parts[path]._parameters, name) for path in facts.linears for name in ("weight", "bias")]
        self._norms = tuple(self.parts[path] for path in facts.norms)

    @staticmethod
    def fits(layer: nn.Module, facts: LayerFacts, kinds: Mapping[str, type]) -> bool:
        """Whether `layer` consists of what it consisted of when the facts were borne out: `kinds`, by path."""
        if {path: type(module) for path, module in layer.named_modules()} != kinds:
            return False
        plain = [(nn.Linear, path) for path in facts.linears] + [(nn.LayerNorm, path) for path in facts.norms]
        return all(kinds[path] is kind for kind, path in plain)

    def holds(self) -> bool:
        """Whether the layer still consists of the modules that it consisted of."""
        return all(children.get(name) is module for children, name, module in self._places)

    def __call__(self, x: Tensor, visit: Visit, derived: Derived, options: Options, bias: Tensor | None) -> Tensor:
        """The layer's output for tokens `[tokens, width]`."""
        ready = self._ready(derived, options)
        before, after = self._norms
        first = self.facts.first
        mixed = self._attention(_norm(before, x) if first else x, ready, visit, bias, options.narrow)
        x = ready.out(mixed, residual=x)
        if not first:
            x = _norm(before, x)
        wide = ready.up(_norm(after, x) if first else x, dtype=options.narrow)
        if self.facts.activation is None:
            wide = self.parts[self.facts.act](wide)
        x = ready.down(wide, residual=x)
        return x if first else _norm(after, x)

    def _attention(
        self, x: Tensor, ready: _Ready, visit: Visit, bias: Tensor | None, narrow: torch.dtype | None
    ) -> Tensor:
        tokens = len(x)
        q, k, v = ready.qkv(x, dtype=narrow).view(tokens, 3, self.heads, -1).unbind(1)
        return attend(visit, q, k, v, scale=q.shape[-1] ** -0.5, bias=bias, dropout=0.0).reshape(tokens, -1)

    def _ready(self, derived: Derived, options: Options) -> _Ready:
        tensors = [parameters[name] for parameters, name in self._tensors]
        return derived.get(("layer", id(self)), tensors, lambda: self._prepare(tensors, options))

    @torch.no_grad()
    def _prepare(self, tensors: list[Tensor | None], options: Options) -> _Ready:
        parts: list[Any] = [None if tensor is None else tensor.detach() for tensor in tensors]
        wq, bq, wk, bk, wv, bv, wo, bo, wu, bu, wd, bd = parts
        how: Mapping[str, Any] = {"dtype": options.dtype, "int8": options.int8}
        joined = torch.cat([wq, wk, wv])
        return _Ready(
            prepare(joined, _joined_bias((bq, bk, bv), (wq, wk, wv)), **how),
            prepare(wo, bo, **how),
            prepare(wu, bu, activation=self.facts.activation, **how),
            prepare(wd, bd, **how),
        )


def _place(layer: nn.Module, path: str) -> tuple[dict[str, nn.Module | None], str, nn.Module]:
    parent, _, leaf = path.rpartition(".")
    owner = layer.get_submodule(parent)
    return owner._modules, leaf, owner.get_submodule(leaf)


def _joined_bias(biases: tuple[Tensor | None, ...], weights: tuple[Tensor, ...]) -> Tensor | None:
    """The biases one after the other, zeros for those that are missing; None if all are."""
    if all(bias is None for bias in biases):
        return None
    return torch.cat([w.new_zeros(len(w)) if b is None else b for b, w in zip(biases, weights, strict=True)])


def _norm(norm: nn.Module, x: Tensor) -> Tensor:
    parts: Any = norm
    return functional.layer_norm(x, parts.normalized_shape, parts.weight, parts.bias, parts.eps)


_FUSED: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": functional.relu,
    "silu": functional.silu,
}


def fused_activation(act: nn.Module | Callable[[Tensor], Tensor]) -> str | None:
    """The fused activation that computes what `act` does; None if there is none.

    Found by trying: names tell little (`gelu_new`, `gelu_python`, `gelu_fast`, …).

    >>> fused_activation(nn.SiLU()), fused_activation(nn.GELU()), fused_activation(nn.Tanh())
    ('silu', 'gelu', None)
    """
    grid = torch.linspace(-9, 9, 1801, dtype=torch.float64)
    with torch.no_grad(), torch.device("cpu"):
        wanted = act(grid.clone())
        close = [name for name, function in _FUSED.items() if (function(grid) - wanted).abs().max() < 1e-8]
    return close[0] if close else None
