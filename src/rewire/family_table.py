"""What is known about the fused projections of Transformers' classes, as data: which rows are whose.

A `Family` says for a class (its owner) and the name of a linear in it how the rows of the parts follow each other,
by a rule that looks at no more than the numbers around the linear.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from rewire.linears import LinearFacts
from rewire.roles import GATE_UP, KV, QKV, UP_GATE

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

_Rule = Callable[[Sight], "Rows | str"]


@dataclass(frozen=True)
class _Equal:
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
class _Sizes:
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


def _self_or_cross(sight: Sight) -> Rows | str:
    """GPT-2 and its kin: in a cross-attention the same name holds keys and values only."""
    return _Equal(KV if sight.flag("is_cross_attention") else QKV)(sight)


def _falcon(sight: Sight) -> Rows | str:
    """Three generations: per key-value group; one shared key-value head at the end; per head."""
    heads, head_dim = sight.heads or 0, sight.head_dim or 0
    if sight.flag("new_decoder_architecture"):
        kv = sight.number("num_kv_heads") or heads
        return Rows(QKV, (heads * head_dim, kv * head_dim, kv * head_dim), kv, "grouped")
    if sight.flag("multi_query"):
        return Rows(QKV, (heads * head_dim, head_dim, head_dim), 1, "stacked")
    return _Equal(QKV, "per_head")(sight)


def _gpt_bigcode(sight: Sight) -> Rows | str:
    if sight.flag("is_cross_attention"):
        return "the cross-attention of GPTBigCode cannot run in Transformers, so its layout cannot be told"
    if sight.flag("multi_query"):
        head_dim = sight.head_dim or 0
        return Rows(QKV, (sight.rows - 2 * head_dim, head_dim, head_dim), 1, "stacked")
    return _Equal(QKV, "per_head")(sight)


def _codegen(sight: Sight) -> Rows | str:
    """Four blocks, fixed in the code, each with its queries, *values* and keys."""
    return Rows(("q", "v", "k"), (sight.rows // 3,) * 3, 4, "grouped")


def _levit(sight: Sight) -> Rows | str:
    """Per head; values are `attention_ratio` times as wide as keys."""
    heads, key, ratio = sight.heads or 0, sight.number("key_dim") or 0, sight.number("attention_ratio") or 0
    narrow, wide = heads * key, heads * key * ratio
    if sight.leaf.startswith("keys"):
        return Rows(KV, (narrow, wide), heads, "per_head")
    return Rows(QKV, (narrow, narrow, wide), heads, "per_head")


def _delta_net(sight: Sight) -> Rows | str:
    """Per key head: its query, its key, the values and the output gates (z) of the value heads that share it."""
    heads, values = sight.number("num_k_heads") or 0, sight.number("num_v_heads") or 0
    narrow, wide = heads * (sight.number("head_k_dim") or 0), values * (sight.number("head_v_dim") or 0)
    return Rows((*QKV, "z"), (narrow, narrow, wide, wide), heads, "grouped")


def _delta_net_steps(sight: Sight) -> Rows | str:
    """Per key head: step sizes (b) and decays (a) of the value heads that share it."""
    values = sight.number("num_v_heads") or 0
    return Rows(("b", "a"), (values, values), sight.number("num_k_heads") or 0, "grouped")


def _one_query(sight: Sight) -> Rows | str:
    """A single number per position as query; keys and values in full."""
    width = sight.number("embed_dim") or 0
    return Rows(QKV, (1, width, width), 1, "stacked")


# ---------------------------------------------------------------- the families of Transformers, as data


@dataclass(frozen=True)
class Family:
    """The rows of the linear `leaf` in the classes `owners` (of `transformers.models`) follow `rule`.

    `note`: what else one should know.
    """

    leaf: str
    owners: tuple[str, ...]
    rule: _Rule
    note: str = ""


def _family(leaf: str, owners: str, rule: _Rule, note: str = "") -> Family:
    return Family(leaf, tuple(owners.split()), rule, note)


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
_GATED_CONVOLUTION = "input and gate of a short convolution, not attention"
_MODULATION = "scales, shifts and gates of an adaptive norm, not attention"

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
    _family("Wqkv", "DbrxAttention", by_heads),
    _family("qkv_proj", "Phi3Attention Phi4MultimodalAttention", by_heads),
    _family("qkv", "Exaone4_5_VisionAttention", _Sizes(QKV, ("q_dim", "kv_dim", "kv_dim"))),
    _family("kv_proj", "JetMoeAttention", _Equal(KV)),
    _family(
        "to_kv",
        "EvollaSequenceCompressorAttention GraniteSpeechConformerAttention GraniteSpeechPlusConformerAttention",
        _Equal(KV),
    ),
    _family("qkv_proj.convolution", "MobileViTV2LinearSelfAttention", _one_query),
    _family(
        "in_proj_qkv",
        "Qwen3_5GatedDeltaNet Qwen3_5MoeGatedDeltaNet Qwen4ExpTextGatedDeltaNet",
        _Sizes(QKV, ("key_dim", "key_dim", "value_dim")),
        "linear attention: a short convolution over queries, keys and values follows",
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
    _family(
        "in_proj_qkvz",
        "Qwen3NextGatedDeltaNet",
        _delta_net,
        "linear attention: a short convolution over queries, keys and values follows",
    ),
    _family("in_proj_ba", "Qwen3NextGatedDeltaNet", _delta_net_steps, "linear attention: step sizes and decays"),
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
    _family("in_proj", _SSM, NotFused("gates, states and time steps of a state space model")),
    _family(
        "in_proj",
        "Lfm2MoeShortConv Lfm2ShortConv Lfm3ShortConv Lfm3VlVisionShortConv",
        NotFused("two gates and the input of a short convolution, not attention"),
    ),
    _family(
        "x_proj",
        "FalconMambaMixer JambaMambaMixer MambaMixer",
        NotFused("time steps and state matrices of a state space model"),
    ),
    _family("linear_start", "Gemma3nAudioConformerLightConv1d", NotFused(_GATED_CONVOLUTION)),
    _family("linear_start.linear", "Gemma4AudioLightConv1d", NotFused(_GATED_CONVOLUTION)),
    _family("pointwise_lin1", "GraniteSpeech5EncoderConvolutionModule", NotFused(_GATED_CONVOLUTION)),
    _family("projection_in", "FocalNetModulation", NotFused("a query, a context and gates of a focal modulation")),
    _family("gate", "DFineGate Deimv2Gate", NotFused("two gates that mix two inputs")),
    _family("linear", "VibeVoiceDiffusionHeadAdaLayerNorm", NotFused(_MODULATION)),
    _family(
        "adaln_proj",
        "GradiumPhononTTSFlowFinalLayer GradiumPhononTTSFlowResBlock PocketTTSFlowFinalLayer PocketTTSFlowResBlock",
        NotFused(_MODULATION),
    ),
    _family(
        "kv_a_proj_with_mqa",
        _LATENT,
        NotFused("the latent of keys and values and a shared rotary key; kv_b_proj holds keys and values"),
    ),
    _family(
        "kv_proj",
        "DeepseekV4Attention DeepseekV4CSACompressor DeepseekV4HCACompressor DeepseekV4Indexer",
        NotFused(_SHARED_KV),
    ),
    _family("query_key", "LSHSelfAttention", NotFused("queries and keys are the same rows here")),
    _family("index_qk_proj", "Qwen4ExpTextQSAIndexer", NotFused("chooses tokens for sparse attention")),
    _family("linear_kv_points", "EsmFoldInvariantPointAttention", NotFused("points in space: x, y and z of each")),
    _family("in_proj", "BarkMLP Kimi_K25MultimodalProjection", NotFused()),
)

#: Attentions whose separate layers are not named query, key and value, all three: class to roles and children.
SEPARATE: Mapping[str, tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]] = {
    "SwiftFormerEfficientAdditiveAttention": ((("q", "k"), ("to_query", "to_key")),),
    "ZayaCCAProjection": ((QKV, ("q_proj", "k_proj", "v_proj_current")),),
    **dict.fromkeys(
        ("GroundingDinoBiMultiHeadAttention", "MMGroundingDinoBiMultiHeadAttention"),
        (
            (("q", "v"), ("vision_proj", "values_vision_proj")),  # each side is query to the other
            (("k", "v"), ("text_proj", "values_text_proj")),
        ),
    ),
}

_INDEX = {(owner, family.leaf): family for family in FAMILIES for owner in family.owners}
LEAVES = frozenset(family.leaf for family in FAMILIES)
LAST_NAMES = frozenset(leaf.rpartition(".")[2] for leaf in LEAVES)
_TABLE_HOME = "transformers.models."


def known_family(owner: nn.Module, leaf: str) -> Family | None:
    """The table's record for this owner, unless a class from elsewhere has given it another forward."""
    mro = type(owner).__mro__
    runs = next((kind for kind in mro if "forward" in vars(kind)), None)
    if runs is None or not runs.__module__.startswith(_TABLE_HOME):
        return None
    return next((_INDEX[key] for kind in mro if (key := (kind.__name__, leaf)) in _INDEX), None)
