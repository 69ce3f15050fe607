"""Files of safetensors made by hand, right and wrong, for the tests of `rewire.checkpoint`."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from rewire.checkpoint import DTYPES, INDEX, SINGLE, shard_name

Parts = Mapping[str, tuple[str, list[int]]]  # name → element type and shape


def described(parts: Parts) -> dict[str, Any]:
    """The header's object for tensors that lie one after the other."""
    header: dict[str, Any] = {}
    start = 0
    for name, (dtype, shape) in parts.items():
        stop = start + size(dtype, shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}
        start = stop
    return header


def size(dtype: str, shape: list[int]) -> int:
    count = DTYPES[dtype]
    for length in shape:
        count *= length
    return count // 8


def raw(header: str | bytes | Mapping[str, Any], body: int | bytes = 0) -> bytes:
    """A file with this header, whatever is wrong with it, and a body of so many bytes."""
    if isinstance(header, Mapping):
        header = json.dumps(header, separators=(",", ":"))
    text = header if isinstance(header, bytes) else header.encode()
    return struct.pack("<Q", len(text)) + text + (bytes(body) if isinstance(body, int) else body)


def whole(parts: Parts) -> bytes:
    """A right file; its bytes count up, so that no two places look alike."""
    total = sum(size(dtype, shape) for dtype, shape in parts.values())
    return raw(described(parts), bytes(number % 251 for number in range(total)))


def single(folder: Path, data: bytes) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / SINGLE).write_bytes(data)
    return folder


def sharded(folder: Path, *shards: Parts, weight_map: Mapping[str, Any] | None = None) -> Path:
    """A checkpoint in shards, with a right index unless another is given."""
    folder.mkdir(exist_ok=True, parents=True)
    names = [shard_name(number + 1, max(len(shards), 2)) for number in range(len(shards))]
    for name, parts in zip(names, shards, strict=True):
        (folder / name).write_bytes(whole(parts))
    right = {tensor: name for name, parts in zip(names, shards, strict=True) for tensor in parts}
    index(folder, right if weight_map is None else weight_map)
    return folder


def index(folder: Path, weight_map: Mapping[str, Any], **metadata: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": metadata, "weight_map": weight_map}))


def library_reads(path: Path) -> dict[str, list[int]]:
    """What the format's own library finds: names and shapes. Raises `SafetensorError` as it does."""
    with safe_open(path, "np") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
