"""Texts in, vectors out, in the order of the texts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rewire.errors import EncodeError
from rewire.fastpath.batches import batches
from rewire.fastpath.pooling import Pooling, pooling_of
from rewire.fastpath.tokens import Advance, Chunk, Tokens, chunks

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Vectors = NDArray[np.float32]

BATCH_TOKENS = 4096
"""Tokens in one batch: enough for full speed, and few enough for the caches of a processor."""


def encode(
    model: nn.Module,
    tokenizer: Any,
    texts: Iterable[str],
    *,
    pooling: str | Sequence[str] = "mean",
    normalize: bool = False,
    batch_tokens: int = BATCH_TOKENS,
    max_length: int | None = None,
    prompt: str = "",
    progress: Advance | None = None,
) -> Vectors:
    """Vectors of texts, `[texts, width]`, float32, in the order of the texts.

    Texts are sorted by their tokens and go through the model in batches of at most `batch_tokens` tokens, while the
    next ones are tokenised. Vectors are those of sentence-transformers with the same pooling.

    Args:
        model: an encoder, best packed (`rewire.plan.Pack`). It is put into eval mode meanwhile.
        tokenizer: its tokenizer (`AutoTokenizer.from_pretrained`).
        texts: any number of texts; an iterator is read as it goes.
        pooling: `mean`, `cls`, `max`, `mean_sqrt_len_tokens`, `weightedmean`, `lasttoken` or `pooler`; of several
            the vectors are put side by side.
        normalize: whether vectors get length 1.
        batch_tokens: tokens of one batch, padding included.
        max_length: tokens of a text at most; what exceeds them is cut off. By default what the tokenizer says.
        prompt: text put in front of every text.
        progress: called as it goes, with the number of texts done.

    Raises:
        EncodeError: the settings do not fit the model, or something is no text.

    >>> from rewire.zoo import tiny_model
    >>> encode(tiny_model("bert"), None, [])
    array([], shape=(0, 0), dtype=float32)
    """
    import numpy as np

    if isinstance(texts, str):
        raise EncodeError("texts must be a list of texts (or another iterable), but is one text; put it into a list")
    how = Pooling(pooling_of(pooling), normalize, max_length, prompt)
    total = len(texts) if isinstance(texts, Sequence) else 0
    parts = list(encode_stream(model, tokenizer, texts, how, batch_tokens=batch_tokens, total=total, progress=progress))
    return np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)


def encode_stream(
    model: nn.Module,
    tokenizer: Any,
    texts: Iterable[str],
    pooling: Pooling,
    *,
    batch_tokens: int = BATCH_TOKENS,
    first: int = 0,
    total: int = 0,
    progress: Advance | None = None,
) -> Iterator[Vectors]:
    """As `encode`, chunk by chunk, in memory that does not grow with the number of texts.

    `first` is the number of the first chunk, for a run that goes on where another ended; `total` the number of
    texts, where it is known.
    """
    if batch_tokens < 1:
        raise EncodeError(f"batch_tokens must be at least 1, but is {batch_tokens}")
    tokens = Tokens(tokenizer, pooling.max_length, pooling.prompt)
    was_training = model.training
    model.eval()
    done = 0
    try:
        for chunk in chunks(texts, tokens, first):
            yield _vectors(model, tokens, chunk, pooling, batch_tokens, _from(progress, done, total))
            done += len(chunk)
    finally:
        model.train(was_training)


def _from(progress: Advance | None, start: int, total: int) -> Advance | None:
    if progress is None:
        return None
    return lambda text, done, _: progress(text, start + done, total)


def _vectors(
    model: nn.Module, tokens: Tokens, chunk: Chunk, pooling: Pooling, budget: int, progress: Advance | None
) -> Vectors:
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    found: Tensor | None = None
    done = 0
    for numbers in batches(chunk.lengths, budget):
        vectors = _batch(model, tokens.padded(chunk, numbers), pooling, device)
        if found is None:
            found = torch.empty((len(chunk), vectors.shape[1]))
        found[torch.tensor(numbers)] = vectors
        done += len(numbers)
        if progress is not None:
            progress("texts", done, 0)
    assert found is not None  # no chunk is empty
    return found.numpy()


@torch.inference_mode()
def _batch(model: nn.Module, batch: dict[str, Tensor], pooling: Pooling, device: torch.device) -> Tensor:
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    return pooling(model(**batch), batch["attention_mask"]).cpu()
