"""Tiny models from their own configurations, with weights strong enough that any mistake shows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

_SMALL: dict[str, dict[str, Any]] = {
    "bert": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0},
    "gpt_neox": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "phi3": {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    },
    "llama": {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    },
    "codegen": {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "bos_token_id": 0, "eos_token_id": 0},
    "whisper": {
        "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_mel_bins": 8,
        "max_source_positions": 16, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
        "decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None,
    },
    "bart": {
        "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    },
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
    "clip_text_model": {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    },
    "siglip_vision_model": {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
        "image_size": 16, "patch_size": 4,
    },
    "vit": {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
        "image_size": 16, "patch_size": 4,
    },
}  # fmt: skip

_LLAMA = _SMALL["llama"]
_LATENT = {
    "q_lora_rank": 12, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4,
}  # fmt: skip
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 48}
_MOE: dict[str, dict[str, Any]] = {
    "mixtral": _EXPERTS,
    "phimoe": _EXPERTS,
    "gpt_oss": {**_EXPERTS, "head_dim": 8},
    "openai_privacy_filter": {**_EXPERTS, "head_dim": 8},
    "muse_spark_text": {**_EXPERTS, "head_dim": 8, "moe_intermediate_size": 24, "moe_hidden_size": 32},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 24, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 24, "num_experts_per_tok": 2, "head_dim": 8},
    "llama4_text": {**_EXPERTS, "num_experts_per_tok": 1, "intermediate_size_mlp": 48, "head_dim": 8},
    "jetmoe": {**_EXPERTS, "kv_channels": 8},
    "aria_text": {"intermediate_size": 24, "moe_num_experts": 4, "moe_topk": 2, "head_dim": 8},
    "deepseek_v3": {
        **_LATENT, "n_routed_experts": 8, "moe_intermediate_size": 16, "num_experts_per_tok": 2, "n_group": 2,
        "topk_group": 1, "first_k_dense_replace": 1, "num_mtp_layers": 0,
    },
    "longcat_flash": {
        **_LATENT, "num_layers": 1, "ffn_hidden_size": 48, "n_routed_experts": 4, "zero_expert_num": 2,
        "expert_ffn_hidden_size": 24, "moe_topk": 3, "head_dim": 8,
    },
    "inkling_text": {
        "head_dim": 8, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8,
        "n_routed_experts": 4, "moe_intermediate_size": 24, "num_experts_per_tok": 2, "rel_extent": 32,
        "mlp_layer_types": ["dense", "sparse"],
    },
    "nemotron_h": {
        "layers_block_type": ["mamba", "moe", "attention"], "head_dim": 8, "ssm_state_size": 8, "mamba_num_heads": 4,
        "mamba_head_dim": 16, "n_groups": 2, "chunk_size": 8, "n_routed_experts": 4, "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 24, "moe_latent_size": 16, "num_experts_per_tok": 2,
    },
    "dbrx": {
        "d_model": 32, "n_heads": 4, "n_layers": 2,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
    },
}  # fmt: skip
_SMALL |= {model_type: {**_LLAMA, **values} for model_type, values in _MOE.items()}
_SMALL |= {
    "switch_transformers": {
        "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "num_experts": 4,
        "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "router_jitter_noise": 0.0,
    },
    "nllb-moe": {
        "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_experts": 4, "encoder_sparse_step": 2,
        "decoder_sparse_step": 2,
    },
}  # fmt: skip

_SAM = {
    "vision_config": {
        "num_pos_feats": 16,
        "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 64, "patch_size": 8,
        "global_attn_indexes": [1], "window_size": 3, "mlp_dim": 64, "output_channels": 32,
    },
    "prompt_encoder_config": {"hidden_size": 32, "image_size": 64, "patch_size": 8, "mask_input_channels": 4},
    "mask_decoder_config": {
        "hidden_size": 32, "mlp_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "iou_head_hidden_dim": 32,
    },
}  # fmt: skip

VOCABULARY = 60


def tiny(model_type: str, *, head: bool = False, seed: int = 0, **values: Any) -> PreTrainedModel:
    """A tiny model in evaluation mode; `head`: with a causal language-model head."""
    torch.manual_seed(seed)
    small = _SAM if model_type == "sam" else {"vocab_size": VOCABULARY, **_SMALL[model_type]}
    config = CONFIG_MAPPING[model_type](**{**small, **values})
    model = (AutoModelForCausalLM if head else AutoModel).from_config(config)
    strengthen(model, seed)
    return model.eval()


def strengthen(model: nn.Module, seed: int = 0) -> None:
    """Draws every weight anew: attention far from uniform, no bias zero, no norm at one."""
    generator = torch.Generator().manual_seed(seed)
    kernels = {id(m.weight) for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                stacked = parameter.ndim == 3 and id(parameter) not in kernels  # a matrix for every expert
                fan_in = max(parameter.shape[1:]) if stacked else parameter[0].numel()
                parameter.normal_(0, 1.5 / fan_in**0.5, generator=generator)
            else:
                parameter.add_(torch.empty_like(parameter).normal_(0, 0.2, generator=generator))


def ids(batch: int = 2, length: int = 9, seed: int = 1) -> Tensor:
    """Random token numbers without special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


def output(model: nn.Module, **inputs: Any) -> Tensor:
    """The first output tensor."""
    with torch.no_grad():
        first = model(**inputs)[0]
    assert isinstance(first, Tensor)
    return first.clone()


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all tensors that a checkpoint holds."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Same names in the same order, same types, same bits."""
    return list(first) == list(second) and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


def tree(model: nn.Module) -> list[tuple[str, type]]:
    """Names and classes of all modules, in order."""
    return [(name, type(module)) for name, module in model.named_modules(remove_duplicate=False)]
