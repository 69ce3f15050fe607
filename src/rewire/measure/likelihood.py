"""Perplexity of a causal language model on a text, averaged over tokens.

A text longer than what a model takes is scored in windows that overlap: each goes on `stride` tokens behind the one
before, and only tokens that no earlier window scored count, with everything before them in the window as context
(https://huggingface.co/docs/transformers/perplexity).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rewire.errors import MeasureError

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and out of how much."""

LONGEST = 2048
"""Tokens in a window, where nobody says and the model would take more."""

_LOGITS = 2**27
"""Numbers in the logits of one batch at most (half a gigabyte in float32)."""


@dataclass(frozen=True)
class Window:
    """Tokens `start` to `stop` go through the model; those from `first` on are scored."""

    start: int
    stop: int
    first: int

    @property
    def scored(self) -> int:
        """Tokens that are scored."""
        return self.stop - self.first


@dataclass(frozen=True)
class Perplexity:
    """What a text cost a model.

    Attributes:
        value: exponential of the mean negative log likelihood of a token.
        tokens: tokens scored; the first of a text never is, for it has no context.
        nats: sum of their negative log likelihoods.
        text_bytes: bytes of the text in UTF-8; 0 if only its tokens were given.
        window: tokens in a window.
        stride: by how many tokens windows follow each other.
        seconds: wall time.
        windows: nats and tokens of each window, for comparing two models window by window.
    """

    value: float
    tokens: int
    nats: float
    text_bytes: int
    window: int
    stride: int
    seconds: float
    windows: tuple[tuple[float, int], ...] = field(repr=False)

    @property
    def bits_per_byte(self) -> float | None:
        """Bits that the text costs per byte: comparable between tokenizers. None without the text."""
        return self.nats / math.log(2) / self.text_bytes if self.text_bytes else None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data, without the single windows."""
        data = asdict(self)
        del data["windows"]
        return {**data, "bits_per_byte": self.bits_per_byte}

    def summary(self) -> str:
        """One line for people."""
        bits = self.bits_per_byte
        per_byte = "" if bits is None else f"; {bits:.4f} bits per byte"
        return (
            f"perplexity {self.value:.4f} over {self.tokens:,} tokens{per_byte} "
            f"(windows of {self.window}, stride {self.stride}; {self.seconds:.1f} s)"
        )


def windows(count: int, window: int, stride: int) -> Iterator[Window]:
    """The windows over `count` tokens.

    >>> list(windows(7, window=4, stride=2))
    [Window(start=0, stop=4, first=1), Window(start=2, stop=6, first=4), Window(start=4, stop=7, first=6)]
    """
    done = 1  # the first token has no context
    for start in range(0, count, stride):
        stop = min(start + window, count)
        first = max(done, start + 1)  # without overlap the first token of each window has no context either
        if stop > first:
            yield Window(start, stop, first)
        done = stop
        if stop == count:
            return


def perplexity(
    model: nn.Module,
    tokens: Tensor | Sequence[int],
    *,
    window: int | None = None,
    stride: int | None = None,
    batch: int | None = None,
    text_bytes: int = 0,
    progress: Progress | None = None,
) -> Perplexity:
    """The perplexity of a causal language model on a text.

    Args:
        model: gives `logits` `[batch, length, vocabulary]`, those of a position for the token after it.
        tokens: the text as token numbers, `[tokens]`.
        window: tokens in a window; by default what the model's configuration allows, 2,048 at most.
        stride: by how many tokens windows follow each other, `window // 2` by default. Shorter ones give tokens
            more context and take longer.
        batch: windows that go through the model together; by default as many as fit into half a gigabyte of logits.
        text_bytes: bytes of the text, for bits per byte.
        progress: called after every batch, with tokens scored.

    Raises:
        MeasureError: the text is too short, the model is no causal language model, or its logits are not finite.
    """
    began = time.perf_counter()
    ids = torch.as_tensor(tokens, dtype=torch.long).flatten()
    window = window or min(_allowed(model), LONGEST, max(len(ids), 2))
    stride = stride or max(window // 2, 1)
    _check(ids, window, stride)
    parts = list(windows(len(ids), window, stride))
    was_training = model.training
    model.eval()
    try:
        vocabulary = _check_causal(model, ids[: min(window, 32)])
        size = batch or max(1, _LOGITS // (window * vocabulary))
        found = list(_scores(model, ids, parts, size, progress))
    finally:
        model.train(was_training)
    nats, count = math.fsum(nats for nats, _ in found), sum(scored for _, scored in found)
    seconds = time.perf_counter() - began
    return Perplexity(math.exp(nats / count), count, nats, text_bytes, window, stride, seconds, tuple(found))


def _allowed(model: nn.Module) -> int:
    """Tokens that the model takes at once, as its configuration says."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"):
        found = getattr(text, name, None)
        if isinstance(found, int) and found > 1:
            return found
    return LONGEST


def _check(ids: Tensor, window: int, stride: int) -> None:
    if window < 2:
        raise MeasureError(f"a window of {window} has no token with context; use at least 2")
    if not 1 <= stride <= window:
        raise MeasureError(f"a stride of {stride} does not fit windows of {window}: it must be from 1 to {window}")
    if len(ids) < window:
        raise MeasureError(
            f"the text has {len(ids)} tokens, fewer than a window of {window}; give a longer text or a smaller window"
        )


def _check_causal(model: nn.Module, ids: Tensor) -> int:
    """Raises `MeasureError` unless later tokens leave the logits of earlier ones alone; returns the vocabulary."""
    logits = _logits(model, ids[None])
    other = ids.clone()
    other[-1] = (int(ids[-1]) + 1) % logits.shape[-1]
    changed = (_logits(model, other[None])[0, :-1] - logits[0, :-1]).abs().max()
    scale = logits.abs().max()
    if changed > 1e-3 * scale:
        raise MeasureError(
            f"{type(model).__name__} is no causal language model: its prediction for a token depends on later tokens. "
            "Perplexity means nothing there; for an encoder compare embeddings (rewire quality)"
        )
    return logits.shape[-1]


@torch.inference_mode()
def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise MeasureError(f"{type(model).__name__} is an encoder-decoder, not a causal language model")
    device = next(model.parameters()).device
    logits = getattr(model(input_ids=ids.to(device)), "logits", None)
    if not isinstance(logits, Tensor) or logits.shape[:2] != ids.shape:
        raise MeasureError(
            f"{type(model).__name__} gives no logits for every token; load it with a language model head"
        )
    return logits


def _scores(
    model: nn.Module, ids: Tensor, parts: Sequence[Window], size: int, progress: Progress | None
) -> Iterator[tuple[float, int]]:
    """Nats and tokens of every window. Windows of one length go together, so that nothing is padded."""
    total, done = sum(part.scored for part in parts), 0
    for _, alike in groupby(parts, key=lambda part: part.stop - part.start):
        group = list(alike)
        for start in range(0, len(group), size):
            some = group[start : start + size]
            yield from _batch(model, ids, some)
            done += sum(part.scored for part in some)
            if progress is not None:
                progress("tokens", done, total)


def _batch(model: nn.Module, ids: Tensor, parts: Sequence[Window]) -> Iterator[tuple[float, int]]:
    logits = _logits(model, torch.stack([ids[part.start : part.stop] for part in parts]))
    for part, row in zip(parts, logits, strict=True):
        before = row[part.first - part.start - 1 : -1].float()
        wanted = ids[part.first : part.stop].to(row.device)
        losses = F.cross_entropy(before, wanted, reduction="none").double()
        if not losses.isfinite().all():
            place = part.first + int((~losses.isfinite()).nonzero()[0])
            raise MeasureError(
                f"the logits for token {place} are not finite; the model is broken there, or its type too narrow"
            )
        yield float(losses.sum()), part.scored


@dataclass(frozen=True)
class Comparison:
    """Two models on one text.

    Attributes:
        before: of the untouched model.
        after: of the edited one.
        ratio: `after` as a multiple of `before`.
        low: lower end of the 95 % interval of the ratio.
        high: its upper end.
    """

    before: Perplexity
    after: Perplexity
    ratio: float
    low: float
    high: float

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data."""
        interval = {"ratio": self.ratio, "low": self.low, "high": self.high}
        return {"before": self.before.to_dict(), "after": self.after.to_dict(), **interval}

    def summary(self) -> str:
        """One line for people."""
        return (
            f"perplexity {self.before.value:.4f} → {self.after.value:.4f}: "
            f"{self.ratio:.5f} times (95 % interval {self.low:.5f}–{self.high:.5f})"
        )


def compare(before: Perplexity, after: Perplexity, *, draws: int = 2000, seed: int = 0) -> Comparison:
    """How many times as large a perplexity is, with a paired bootstrap interval (95 %, percentiles).

    Windows are drawn, not tokens: the losses of tokens that stand together depend on each other. Drawing the same
    windows for both models takes out how hard the text is. Source: Efron and Tibshirani, An Introduction to the
    Bootstrap (1993), ch. 13; paired as in Koehn (2004), Statistical Significance Tests for Machine Translation.

    Raises `MeasureError` unless both were measured on the same windows.
    """
    counts = [count for _, count in before.windows]
    if counts != [count for _, count in after.windows]:
        raise MeasureError("the two perplexities were measured on different windows and cannot be compared")
    difference = torch.tensor([b[0] - a[0] for a, b in zip(before.windows, after.windows, strict=True)]).double()
    weights = torch.tensor(counts).double()
    drawn = torch.randint(len(counts), (draws, len(counts)), generator=torch.Generator().manual_seed(seed))
    ratios = (difference[drawn].sum(1) / weights[drawn].sum(1)).exp()
    low, high = (float(ratios.quantile(share)) for share in (0.025, 0.975))
    return Comparison(before, after, float((difference.sum() / weights.sum()).exp()), low, high)
