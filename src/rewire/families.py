"""Where a model keeps its projections: which rows of a fused linear are queries, which are keys, and so on.

Nothing here touches a value: classes, names, shapes and configuration decide, so models on `meta` and
models already edited in part are fine. What is known about the classes of Transformers stands in `FAMILIES`,
as data. For a class that is not in the table a numeric probe (see `probe`) looks at a tiny copy of the model;
if that does not settle the matter either, the answer is a `Refusal` that says what to state. Nothing is ever
guessed: a wrong row layout passes every check of keys and shapes.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: How the rows of the parts follow each other.
LAYOUTS = ("stacked", "per_head", "grouped", "interleaved")

_WORDS = {
    "stacked": "one part after the other",
    "per_head": "rows per head",
    "grouped": "rows per group",
    "interleaved": "alternating rows",
}


@dataclass(frozen=True)
class LinearFacts:
    """What a linear map looks like from outside. `transposed`: its weight is `[in, out]` (Conv1D)."""

    in_features: int
    out_features: int
    transposed: bool
    has_bias: bool


@dataclass(frozen=True)
class Refusal:
    """Why nothing can be done at `path`, and what to do instead."""

    path: str
    reason: str


@dataclass(frozen=True)
class FusedProjection:
    """What the fused linear at `path` holds.

    `roles`, `names` and `sizes` follow the order of the rows; `sizes` are rows over all groups, as the row
    steps of `tensor_rules` want them. `evidence` says, for people, how this is known.
    """

    path: str
    kind: str  # "attention" or "mlp"
    roles: tuple[str, ...]
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    groups: int
    layout: str
    evidence: tuple[str, ...] = ()


# ---------------------------------------------------------------- is it a linear map?

# Packages whose layers hold packed or scaled weights.
_QUANTISERS = re.compile(
    "aqlm|auto_gptq|auto_round|autoawq|awq|bitsandbytes|compressed_tensors|eetq|fbgemm_gpu|gptqmodel|higgs|hqq"
    "|optimum|quanto|quark|spqr_quant|torchao|vptq"
)
_QUANTISED_MARKS = ("quant_state", "qweight", "W_q", "weight_scale", "weight_scale_inv", "weight_bit")
_REWIRE_CLASSES = frozenset({"SplitProjection", "JoinedProjection", "JoinedPart"})
_REPARAMETRISED_MARKS = ("parametrizations", "weight_g", "weight_v", "weight_orig", "weight_mask")


def linear_facts(module: nn.Module) -> LinearFacts | str:
    """The shape of a module that acts as one linear map, or the reason why it does not.

    >>> linear_facts(nn.Linear(4, 6, bias=False))
    LinearFacts(in_features=4, out_features=6, transposed=False, has_bias=False)
    >>> linear_facts(nn.ReLU())
    'ReLU is not a linear layer'
    """
    reason = _altered(module) or _not_linear(module)
    if reason is not None:
        return reason
    weight, transposed = module.weight, _is_conv1d(module)
    assert isinstance(weight, Tensor)
    n_out, n_in = weight.shape[::-1] if transposed else weight.shape
    return LinearFacts(n_in, n_out, transposed, getattr(module, "bias", None) is not None)


def _altered(module: nn.Module) -> str | None:
    """What somebody else (or Rewire) has already done to the module."""
    names = {base.__name__ for base in type(module).__mro__}
    if names & _REWIRE_CLASSES:
        return f"already edited by Rewire: {type(module).__name__} stands here"
    if hasattr(module, "base_layer") or hasattr(module, "lora_A"):
        return "already adapted (peft); merge or unload the adapter first, or add it after this edit"
    mark = next((mark for mark in _REPARAMETRISED_MARKS if hasattr(module, mark)), None)
    if mark is not None:
        return f"its weight is computed from other tensors ({mark}); remove the parametrisation first"
    if type(getattr(module, "weight", None)).__name__ == "DTensor":
        return "its weight is spread over several devices (DTensor); edit before it is"
    quantiser = _quantiser(module)
    if quantiser is not None:
        return f"already quantised ({quantiser}); edit first, quantise afterwards"
    if "forward" in vars(module):
        by = "accelerate (device_map)" if hasattr(module, "_hf_hook") else "somebody"
        return f"its forward was replaced on the instance by {by}; edit before that is done"
    return None


def _quantiser(module: nn.Module) -> str | None:
    """Who packed the weight, or `None` if it is a plain one."""
    homes = (base.__module__.partition(".")[0] for base in type(module).__mro__)
    quantiser = next((home for home in homes if _QUANTISERS.fullmatch(home)), None)
    if quantiser is not None:
        return f"{quantiser}: {type(module).__name__}"
    weight = getattr(module, "weight", None)
    mark = next((m for m in _QUANTISED_MARKS if hasattr(module, m) or hasattr(weight, m)), None)
    if mark is not None:
        return f"{type(module).__name__} has {mark}"
    if not isinstance(weight, Tensor):
        return None
    if not weight.dtype.is_floating_point or weight.dtype.itemsize < 2:
        return f"weight of {weight.dtype}"
    plain = type(weight) in (Tensor, nn.Parameter) or isinstance(weight, nn.UninitializedParameter)
    return None if plain else f"weight is a {type(weight).__name__}"


def _not_linear(module: nn.Module) -> str | None:
    kind: Any = type(module)
    if not (isinstance(module, nn.Linear) or _is_conv1d(module)):
        return f"{kind.__name__} is not a linear layer"
    weight: Any = module.weight
    if isinstance(weight, nn.UninitializedParameter):
        return "its weight has no shape yet"
    if weight.ndim != 2:
        return f"its weight is not a matrix, but {list(weight.shape)}"
    if kind.forward is nn.Linear.forward or _is_conv1d(module):
        return None
    return _differs_from_linear(kind)


def _is_conv1d(module: nn.Module) -> bool:
    """The transposed linear of `transformers.pytorch_utils`, known by name: that package is not imported."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


@functools.lru_cache(maxsize=256)  # a pure function of the class
def _differs_from_linear(kind: type[nn.Linear]) -> str | None:
    """Why a subclass with a forward of its own is not the same map as `nn.Linear`: a small one is tried."""
    try:
        # The constructor may draw random numbers and may stand under `with torch.device("meta")`.
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            small = kind(8, 12).double().eval()
            x = torch.linspace(-2, 3, 2 * 5 * 8, dtype=torch.float64).sin().reshape(2, 5, 8)
            with torch.no_grad():
                for offset, parameter in enumerate(small.parameters()):
                    values = torch.arange(parameter.numel(), dtype=torch.float64) + offset
                    parameter.copy_(values.sin().reshape(parameter.shape))
                same = _same_map(small, x)
    except Exception as error:  # any code may stand in that class
        return f"{kind.__name__} has its own forward and could not be tried ({type(error).__name__}: {error})"
    return None if same else f"{kind.__name__} has a forward of its own that is not the one of nn.Linear"


def _same_map(small: nn.Linear, x: Tensor) -> bool:
    tensors = {name for name, _ in [*small.named_parameters(), *small.named_buffers()]}
    if not tensors <= {"weight", "bias"} or small.weight.shape != (12, 8):
        return False
    got, want = small(x), F.linear(x, small.weight, small.bias)
    return isinstance(got, Tensor) and got.dtype == want.dtype and torch.allclose(got, want, rtol=1e-12)


# ---------------------------------------------------------------- what is around a linear

_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "encoder_attention_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_heads", "kv_n_heads", "n_head_kv")
_HEAD_DIM = ("head_dim", "head_size", "attention_head_size", "dim_head", "head_width", "d_kv", "kv_channels")
_HIDDEN = ("hidden_size", "embed_dim", "d_model", "n_embd", "dim")


@dataclass(frozen=True)
class _Sight:
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
class _Rows:
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

_Rule = Callable[[_Sight], "_Rows | str"]
QKV, KV, GATE_UP, UP_GATE = ("q", "k", "v"), ("k", "v"), ("gate", "up"), ("up", "gate")


@dataclass(frozen=True)
class _Equal:
    """Parts of equal size."""

    roles: tuple[str, ...] = QKV
    layout: str = "stacked"

    def __call__(self, sight: _Sight) -> _Rows | str:
        size, rest = divmod(sight.rows, len(self.roles))
        if rest:
            return f"out_features {sight.rows} does not divide into {len(self.roles)} equal parts"
        groups = sight.heads if self.layout == "per_head" else 1
        if groups is None:
            return "the number of heads is nowhere to be found"
        return _Rows(self.roles, (size,) * len(self.roles), groups, self.layout)


@dataclass(frozen=True)
class _Sizes:
    """Parts whose rows (per head, if `layout` is that) are attributes of the owner."""

    roles: tuple[str, ...]
    attributes: tuple[str, ...]
    layout: str = "stacked"

    def __call__(self, sight: _Sight) -> _Rows | str:
        groups = sight.heads if self.layout == "per_head" else 1
        sizes = tuple(sight.number(name) or 0 for name in self.attributes)
        if groups is None or 0 in sizes:
            return f"one of heads, {', '.join(self.attributes)} is nowhere to be found"
        return _Rows(self.roles, tuple(size * groups for size in sizes), groups, self.layout)


@dataclass(frozen=True)
class _NotFused:
    """Not a fused projection of attention or MLP, and why; without a reason, a plain linear."""

    reason: str = ""

    def __call__(self, sight: _Sight) -> _Rows | str:
        return self.reason or "a plain linear: all of its rows play one role"


def _by_heads(sight: _Sight) -> _Rows | str:
    """Queries of every head, then keys and values of the (possibly fewer) key-value heads."""
    sizes = _head_sizes(sight)
    return _Rows(QKV, sizes, 1, "stacked") if sizes else "head counts are nowhere to be found"


def _head_sizes(sight: _Sight) -> tuple[int, int, int] | None:
    heads, kv_heads, head_dim = sight.heads, sight.kv_heads, sight.head_dim
    if heads is None or kv_heads is None or head_dim is None:
        return None
    return heads * head_dim, kv_heads * head_dim, kv_heads * head_dim


def _self_or_cross(sight: _Sight) -> _Rows | str:
    """GPT-2 and its kin: in a cross-attention the same name holds keys and values only."""
    return _Equal(KV if sight.flag("is_cross_attention") else QKV)(sight)


def _falcon(sight: _Sight) -> _Rows | str:
    """Three generations: per key-value group; one shared key-value head at the end; per head."""
    heads, head_dim = sight.heads or 0, sight.head_dim or 0
    if sight.flag("new_decoder_architecture"):
        kv = sight.number("num_kv_heads") or heads
        return _Rows(QKV, (heads * head_dim, kv * head_dim, kv * head_dim), kv, "grouped")
    if sight.flag("multi_query"):
        return _Rows(QKV, (heads * head_dim, head_dim, head_dim), 1, "stacked")
    return _Equal(QKV, "per_head")(sight)


def _gpt_bigcode(sight: _Sight) -> _Rows | str:
    if sight.flag("is_cross_attention"):
        return "the cross-attention of GPTBigCode cannot run in Transformers, so its layout cannot be told"
    if sight.flag("multi_query"):
        head_dim = sight.head_dim or 0
        return _Rows(QKV, (sight.rows - 2 * head_dim, head_dim, head_dim), 1, "stacked")
    return _Equal(QKV, "per_head")(sight)


def _codegen(sight: _Sight) -> _Rows | str:
    """Four blocks, fixed in the code, each with its queries, *values* and keys."""
    return _Rows(("q", "v", "k"), (sight.rows // 3,) * 3, 4, "grouped")


def _levit(sight: _Sight) -> _Rows | str:
    """Per head; values are `attention_ratio` times as wide as keys."""
    heads, key, ratio = sight.heads or 0, sight.number("key_dim") or 0, sight.number("attention_ratio") or 0
    narrow, wide = heads * key, heads * key * ratio
    if sight.leaf.startswith("keys"):
        return _Rows(KV, (narrow, wide), heads, "per_head")
    return _Rows(QKV, (narrow, narrow, wide), heads, "per_head")


# ---------------------------------------------------------------- the families of Transformers, as data


@dataclass(frozen=True)
class Family:
    """The rows of the linear `leaf` in the classes `owners` (of `transformers.models`) follow `rule`."""

    leaf: str
    owners: tuple[str, ...]
    rule: _Rule


def _family(leaf: str, owners: str, rule: _Rule) -> Family:
    return Family(leaf, tuple(owners.split()), rule)


_LATENT = (
    "AXK1Attention AXK2Attention BailingHybridAttention DeepseekV2Attention DeepseekV32Attention "
    "DeepseekV3Attention Dots3NoteTextAttention Glm4MoeLiteAttention Glm5NextTextAttention "
    "GlmMoeDsaAttention HYV4Attention KimiLinearAttention LongcatFlashMLA MiniCPM3Attention "
    "Mistral4Attention MistralLarge4TextAttention YoutuAttention"
)
_SSM = (
    "BambaMixer FalconH1Mixer FalconMambaMixer GraniteMoeHybridMambaLayer JambaMambaMixer Mamba2Mixer "
    "MambaMixer NemotronHMamba2Mixer Zamba2MambaMixer ZambaMambaMixer"
)
_SHARED_KV = "keys and values are the same rows here"

#: Read off the forward of each class in Transformers 5.23.0; the tests check it with the numeric probe.
FAMILIES: tuple[Family, ...] = (
    # Attention, parts one after the other.
    _family(
        "qkv",
        "Blip2Attention BlipAttention CohereCompassVisionAttention DeepseekOcr2SamVisionAttention "
        "Dots3NoteVisionAttention Ernie4_5_VLMoeVisionAttention Florence2VisionChannelAttention "
        "Florence2VisionWindowAttention Glm4vMoeVisionAttention Glm4vVisionAttention "
        "Glm5NextVisionAttention GlmImageVisionAttention GlmOcrVisionAttention GotOcr2VisionAttention "
        "HieraMaskUnitAttention InstructBlipAttention InstructBlipVideoAttention MgpstrAttention "
        "PPFormulaNetVisionAttention PPOCRV5MobileRecAttention PPOCRV5ServerRecAttention "
        "PPOCRV6SmallRecAttention Qwen2_5_VLVisionAttention Qwen3OmniMoeVisionAttention "
        "Qwen3VLMoeVisionAttention Qwen3VLVisionAttention Qwen3_5MoeVisionAttention "
        "Qwen3_5VisionAttention Qwen4ExpVisionAttention SLANeXtVisionAttention Sam2MultiScaleAttention "
        "SamHQVisionAttention SamVisionAttention SegGptAttention TimesformerSelfAttention "
        "UnlimitedOcrSamVisionAttention VisionAttention VitDetAttention",
        _Equal(),
    ),
    _family("Wqkv", "ModernBertAttention MptAttention", _Equal()),
    _family("att_proj", "BarkSelfAttention", _Equal()),
    _family("qkv_linear", "LayoutLMv2SelfAttention", _Equal()),
    _family("c_attn", "Attention", _Equal()),  # the first GPT
    _family("c_attn", "DecisionTransformerGPT2Attention GPT2Attention ImageGPTAttention", _self_or_cross),
    _family("Wqkv", "DbrxAttention", _by_heads),
    _family("qkv_proj", "Phi3Attention Phi4MultimodalAttention", _by_heads),
    _family("qkv", "Exaone4_5_VisionAttention", _Sizes(QKV, ("q_dim", "kv_dim", "kv_dim"))),
    _family("kv_proj", "JetMoeAttention", _Equal(KV)),
    _family(
        "to_kv",
        "EvollaSequenceCompressorAttention GraniteSpeechConformerAttention GraniteSpeechPlusConformerAttention",
        _Equal(KV),
    ),
    _family("qkv_opreact", "xLSTMLayer", _Sizes((*QKV, "gate"), ("qk_dim", "qk_dim", "v_dim", "v_dim"))),
    # Attention, head by head.
    _family(
        "query_key_value",
        "BloomAttention GPTNeoXAttention GPTNeoXJapaneseAttention PersimmonAttention",
        _Equal(QKV, "per_head"),
    ),
    _family("qkv_proj", "MiniMaxLightningAttention", _Equal(QKV, "per_head")),
    _family("in_proj", "DisentangledSelfAttention", _Equal(QKV, "per_head")),
    _family("proj", "EsmFoldSelfAttention", _Equal(QKV, "per_head")),
    _family("linear_kv", "EsmFoldInvariantPointAttention", _Equal(KV, "per_head")),
    _family("queries_keys_values.linear", "LevitAttention", _levit),
    _family("keys_values.linear", "LevitAttentionSubsample", _levit),
    _family("kv_b_proj", _LATENT, _Sizes(KV, ("qk_nope_head_dim", "v_head_dim"), "per_head")),
    _family(
        "q_proj",
        "Qwen3NextAttention Qwen3_5Attention Qwen3_5MoeAttention Qwen4ExpTextAttention",
        _Equal(("q", "gate"), "per_head"),
    ),
    _family("q_gate_proj", "AXK2Attention", _Sizes(("q", "gate"), ("qk_head_dim", "v_head_dim"), "per_head")),
    # Attention, as the configuration says.
    _family("query_key_value", "FalconAttention", _falcon),
    _family("c_attn", "GPTBigCodeAttention", _gpt_bigcode),
    _family("qkv_proj", "CodeGenAttention", _codegen),
    # MLP: `gate` is the half that goes through the activation.
    _family(
        "gate_up_proj",
        "DiaMLP Dots3NoteAudioMLP EsmFold2SwiGLU Glm4MLP Glm4vTextMLP GlmImageTextMLP GlmMLP GlmOcrTextMLP "
        "MiniMaxM3VLDenseMLP Phi3MLP Phi4MultimodalMLP Zamba2MLP",
        _Equal(GATE_UP),
    ),
    _family("gate_up_proj", "Phi4MultimodalAudioMLP", _Equal(UP_GATE)),
    _family("Wi", "ModernBertDecoderMLP ModernBertMLP", _Equal(GATE_UP)),
    _family("input_linear", "GraniteMoeHybridMLP GraniteMoeSWAMLP GraniteMoeSharedMLP", _Equal(GATE_UP)),
    _family("proj_up_gate_z", "xLSTMFeedForward", _Equal(GATE_UP)),
    _family("fc1", "KyutaiSpeechToTextGatingMLP MoshiGatingMLP", _Equal(GATE_UP)),
    _family("fc1", "MoonshineDecoderMLP MoonshineStreamingDecoderMLP", _Equal(UP_GATE)),
    _family("proj", "ClvpGatedLinearUnit", _Equal(UP_GATE)),
    _family("linear_1", "AyaVisionMultiModalProjector Cohere2VisionMultiModalProjector", _Equal(UP_GATE)),
    # Fused, but not projections of this kind.
    _family("in_proj", _SSM, _NotFused("gates, states and time steps of a state space model")),
    _family(
        "in_proj",
        "Lfm2MoeShortConv Lfm2ShortConv Lfm3ShortConv Lfm3VlVisionShortConv",
        _NotFused("two gates and the input of a short convolution, not attention"),
    ),
    _family(
        "in_proj_qkv",
        "Qwen3_5GatedDeltaNet Qwen3_5MoeGatedDeltaNet Qwen4ExpTextGatedDeltaNet",
        _NotFused("queries, keys and values of a gated delta net: they pass a convolution together"),
    ),
    _family(
        "in_proj_qkvz",
        "Qwen3NextGatedDeltaNet",
        _NotFused("queries, keys, values and gates of a gated delta net, per key head"),
    ),
    _family(
        "in_proj_ba",
        "Qwen3NextGatedDeltaNet",
        _NotFused("step sizes and decays of a gated delta net, per key head"),
    ),
    _family(
        "kv_a_proj_with_mqa",
        _LATENT,
        _NotFused("the latent of keys and values and a shared rotary key; kv_b_proj holds keys and values"),
    ),
    _family(
        "kv_proj",
        "DeepseekV4Attention DeepseekV4CSACompressor DeepseekV4HCACompressor DeepseekV4Indexer",
        _NotFused(_SHARED_KV),
    ),
    _family("query_key", "LSHSelfAttention", _NotFused("queries and keys are the same rows here")),
    _family("index_qk_proj", "Qwen4ExpTextQSAIndexer", _NotFused("chooses tokens for sparse attention")),
    _family("linear_kv_points", "EsmFoldInvariantPointAttention", _NotFused("points in space: x, y and z of each")),
    _family("in_proj", "BarkMLP Kimi_K25MultimodalProjection", _NotFused()),
)

_INDEX = {(owner, family.leaf): family for family in FAMILIES for owner in family.owners}
_LEAVES = frozenset(family.leaf for family in FAMILIES)
_LAST_NAMES = frozenset(leaf.rpartition(".")[2] for leaf in _LEAVES)
_TABLE_HOME = "transformers.models."


def _known(owner: nn.Module, leaf: str) -> Family | None:
    """The table's record for this owner, unless a class from elsewhere has given it another forward."""
    mro = type(owner).__mro__
    runs = next((kind for kind in mro if "forward" in vars(kind)), None)
    if runs is None or not runs.__module__.startswith(_TABLE_HOME):
        return None
    return next((_INDEX[key] for kind in mro if (key := (kind.__name__, leaf)) in _INDEX), None)


# ---------------------------------------------------------------- what a fused linear holds


def fused_projection(
    model: nn.Module,
    path: str,
    *,
    layout: str = "auto",
    into: Sequence[str] | None = None,
    sizes: Sequence[int] | None = None,
    groups: int | None = None,
) -> FusedProjection | Refusal:
    """What the fused linear at `path` holds.

    With `layout="auto"` this is looked up or measured, and what the caller states must agree with it; a
    stated layout is taken at its word, and what it leaves open comes from the configuration. `into` and
    `sizes` follow the order of the rows; names that say their role (`q`, `key_proj`, …) are put into the
    right order where that is known.

    >>> toy = nn.Sequential(nn.Linear(4, 12))
    >>> fused_projection(toy, "0", layout="stacked", into=("q", "k", "v")).sizes
    (4, 4, 4)
    >>> fused_projection(toy, "0", layout="stacked", into=("q", "k", "v"), sizes=(8, 4, 4)).reason
    'out_features 12 is not 8 + 4 + 4; state sizes and groups that fit'
    """
    sight = _look(model, path)
    if isinstance(sight, Refusal):
        return sight
    wish = _Wish(layout, tuple(into or ()), tuple(sizes or ()), groups)
    if len(set(wish.into)) < len(wish.into):
        result: FusedProjection | str = f"into names a part twice: {', '.join(wish.into)}"
    elif layout == "auto":
        result = _detected(model, sight, wish)
    elif layout in LAYOUTS:
        result = _stated(sight, wish)
    else:
        result = f"unknown layout {layout!r}; state one of {' | '.join(LAYOUTS)} | auto"
    return Refusal(path, result) if isinstance(result, str) else result


def known_projection(model: nn.Module, path: str) -> FusedProjection | None:
    """What the fused linear at `path` holds, where its family is known by name; nothing is tried out.

    >>> known_projection(nn.Sequential(nn.Linear(4, 12)), "0") is None
    True
    """
    sight = _look(model, path)
    if isinstance(sight, Refusal) or _known(sight.owner, sight.leaf) is None:
        return None
    found = _found_in_table(sight)
    return None if isinstance(found, str) else _projection(sight, found, _Wish("auto", (), (), None))


@dataclass(frozen=True)
class _Found:
    """Rows, and how they are known."""

    rows: _Rows
    evidence: tuple[str, ...]

    def against(self, wish: _Wish) -> str | None:
        """What speaks against the caller's words."""
        rows = self.rows
        if wish.layout not in ("auto", rows.layout):
            return f"layout is {rows.layout}, not {wish.layout}"
        if wish.groups not in (None, rows.groups):
            return f"groups is {rows.groups}, not {wish.groups}"
        if wish.into and len(wish.into) != len(rows.roles):
            return f"the rows hold {', '.join(rows.roles)}, and into names {len(wish.into)} parts"
        if wish.sizes and _in_order(wish.sizes, wish, rows) != rows.sizes:
            return f"sizes are {list(rows.sizes)}, not {list(wish.sizes)}"
        return None


@dataclass(frozen=True)
class _Wish:
    """What the caller states; empty means open."""

    layout: str
    into: tuple[str, ...]
    sizes: tuple[int, ...]
    groups: int | None

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that the names speak of, or the names themselves."""
        return tuple(_role_of(name) or name for name in self.into)


def _look(model: nn.Module, path: str) -> _Sight | Refusal:
    """The linear at `path` and what is around it."""
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return Refusal(path, "the model has no module of this name")
    facts = linear_facts(module)
    if isinstance(facts, str):
        return Refusal(path, facts)
    leaf, around = _surroundings(model, path)
    return _Sight(path, leaf, facts, around)


def _surroundings(model: nn.Module, path: str) -> tuple[str, tuple[nn.Module, ...]]:
    """The name of a linear within its owner, and the owner followed by its parents."""
    parts = path.split(".")
    # A few projections are wrapped once more (a linear and its batch norm): their name has two parts.
    wrapped = ".".join(parts[-2:])
    leaf = wrapped if wrapped in _LEAVES else parts[-1]
    around = [model]
    for part in parts[: len(parts) - leaf.count(".") - 1]:
        around.append(around[-1].get_submodule(part))
    return leaf, tuple(reversed(around))


def _detected(model: nn.Module, sight: _Sight, wish: _Wish) -> FusedProjection | str:
    """From the table, else by the probe. What the caller states must agree."""
    found = _found(model, sight)
    if isinstance(found, str):
        return found
    disagreement = found.against(wish)
    if disagreement:
        return f"{disagreement}; leave it out, or state the layout too if you mean it"
    return _projection(sight, found, wish)


def _found(model: nn.Module, sight: _Sight) -> _Found | str:
    if _known(sight.owner, sight.leaf) is not None:
        return _found_in_table(sight)
    return _probed(model, sight)


def _probed(model: nn.Module, sight: _Sight) -> _Found | str:
    """By trying, on a tiny copy of the model."""
    from rewire.probe import Probed, probe_rows  # costs nothing where the table knows the answer

    owner = sight.path.removesuffix(sight.leaf).removesuffix(".")
    seen = probe_rows(model, sight.path, owner, sight.rows)
    if not isinstance(seen, Probed):
        return _ambiguous(sight, f"this class is not known, and {seen}")
    layout = "per_head" if seen.groups == sight.heads else "grouped"
    if seen.groups == 1:
        layout = "stacked"
    elif set(seen.sizes) == {seen.groups}:
        layout = "interleaved"
    rows = _Rows(seen.roles, seen.sizes, seen.groups, layout)
    return _Found(rows, (f"{sight.place}: {_WORDS[layout]} (numeric probe)", _arithmetic(sight, rows)))


def _found_in_table(sight: _Sight) -> _Found | str:
    family = _known(sight.owner, sight.leaf)
    if family is None:
        return _ambiguous(sight, "this class is not known")
    rows = family.rule(sight)
    problem = rows if isinstance(rows, str) else rows.problem(sight.rows)
    if problem is not None:
        return f"{sight.place}: {problem}; to split it all the same, state layout, into and sizes"
    assert not isinstance(rows, str)
    origin = f"{sight.place}: {_WORDS[rows.layout]} (known family)"
    return _Found(rows, (origin, _arithmetic(sight, rows)))


def _ambiguous(sight: _Sight, why: str) -> str:
    return f"ambiguous layout of {sight.place}: {why}; state layout: {' | '.join(LAYOUTS)} in the plan"


def _arithmetic(sight: _Sight, rows: _Rows) -> str:
    total = f"{' + '.join(map(str, rows.sizes))} = {sight.rows} rows"
    by_heads = dict(zip(QKV, _head_sizes(sight) or (), strict=False))
    if by_heads and all(by_heads.get(role) == size for role, size in zip(rows.roles, rows.sizes, strict=True)):
        few = f", {sight.kv_heads} for keys and values" if sight.kv_heads != sight.heads else ""
        return f"config: {sight.heads} head{'s' * (sight.heads != 1)} of {sight.head_dim}{few}; {total}"
    return f"{total} in {rows.groups} groups" if rows.groups > 1 else total


def _in_order(values: tuple[int, ...] | tuple[str, ...], wish: _Wish, rows: _Rows) -> tuple[int | str, ...]:
    """`values`, stated along `into`, in the order of the rows, where the names tell their roles."""
    if sorted(wish.roles) != sorted(rows.roles) or len(values) != len(rows.roles):
        return tuple(values)
    return tuple(values[wish.roles.index(role)] for role in rows.roles)


def _projection(sight: _Sight, found: _Found, wish: _Wish) -> FusedProjection:
    rows = found.rows
    names = tuple(map(str, _in_order(wish.into, wish, rows))) or _names(sight, rows.roles)
    kind = "mlp" if set(rows.roles) <= {"gate", "up"} else "attention"
    dealt = (rows.roles, names, rows.sizes, rows.groups, rows.layout)
    return FusedProjection(sight.path, kind, *dealt, found.evidence)


def _names(sight: _Sight, roles: tuple[str, ...]) -> tuple[str, ...]:
    """Names for the parts, by the habit of the model: `q_proj` where its linears are called so, else `q`."""
    siblings = (name for name, _ in sight.owner.named_children())
    suffix = "_proj" if any(name.endswith("_proj") for name in (sight.leaf, *siblings)) else ""
    return tuple(role + suffix for role in roles)


# ---------------------------------------------------------------- a layout that the caller states


def _stated(sight: _Sight, wish: _Wish) -> FusedProjection | str:
    """As the caller states it; where the table says the same, it fills in what is left open."""
    known = _found_in_table(sight)
    if isinstance(known, _Found) and not known.against(wish):
        return _projection(sight, known, wish)
    rows = _stated_rows(sight, wish)
    if isinstance(rows, str):
        return rows
    # Rewire obeys, but says in the receipt that the table sees it otherwise.
    contrary = known.evidence[:1] if isinstance(known, _Found) else ()
    return _projection(sight, _Found(rows, ("stated by the plan", *contrary)), wish)


def _stated_rows(sight: _Sight, wish: _Wish) -> _Rows | str:
    roles = wish.roles or _default_roles(sight, wish)
    if not roles:
        return "state `into`: the names of the parts in the order of the rows"
    sizes = wish.sizes or _default_sizes(sight, wish.layout, roles)
    if isinstance(sizes, str):
        return f"{sizes}; state sizes"
    groups = wish.groups or _default_groups(sight, wish.layout, roles)
    if groups is None:
        return f"no head count near {sight.path}; state groups"
    rows = _Rows(roles, sizes, groups, wish.layout)
    problem = rows.problem(sight.rows)
    return f"{problem}; state sizes and groups that fit" if problem else rows


def _default_roles(sight: _Sight, wish: _Wish) -> tuple[str, ...]:
    """What a layout means by definition, for a linear whose name promises queries, keys and values."""
    count, leaf = len(wish.sizes), sight.leaf.lower()
    # Which of gate and up comes first, no layout and no name tells: there are models that lie.
    options = {
        QKV: re.search(r"qkv|query_key_value|c_attn", leaf),
        KV: re.search(r"kv|key_value", leaf),
    }
    return next((roles for roles, hit in options.items() if hit and count in (0, len(roles))), ())


def _default_sizes(sight: _Sight, layout: str, roles: tuple[str, ...]) -> tuple[int, ...] | str:
    """Rows by the head counts where queries, keys and values are meant, else equal parts."""
    may_differ = sorted(roles) == sorted(QKV) and layout in ("stacked", "grouped")
    by_heads = _head_sizes(sight) if may_differ else None
    if by_heads is not None and sum(by_heads) == sight.rows:
        return tuple(dict(zip(QKV, by_heads, strict=True))[role] for role in roles)
    if by_heads is not None and by_heads[0] != by_heads[1]:
        q, k, _ = by_heads
        heads = f"{sight.heads} heads of {sight.head_dim}, {sight.kv_heads} for keys and values"
        return f"out_features {sight.rows} is not {q} + 2·{k} ({heads})"
    size, rest = divmod(sight.rows, len(roles))
    return f"out_features {sight.rows} is not {len(roles)} equal parts" if rest else (size,) * len(roles)


def _default_groups(sight: _Sight, layout: str, roles: tuple[str, ...]) -> int | None:
    alternating = sight.rows // len(roles)
    groups = {"stacked": 1, "per_head": sight.heads, "grouped": sight.kv_heads, "interleaved": alternating}
    return groups[layout]


_ROLE_WORDS = {
    "q": "q", "query": "q", "queries": "q",
    "k": "k", "key": "k", "keys": "k",
    "v": "v", "value": "v", "values": "v",
    "gate": "gate", "up": "up",
}  # fmt: skip


def _role_of(name: str) -> str | None:
    """The role that a name speaks of, if exactly one.

    >>> [_role_of(name) for name in ("k_proj", "Wq", "to_v", "value", "kv", "up_gate")]
    ['k', 'q', 'v', 'v', None, None]
    """
    words = re.split(r"_", re.sub(r"^[wW](?=[qkv]$)", "", name).lower())
    found = {_ROLE_WORDS[word] for word in words if word in _ROLE_WORDS}
    return found.pop() if len(found) == 1 else None


# ---------------------------------------------------------------- going through a whole model

_FUSED_NAMES = re.compile(
    r"(^|_)[wW]?(qkv|kv)z?(_|$)|quer(y|ies)_keys?_values?|^keys?_values?$|^query_key$|gate_?up|^up_?gate"
    r"|^c_attn$|^att_proj$|^in_proj$|^Wi$|^w12$"
)


def fused_projections(model: nn.Module) -> tuple[FusedProjection | Refusal, ...]:
    """Every fused projection that the model holds, found by class and name, in the model's order.

    Candidates whose rows cannot be told apart, and those already adapted, quantised or edited, come as
    refusals with the reason.
    """
    candidates = (path for path, module in model.named_modules() if _may_be_fused(model, path, module))
    return tuple(fused_projection(model, path) for path in candidates)


def _may_be_fused(model: nn.Module, path: str, module: nn.Module) -> bool:
    leaf = path.rpartition(".")[2]
    sounds_fused = _FUSED_NAMES.search(leaf) is not None
    if not (isinstance(module, nn.Linear) or _is_conv1d(module)):
        return sounds_fused and _replaced_linear(module)
    if not (sounds_fused or leaf in _LAST_NAMES):
        return False
    name, around = _surroundings(model, path)
    family = _known(around[0], name)
    if family is None:
        return sounds_fused
    return not (isinstance(family.rule, _NotFused) and not family.rule.reason)


def _replaced_linear(module: nn.Module) -> bool:
    """Whether a linear by another name stands here: adapted, quantised, edited."""
    names = {base.__name__ for base in type(module).__mro__}
    return bool(names & _REWIRE_CLASSES) or hasattr(module, "base_layer") or _quantiser(module) is not None


@dataclass(frozen=True)
class SeparateProjections:
    """Child linears of the module at `path` that read inputs of the same width: candidates for a join.

    Known by names and shapes alone; whether they are really given the same tensor is for the join to see
    (it stays exact if they are not).
    """

    path: str
    kind: str  # "attention" or "mlp"
    roles: tuple[str, ...]
    parts: tuple[str, ...]
    evidence: tuple[str, ...] = ()


# Gate first. The names of Llama, LFM, MT5, xLSTM, timm and a few more.
_GATE_UP_PAIRS = (
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
    ("proj_up_gate", "proj_up"),
    ("fc1_g", "fc1_x"),
    ("gate", "up"),
    ("fc_gate", "fc_up"),
    ("linear_gate", "linear_up"),
)


def separate_projections(model: nn.Module) -> tuple[SeparateProjections, ...]:
    """Every place where queries, keys and values, or gate and up, are linears of their own.

    Where one of queries, keys and values has an input of another width (a cross-attention), the other two
    are given. Linears that are adapted, quantised or otherwise not plain are left out.

    >>> attention = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("q_proj", "k_proj", "v_proj")})
    >>> separate_projections(nn.ModuleDict({"attn": attention}))[0].parts
    ('q_proj', 'k_proj', 'v_proj')
    """
    return tuple(
        SeparateProjections(path, kind, roles, parts, (_width(parent, parts),))
        for path, parent in model.named_modules()
        for kind, roles, parts in (*_separate_attention(parent), *_separate_mlp(parent))
    )


_Parts = tuple[str, tuple[str, ...], tuple[str, ...]]


def _separate_attention(parent: nn.Module) -> Iterator[_Parts]:
    """Children named alike but for the role: `q_proj`, `k_proj`, `v_proj`; `Wq`, `Wk`, `Wv`; ..."""
    alike: dict[str, dict[str, str]] = {}
    for name, _ in parent.named_children():
        pattern, role = _pattern(name)
        if role in QKV:
            alike.setdefault(pattern, {})[role] = name
    for names in alike.values():
        widths = {role: _plain_width(parent, names[role]) for role in QKV if role in names}
        shared = [role for role, width in widths.items() if width and list(widths.values()).count(width) > 1]
        if len(widths) == len(QKV) and len(shared) > 1:
            yield "attention", tuple(shared), tuple(names[role] for role in shared)


def _pattern(name: str) -> tuple[str, str]:
    """A name without its role, and the role.

    >>> _pattern("q_proj"), _pattern("Wk"), _pattern("projection_value"), _pattern("dense")
    (('*_proj', 'q'), ('W*', 'k'), ('projection_*', 'v'), ('dense', ''))
    """
    if re.fullmatch(r"[wW][qkv]", name):
        return f"{name[0]}*", name[1]
    role = _role_of(name)
    if role is None:
        return name, ""
    return "_".join("*" if word.lower() in _ROLE_WORDS else word for word in name.split("_")), role


def _separate_mlp(parent: nn.Module) -> Iterator[_Parts]:
    for pair in _GATE_UP_PAIRS:
        shapes = {_plain_shape(parent, name) for name in pair}
        if len(shapes) == 1 and None not in shapes:
            yield "mlp", GATE_UP, pair


def _plain_width(parent: nn.Module, name: str) -> int | None:
    shape = _plain_shape(parent, name)
    return None if shape is None else shape[0]


def _plain_shape(parent: nn.Module, name: str) -> tuple[int, int] | None:
    """(in, out) of a child that is a plain linear."""
    child = getattr(parent, name, None)
    facts = linear_facts(child) if isinstance(child, nn.Module) else "not a module"
    return None if isinstance(facts, str) else (facts.in_features, facts.out_features)


def _width(parent: nn.Module, parts: tuple[str, ...]) -> str:
    shapes = [_plain_shape(parent, name) or (0, 0) for name in parts]
    rows = " + ".join(str(n_out) for _, n_out in shapes)
    return f"{type(parent).__name__}: {', '.join(parts)} all read {shapes[0][0]} features; {rows} rows"
