"""Damaged checkpoints by the thousand: each is read rightly or refused with a clean error, in bounded time and room."""

from __future__ import annotations

import json
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from checkpoint_files import described, library_reads, raw, whole
from rewire.checkpoint import DTYPES, INDEX, SINGLE, Checkpoint, open_checkpoint, shard_name
from rewire.errors import CheckpointError

PARTS = {"a.weight": ("F32", [2, 3]), "b": ("BF16", [4]), "c": ("U8", [0, 7]), "d": ("F4", [2]), "e": ("I64", [])}
OTHER = {"f": ("F16", [3]), "g": ("BOOL", [2, 2])}
FIRST, SECOND = shard_name(1, 2), shard_name(2, 2)
WEIGHT_MAP = {**dict.fromkeys(PARTS, FIRST), **dict.fromkeys(OTHER, SECOND)}

SECONDS = 2.0  # of processor time for one checkpoint of a few hundred bytes; the usual is 0.001
MEMORY = 4_000_000  # bytes

# ---------------------------------------------------------------- what can be wrong

NUMBERS = (
    st.integers(-2, 40)
    | st.sampled_from([2**31, 2**32, 2**53, 2**61, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, -(2**63)])
    | st.floats()
    | st.booleans()
)
TEXTS = (
    st.text(max_size=5)
    | st.sampled_from(["__metadata__", "dtype", "\ud800", "..", "../x.safetensors", "/x", "\0", FIRST, SECOND, SINGLE])
    | st.sampled_from([*DTYPES, *PARTS, *OTHER])
)
VALUES = st.recursive(
    st.none() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=6,
)


@st.composite
def changed(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value with one to three places changed, added or taken away."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        value = draw(_changed_once(value))
    return value


@st.composite
def _changed_once(draw: st.DrawFn, value: Any) -> Any:
    if not isinstance(value, dict | list) or not value or draw(st.integers(0, 5)) == 0:
        return draw(VALUES)
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = draw(st.sampled_from(keys))
    action = draw(st.sampled_from(["inside", "inside", "inside", "drop", "add"]))
    if action == "inside":
        value[key] = draw(_changed_once(value[key]))
    elif action == "drop":
        del value[key]
    elif isinstance(value, dict):
        value[draw(TEXTS)] = draw(VALUES | st.just(value[key]))
    else:
        value.insert(key, draw(VALUES))
    return value


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes with one to four places overwritten, cut out, doubled or filled in."""
    found = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(found)))
        end = min(len(found), at + draw(st.integers(0, 12)))
        piece = draw(
            st.binary(max_size=8) | st.sampled_from([b"{", b"}", b'"', b",", b"0", b"\\", b"\\ud800", b"[" * 2000])
        )
        new = draw(st.sampled_from([piece, b"", bytes(found[at:end]) * 2, piece + bytes(found[at:end])]))
        found[at:end] = new
    return bytes(found)


def with_true_length(data: bytes) -> bytes:
    """The same file with a length that ends at its last closing brace, so that damage reaches the parser."""
    end = data.rfind(b"}") + 1
    return struct.pack("<Q", max(end - 8, 0)) + data[8:] if len(data) > 8 else data


HEADER = {"__metadata__": {"format": "pt"}, **described(PARTS)}
BODY = len(whole(PARTS)) - len(raw(described(PARTS)))

structured = changed(HEADER).map(lambda header: raw(json.dumps(header), BODY))
mutated = damaged(raw(HEADER, BODY))
mutated_text = mutated.map(with_true_length)
indexes = changed({"metadata": {"total_size": 1}, "weight_map": WEIGHT_MAP}).map(
    lambda value: json.dumps(value).encode()
)
damaged_indexes = damaged(json.dumps({"metadata": {}, "weight_map": WEIGHT_MAP}).encode())

# ---------------------------------------------------------------- what must hold


def check(folder: Path, repair: bool = False) -> None:
    """Opening gives a checkpoint that the library reads alike, or a `CheckpointError`; nothing else, and at once."""
    started = time.process_time()
    tracemalloc.start()
    try:
        found = outcome(folder, repair)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert time.process_time() - started < SECONDS
    assert peak < MEMORY
    if isinstance(found, Checkpoint):
        agrees(found)
    else:
        assert 20 < len(found) < 100_000
        assert all(line.isprintable() for line in found.split("\n"))  # whatever the file said


def outcome(folder: Path, repair: bool) -> Checkpoint | str:
    try:
        return open_checkpoint(folder, repair_index=repair)
    except CheckpointError as error:
        return str(error)


def agrees(checkpoint: Checkpoint) -> None:
    for number, shard in enumerate(checkpoint.shards):
        ours = [info for info in checkpoint.tensors.values() if info.shard == number]
        assert {info.name: list(info.shape) for info in ours} == library_reads(shard.path)
        places = sorted((info.start, info.stop) for info in ours)
        ends = [shard.body_start, *(stop for _, stop in places)]
        assert [start for start, _ in places] == ends[:-1]  # every byte of the body, once
        assert ends[-1] == shard.size


def refusals_agree(folder: Path) -> None:
    """What we refuse the library refuses, but for what has two meanings (`WE_REFUSE` of the header tests)."""
    found = outcome(folder, repair=False)
    if isinstance(found, str) and not any(reason in found for reason in ("twice", "not by an object")):
        with pytest.raises(SafetensorError):
            library_reads(folder / SINGLE)


def headers(folder: Path, count: int, data: st.SearchStrategy[bytes]) -> None:
    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(data)
    def run(data: bytes) -> None:
        (folder / SINGLE).write_bytes(data)
        check(folder)
        refusals_agree(folder)

    run()


def whole_checkpoints(folder: Path, count: int, index: st.SearchStrategy[bytes]) -> None:
    """Index and a shard damaged together, or the index alone."""
    (folder / FIRST).write_bytes(whole(PARTS))
    fine = st.just(whole(OTHER))
    shard = (
        fine | fine | damaged(whole(OTHER)) | changed(described(OTHER)).map(lambda value: raw(json.dumps(value), 10))
    )

    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(index, shard, st.booleans())
    def run(index: bytes, shard: bytes, repair: bool) -> None:
        (folder / INDEX).write_bytes(index)
        (folder / SECOND).write_bytes(shard)
        check(folder, repair)

    run()


KINDS: dict[str, Callable[[Path, int], None]] = {
    "header, structure": lambda folder, count: headers(folder, count, structured),
    "header, bytes": lambda folder, count: headers(folder, count, mutated),
    "header, text": lambda folder, count: headers(folder, count, mutated_text),
    "index, structure": lambda folder, count: whole_checkpoints(folder, count, indexes),
    "index, bytes": lambda folder, count: whole_checkpoints(folder, count, damaged_indexes),
}


@pytest.mark.parametrize("kind", KINDS)
def test_damage(tmp_path: Path, kind: str) -> None:
    KINDS[kind](tmp_path, 60)


@pytest.mark.sweep
@pytest.mark.parametrize("kind", KINDS)
def test_damage_by_the_thousand(tmp_path: Path, kind: str) -> None:
    KINDS[kind](tmp_path, 5000)  # 25,000 in all


def test_the_undamaged_checkpoint_is_right(tmp_path: Path) -> None:
    """Else the tests above would say nothing."""
    (tmp_path / FIRST).write_bytes(raw(HEADER, BODY))
    (tmp_path / SECOND).write_bytes(whole(OTHER))
    (tmp_path / INDEX).write_bytes(json.dumps({"weight_map": WEIGHT_MAP}).encode())
    agrees(open_checkpoint(tmp_path))
