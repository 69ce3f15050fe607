"""How the rows of a fused projection follow each other: rules that look at no more than the numbers around it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from rewire.linears import LinearFacts
from rewire.roles import KV, QKV

#: How the rows of the parts follow each other.
LAYOUTS = ("stacked", "per_head", "grouped", "interleaved")

WORDS = {
    "stacked": "one part after the other",
    "per_head": "rows per head",
    "grouped": "rows per group",
    "interleaved": "alternating rows",
}


_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "encoder_attention_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_heads", "kv_n_heads", "n_head_kv")
_HEAD_DIM = ("head_dim", "head_size", "attention_head_size", "dim_head", "head_width", "d_kv", "kv_channels")
_HIDDEN = ("hidden_size", "embed_dim", "d_model", "n_embd", "dim")


@dataclass(frozen=True)
class Sight:
    """A linear and its surroundings, as far as a rule may look. `around`: the owner, then its parents."""

    path: str
    leaf: str
    facts: LinearFacts
    around: tuple[nn.Module, ...]

    @property
    def owner(self) -> nn.Module:
        return self.around[0]

    @property
    def place(self) -> str:
        return f"{type(self.owner).__name__}.{self.leaf}"

    @property
    def rows(self) -> int:
        return self.facts.out_features

    def number(self, *names: str) -> int | None:
        """The first of these found as a positive int: on the owner itself, else in the nearest config."""
        configs = [getattr(module, "config", None) for module in self.around]
        for holder in (self.owner, *configs):
            for name in names:
                try:
                    value = getattr(holder, name, None)
                except Exception:  # a config whose layers differ refuses to say one number for all
                    return None
                if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                    return value
        return None

    def flag(self, name: str) -> bool:
        return bool(getattr(self.owner, name, False))

    @property
    def heads(self) -> int | None:
        return self.number(*_HEADS)

    @property
    def kv_heads(self) -> int | None:
        return self.number(*_KV_HEADS) or self.heads

    @property
    def head_dim(self) -> int | None:
        stated, hidden, heads = self.number(*_HEAD_DIM), self.number(*_HIDDEN), self.heads
        if stated is None and hidden and heads and hidden % heads == 0:
            return hidden // heads
        return stated


@dataclass(frozen=True)
class Rows:
    """How the rows are dealt out: the part of `FusedProjection` that a rule finds."""

    roles: tuple[str, ...]
    sizes: tuple[int, ...]
    groups: int
    layout: str

    def problem(self, rows: int) -> str | None:
        """Why these numbers cannot describe a linear with so many rows."""
        total = " + ".join(map(str, self.sizes))
        if len(self.sizes) != len(self.roles):
            return f"{len(self.roles)} parts but {len(self.sizes)} sizes ({total})"
        if min(self.sizes, default=0) < 1 or sum(self.sizes) != rows:
            return f"out_features {rows} is not {total}"
        if self.layout == "stacked" and self.groups != 1:
            return f"stacked parts are one group, not {self.groups}"
        if self.layout == "interleaved" and any(size != self.groups for size in self.sizes):
            return f"alternating rows need equal parts and as many groups, not {total} in {self.groups}"
        if self.groups < 1 or any(size % self.groups for size in self.sizes):
            return f"sizes {total} do not divide by {self.groups} groups"
        return None


# ---------------------------------------------------------------- rules: how a family lays out its rows

Rule = Callable[[Sight], "Rows | str"]


@dataclass(frozen=True)
class Equal:
    """Parts of equal size."""

    roles: tuple[str, ...] = QKV
    layout: str = "stacked"

    def __call__(self, sight: Sight) -> Rows | str:
        size, rest = divmod(sight.rows, len(self.roles))
        if rest:
            return f"out_features {sight.rows} does not divide into {len(self.roles)} equal parts"
        groups = sight.heads if self.layout == "per_head" else 1
        if groups is None:
            return "the number of heads is nowhere to be found"
        return Rows(self.roles, (size,) * len(self.roles), groups, self.layout)


@dataclass(frozen=True)
class Sizes:
    """Parts whose rows (per head, if `layout` is that) are attributes of the owner."""

    roles: tuple[str, ...]
    attributes: tuple[str, ...]
    layout: str = "stacked"

    def __call__(self, sight: Sight) -> Rows | str:
        groups = sight.heads if self.layout == "per_head" else 1
        sizes = tuple(sight.number(name) or 0 for name in self.attributes)
        if groups is None or 0 in sizes:
            return f"one of heads, {', '.join(self.attributes)} is nowhere to be found"
        return Rows(self.roles, tuple(size * groups for size in sizes), groups, self.layout)


@dataclass(frozen=True)
class NotFused:
    """Not a fused projection of attention or MLP, and why; without a reason, a plain linear."""

    reason: str = ""

    def __call__(self, sight: Sight) -> Rows | str:
        return self.reason or "a plain linear: all of its rows play one role"


def by_heads(sight: Sight) -> Rows | str:
    """Queries of every head, then keys and values of the (possibly fewer) key-value heads."""
    sizes = head_sizes(sight)
    return Rows(QKV, sizes, 1, "stacked") if sizes else "head counts are nowhere to be found"


def head_sizes(sight: Sight) -> tuple[int, int, int] | None:
    """Rows of queries, keys and values by the numbers of heads; None where these are unknown."""
    heads, kv_heads, head_dim = sight.heads, sight.kv_heads, sight.head_dim
    if heads is None or kv_heads is None or head_dim is None:
        return None
    return heads * head_dim, kv_heads * head_dim, kv_heads * head_dim


def self_or_cross(sight: Sight) -> Rows | str:
    """GPT-2 and its kin: in a cross-attention the same name holds keys and values only."""
    return Equal(KV if sight.flag("is_cross_attention") else QKV)(sight)


def falcon(sight: Sight) -> Rows | str:
    """Three generations: per key-value group; one shared key-value head at the end; per head."""
    heads, head_dim = sight.heads or 0, sight.head_dim or 0
    if sight.flag("new_decoder_architecture"):
        kv = sight.number("num_kv_heads") or heads
        return Rows(QKV, (heads * head_dim, kv * head_dim, kv * head_dim), kv, "grouped")
    if sight.flag("multi_query"):
        return Rows(QKV, (heads * head_dim, head_dim, head_dim), 1, "stacked")
    return Equal(QKV, "per_head")(sight)


def gpt_bigcode(sight: Sight) -> Rows | str:
    """One shared key-value head at the end, or per head."""
    if sight.flag("is_cross_attention"):
        return "the cross-attention of GPTBigCode cannot run in Transformers, so its layout cannot be told"
    if sight.flag("multi_query"):
        head_dim = sight.head_dim or 0
        return Rows(QKV, (sight.rows - 2 * head_dim, head_dim, head_dim), 1, "stacked")
    return Equal(QKV, "per_head")(sight)


def codegen(sight: Sight) -> Rows | str:
    """Four blocks, fixed in the code, each with its queries, *values* and keys."""
    return Rows(("q", "v", "k"), (sight.rows // 3,) * 3, 4, "grouped")


def levit(sight: Sight) -> Rows | str:
    """Per head; values are `attention_ratio` times as wide as keys."""
    heads, key, ratio = sight.heads or 0, sight.number("key_dim") or 0, sight.number("attention_ratio") or 0
    narrow, wide = heads * key, heads * key * ratio
    if sight.leaf.startswith("keys"):
        return Rows(KV, (narrow, wide), heads, "per_head")
    return Rows(QKV, (narrow, narrow, wide), heads, "per_head")


def delta_net(sight: Sight) -> Rows | str:
    """Per key head: its query, its key, the values and the output gates (z) of the value heads that share it."""
    heads, values = sight.number("num_k_heads") or 0, sight.number("num_v_heads") or 0
    narrow, wide = heads * (sight.number("head_k_dim") or 0), values * (sight.number("head_v_dim") or 0)
    return Rows((*QKV, "z"), (narrow, narrow, wide, wide), heads, "grouped")


def delta_net_steps(sight: Sight) -> Rows | str:
    """Per key head: step sizes (b) and decays (a) of the value heads that share it."""
    values = sight.number("num_v_heads") or 0
    return Rows(("b", "a"), (values, values), sight.number("num_k_heads") or 0, "grouped")


def one_query(sight: Sight) -> Rows | str:
    """A single number per position as query; keys and values in full."""
    width = sight.number("embed_dim") or 0
    return Rows(QKV, (1, width, width), 1, "stacked")


def biases_apart(sight: Sight) -> Rows | str:
    """The biases may be parameters of the owner, added to the weight's product without calling the layer."""
    if getattr(sight.owner, "q_bias", None) is not None and not sight.flag("qkv_bias_separate"):
        return (
            "its biases are parameters of their own, and its weight is used past the layer, where no adapter would act"
        )
    return Equal()(sight)
