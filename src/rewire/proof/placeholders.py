"""Images, videos and sounds inside a text: which tokens stand for them, and how many.

A model that mixes them into its text puts their features where placeholder tokens stand. How many it takes is
asked of the model: of `get_image_features`, `get_video_features` and `get_audio_features`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rewire.proof.execution import placement
from rewire.proof.facts import Facts, lookup

TEXT_KIND, IMAGE_KIND, VIDEO_KIND, AUDIO_KIND = 0, 1, 2, 3
"""What `mm_token_type_ids` says of a token."""

MASKS = frozenset({"image_features", "video_features"})
"""Arguments of `get_placeholder_mask` where it finds the places of images and of videos in one call."""


@dataclass(frozen=True)
class Run:
    """`count` tokens `token` in a row, which stand for something of the kind `kind`."""

    token: int
    count: int
    kind: int = TEXT_KIND


@dataclass(frozen=True)
class Modality:
    """Something that enters a text through placeholders.

    Attributes:
        name: for people.
        kind: its number in `mm_token_type_ids`.
        content: arguments one of which holds the thing itself.
        features: the method that makes features of it.
        config: the config of its tower, which may be left out on purpose.
        tokens: config values that name the placeholder.
        before: config values that name the token in front of the placeholders.
        after: those behind them.
    """

    name: str
    kind: int
    content: frozenset[str]
    features: str
    config: str
    tokens: tuple[str, ...]
    before: tuple[str, ...]
    after: tuple[str, ...]


IMAGE = Modality(
    "image",
    IMAGE_KIND,
    frozenset({"pixel_values"}),
    "get_image_features",
    "vision_config",
    ("image_token_id", "image_token_index", "image_patch_id", "media_placeholder_token_id"),
    ("image_start_token_id", "vision_start_token_id", "boi_token_id", "boi_token_index"),
    ("image_end_token_id", "vision_end_token_id", "eoi_token_id", "eoi_token_index"),
)
VIDEO = Modality(
    "video",
    VIDEO_KIND,
    frozenset({"pixel_values_videos"}),
    "get_video_features",
    "vision_config",
    ("video_token_id", "video_token_index"),
    ("video_start_token_id", "vision_start_token_id"),
    ("video_end_token_id", "vision_end_token_id"),
)
AUDIO = Modality(
    "audio",
    AUDIO_KIND,
    frozenset({"input_features", "input_values", "audio_input_ids"}),
    "get_audio_features",
    "audio_config",
    ("audio_token_id", "audio_token_index"),
    ("audio_start_token_id", "audio_bos_token_id"),
    ("audio_end_token_id", "audio_eos_token_id"),
)
MODALITIES = (IMAGE, VIDEO, AUDIO)

FRAMES = 4
"""Frames of a video, where the model does not say."""

Make = Callable[[str], Any]
"""Makes the argument of a name for one image, video or sound."""


def mixed(facts: Facts) -> tuple[Modality, ...]:
    """What enters the text of a model through placeholders."""
    if "input_ids" not in facts.accepts:
        return ()
    return tuple(one for one in MODALITIES if token_of(facts, one) is not None and _takes(facts, one))


def together(facts: Facts, modalities: Collection[Modality]) -> tuple[tuple[Modality, ...], ...]:
    """The modalities in groups that one text can hold: all, or videos apart from the rest.

    Videos stand apart where the model puts them in the places of images, or looks for one kind only.
    """
    if not {IMAGE, VIDEO} <= set(modalities) or _tells_apart(facts):
        return (tuple(modalities),)
    return tuple(one for one in modalities if one is not VIDEO), (VIDEO,)


def token_of(facts: Facts, modality: Modality) -> int | None:
    """The token that stands for a piece of it, if the config names one inside the vocabulary."""
    return _token(facts, modality.tokens)


def arguments(facts: Facts, modality: Modality) -> frozenset[str]:
    """The arguments of forward that come together with it."""
    method = _method(facts.model, modality.features)
    taken = frozenset(inspect.signature(method).parameters) if method is not None else frozenset()
    return facts.accepts & (taken | modality.content) - {"input_ids", "attention_mask", "token_type_ids"}


def is_required(facts: Facts, modality: Modality, name: str) -> bool:
    """Whether the model cannot make features of it without the argument `name`."""
    method = _method(facts.model, modality.features)
    found = inspect.signature(method).parameters.get(name) if method is not None else None
    return found is not None and found.default is found.empty


def frames_of_video(facts: Facts) -> int:
    """Frames of a video."""
    return int(lookup(facts.config, "frames_per_clip", "num_frames") or FRAMES)


def runs(facts: Facts, modalities: Collection[Modality], make: Make) -> tuple[Run, ...]:
    """The placeholders of one image, one video and one sound, with the tokens that the config puts around them."""
    return tuple(run for modality in modalities for run in _runs(facts, modality, make))


def _runs(facts: Facts, modality: Modality, make: Make) -> Iterator[Run]:
    token, count = _standing_for(facts, modality), _count(facts, modality, make)
    if token is None or not count:
        return
    before, after = _token(facts, modality.before), _token(facts, modality.after)
    if before is not None:
        yield Run(before, 1)
    yield Run(token, count, modality.kind)
    if after is not None:
        yield Run(after, 1)


def _token(facts: Facts, names: tuple[str, ...]) -> int | None:
    found = lookup(facts.config, *names)
    return found if isinstance(found, int) and 0 <= found < facts.vocab_size else None


def _takes(facts: Facts, modality: Modality) -> bool:
    if _queries(facts):
        return "pixel_values" in facts.accepts
    has_tower = getattr(facts.config, modality.config, True) is not None
    return has_tower and bool(modality.content & facts.accepts) and _method(facts.model, modality.features) is not None


def _queries(facts: Facts) -> int:
    """Tokens of one image of models that look at it with a fixed number of queries; 0 for others."""
    found = getattr(facts.config, "num_query_tokens", None)
    return found if isinstance(found, int) and getattr(facts.config, "qformer_config", None) is not None else 0


def _method(model: nn.Module, name: str) -> Callable[..., Any] | None:
    """The method of that name of the outermost module that has it."""
    return next((found for module in model.modules() if callable(found := getattr(module, name, None))), None)


def _count(facts: Facts, modality: Modality, make: Make) -> int:
    """How many rows of features the model makes of one."""
    if _queries(facts):
        return _queries(facts) * (frames_of_video(facts) if modality is VIDEO else 1)
    method = _method(facts.model, modality.features)
    if method is None:
        return 0
    made = {name: make(name) for name in inspect.signature(method).parameters if name in facts.accepts}
    pixels = made.get("pixel_values")
    if isinstance(pixels, Tensor) and pixels.ndim == 5 and not hasattr(facts.model, modality.features):
        made["pixel_values"] = pixels.flatten(0, 1)  # a part of the model takes the images one by one
    with torch.no_grad():
        found = method(**_placed(facts, {name: value for name, value in made.items() if value is not None}))
    return _rows(facts, found)


def _placed(facts: Facts, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    device, dtype = placement(facts.model)
    return {name: _to(value, device, dtype) if isinstance(value, Tensor) else value for name, value in kwargs.items()}


def _to(value: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    return value.to(device, dtype) if value.is_floating_point() else value.to(device)


def _rows(facts: Facts, found: Any) -> int:
    """Rows of the features that a model made, which it may give as one tensor or as one for each image."""
    named = (getattr(found, name, None) for name in ("pooler_output", "last_hidden_state"))
    found = next((one for one in named if one is not None), found)
    # Features of several depths of the tower are put in the same places.
    found = getattr(found, "deepstack_features", [found])[0]
    width = _width(facts)
    return sum(tensor.numel() // _features(tensor, width) for tensor in _tensors(found))


def _features(tensor: Tensor, width: int | None) -> int:
    """Features of a row: along the last dimension, or the first of (channels, rows, columns)."""
    is_map = tensor.ndim == 3 and width is not None and tensor.shape[-1] < min(width, tensor.shape[0])
    return tensor.shape[0 if is_map else -1]


def _tensors(found: Any) -> Iterator[Tensor]:
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, list | tuple):
        for one in found:
            yield from _tensors(one)


def _width(facts: Facts) -> int | None:
    """Features of a token."""
    try:
        width = getattr(facts.model.get_input_embeddings(), "embedding_dim", None)  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return width if isinstance(width, int) else None


# ---------------------------------------------------------------- asking the model what stands where


def _standing_for(facts: Facts, modality: Modality) -> int | None:
    """The token that stands for a piece: the one of the config, or, for a video, the one that the model looks for."""
    token, other = token_of(facts, modality), token_of(facts, IMAGE)
    if modality is not VIDEO or token is None or other is None:
        return token
    method = _method(facts.model, "get_placeholder_mask")
    taken = set(inspect.signature(method).parameters) & MASKS if method is not None else set()
    if taken == {"image_features"}:  # the model looks for images only, and puts videos there as well
        return other
    text = [*_around(facts, VIDEO, other, token)]
    found = _places(facts, text)
    # GLM's models put the frames of a video where image tokens stand, between two tokens of their own.
    return token if found is None or not found[1].any() else text[int(found[1].int().argmax())]


def _tells_apart(facts: Facts) -> bool:
    """Whether the model finds the places of an image and of a video in a text that holds both."""
    image, video = token_of(facts, IMAGE), _standing_for(facts, VIDEO)
    if image is None or video is None:
        return False
    found = _places(facts, [*_around(facts, IMAGE, image), *_around(facts, VIDEO, video)])
    return found is not None and bool(found[0].any() and found[1].any() and not (found[0] & found[1]).any())


def _around(facts: Facts, modality: Modality, *tokens: int) -> Iterator[int]:
    ends = _token(facts, modality.before), _token(facts, modality.after)
    yield from (token for token in (ends[0], *tokens, ends[1]) if token is not None)


def _places(facts: Facts, text: list[int]) -> tuple[Tensor, Tensor] | None:
    """Where the model would put an image and where a video, (length,) each; None where it cannot tell."""
    method = _method(facts.model, "get_placeholder_mask")
    if method is None or not set(inspect.signature(method).parameters) >= MASKS:
        return None
    device, dtype = placement(facts.model)
    if device.type == "meta":
        return None
    ids = torch.tensor([text], device=device)
    masks = method(ids, torch.zeros(1, len(text), _width(facts) or 1, device=device, dtype=dtype))
    image, video = (mask.flatten(2).any(-1)[0] for mask in masks[:2])
    return image, video
