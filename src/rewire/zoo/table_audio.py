"""The part of the table for audio models."""

from __future__ import annotations

from typing import Any

from rewire.zoo.entry import Draw, Entry

_AUDIO = 100
"""A token that stands for a piece of sound."""

_FASTSPEECH = {"encoder_layers": 2, "decoder_layers": 2, "encoder_linear_units": 96, "decoder_linear_units": 96}

_LATENTS: dict[str, Any] = {
    "input_ids": Draw(values=[[_AUDIO, _AUDIO, _AUDIO, 3, 4, 5, 6, 7, 102, 101, 101]]),
    "audio_latents": Draw((1, 2, 16)),
}

ENTRIES: dict[str, Entry] = {
    "vits": Entry(
        "random durations make a waveform of half a minute; spoken fast it is short", then={"speaking_rate": 40.0}
    ),
    "clap": Entry(
        "the widths of the four stages double up to the hidden size, and the spectrogram is cut into squares",
        then={
            "num_hidden_layers": 6,
            "audio_config.depths": (2, 2, 2, 2),
            "audio_config.num_attention_heads": (2, 2, 4, 4),
            "audio_config.patch_embeds_hidden_size": 16,
            "audio_config.hidden_size": 128,
            "audio_config.spec_size": 128,
            "audio_config.window_size": 4,
            "audio_config.num_mel_bins": 32,
        },
    ),
    "clvp": Entry(
        "the decoder's output gets fixed codes, which the small vocabulary must hold; positions rotate 32 features",
        then={
            "decoder_config.decoder_fixing_codes": (83, 45, 45, 24),
            "text_config.num_attention_heads": 2,
            "speech_config.num_attention_heads": 2,
        },
    ),
    "csm": Entry(
        "sounds become codebook tokens at the places of an audio token; the decoder of codebooks runs with labels only",
        then={
            "audio_token_id": _AUDIO,
            "num_codebooks": 4,
            "depth_decoder_config.num_codebooks": 4,
            "depth_decoder_config.max_position_embeddings": 5,
            "codec_config.num_quantizers": 4,
        },
        inputs={
            "input_ids": Draw(values=[[3, 4, 5, _AUDIO, _AUDIO, _AUDIO, _AUDIO, 6, 7]]),
            "input_values": Draw((1, 1, 4 * 1920)),
            "input_values_cutoffs": Draw(values=[[4 * 1920]]),
            "labels": Draw(values=[[-100, -100, -100, _AUDIO, _AUDIO, _AUDIO, _AUDIO, -100, -100]]),
        },
        only=True,
    ),
    "dia": Entry(
        "the decoder reads nine channels of tokens",
        inputs={"decoder_input_ids": Draw((1, 10, 9), "integers", 0, 100)},
    ),
    "fastspeech2_conformer": Entry(
        "the configuration copies its values into mappings when it is made", given=_FASTSPEECH
    ),
    "fastspeech2_conformer_with_hifigan": Entry(
        "the configuration copies its values into mappings when it is made", given={"model_config": _FASTSPEECH}
    ),
    "gradium_phonon_tts": Entry(
        "a voice and the sound so far stand in the text as latent vectors",
        then={"audio_prompt_token_id": _AUDIO, "audio_latent_token_id": 101, "audio_bos_token_id": 102},
        inputs=_LATENTS | {"audio_prompt_latents": Draw((1, 3, 64))},
        only=True,
    ),
    "kyutai_speech_to_text": Entry(
        "every position holds a token of text and one of each codebook",
        inputs={"input_ids": Draw((1, 17, 33), "integers", 0, 100), "attention_mask": None},
    ),
    "moonshine_streaming": Entry(
        "the default configuration of its decoder has no number of key-value heads",
        given={"num_key_value_heads": 8},
    ),
    "moshi": Entry(
        "AutoModel takes the decoder of texts alone, without those of sounds; the latter run with labels only",
        given={"audio_vocab_size": 2048},
        then={
            "audio_vocab_size": 128,
            "depth_decoder_config.input_size": 64,
            "audio_encoder_config.num_quantizers": 8,
        },
        architecture="MoshiForConditionalGeneration",
        inputs={
            "input_ids": Draw((1, 9), "integers", 0, 128),
            "user_input_values": Draw((1, 1, 9 * 1920)),
            "moshi_audio_codes": Draw((1, 8, 9), "integers", 0, 128),
            "text_labels": Draw((1, 9), "integers", 0, 128),
            "audio_labels": Draw((1, 8, 9), "integers", 0, 128),
        },
        only=True,
    ),
    "musicgen": Entry(
        "AutoModel takes the decoder alone, whose configuration is another one",
        architecture="MusicgenForConditionalGeneration",
        inputs={"decoder_input_ids": Draw((4, 10), "integers", 0, 100), "input_values": None},
    ),
    "musicgen_melody": Entry(
        "AutoModel takes the decoder alone, whose configuration is another one",
        architecture="MusicgenMelodyForConditionalGeneration",
        inputs={"decoder_input_ids": Draw((4, 10), "integers", 0, 100)},
    ),
    "muse_spark": Entry("four merged patches are as wide as what the adapter reads", then={"out_hidden_size": 256}),
    "musicflamingo": Entry(
        "the model cannot be asked how many tokens a sound takes before they stand in a text: a quarter of its frames",
        then={"audio_token_id": _AUDIO, "head_dim": 64},
        inputs={
            "input_ids": Draw(values=[[3, 4, 5, *[_AUDIO] * 64, 6, 7]]),
            "input_features": Draw((1, 128, 256)),
            "input_features_mask": Draw((1, 256), "constant", 1),
        },
        only=True,
    ),
    "nemo_speechlm": Entry(
        "the text part lists its layers without a number",
        then={"text_config.layers_block_type": ["linear_attention", "moe", "full_attention", "moe"]},
    ),
    "pocket_tts": Entry(
        "a voice and the sound so far stand in the text as latent vectors",
        then={"audio_prompt_token_id": _AUDIO, "audio_latent_token_id": 101, "audio_bos_token_id": 102},
        inputs=_LATENTS | {"audio_prompt_latents": Draw((1, 3, 16))},
        only=True,
    ),
    "qwen2_5_omni_thinker": Entry(
        "the default configuration lacks the tokens around images",
        given={"vision_start_token_id": 151652, "vision_end_token_id": 151653},
    ),
    "qwen2_audio": Entry(
        "the model cannot be asked how many tokens a sound takes: a quarter of its frames",
        then={"audio_token_id": _AUDIO},
        inputs={"input_ids": Draw(values=[[3, 4, 5, *[_AUDIO] * 64, 6, 7]])},
    ),
    "qwen3_asr": Entry("the default sizes of tower and text differ", then={"audio_config.output_dim": 64}),
    "qwen3_omni_moe_thinker": Entry(
        "the default configuration lacks the tokens around images, and the one behind sounds",
        given={"vision_start_token_id": 151652, "vision_end_token_id": 151653, "audio_end_token_id": 151670},
    ),
    "speecht5": Entry(
        "the model without pre-nets reads and writes hidden vectors",
        inputs={"input_values": Draw((1, 12, 64)), "decoder_input_values": Draw((1, 7, 64))},
        only=True,
    ),
    "vibevoice_acoustic_tokenizer_decoder": Entry(
        "reads latent vectors", inputs={"hidden_states": Draw((1, 16, 12))}, only=True
    ),
    "vibevoice_acoustic_tokenizer_encoder": Entry(
        "reads samples under another name", inputs={"hidden_states": Draw((1, 1, 12 * 3200))}, only=True
    ),
    "univnet": Entry(
        "layers behind the predictor's hidden channels have the width of the noise",
        then={"kernel_predictor_hidden_channels": 16},
    ),
    "voxtral": Entry("the default configuration names no audio token", given={"audio_token_id": 24}),
    "voxtral_realtime": Entry(
        "sound is added to the text, one token for eight frames",
        inputs={"input_ids": Draw((1, 17), "integers", 3, 120), "input_features": Draw((1, 128, 8 * 17))},
    ),
    "xcodec": Entry("the codebook is as wide as the two encoders together", then={"codebook_dim": 128}),
}

#: Types of which no model can be made or run here, and why; every reason lies outside Rewire.
UNAVAILABLE: dict[str, str] = {
    "bark": "BarkModel has no forward pass, only generate",
    "higgs_audio_v2_tokenizer": "needs torchaudio",
    "pe_audio_video": "the part for videos wraps a model of timm, which needs torchvision",
    "pe_audio_video_encoder": "the part for videos wraps a model of timm, which needs torchvision",
}
