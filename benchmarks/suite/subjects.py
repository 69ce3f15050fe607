"""The models that are measured, of real size, with random weights strong enough that a mistake would show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MixtralConfig,
    MixtralModel,
    Phi3Config,
    Phi3ForCausalLM,
    SamConfig,
    SamModel,
)

from rewire.plan import Edit, Join, Plan, Split, Unstack
from rewire.proof.strong import draw_strong

SAM_SPLIT = Split("vision_encoder.layers.*.attn.qkv", into=("q", "k", "v"))
BERT_JOIN = Join("encoder.layer.*.attention.self", parts=("query", "key", "value"))
GPT2_SPLIT = Split("h.*.attn.c_attn", into=("q", "k", "v"))
LLAMA_JOIN = Plan(
    [
        Join("**.layers.*.self_attn", parts=("q_proj", "k_proj", "v_proj")),
        Join("**.layers.*.mlp", parts=("gate_proj", "up_proj")),
    ]
)
MIXTRAL_UNSTACK = Unstack("layers.*.mlp.experts")
MIXTRAL_VIEWS = Unstack("layers.*.mlp.experts", views=True)
PHI3_SPLIT = Plan([Split("model.layers.*.self_attn.qkv_proj"), Split("model.layers.*.mlp.gate_up_proj")])


@dataclass(frozen=True)
class Subject:
    """A model and the plan that it is measured with."""

    name: str
    make: Callable[[], Any]
    plan: Plan | Edit


def sam(side: int = 1024) -> Any:
    """SAM ViT-base for images of `side` × `side`."""
    prompts = {"image_size": side, "image_embedding_size": side // 16}
    return _strong(SamModel(SamConfig(vision_config={"image_size": side}, prompt_encoder_config=prompts)))


def minilm() -> Any:
    """The shape of all-MiniLM-L6-v2."""
    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    return _strong(BertModel(BertConfig(**sizes)))


def bert() -> Any:
    """BERT-base."""
    return _strong(BertModel(BertConfig()))


def gpt2() -> Any:
    """GPT-2 small; its weights are stored transposed."""
    return _strong(GPT2Model(GPT2Config()))


def small_llama() -> Any:
    """A decoder of the size of GPT-2 small, with grouped queries."""
    sizes = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 4}
    return _strong(LlamaModel(LlamaConfig(**sizes, intermediate_size=2048, vocab_size=32_000)))


def small_mixtral() -> Any:
    """A mixture of eight experts, two for each token, in four layers."""
    sizes = {"hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4}
    return _strong(MixtralModel(MixtralConfig(**sizes, intermediate_size=1024, num_local_experts=8, vocab_size=32_000)))


_DECODER = {
    "vocab_size": 32_000, "hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32,
    "num_key_value_heads": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def llama(layers: int = 9) -> Any:
    """A decoder of about 1 GB in bfloat16, with separate projections and grouped queries."""
    return _half(LlamaForCausalLM, LlamaConfig(**_DECODER, num_hidden_layers=layers))


def phi3(layers: int = 9) -> Any:
    """The same with fused projections."""
    return _half(Phi3ForCausalLM, Phi3Config(**_DECODER, num_hidden_layers=layers))


def _strong(model: Any) -> Any:
    draw_strong(model, gain=1.0)
    return model.eval()


def _half(model_class: Any, config: Any) -> Any:
    model = model_class._from_config(config, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.05, generator=generator)
    return model.eval()


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    """Random token numbers."""
    return torch.randint(100, 30_000, (batch, length), generator=torch.Generator().manual_seed(seed))
