"""What is known about the encoder layers of Transformers 5.23, as data.

A record in `LAYERS` says where layers of one make have their parts. It is tried out before it is used (see
`encoder_trial`), in both orders of norms, so a record that does not fit a class does no harm. A class without one
runs its own code on packed tokens, which asks for no record as long as its attention looks up the registry.
`ATTENTIONS` has the attention classes that do not. `STACKS` says what is particular about whole stacks.
"""

from __future__ import annotations

from collections.abc import Mapping

from rewire.modules.packed import AttentionFacts, LayerFacts, StackFacts


def _layer(attention: str, qkvo: str, norms: str, feed_forward: str) -> LayerFacts:
    """A record in short: names below the attention module, norms, and first projection, activation, second."""
    q, k, v, out = (f"{attention}.{name}" if not name.startswith("/") else name[1:] for name in qkvo.split())
    norm_attention, norm_output = norms.split()
    up, act, down = feed_forward.split()
    return LayerFacts(attention, q, k, v, out, norm_attention, up, act, down, norm_output)


LAYERS: Mapping[str, LayerFacts] = {
    "bert": _layer(
        "attention.self",
        "query key value /attention.output.dense",
        "attention.output.LayerNorm output.LayerNorm",
        "intermediate.dense intermediate.intermediate_act_fn output.dense",
    ),
    "distilbert": _layer(
        "attention",
        "q_lin k_lin v_lin out_lin",
        "sa_layer_norm output_layer_norm",
        "ffn.lin1 ffn.activation ffn.lin2",
    ),
    "albert": _layer(
        "attention",
        "query key value dense",
        "attention.LayerNorm full_layer_layer_norm",
        "ffn activation ffn_output",
    ),
    "mpnet": _layer(
        "attention.attn",
        "q k v o",
        "attention.LayerNorm output.LayerNorm",
        "intermediate.dense intermediate.intermediate_act_fn output.dense",
    ),
    "xlm-roberta-xl": _layer(
        "attention.self",
        "query key value /attention.output.dense",
        "attention.self_attn_layer_norm LayerNorm",
        "intermediate.dense intermediate.intermediate_act_fn output.dense",
    ),
    "bart": _layer(
        "self_attn",
        "q_proj k_proj v_proj out_proj",
        "self_attn_layer_norm final_layer_norm",
        "fc1 activation_fn fc2",
    ),
    "prophetnet": _layer(
        "self_attn",
        "query_proj key_proj value_proj out_proj",
        "self_attn_layer_norm feed_forward_layer_norm",
        "feed_forward.intermediate feed_forward.activation_fn feed_forward.output",
    ),
    "clip": _layer(
        "self_attn",
        "q_proj k_proj v_proj out_proj",
        "layer_norm1 layer_norm2",
        "mlp.fc1 mlp.activation_fn mlp.fc2",
    ),
    "vit": _layer(
        "attention",
        "q_proj k_proj v_proj o_proj",
        "layernorm_before layernorm_after",
        "mlp.fc1 mlp.activation_fn mlp.fc2",
    ),
    "videomae": _layer(
        "attention.attention",
        "query key value /attention.output.dense",
        "layernorm_before layernorm_after",
        "intermediate.dense intermediate.intermediate_act_fn output.dense",
    ),
    "wav2vec2": _layer(
        "attention",
        "q_proj k_proj v_proj out_proj",
        "layer_norm final_layer_norm",
        "feed_forward.intermediate_dense feed_forward.intermediate_act_fn feed_forward.output_dense",
    ),
    "seamless": _layer(
        "self_attn",
        "q_proj k_proj v_proj out_proj",
        "self_attn_layer_norm ffn_layer_norm",
        "ffn.fc1 ffn.act ffn.fc2",
    ),
    "llama4-vision": _layer(
        "self_attn",
        "q_proj k_proj v_proj o_proj",
        "input_layernorm post_attention_layernorm",
        "mlp.fc1 mlp.activation_fn mlp.fc2",
    ),
}

_BERT_LIKE = AttentionFacts("query", "key", "value")

ATTENTIONS: Mapping[str, AttentionFacts] = {
    "RemBertSelfAttention": _BERT_LIKE,
    "TapasSelfAttention": _BERT_LIKE,
    "RoFormerSelfAttention": AttentionFacts("query", "key", "value", rotary="apply_rotary_position_embeddings"),
    "ViltSelfAttention": AttentionFacts("query", "key", "value", pair=False),
    "MPNetSelfAttention": AttentionFacts("q", "k", "v", "o", pair=False),
    "ProphetNetAttention": AttentionFacts("query_proj", "key_proj", "value_proj", "out_proj", drops=True),
    "fsmt.Attention": AttentionFacts("q_proj", "k_proj", "v_proj", "out_proj"),
}
"""By class name; by the last part of the module's name too (`fsmt.Attention`) where the class name says little."""

_IN_PLACE = StackFacts(chains=False, in_place=True)

STACKS: Mapping[str, StackFacts] = {
    "FSMTEncoder": StackFacts(sequence_first=True, inverted=True),
    "Blip2QFormerEncoder": _IN_PLACE,
    "InstructBlipQFormerEncoder": _IN_PLACE,
    "InstructBlipVideoQFormerEncoder": _IN_PLACE,
}
"""By the class of the module that calls the layers. Q-formers have a fixed number of queries, so no padding worth
leaving out, and tell them from text by their places: what is prepared for them is the weights alone."""

REFUSED: Mapping[str, str] = {
    "DebertaLayer": "its attention adds terms that depend on the content of queries and keys at relative positions",
    "DebertaV2Layer": "its attention adds terms that depend on the content of queries and keys at relative positions",
}
"""Layer classes whose attention cannot be had by the means at hand, with what stands in the way."""
