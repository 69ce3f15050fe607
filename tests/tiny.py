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
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                fan_in = parameter[0].numel()
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
