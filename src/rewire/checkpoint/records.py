"""What is known of a checkpoint once all its headers have been read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies. A checkpoint has one per tensor, so it must stay small (some 400 bytes with its name)."""

    name: str
    dtype: str  # a key of DTYPES
    shape: tuple[int, ...]
    shard: int  # index into Checkpoint.shards
    start: int  # offset of its first byte in the file
    stop: int  # offset of the byte after its last


@dataclass(frozen=True)
class Shard:
    """One file of a checkpoint, as it was when its header was read."""

    name: str
    path: Path  # links resolved
    size: int  # bytes
    mtime_ns: int
    inode: tuple[int, int]  # device and number: two names of one file agree in it
    header_hash: str  # SHA-256 of the length and the header
    metadata: Mapping[str, str]
    body_start: int  # offset of the first byte after the header


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose headers, index and configuration have been read and found right. No weights are in memory."""

    folder: Path
    shards: tuple[Shard, ...]  # in the order of their names
    tensors: Mapping[str, TensorInfo]  # in the order in which they lie on disk, shard by shard
    config: Mapping[str, Any] | None  # config.json; None if there is none
    ignored: tuple[str, ...] = ()  # other files of weights in the folder (variants, pickles): not read
    repaired: bool = False  # the index was made anew from the shards

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the names, sizes and headers of all shards. Copies on other machines agree in it."""
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(f"{shard.name}\0{shard.size}\0{shard.header_hash}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()

    @cached_property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors together; what an index calls `total_size`."""
        return sum(info.stop - info.start for info in self.tensors.values())
