"""What is known about the fused projections of Transformers' classes, as data: which rows are whose.

A `Family` says for a class (its owner) and the name of a linear in it how the rows of the parts follow each other,
by one of the rules of `family_rules`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from rewire.family_rules import (
    Equal,
    NotFused,
    Rule,
    Sizes,
    biases_apart,
    by_heads,
    codegen,
    delta_net,
    delta_net_steps,
    falcon,
    gpt_bigcode,
    levit,
    one_query,
    self_or_cross,
)
from rewire.roles import GATE_UP, KV, QKV, UP_GATE


@dataclass(frozen=True)
class Family:
    """The rows of the linear `leaf` in the classes `owners` follow `rule`.

    Owners are classes of `transformers.models`; those of timm, where many classes are called alike, have their
    module before them. `note`: what else one should know.
    """

    leaf: str
    owners: tuple[str, ...]
    rule: Rule
    note: str = ""


def _family(leaf: str, owners: str, rule: Rule, note: str = "") -> Family:
    return Family(leaf, tuple(owners.split()), rule, note)


def _timm(leaf: str, owners: str, rule: Rule) -> Family:
    return Family(leaf, tuple(f"timm.{owner}" for owner in owners.split()), rule)


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
        Equal(),
    ),
    _family("Wqkv", "ModernBertAttention MptAttention", Equal()),
    _family("att_proj", "BarkSelfAttention", Equal()),
    _family("qkv_linear", "LayoutLMv2SelfAttention", Equal()),
    _family("c_attn", "Attention", Equal()),  # the first GPT
    _family("c_attn", "DecisionTransformerGPT2Attention GPT2Attention ImageGPTAttention", self_or_cross),
    _family("Wqkv", "DbrxAttention", by_heads),
    _family("qkv_proj", "Phi3Attention Phi4MultimodalAttention", by_heads),
    _family("qkv", "Exaone4_5_VisionAttention", Sizes(QKV, ("q_dim", "kv_dim", "kv_dim"))),
    _family("kv_proj", "JetMoeAttention", Equal(KV)),
    _family(
        "to_kv",
        "EvollaSequenceCompressorAttention GraniteSpeechConformerAttention GraniteSpeechPlusConformerAttention",
        Equal(KV),
    ),
    _family("qkv_proj.convolution", "MobileViTV2LinearSelfAttention", one_query),
    _family(
        "in_proj_qkv",
        "Qwen3_5GatedDeltaNet Qwen3_5MoeGatedDeltaNet Qwen4ExpTextGatedDeltaNet",
        Sizes(QKV, ("key_dim", "key_dim", "value_dim")),
        "linear attention: a short convolution over queries, keys and values follows",
    ),
    _family("qkv_opreact", "xLSTMLayer", Sizes((*QKV, "gate"), ("qk_dim", "qk_dim", "v_dim", "v_dim"))),
    # Attention, head by head.
    _family(
        "query_key_value",
        "BloomAttention GPTNeoXAttention GPTNeoXJapaneseAttention PersimmonAttention",
        Equal(QKV, "per_head"),
    ),
    _family("qkv_proj", "MiniMaxLightningAttention", Equal(QKV, "per_head")),
    _family("in_proj", "DisentangledSelfAttention", Equal(QKV, "per_head")),
    _family("proj", "EsmFoldSelfAttention", Equal(QKV, "per_head")),
    _family("linear_kv", "EsmFoldInvariantPointAttention", Equal(KV, "per_head")),
    _family("queries_keys_values.linear", "LevitAttention", levit),
    _family("keys_values.linear", "LevitAttentionSubsample", levit),
    _family("kv_b_proj", _LATENT, Sizes(KV, ("qk_nope_head_dim", "v_head_dim"), "per_head")),
    _family(
        "q_proj",
        "Qwen3NextAttention Qwen3_5Attention Qwen3_5MoeAttention Qwen4ExpTextAttention",
        Equal(("q", "gate"), "per_head"),
    ),
    _family("q_gate_proj", "AXK2Attention", Sizes(("q", "gate"), ("qk_head_dim", "v_head_dim"), "per_head")),
    # Attention, as the configuration says.
    _family("query_key_value", "FalconAttention", falcon),
    _family("c_attn", "GPTBigCodeAttention", gpt_bigcode),
    _family("qkv_proj", "CodeGenAttention", codegen),
    _family(
        "in_proj_qkvz",
        "Qwen3NextGatedDeltaNet",
        delta_net,
        "linear attention: a short convolution over queries, keys and values follows",
    ),
    _family("in_proj_ba", "Qwen3NextGatedDeltaNet", delta_net_steps, "linear attention: step sizes and decays"),
    # MLP: `gate` is the half that goes through the activation.
    _family(
        "gate_up_proj",
        "DiaMLP Dots3NoteAudioMLP EsmFold2SwiGLU Glm4MLP Glm4vTextMLP GlmImageTextMLP GlmMLP GlmOcrTextMLP "
        "MiniMaxM3VLDenseMLP Phi3MLP Phi4MultimodalMLP Zamba2MLP",
        Equal(GATE_UP),
    ),
    _family("gate_up_proj", "Phi4MultimodalAudioMLP", Equal(UP_GATE)),
    _family("Wi", "ModernBertDecoderMLP ModernBertMLP", Equal(GATE_UP)),
    _family("input_linear", "GraniteMoeHybridMLP GraniteMoeSWAMLP GraniteMoeSharedMLP", Equal(GATE_UP)),
    _family("proj_up_gate_z", "xLSTMFeedForward", Equal(GATE_UP)),
    _family("fc1", "KyutaiSpeechToTextGatingMLP MoshiGatingMLP", Equal(GATE_UP)),
    _family("fc1", "MoonshineDecoderMLP MoonshineStreamingDecoderMLP", Equal(UP_GATE)),
    _family("proj", "ClvpGatedLinearUnit", Equal(UP_GATE)),
    _family("linear_1", "AyaVisionMultiModalProjector Cohere2VisionMultiModalProjector", Equal(UP_GATE)),
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
    _family("in_proj", "BarkMLP DacVectorQuantize Kimi_K25MultimodalProjection", NotFused()),
    # Backbones of timm (1.0), which Transformers puts into models of its own.
    _timm(
        "qkv",
        "layers.attention.Attention layers.attention.AttentionRope layers.attention_pool2d.AttentionPool2d "
        "layers.attention_pool2d.RotAttentionPool2d layers.diff_attention.DiffAttention models.cait.TalkingHeadAttn "
        "models.coat.FactorAttnConvRelPosEnc models.convit.MHSA models.davit.ChannelAttention "
        "models.davit.ChannelAttentionV2 models.davit.WindowAttention models.edgenext.CrossCovarianceAttn "
        "models.fastvit.Attention models.hiera.MaskUnitAttention models.hieradet_sam2.MultiScaleAttention "
        "models.metaformer.Attention models.mvitv2.MultiScaleAttention models.nest.Attention "
        "models.swin_transformer.WindowAttention models.swin_transformer_v2_cr.WindowMultiHeadAttention "
        "models.twins.LocallyGroupedAttn models.visformer.Attention models.vision_transformer_relpos.RelPosAttention "
        "models.vision_transformer_sam.Attention models.volo.Attention models.xcit.XCA",
        Equal(),
    ),
    _timm(
        "qkv",
        "models.beit.Attention models.eva.EvaAttention models.swin_transformer_v2.WindowAttention",
        biases_apart,
    ),
    _timm(
        "kv",
        "layers.attention_pool.AttentionPoolLatent models.pvt_v2.Attention models.twins.GlobalSubSampleAttn "
        "models.volo.ClassAttention",
        Equal(KV),
    ),
    _timm(
        "qkv",
        "models.efficientformer.Attention models.tiny_vit.Attention",
        Sizes(QKV, ("key_dim", "key_dim", "val_dim"), "per_head"),
    ),
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
_HOMES = ("transformers.models.", "timm.")


def known_family(owner: nn.Module, leaf: str) -> Family | None:
    """The table's record for this owner, unless a class from elsewhere has given it another forward."""
    mro = type(owner).__mro__
    runs = next((kind for kind in mro if "forward" in vars(kind)), None)
    if runs is None or not runs.__module__.startswith(_HOMES):
        return None
    return next((_INDEX[key] for kind in mro if (key := (_name(kind), leaf)) in _INDEX), None)


def _name(kind: type) -> str:
    """What a class is called in the table."""
    return f"{kind.__module__}.{kind.__name__}" if kind.__module__.startswith("timm.") else kind.__name__
