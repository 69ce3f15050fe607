"""A file of texts in, a file of vectors out."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from rewire.errors import OutputError
from rewire.fastpath.encode import BATCH_TOKENS, encode_stream
from rewire.fastpath.pooling import Pooling
from rewire.fastpath.texts import open_texts
from rewire.fastpath.tokens import Advance, cut
from rewire.fastpath.vectors import VectorFile


@dataclass(frozen=True)
class EncodedFile:
    """What was written.

    Attributes:
        path: the file of vectors.
        rows: vectors in it.
        width: of each.
        resumed: those of them that an earlier run had made.
        seconds: wall time of this run.
    """

    path: Path
    rows: int
    width: int
    resumed: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data."""
        return {**asdict(self), "path": str(self.path)}


def encode_file(
    model: nn.Module,
    tokenizer: Any,
    source: str | Path,
    out: Path,
    pooling: Pooling,
    *,
    field: str | None = None,
    batch_tokens: int = BATCH_TOKENS,
    identity: Mapping[str, Any] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Advance | None = None,
) -> EncodedFile:
    """Writes a vector for every text of a file, in memory that does not grow with it.

    The output appears whole or not at all. What an interrupted run has done stays beside it, and `resume` goes on
    from there with the same result.

    Args:
        model: an encoder.
        tokenizer: its tokenizer.
        source: a file of texts, or `-` (see `rewire.fastpath.texts`).
        out: where to; `.npy` (float32, `[texts, width]`) or `.parquet` (a column `vector`).
        pooling: how sequences become vectors.
        field: key or column of the texts.
        batch_tokens: tokens of one batch.
        identity: what besides the texts and the pooling the vectors depend on (the model); a run can be resumed
            only with the same.
        resume: whether to go on with an interrupted run, if there is one.
        overwrite: whether an existing file may be replaced.
        progress: called as it goes.

    Raises:
        EncodeError: the texts cannot be read, or the settings do not fit.
        OutputError: the output cannot be written, exists, or belongs to another run.
    """
    start = time.perf_counter()
    settings = {**asdict(pooling), "modes": list(pooling.modes), "batch_tokens": batch_tokens, **(identity or {})}
    with open_texts(source, field) as texts, _vector_file(out, settings, resume, overwrite) as file:
        resumed, first = file.state.rows, file.state.chunks
        _skip(file, texts, resumed)
        watched = _Watched(texts)
        report = None if progress is None else (lambda text, done, total: progress(text, resumed + done, total))
        for vectors in encode_stream(
            model, tokenizer, watched, pooling, batch_tokens=batch_tokens, first=first, progress=report
        ):
            file.add(watched.take(len(vectors)), vectors)
        file.finish()
        return EncodedFile(out, file.state.rows, file.state.width, resumed, time.perf_counter() - start)


@contextmanager
def _vector_file(out: Path, settings: Mapping[str, Any], resume: bool, overwrite: bool) -> Iterator[VectorFile]:
    file = VectorFile(out, settings, resume=resume, overwrite=overwrite)
    try:
        yield file
    finally:
        file.close()


def _skip(file: VectorFile, texts: Iterator[str], rows: int) -> None:
    """Passes over the texts that are done, and makes sure that they are the same."""
    left = rows
    for some in cut(_first(texts, rows)):
        file.skip(some)
        left -= len(some)
    if left:
        raise OutputError(f"{file.part} holds {rows:,} vectors, but there are {rows - left:,} texts only")
    file.check_skipped()


def _first(texts: Iterator[str], count: int) -> Iterator[str]:
    for _ in range(count):
        text = next(texts, None)
        if text is None:
            return
        yield text


class _Watched:
    """Texts, with those kept that have been read and not yet been taken."""

    def __init__(self, texts: Iterator[str]) -> None:
        self.texts = texts
        self.read: deque[str] = deque()  # filled by one thread, emptied by another

    def __iter__(self) -> Iterator[str]:
        for text in self.texts:
            self.read.append(text)
            yield text

    def take(self, count: int) -> tuple[str, ...]:
        """The next texts, in order."""
        return tuple(self.read.popleft() for _ in range(count))
