"""Texts to tokens: in chunks, ahead of the model, in a thread of their own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from rewire.errors import EncodeError

FIRST, MOST = 512, 8192
"""Texts in the first chunk, and in one at most: each has twice as many as the one before, so that the model starts
soon and long inputs are sorted well."""

_AHEAD = 1
"""Chunks that wait for the model at most."""


@dataclass(frozen=True)
class Chunk:
    """Texts that stand together in the input, as tokens: the values of each of the tokenizer's fields."""

    number: int
    texts: tuple[str, ...]
    fields: Mapping[str, Sequence[Sequence[int]]]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each text."""
        return [len(ids) for ids in self.fields["input_ids"]]

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class Tokens:
    """How a tokenizer is asked."""

    tokenizer: Any
    max_length: int | None
    prompt: str = ""

    def chunk(self, number: int, texts: tuple[str, ...]) -> Chunk:
        """Texts as tokens, without padding. Raises `EncodeError` for what is no text."""
        for text in texts:
            if not isinstance(text, str):
                raise EncodeError(f"texts must be str, but one is {type(text).__name__}: {text!r:.60}")
        given = [self.prompt + text for text in texts] if self.prompt else list(texts)
        longest = self.max_length or _longest(self.tokenizer)
        cut = {"truncation": True, "max_length": longest} if longest else {"truncation": False}
        found = self.tokenizer(given, padding=False, return_attention_mask=False, verbose=False, **cut)
        return Chunk(number, texts, {name: found[name] for name in _fields(self.tokenizer, found)})

    def padded(self, chunk: Chunk, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Some of the texts of a chunk as one batch for the model, `[texts, longest]` each."""
        left = getattr(self.tokenizer, "padding_side", "right") == "left"
        lengths = torch.tensor([len(chunk.fields["input_ids"][number]) for number in numbers])
        width = int(lengths.max()) if len(numbers) else 0
        columns = torch.arange(width)
        real = columns >= (width - lengths)[:, None] if left else columns < lengths[:, None]
        batch = {"attention_mask": real.long()}
        for name, rows in chunk.fields.items():
            values = torch.full((len(numbers), width), _padding(self.tokenizer, name))
            values[real] = torch.tensor([value for number in numbers for value in rows[number]], dtype=torch.long)
            batch[name] = values
        return batch


def _longest(tokenizer: Any) -> int | None:
    """Tokens that the tokenizer's model takes; None where it does not say (it then gives an absurd number)."""
    stated = getattr(tokenizer, "model_max_length", None)
    return int(stated) if stated and stated < 1_000_000 else None


def _fields(tokenizer: Any, found: Mapping[str, Any]) -> list[str]:
    wanted = getattr(tokenizer, "model_input_names", ["input_ids"])
    return [name for name in found if name in wanted and name != "attention_mask"]


def _padding(tokenizer: Any, name: str) -> int:
    found = getattr(tokenizer, {"input_ids": "pad_token_id", "token_type_ids": "pad_token_type_id"}.get(name, ""), None)
    return int(found or 0)  # what stands there is masked


def chunks(texts: Iterable[str], tokens: Tokens, first: int = 0) -> Iterator[Chunk]:
    """The texts in chunks, tokenised ahead of what takes them; `first` is the number of the first chunk.

    What goes wrong while reading or tokenising is raised here. Nothing is read far ahead, so any number of texts
    takes the same memory.
    """
    ready: queue.Queue[Chunk | BaseException | None] = queue.Queue(_AHEAD)
    stop = threading.Event()
    work = threading.Thread(target=_tokenise, args=(texts, tokens, first, ready, stop), daemon=True)
    work.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        _drain(ready)
        work.join()


def _tokenise(
    texts: Iterable[str],
    tokens: Tokens,
    first: int,
    ready: queue.Queue[Chunk | BaseException | None],
    stop: threading.Event,
) -> None:
    try:
        for number, some in enumerate(cut(texts, first), first):
            ready.put(tokens.chunk(number, some))
            if stop.is_set():
                return
        ready.put(None)
    except BaseException as error:  # it belongs to the thread that waits
        ready.put(error)


def _drain(ready: queue.Queue[Any]) -> None:
    """Lets a thread that waits for room go on to its end."""
    try:
        while True:
            ready.get_nowait()
    except queue.Empty:
        pass


def cut(texts: Iterable[str], first: int = 0) -> Iterator[tuple[str, ...]]:
    """The texts in tuples of the sizes of chunks `first`, `first + 1`, …

    >>> [len(some) for some in cut("x" for _ in range(3000))]
    [512, 1024, 1464]
    """
    source = iter(texts)
    number = first
    while some := tuple(islice(source, size_of(number))):
        yield some
        number += 1


def size_of(number: int) -> int:
    """Texts in chunk `number`: the same in every run, so that one that was interrupted goes on alike."""
    return int(min(FIRST * 2**number, MOST)) if number < 16 else MOST


Advance = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and out of how much (0: unknown)."""
