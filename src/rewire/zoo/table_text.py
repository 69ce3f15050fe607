"""The part of the table for text models, time series and trajectories."""

from __future__ import annotations

from rewire.zoo.entry import Draw, Entry

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_SERIES = {
    "prediction_length": 4,
    "context_length": 8,
    "lags_sequence": [1, 2, 3],
    "num_time_features": 2,
    "num_dynamic_real_features": 1,
    "num_static_real_features": 1,
    "num_static_categorical_features": 1,
    "cardinality": [5],
    "embedding_dimension": [3],
}
_NO_LENGTH = "the default configuration has no length to predict; with features of every kind"
_NO_HEAD_SIZE = "the default configuration has no head size, and the model does without only if the name is missing"

ENTRIES: dict[str, Entry] = {
    "autoformer": Entry(_NO_LENGTH, given={**_SERIES, "label_length": 4}),
    "bamba": Entry("no layer of attention by default", given={"attn_layer_indices": [9, 18, 27]}),
    "blt": Entry(
        "its cache asks the whole configuration for a number of layers, which only the parts have; wide patches",
        given={"num_hidden_layers": 2},
        then={
            "global_config.hidden_size": 128,
            "global_config.head_dim": 32,
            "encoder_config.hidden_size_global": 128,
            "decoder_config.hidden_size_global": 128,
        },
    ),
    "cohere_compass_text": Entry(
        "no rotation by default, which the model cannot do without; with both kinds of layers",
        given={
            "num_hidden_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"],
            "num_key_value_heads": 8,
            "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
        },
    ),
    "dbrx": Entry(
        "the configuration of its attention has no rotation by default; more than one expert at a time",
        given={"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 8, "clip_qkv": 8}, "ffn_config": {"moe_top_k": 4}},
    ),
    "decision_transformer": Entry("more than one head", given={"n_head": 4}),
    "deepseek_v2": Entry(
        "no number of experts to choose by default; as in the published model, where the first layer is dense",
        given={
            "num_experts_per_tok": 6,
            "first_k_dense_replace": 1,
            "topk_method": "group_limited_greedy",
            "n_group": 8,
            "topk_group": 3,
        },
    ),
    "diffusion_gemma": Entry(
        "no experts by default, and the model does not work without; takes images under no name of their own",
        given={"text_config": {"num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704}},
        inputs={
            "input_ids": Draw(values=[[2, 9, 126, 125, 125, 125, 125, 124, 30, 31, 32, 33, 34]]),
            "pixel_values": Draw((1, 36, 768), "uniform"),
            "image_position_ids": Draw(values=[[[column, row] for row in range(6) for column in range(6)]]),
        },
    ),
    "dots1": Entry(
        "no number of experts by default; as in the published model, where the first layer is dense",
        given={"n_routed_experts": 128, "num_experts_per_tok": 6, "n_shared_experts": 2, "first_k_dense_replace": 1},
    ),
    "esm": Entry(
        "no vocabulary by default",
        given={"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    ),
    "evolla": Entry("AutoModel does not find the class, which the package has", architecture="EvollaModel"),
    "falcon_h1": Entry(
        "its state-space layers have a width of their own, which their heads must fill",
        then={"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    ),
    "funnel": Entry(
        "two classes of models for one type, and the default configuration does not say which",
        given={"architectures": ["FunnelModel"]},
    ),
    "granitemoehybrid": Entry(
        "no layer of attention by default",
        given={"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], "num_key_value_heads": 8},
    ),
    "hrm_text": Entry("every pass over a stack counts as layers", then={"num_hidden_layers": 16}),
    "hunyuan_v1_dense": Entry(_NO_HEAD_SIZE, given={"head_dim": 128, "num_key_value_heads": 8}),
    "hunyuan_v1_moe": Entry(
        f"{_NO_HEAD_SIZE}; more than one expert",
        given={"head_dim": 128, "num_key_value_heads": 8, "num_experts": 16, "moe_topk": 2},
    ),
    "hunyuan_vl_text": Entry(_NO_HEAD_SIZE, given={"head_dim": 128, "num_key_value_heads": 8}),
    "informer": Entry(_NO_LENGTH, given=_SERIES),
    "lfm2_moe": Entry(
        "no kinds of layers by default",
        given={"num_hidden_layers": 4, "layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    ),
    "ministral": Entry(_NO_HEAD_SIZE, given={"head_dim": 128}),
    "nemotron": Entry("no number of key-value heads by default", given={"num_key_value_heads": 8}),
    "nllb-moe": Entry(
        "this release sends every token to the experts 0 and 1, whatever the router says",
        then={"num_experts": 2},
    ),
    "patchtsmixer": Entry(
        "attention, and series of several variables",
        given={
            "d_model": 16,
            "num_input_channels": 3,
            "mode": "mix_channel",
            "self_attn": True,
            "self_attn_heads": 4,
            "context_length": 32,
        },
    ),
    "patchtst": Entry(
        "attention between variables too",
        given={"num_input_channels": 3, "patch_length": 8, "patch_stride": 8, "channel_attention": True},
    ),
    "qwen4_exp_text": Entry(
        "no sizes of the indexer by default; with embeddings of pairs and triples of tokens in one layer",
        given={
            "indexer_n_heads": 16,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 256,
            "indexer_budget": 2048,
            "indexer_compress_ratio": 16,
            "ple_layer_ids": [2],
            "eos_token_id": 1,
        },
        then={
            "indexer_budget": 8,
            "indexer_compress_ratio": 2,
            "ple_layer_ids": [1],
            "heads_per_ngram": 2,
            "split_ngram_parts": 2,
            "hc_lowrank": 16,
        },
    ),
    "recurrent_gemma": Entry("two layers of which one attends", then={"block_types": ["recurrent", "attention"]}),
    "reformer": Entry(
        "factors of the width and of the number of positions; chunks that a short text fills; a fixed choice of hashes",
        then={
            "axial_pos_embds_dim": (16, 48),
            "axial_pos_shape": (8, 16),
            "local_attn_chunk_length": 8,
            "lsh_attn_chunk_length": 8,
            "num_buckets": 4,
            "hash_seed": 0,
        },
    ),
    "rwkv": Entry("its cache is written in place, which gradients do not survive", then={"use_cache": False}),
    "sam3_lite_text_text_model": Entry("attention only between its two ends", then={"num_hidden_layers": 4}),
    "switch_transformers": Entry("one expert for a token, and few tokens", then={"num_experts": 2}),
    "t5gemma2_encoder": Entry(
        "its configuration has no dropout rate unless it stands in that of the whole model; tokens of a small image",
        given={"text_config": {"dropout_rate": 0.0}},
        then={"mm_tokens_per_image": 4},
    ),
    "time_series_transformer": Entry(_NO_LENGTH, given=_SERIES),
    "xlnet": Entry(
        "segments, of which the configuration does not speak",
        inputs={"token_type_ids": Draw((1, 33), "integers", 0, 2)},
    ),
    "xlstm": Entry(
        "its cache has room for multiples of 64 features of queries, which are half the width",
        then={"hidden_size": 128, "embedding_dim": 128},
    ),
    "xmod": Entry(
        "no language by default",
        given={"default_language": "en_XX"},
    ),
    "zamba": Entry(
        "two layers that share their attention, which reads twice the width",
        then={
            "num_hidden_layers": 3,
            "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
            "attention_head_dim": 32,
        },
    ),
    "zamba2": Entry(
        "two layers that share their attention, which reads twice the width; state-space heads that fill it",
        then={
            "num_hidden_layers": 3,
            "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
            "hybrid_layer_ids": [1, 2],
            "attention_head_dim": 32,
            "n_mamba_heads": 4,
            "mamba_headdim": 32,
            "kv_channels": 16,
        },
    ),
}

#: Types of which no model can be made or run here, and why; every reason lies outside Rewire.
UNAVAILABLE: dict[str, str] = {
    "voxtral_realtime_text": "the package does not export the class of this type; it is a part of voxtral_realtime",
}
