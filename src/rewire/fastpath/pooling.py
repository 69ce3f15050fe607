"""From the hidden states of a sequence to one vector, as sentence-transformers defines it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rewire.errors import EncodeError


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    return _sum(hidden, mask) / _count(mask)


def _mean_sqrt(hidden: Tensor, mask: Tensor) -> Tensor:
    return _sum(hidden, mask) / _count(mask).sqrt()


def _weighted_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """Later tokens weigh more: the n-th real token counts n times."""
    weights = mask.cumsum(1) * mask
    return _sum(hidden, weights) / _count(weights)


def _max(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden.masked_fill(mask.unsqueeze(-1) == 0, -torch.inf).amax(1)


def _first(hidden: Tensor, mask: Tensor) -> Tensor:
    return _pick(hidden, mask.to(torch.int8).argmax(1))


def _last(hidden: Tensor, mask: Tensor) -> Tensor:
    return _pick(hidden, (mask.cumsum(1) * mask).argmax(1))


def _sum(hidden: Tensor, mask: Tensor) -> Tensor:
    return (hidden * mask.unsqueeze(-1).to(hidden.dtype)).sum(1)


def _count(mask: Tensor) -> Tensor:
    return mask.sum(1, keepdim=True).to(torch.float32).clamp(min=1e-9)


def _pick(hidden: Tensor, positions: Tensor) -> Tensor:
    return hidden[torch.arange(len(hidden), device=hidden.device), positions]


_MODES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cls": _first,
    "max": _max,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_sqrt,
    "weightedmean": _weighted_mean,
    "lasttoken": _last,
}

POOLINGS: tuple[str, ...] = (*_MODES, "pooler")
"""What `pooling` may name; `pooler` is the model's own."""


@dataclass(frozen=True)
class Pooling:
    """How sequences become vectors.

    Attributes:
        modes: one or more of `POOLINGS`; the vectors of several are put side by side.
        normalize: whether vectors get length 1.
        max_length: tokens of a text, special ones included; what exceeds them is cut off. None: what the tokenizer
            says.
        prompt: text put in front of every text.
    """

    modes: tuple[str, ...] = ("mean",)
    normalize: bool = False
    max_length: int | None = None
    prompt: str = ""

    def __post_init__(self) -> None:
        unknown = [mode for mode in self.modes if mode not in POOLINGS]
        if unknown or not self.modes:
            raise EncodeError(f"pooling {', '.join(unknown) or '(none)'} is unknown; use {', '.join(POOLINGS)}")
        if self.max_length is not None and self.max_length < 1:
            raise EncodeError(f"max_length must be at least 1, but is {self.max_length}")

    def __call__(self, outputs: Any, mask: Tensor) -> Tensor:
        """Vectors `[sequences, width]`, float32.

        Args:
            outputs: what the model gave: `last_hidden_state` `[sequences, length, hidden]`, perhaps `pooler_output`.
            mask: `[sequences, length]`, 1 for real tokens.
        """
        found = torch.cat([self._one(mode, outputs, mask) for mode in self.modes], dim=1)
        return F.normalize(found, dim=1) if self.normalize else found

    def _one(self, mode: str, outputs: Any, mask: Tensor) -> Tensor:
        if mode != "pooler":
            return _MODES[mode](_hidden(outputs).float(), mask)
        pooled = getattr(outputs, "pooler_output", None)
        if pooled is None:
            raise EncodeError("this model has no pooler; use another pooling, such as mean")
        return pooled.float()  # type: ignore[no-any-return]


def _hidden(outputs: Any) -> Tensor:
    for name in ("last_hidden_state", "encoder_last_hidden_state"):
        found = getattr(outputs, name, None)
        if isinstance(found, Tensor):
            return found
    raise EncodeError(
        f"the model gives {type(outputs).__name__} without hidden states; encode with the base model (AutoModel)"
    )


def saved_pooling(folder: Path) -> Pooling | None:
    """What the folder of a sentence-transformers model says; None for any other folder.

    Raises `EncodeError` for modules that are neither transformer, pooling nor normalisation, and for pooling that
    leaves out the prompt.
    """
    modules = _read(folder / "modules.json")
    if not modules:
        return None
    kinds = {str(module.get("type", "")).rpartition(".")[2]: str(module.get("path", "")) for module in modules}
    others = sorted(set(kinds) - {"Transformer", "Pooling", "Normalize"})
    if others or "Pooling" not in kinds:
        raise EncodeError(
            f"{folder} has the modules {', '.join(kinds)}; only Transformer, Pooling and Normalize are known here. "
            "Name a pooling (--pooling mean) to leave the others out"
        )
    settings = _read(folder / kinds["Pooling"] / "config.json") or {}
    found = Pooling(_modes(settings), "Normalize" in kinds, _max_length(folder, kinds.get("Transformer", "")))
    found = replace(found, prompt=_default_prompt(folder))
    if found.prompt and settings.get("include_prompt") is False:
        raise EncodeError(f"{folder} pools without the tokens of its prompt, which is not supported; name a pooling")
    return found


def _modes(settings: Mapping[str, Any]) -> tuple[str, ...]:
    stated = settings.get("pooling_mode")
    if stated:
        return (stated,) if isinstance(stated, str) else tuple(stated)
    keys = {
        "pooling_mode_cls_token": "cls",
        "pooling_mode_max_tokens": "max",
        "pooling_mode_mean_tokens": "mean",
        "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
        "pooling_mode_weightedmean_tokens": "weightedmean",
        "pooling_mode_lasttoken": "lasttoken",
    }
    return tuple(mode for key, mode in keys.items() if settings.get(key)) or ("mean",)


def _max_length(folder: Path, transformer: str) -> int | None:
    settings = _read(folder / transformer / "sentence_bert_config.json") or {}
    found = settings.get("max_seq_length")
    return found if isinstance(found, int) and found > 0 else None


def _default_prompt(folder: Path) -> str:
    settings = _read(folder / "config_sentence_transformers.json") or {}
    prompts: Mapping[str, str] = settings.get("prompts") or {}
    return prompts.get(settings.get("default_prompt_name") or "", "")


def _read(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise EncodeError(f"{path} cannot be read: {error}") from error


def pooling_of(names: str | Sequence[str]) -> tuple[str, ...]:
    """One name or several as a tuple."""
    return (names,) if isinstance(names, str) else tuple(names)
