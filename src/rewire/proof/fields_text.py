"""The tensors that text models take beside their tokens, and those of time series and trajectories."""

from __future__ import annotations

import torch
from torch import Tensor

from rewire.proof import fields
from rewire.proof.facts import Facts, lookup
from rewire.proof.fields import Maker, Shape, text

STEPS = 6
"""Steps of a trajectory, and of what a draft model has read before."""

RESIDUES = 9
"""Residues of a protein."""

ENTITIES = 3
"""Entities marked in a text."""


def number(facts: Facts, name: str) -> int:
    """A whole number of the config; 0 where it has none of this name."""
    value = lookup(facts.config, name)
    return value if isinstance(value, int) else 0


def normal(shape: Shape, salt: str, *size: int) -> Tensor:
    """Normally distributed numbers, (batch, *size)."""
    return torch.randn(shape.batch, *size, generator=shape.generator(salt))


def integers(shape: Shape, salt: str, below: int, *size: int) -> Tensor:
    """Whole numbers from 0, (batch, *size)."""
    return torch.randint(max(1, below), (shape.batch, *size), generator=shape.generator(salt))


# --- Texts ------------------------------------------------------------------------------------------------


def global_attention_mask(facts: Facts, shape: Shape) -> Tensor:
    """Ones at the few tokens that look at all others and are looked at by all, (batch, length)."""
    mask = torch.zeros(shape.batch, shape.length, dtype=torch.long)
    mask[:, : max(1, shape.length // 8)] = 1
    return mask * shape.mask.long()


def entity_ids(facts: Facts, shape: Shape) -> Tensor:
    """Entities of a vocabulary of their own, (batch, entities)."""
    return integers(shape, "entity_ids", number(facts, "entity_vocab_size"), ENTITIES)


def entity_position_ids(facts: Facts, shape: Shape) -> Tensor:
    """Where each entity stands in the text: up to two tokens, (batch, entities, 2); -1 is none."""
    positions = integers(shape, "entity_position_ids", shape.length, ENTITIES, 2)
    positions[:, 0, 1] = -1
    return positions


def entity_attention_mask(facts: Facts, shape: Shape) -> Tensor:
    """Ones at entities that count, (batch, entities)."""
    return torch.ones(shape.batch, ENTITIES, dtype=torch.long)


def xpath_tags_seq(facts: Facts, shape: Shape) -> Tensor:
    """The tags above each token in a page, (batch, length, depth)."""
    tags = number(facts, "max_xpath_tag_unit_embeddings")
    return integers(shape, "xpath_tags_seq", tags, shape.length, number(facts, "max_depth"))


def xpath_subs_seq(facts: Facts, shape: Shape) -> Tensor:
    """The number of each of these tags among its likes, (batch, length, depth)."""
    numbers = number(facts, "max_xpath_subs_unit_embeddings")
    return integers(shape, "xpath_subs_seq", numbers, shape.length, number(facts, "max_depth"))


def input_shape_ids(facts: Facts, shape: Shape) -> Tensor:
    """The written shape of each token, (batch, length)."""
    return integers(shape, "input_shape_ids", number(facts, "shape_vocab_size"), shape.length)


def input_pronunciation_ids(facts: Facts, shape: Shape) -> Tensor:
    """The pronunciation of each token, (batch, length)."""
    return integers(shape, "input_pronunciation_ids", number(facts, "pronunciation_vocab_size"), shape.length)


def protein_input_ids(facts: Facts, shape: Shape) -> Tensor:
    """The protein that a text speaks of, (batch, residues)."""
    vocabulary = lookup(getattr(facts.config, "protein_encoder_config", None), "vocab_size") or 0
    return integers(shape, "protein_input_ids", vocabulary - 5, RESIDUES) + 5


def protein_attention_mask(facts: Facts, shape: Shape) -> Tensor:
    """Ones at the residues that count, (batch, residues)."""
    return torch.ones(shape.batch, RESIDUES, dtype=torch.long)


def langs(facts: Facts, shape: Shape) -> Tensor | None:
    """The language of each token, (batch, length)."""
    languages = number(facts, "n_langs")
    return integers(shape, "langs", languages, shape.length) if languages > 1 else None


def lang_ids(facts: Facts, shape: Shape) -> Tensor | None:
    """The language of each text, (batch,)."""
    languages = lookup(facts.config, "languages")
    return integers(shape, "lang_ids", len(languages)) if isinstance(languages, list | tuple) else None


def self_conditioning_logits(facts: Facts, shape: Shape) -> Tensor:
    """What an earlier round of denoising thought of the decoder's tokens, (batch, length // 2 + 2, vocabulary)."""
    return normal(shape, "self_conditioning_logits", shape.length // 2 + 2, facts.vocab_size)


def inputs(facts: Facts, shape: Shape) -> Tensor | None:
    """What a Perceiver reads: tokens where it embeds them, else numbers, (batch, steps[, features])."""
    if not number(facts, "d_latents"):
        return None
    parts = [module for module in facts.model.modules() if hasattr(module, "input_preprocessor")]
    preprocessor = next((part.input_preprocessor for part in parts), None)
    if preprocessor is None:
        return normal(shape, "inputs", STEPS, number(facts, "d_model"))
    takes_tokens = "Text" in type(preprocessor).__name__
    return text(facts, shape, shape.batch, STEPS, "inputs") if takes_tokens else None


# --- Drafts -----------------------------------------------------------------------------------------------


def noise_embeds(facts: Facts, shape: Shape) -> Tensor:
    """The block that a draft model fills, embedded; (batch, block, hidden size)."""
    return normal(shape, "noise_embeds", number(facts, "block_size"), number(facts, "hidden_size"))


def context_hidden_states(facts: Facts, shape: Shape) -> Tensor:
    """Hidden states of several layers of the model that a draft is for, side by side; (batch, steps, sizes)."""
    layers = lookup(facts.config, "target_layer_ids")
    return normal(shape, "context_hidden_states", STEPS, number(facts, "hidden_size") * len(layers))


def position_ids(facts: Facts, shape: Shape) -> Tensor | None:
    """Positions of context and block, for draft models, which have no other way to know them."""
    if "noise_embeds" not in facts.accepts:
        return None
    return torch.arange(STEPS + number(facts, "block_size")).expand(shape.batch, -1).clone()


def attention_mask(facts: Facts, shape: Shape) -> Tensor | None:
    """As for any text; a block that a draft model fills sees itself and all its context, (batch, 1, block, all)."""
    if "noise_embeds" not in facts.accepts:
        return fields.attention_mask(facts, shape)
    block = number(facts, "block_size")
    return torch.ones(shape.batch, 1, block, STEPS + block, dtype=torch.bool)


# --- Time series ------------------------------------------------------------------------------------------


def past_length(facts: Facts) -> int:
    """Steps of the past that a forecast is made from."""
    lags = lookup(facts.config, "lags_sequence")
    return number(facts, "context_length") + (max(lags) if isinstance(lags, list | tuple) else 0)


def variables(facts: Facts) -> tuple[int, ...]:
    """Size of the last dimension of a series, which only series of several variables have."""
    channels = number(facts, "num_input_channels") or number(facts, "input_size")
    return (channels,) if number(facts, "num_input_channels") or channels > 1 else ()


def past_values(facts: Facts, shape: Shape) -> Tensor:
    """The past of a series, (batch, steps[, variables])."""
    return normal(shape, "past_values", past_length(facts), *variables(facts))


def past_observed_mask(facts: Facts, shape: Shape) -> Tensor:
    """Ones where the past was seen, which is nearly everywhere; shaped like it."""
    size = (shape.batch, past_length(facts), *variables(facts))
    return torch.rand(size, generator=shape.generator("past_observed_mask")).gt(0.1).float()


def past_values_padding(facts: Facts, shape: Shape) -> Tensor:
    """Ones at the steps that only fill up, the first patch; (batch, steps)."""
    padding = torch.zeros(shape.batch, past_length(facts), dtype=torch.long)
    padding[:, : number(facts, "patch_length") // 2] = 1
    return padding


def freq(facts: Facts, shape: Shape) -> Tensor:
    """How often a series was measured, (batch, 1)."""
    return integers(shape, "freq", number(facts, "freq_size"), 1)


def _time_features(facts: Facts, shape: Shape, salt: str, steps: int) -> Tensor:
    features = number(facts, "num_time_features") + number(facts, "num_dynamic_real_features")
    return normal(shape, salt, steps, features)


def past_time_features(facts: Facts, shape: Shape) -> Tensor:
    """What is known of each step of the past, (batch, steps, features)."""
    return _time_features(facts, shape, "past_time_features", past_length(facts))


def future_time_features(facts: Facts, shape: Shape) -> Tensor:
    """What is known of each step to come, (batch, steps, features)."""
    return _time_features(facts, shape, "future_time_features", number(facts, "prediction_length"))


def future_values(facts: Facts, shape: Shape) -> Tensor | None:
    """The steps to come, which train the decoder; (batch, steps[, variables])."""
    if lookup(facts.config, "lags_sequence") is None:
        return None
    return normal(shape, "future_values", number(facts, "prediction_length"), *variables(facts))


def static_categorical_features(facts: Facts, shape: Shape) -> Tensor | None:
    """Kinds that a series has as a whole, (batch, features)."""
    features, kinds = number(facts, "num_static_categorical_features"), lookup(facts.config, "cardinality")
    return integers(shape, "static_categorical_features", min(kinds), features) if features else None


def static_real_features(facts: Facts, shape: Shape) -> Tensor | None:
    """Numbers that a series has as a whole, (batch, features)."""
    features = number(facts, "num_static_real_features")
    return normal(shape, "static_real_features", features) if features else None


# --- Trajectories -----------------------------------------------------------------------------------------


def _of_trajectory(name: str, size: str | None) -> Maker:
    """A maker of one number, or as many as the config says under `size`, for each step of a trajectory."""

    def make(facts: Facts, shape: Shape) -> Tensor | None:
        if not number(facts, "max_ep_len"):
            return None
        return normal(shape, name, STEPS, number(facts, size) if size else 1)

    return make


def timesteps(facts: Facts, shape: Shape) -> Tensor | None:
    """The number of each step of a trajectory, (batch, steps)."""
    if not number(facts, "max_ep_len"):
        return None
    return torch.arange(STEPS).expand(shape.batch, -1).clone()


MAKERS: dict[str, Maker] = {
    "global_attention_mask": global_attention_mask,
    "entity_ids": entity_ids,
    "entity_position_ids": entity_position_ids,
    "entity_attention_mask": entity_attention_mask,
    "xpath_tags_seq": xpath_tags_seq,
    "xpath_subs_seq": xpath_subs_seq,
    "input_shape_ids": input_shape_ids,
    "input_pronunciation_ids": input_pronunciation_ids,
    "protein_input_ids": protein_input_ids,
    "protein_attention_mask": protein_attention_mask,
    "langs": langs,
    "lang_ids": lang_ids,
    "self_conditioning_logits": self_conditioning_logits,
    "inputs": inputs,
    "noise_embeds": noise_embeds,
    "context_hidden_states": context_hidden_states,
    "position_ids": position_ids,
    "attention_mask": attention_mask,
    "past_values": past_values,
    "past_observed_mask": past_observed_mask,
    "observed_mask": past_observed_mask,
    "past_values_padding": past_values_padding,
    "freq": freq,
    "past_time_features": past_time_features,
    "future_time_features": future_time_features,
    "future_values": future_values,
    "static_categorical_features": static_categorical_features,
    "static_real_features": static_real_features,
    "states": _of_trajectory("states", "state_dim"),
    "actions": _of_trajectory("actions", "act_dim"),
    "rewards": _of_trajectory("rewards", None),
    "returns_to_go": _of_trajectory("returns_to_go", None),
    "timesteps": timesteps,
}
