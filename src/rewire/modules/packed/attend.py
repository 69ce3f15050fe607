"""Attention of packed tokens in place of a module's own: through the attention registry, or with known projections."""

from __future__ import annotations

import threading
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from rewire.modules.packed.attention import attention
from rewire.modules.packed.padding import Packing, Unpackable

REGISTRY = "ALL_ATTENTION_FUNCTIONS"
"""The name under which Transformers' modules know the table of attention functions."""


@dataclass(frozen=True, eq=False)
class Visit:
    """What is known while one layer runs on packed tokens.

    Attributes:
        packing: where the tokens come from.
        window: how far a token sees; None: over its whole row.
        causal: whether a token sees those before it alone.
        fast: whether prepared weights may be used.
    """

    packing: Packing
    window: int | None
    causal: bool
    fast: bool

    def bias(self, given: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """What is added to scores, `[heads or 1, longest, longest]`, from `[1 or batch, heads, width, width]` given."""
        longest = self.packing.longest
        window = longest if self.window is None else self.window
        narrow = window < longest - 1
        if given is not None or narrow:
            if not self.packing.adjoining:
                raise Unpackable("distances count, and the real positions of a row do not stand side by side")
        elif not self.causal:
            return None
        bias = None if given is None else _for_all_rows(given, self.packing)
        if not narrow and not self.causal:
            return bias
        places = torch.arange(longest, device=self.packing.starts.device)
        ahead = places[None, :] - places[:, None]  # [query, key]
        hidden = ahead > 0 if self.causal else torch.zeros_like(ahead, dtype=torch.bool)
        if narrow:
            hidden = hidden | (ahead.abs() > window)
        if bias is None:
            bias = torch.zeros(1, longest, longest, dtype=dtype, device=hidden.device)
        return bias.masked_fill(hidden, float("-inf"))


def _for_all_rows(given: Tensor, packing: Packing) -> Tensor:
    """The part of a position bias that holds for every row, wherever in it the real positions begin."""
    longest = packing.longest
    if given.ndim != 4 or given.shape[-1] < longest or given.shape[-2] < longest:
        raise Unpackable(f"a position bias of shape {tuple(given.shape)}")
    if given.shape[0] > 1 and not torch.equal(given[:1].expand_as(given), given):
        raise Unpackable("the position bias differs from row to row")
    if not packing.leading and not torch.equal(given[0, :, 1:, 1:], given[0, :, :-1, :-1]):
        raise Unpackable("the position bias depends on more than distances")
    return given[0, :, :longest, :longest]


class Visits(threading.local):
    """The visit that this thread is on; None: it runs as ever."""

    now: Visit | None = None

    def __deepcopy__(self, memo: object) -> Visits:
        return Visits()

    def __reduce__(self) -> tuple[type[Visits], tuple[()]]:
        return Visits, ()


class RegistryAttention:
    """The forward of an attention module that looks its function up in the registry.

    While a packed layer runs, the module's own code runs with a table of its own in place of the registry, which is
    not touched.
    """

    def __init__(self, module: nn.Module, visits: Visits) -> None:
        self.module, self.visits = module, visits

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return types.MethodType(type(self.module).forward, self.module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        own = type(self.module).forward
        if self.visits.now is None:
            return own(self.module, *args, **kwargs)
        return _through_table(own)(self.module, *args, **kwargs)


def looks_up(forward: Callable[..., Any]) -> bool:
    """Whether a forward looks its attention function up in the registry."""
    code = getattr(_innermost(forward), "__code__", None)
    return code is not None and REGISTRY in code.co_names


def _innermost(function: Callable[..., Any]) -> Any:
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


@lru_cache(maxsize=1024)
def _through_table(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The same code with `_Table` for the registry. (What decorates it says things to people alone.)"""
    own = _innermost(forward)
    names = {**own.__globals__, REGISTRY: _Table()}
    return types.FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)


class _Table:
    """Answers every question for an attention function with the packed one."""

    def get_interface(self, *_: object) -> Callable[..., tuple[Tensor, None]]:
        return _packed_attention

    get = __getitem__ = get_interface


_HARMLESS = frozenset(
    {
        "deterministic",
        "is_causal",
        "output_attentions",
        "output_hidden_states",
        "position_ids",
        "return_dict",
        "sliding_window",
        "use_cache",
    }
)
"""Arguments of attention functions that say nothing more here: what is seen stands in the mask."""


def _packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention function: `[1, heads, tokens, head width]` each, to `[1, tokens, heads, head width]`."""
    forward: Any = module.__dict__["forward"]
    visit: Visit = forward.visits.now
    unknown = {name: value for name, value in others.items() if value is not None and value is not False}
    unknown = {name: value for name, value in unknown.items() if name not in _HARMLESS}
    if unknown:
        raise Unpackable(f"its attention asks for {', '.join(sorted(unknown))}")
    if not query.shape[0] == key.shape[0] == value.shape[0] == 1 or query.shape[2] != visit.packing.tokens:
        raise Unpackable("its attention does not see one row of tokens")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    rows = [part[0].transpose(0, 1) for part in (query, key, value)]
    mixed = attend(visit, *rows, scale=scale, bias=position_bias, dropout=dropout)
    return mixed[None], None


def attend(
    visit: Visit, query: Tensor, key: Tensor, value: Tensor, *, scale: float, bias: Tensor | None, dropout: float
) -> Tensor:
    """Attention of tokens, `[tokens, heads, width]` each, every one within its row."""
    added = visit.bias(bias, query.dtype)
    if added is not None and added.shape[0] != query.shape[1]:
        added = added.expand(query.shape[1], -1, -1)
    packing = visit.packing
    return attention(
        query, key, value, packing.starts, scale=scale, bias=added, longest=packing.longest, dropout=dropout
    )


@dataclass(frozen=True)
class AttentionFacts:
    """Where an attention module with code of its own has its projections, and what it does with them.

    Attributes:
        q: name of the query projection.
        k: of the key projection.
        v: of the value projection.
        out: of the output projection; None where the module has none.
        pair: whether it answers with a pair, whose second part is the attention weights (None here).
        rotary: the method that turns queries and keys by positions; None: there is none.
        drops: whether dropout follows the output projection.
    """

    q: str
    k: str
    v: str
    out: str | None = None
    pair: bool = True
    rotary: str | None = None
    drops: bool = False


class KnownAttention:
    """The forward of an attention module with code of its own, of which `AttentionFacts` are known."""

    def __init__(self, module: nn.Module, visits: Visits, facts: AttentionFacts) -> None:
        self.module, self.visits, self.facts = module, visits, facts

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return types.MethodType(type(self.module).forward, self.module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        visit = self.visits.now
        if visit is None:
            return type(self.module).forward(self.module, *args, **kwargs)
        return self._packed(visit, *args, **kwargs)

    def _packed(self, visit: Visit, *args: Any, **kwargs: Any) -> Any:
        named = dict(zip(argument_names(type(self.module).forward), args, strict=False)) | kwargs
        hidden: Any = named.get("hidden_states", named.get("query"))
        facts, parts, x = self.facts, _children(self.module), hidden.reshape(-1, hidden.shape[-1])
        heads = head_count(self.module)
        q, k, v = (parts[name](x).view(len(x), heads, -1) for name in (facts.q, facts.k, facts.v))
        positions = named.get("sinusoidal_pos")
        if facts.rotary is not None and positions is not None:
            q, k, v = self._turn(positions, q, k, v)
        scale, dropout = q.shape[-1] ** -0.5, rate_of(self.module) if self.module.training else 0.0
        mixed = attend(visit, q, k, v, scale=scale, bias=named.get("position_bias"), dropout=dropout)
        mixed = mixed.reshape(*hidden.shape[:-1], -1)
        if facts.out is not None:
            mixed = parts[facts.out](mixed)
        if facts.drops:
            mixed = nn.functional.dropout(mixed, self.module.dropout, self.module.training)  # type: ignore[arg-type]
        return (mixed, None) if facts.pair else (mixed,)

    def _turn(self, positions: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """By the module's own method, which wants `[1, heads, tokens, width]`."""
        turn = getattr(self.module, self.facts.rotary or "")
        rows = [part.transpose(0, 1)[None] for part in (q, k, v)]
        turned = turn(positions, *rows) if getattr(self.module, "rotary_value", False) else turn(positions, *rows[:2])
        q, k, v = (part[0].transpose(0, 1) for part in (*turned, *rows[len(turned) :]))
        return q, k, v


def _children(module: nn.Module) -> dict[str, nn.Module]:
    return {name: child for name, child in module._modules.items() if child is not None}


MASKS = ("attention_mask", "mask", "encoder_padding_mask", "key_padding_mask", "padding_mask")
"""Names under which layers are given their mask."""


@lru_cache(maxsize=1024)
def argument_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    """The names of the positional arguments of a class's forward, `self` left out."""
    code = _innermost(forward).__code__
    return tuple(code.co_varnames[1 : code.co_argcount])


_HEADS = ("num_attention_heads", "num_heads", "n_heads", "num_attn_heads", "n_head", "heads")


def head_count(module: nn.Module) -> int:
    """The number of heads that an attention module says it has. Raises `Unpackable` where it does not."""
    for name in _HEADS:
        heads = module.__dict__.get(name)
        if isinstance(heads, int) and heads > 0:
            return heads
    raise Unpackable(f"{type(module).__name__} does not say how many heads it has")


def rate_of(module: nn.Module) -> float:
    """The dropout rate of the attention weights."""
    for name in ("attention_dropout", "attn_dropout", "dropout"):
        found = getattr(module, name, None)
        if isinstance(found, nn.Dropout):
            return found.p
        if isinstance(found, int | float):
            return float(found)
    return 0.0
