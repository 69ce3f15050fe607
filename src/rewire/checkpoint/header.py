"""Reads the header of a safetensors file, strictly.

The format (https://github.com/huggingface/safetensors, "Format"): eight bytes that give the length of the header
(little-endian), the header (a JSON object), then the bytes of the tensors, without holes. The rules are those of
its library, and stricter where a file could be read in two ways: a name given twice is refused even where both
mean the same bytes, as is a key given twice inside an entry.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from rewire.checkpoint.dtypes import DTYPES, tensor_bytes
from rewire.checkpoint.faults import Faults
from rewire.checkpoint.reading import read_bytes
from rewire.checkpoint.records import TensorInfo
from rewire.checkpoint.strict_json import JsonError, expect_end, read_object, read_value, shown

LENGTH = 8  # bytes of the length that a file begins with
LONGEST = 100_000_000  # bytes of a header; the limit of the format's own library
METADATA = "__metadata__"

AGAIN = "A damaged file has to be downloaded or saved again."

_WHOLE = r"(?:0|[1-9][0-9]{0,18})"
# An entry as every common writer writes it. Others are read by the general, slower way.
_ENTRY = re.compile(
    rf'\{{"dtype":"([A-Z0-9_]+)","shape":\[((?:{_WHOLE}(?:,{_WHOLE})*)?)\],"data_offsets":\[({_WHOLE}),({_WHOLE})\]\}}'
)
_FIELDS = ("dtype", "shape", "data_offsets")
_MOST = 2**64 - 1


@dataclass(frozen=True, slots=True)
class Header:
    """The header of one file."""

    size: int  # bytes of the whole file
    body_start: int
    digest: str  # SHA-256 of the length and the header
    metadata: Mapping[str, str]
    tensors: list[TensorInfo]  # in the order in which they lie in the file


def read_header(handle: int, shard: int, name: str, faults: Faults) -> Header | None:
    """The header of an open file; None if it has faults, which go to `faults`.

    Args:
        handle: a read-only handle.
        shard: the number that the tensors are to carry.
        name: what the file is called in messages.
        faults: takes every fault found.

    Raises:
        CheckpointError: the file became shorter while it was read.
        OSError: the device reports an error.
    """
    size = os.fstat(handle).st_size
    raw = _raw_header(handle, size, name, lambda message: faults.add(message, file=name, advice=AGAIN))
    if raw is None:
        return None
    digest = hashlib.sha256(raw).hexdigest()
    body_start = len(raw)
    try:
        text = str(memoryview(raw)[LENGTH:], "utf-8")
    except UnicodeDecodeError as error:
        faults.add(f"its header is no UTF-8 (byte {LENGTH + error.start})", file=name, advice=AGAIN)
        return None
    del raw
    found = len(faults.issues)
    reader = _Reader(text, shard, name, body_start, faults)
    reader.read()
    tensors = reader.in_order(size)
    if len(faults.issues) > found:
        return None
    return Header(size, body_start, digest, reader.metadata, tensors)


def header_digest(handle: int, name: str) -> str | None:
    """SHA-256 of the length and header of an open file; None if it has no header of a possible length."""
    raw = _raw_header(handle, os.fstat(handle).st_size, name, lambda _: None)
    return None if raw is None else hashlib.sha256(raw).hexdigest()


def _raw_header(handle: int, size: int, name: str, fault: Callable[[str], None]) -> bytearray | None:
    """Length and header as they stand in the file. A length is believed only where the file is as long."""
    if size < LENGTH:
        fault("is empty" if not size else f"is cut off: it has {size} bytes, and its length alone takes {LENGTH}")
        return None
    length = int.from_bytes(read_bytes(handle, 0, LENGTH, name), "little")
    if length > LONGEST:
        fault(f"claims a header of {length:,} bytes; {LONGEST:,} are the most (is it a safetensors file at all?)")
        return None
    if LENGTH + length > size:
        fault(f"is cut off in its header: that takes {length:,} bytes, the whole file has {size:,}")
        return None
    return read_bytes(handle, 0, LENGTH + length, name)


class _Reader:
    """Reads the text of one header into tensors, metadata and faults."""

    def __init__(self, text: str, shard: int, name: str, body_start: int, faults: Faults) -> None:
        self.text = text
        self.shard = shard
        self.name = name
        self.body_start = body_start
        self.faults = faults
        self.tensors: dict[str, TensorInfo] = {}
        self.metadata: Mapping[str, str] = {}
        self._metadata_seen = False
        self._all_placed = True  # every entry says where its tensor lies
        self._shapes: dict[str, tuple[int, ...]] = {}  # layers repeat their shapes; one tuple serves all

    def read(self) -> None:
        try:
            expect_end(self.text, read_object(self.text, 0, self._member))
        except JsonError as error:
            self._all_placed = False
            self._fault(f"its header is damaged: {error}")

    def in_order(self, size: int) -> list[TensorInfo]:
        """The tensors as they lie in the file of `size` bytes, which they must cover whole and once."""
        tensors = sorted(self.tensors.values(), key=attrgetter("start", "stop"))
        if self._all_placed:
            self._check_cover(tensors, size)
        return tensors

    def _fault(self, message: str, tensor: str | None = None) -> None:
        self.faults.add(message, file=self.name, tensor=tensor, advice=AGAIN)

    def _member(self, key: str, at: int) -> int:
        if key == METADATA:
            return self._read_metadata(at)
        found = _ENTRY.match(self.text, at)
        if found and found[1] in DTYPES:
            self._add(key, found[1], self._shape(found[2]), int(found[3]), int(found[4]))
            return found.end()
        value, end = read_value(self.text, at)
        self._read_entry(key, value)
        return end

    def _shape(self, text: str) -> tuple[int, ...]:
        shape = self._shapes.get(text)
        if shape is None:
            shape = self._shapes[text] = tuple(map(int, text.split(","))) if text else ()
        return shape

    def _read_metadata(self, at: int) -> int:
        value, end = read_value(self.text, at)
        if self._metadata_seen:
            self._fault(f"{METADATA} is given twice")
        self._metadata_seen = True
        if value is not None and not isinstance(value, dict):
            self._fault(f"{METADATA} is {shown(value)}, no object")
        else:
            self.metadata = value or {}
            wrong = [key for key, text in self.metadata.items() if not isinstance(text, str)]
            if wrong:
                self._fault(f"{METADATA} holds values that are no text: {', '.join(map(shown, wrong[:5]))}")
        return end

    def _read_entry(self, name: str, value: Any) -> None:
        problem = _problem(value)
        if problem:
            self._all_placed = False
            self._fault(problem, name)
        else:
            start, stop = value["data_offsets"]
            self._add(name, value["dtype"], tuple(value["shape"]), start, stop)

    def _add(self, name: str, dtype: str, shape: tuple[int, ...], start: int, stop: int) -> None:
        if name in self.tensors:
            self._all_placed = False
            self._fault("is described twice", name)
            return
        if stop < start:
            self._all_placed = False
            self._fault(f"ends before it begins (data_offsets [{start}, {stop}])", name)
            return
        begin = self.body_start
        self.tensors[name] = TensorInfo(name, _CODES[dtype], shape, self.shard, begin + start, begin + stop)
        problem = _misfit(dtype, shape, stop - start)
        if problem:
            self._fault(problem, name)

    def _check_cover(self, tensors: list[TensorInfo], size: int) -> None:
        end, last = self.body_start, ""
        for info in tensors:
            if info.start > end:
                self._fault(f"{info.start - end:,} bytes before it belong to no tensor", info.name)
            elif info.start < end:
                self._fault(f"begins {end - info.start:,} bytes before tensor {shown(last)} ends", info.name)
            if info.stop >= end:
                end, last = info.stop, info.name
        if end < size:
            self._fault(f"{size - end:,} bytes after its last tensor belong to none")
        elif end > size:
            lost = [info.name for info in tensors if info.stop > size]
            self._fault(
                f"is cut off: it has {size:,} bytes, its header describes {end:,}; "
                f"{len(lost):,} of its tensors are incomplete, the first is {shown(lost[0])}"
            )


_CODES = {code: code for code in DTYPES}  # one string object per code, whatever the number of tensors


def _problem(entry: Any) -> str:
    """What keeps the description of a tensor from being one; nothing if it can be read."""
    if not isinstance(entry, dict):
        return f"is described by {shown(entry)}, not by an object"
    missing = [field for field in _FIELDS if field not in entry]
    if missing:
        return f"its description lacks {' and '.join(missing)}"
    dtype, shape, offsets = (entry[field] for field in _FIELDS)
    if not isinstance(dtype, str) or dtype not in DTYPES:
        return f"has the element type {shown(dtype)}, which the format does not define"
    if not _whole_numbers(shape):
        return f"has the shape {shown(shape)}, no list of whole numbers"
    if not _whole_numbers(offsets) or len(offsets) != 2:
        return f"has the data_offsets {shown(offsets)}, not two whole numbers"
    return ""


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and 0 <= number <= _MOST for number in value)


def _misfit(dtype: str, shape: tuple[int, ...], there: int) -> str:
    try:
        needed = tensor_bytes(dtype, shape)
    except OverflowError as error:
        return f"has the shape {shown(shape)}: {error}"
    except ValueError as error:
        return f"{dtype} of shape {shown(shape)} ends inside a byte: {error}"
    if needed != there:
        return f"{dtype} of shape {shown(shape)} takes {needed:,} bytes; its data_offsets give it {there:,}"
    return ""
