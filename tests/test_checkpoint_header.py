"""Headers of safetensors files: what is refused and what is read, beside the format's own library."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from checkpoint_files import described, library_reads, raw, single, whole
from rewire.checkpoint import DTYPES, SINGLE, Checkpoint, open_checkpoint
from rewire.errors import CheckpointError

W = {"w": ("F32", [2, 3])}
HEADER = json.dumps(described(W), separators=(",", ":"))


def entry(dtype: Any = "F32", shape: Any = (1,), start: Any = 0, stop: Any = 4, **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop], **more}


def text(body: str) -> str:
    """A header with one tensor of four bytes whose description is given as text."""
    return '{"w":{' + body + "}}"


A, B = entry(), entry(start=4, stop=8)

# What both refuse: the file, and what our message says.
BOTH_REFUSE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "model.safetensors: is empty"),
    "seven bytes": (b"\0" * 7, "has 7 bytes"),
    "header of no bytes": (struct.pack("<Q", 0), "'{' expected"),
    "truncated data": (whole(W)[:-1], "is cut off: it has .* 1 of its tensors are incomplete, the first is 'w'"),
    "truncated header": (whole(W)[:20], "is cut off in its header"),
    "trailing bytes": (whole(W) + b"\0\0", "2 bytes after its last tensor belong to none"),
    "bytes without tensors": (raw("{}", 4), "4 bytes after its last tensor"),
    "hole at the start": (raw({"w": entry(start=4, stop=8)}, 8), "tensor 'w': 4 bytes before it belong to no tensor"),
    "hole between": (raw({"a": A, "b": entry(start=8, stop=12)}, 12), "tensor 'b': 4 bytes before it"),
    "overlap": (
        raw({"a": A, "b": entry(start=2, stop=6)}, 6),
        "tensor 'b': begins 2 bytes before tensor 'a' ends",
    ),
    "two names on one range": (raw({"a": A, "b": A}, 4), "tensor 'b': begins 4 bytes before tensor 'a' ends"),
    "inside another": (
        raw({"a": entry(shape=[2], stop=8), "b": entry(shape=[0], start=4, stop=4)}, 8),
        "tensor 'b': begins 4 bytes before tensor 'a' ends",
    ),
    "end before start": (raw({"w": entry(start=4, stop=0)}, 4), "ends before it begins"),
    "offset beyond the file": (raw({"w": entry(shape=[10**9], stop=4 * 10**9)}, 4), "is cut off: .* first is 'w'"),
    "offset beyond 64 bits": (raw({"w": entry(stop=2**64)}, 4), "not two whole numbers"),
    "offset of 5,000 digits": (
        raw(text('"dtype":"F32","shape":[1],"data_offsets":[0,' + "9" * 5000 + "]"), 4),
        "not two whole numbers",
    ),
    "shape and bytes": (raw({"w": entry(shape=[2])}, 4), r"F32 of shape \(2,\) takes 8 bytes; .* give it 4"),
    "shape overflows": (raw({"w": entry(shape=[2**32, 2**32])}, 4), "more than 2..64"),
    "bits overflow": (raw({"w": entry(shape=[2**61])}, 4), "more than 2..64 bits"),
    "overflow before a zero": (raw({"w": entry(shape=[2**63, 4, 0], stop=0)}), "more than 2..64 elements"),
    "header of 2**63 bytes": (struct.pack("<Q", 2**63) + b"{}", "claims a header of 9,223,372,036,854,775,808"),
    "header of 100 MB + 1": (struct.pack("<Q", 100_000_001) + b"{}", "100,000,000 are the most"),
    "header of 99 MB, claimed": (
        struct.pack("<Q", 99_000_000) + b"{}",
        "takes 99,000,000 bytes, the whole file has 10",
    ),
    "name twice, other range": (
        raw(HEADER[:-1] + ',"w":' + json.dumps(B) + "}", 28),
        "tensor 'w': is described twice",
    ),
    "metadata twice": (
        raw('{"__metadata__":{"a":"b"},"__metadata__":{"a":"b"},' + HEADER[1:], 24),
        "__metadata__ is given twice",
    ),
    "metadata no text": (raw('{"__metadata__":{"a":1},' + HEADER[1:], 24), "values that are no text: 'a'"),
    "metadata nested": (raw('{"__metadata__":{"a":{}},' + HEADER[1:], 24), "values that are no text: 'a'"),
    "metadata a list": (raw('{"__metadata__":[],' + HEADER[1:], 24), "no object"),
    "no UTF-8": (raw(b'{"\xff":' + json.dumps(A).encode() + b"}", 4), "no UTF-8"),
    "byte order mark": (raw(b"\xef\xbb\xbf" + HEADER.encode(), 24), "'{' expected at character 0"),
    "half a surrogate in a name": (raw('{"\\ud800":' + json.dumps(A) + "}", 4), "half a surrogate"),
    "half a surrogate in metadata": (raw('{"__metadata__":{"a":"\\udc00"}}'), "half a surrogate"),
    "half a surrogate in an unknown field": (raw({"w": entry(note="\ud800")}, 4), "half a surrogate"),
    "control character": (raw(HEADER.replace("w", "w\x01", 1), 24), "damaged"),
    "float offset": (raw({"w": entry(stop=4.0)}, 4), "not two whole numbers"),
    "exponent": (raw(text('"dtype":"F32","shape":[1e0],"data_offsets":[0,4]'), 4), "no list of whole numbers"),
    "boolean offset": (raw({"w": entry(stop=True)}, 4), "not two whole numbers"),
    "boolean length": (raw({"w": entry(shape=[True])}, 4), "no list of whole numbers"),
    "negative length": (raw({"w": entry(shape=[-1])}, 4), "no list of whole numbers"),
    "negative offset": (raw({"w": entry(start=-4, stop=0)}, 4), "not two whole numbers"),
    "minus zero": (raw(text('"dtype":"F32","shape":[1],"data_offsets":[-0,4]'), 4), "not two whole numbers"),
    "leading zero": (raw(text('"dtype":"F32","shape":[01],"data_offsets":[0,4]'), 4), "damaged"),
    "three offsets": (raw({"w": A | {"data_offsets": [0, 4, 4]}}, 4), "not two whole numbers"),
    "shape a number": (raw({"w": A | {"shape": 1}}, 4), "no list of whole numbers"),
    "no shape": (raw(text('"dtype":"F32","data_offsets":[0,4]'), 4), "its description lacks shape"),
    "field twice": (raw(text('"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]'), 4), "'dtype' is given"),
    "described by text": (raw({"w": "F32"}, 4), "described by 'F32', not by an object"),
    "unknown element type": (raw({"w": entry(dtype="I4")}, 4), "'I4', which the format does not define"),
    "element type in small letters": (raw({"w": entry(dtype="f32")}, 4), "'f32', which the format does not define"),
    "NaN": (raw(text('"dtype":"F32","shape":[NaN],"data_offsets":[0,4]'), 4), "NaN is no JSON"),
    "NaN in an unknown field": (raw(text('"n":NaN,"dtype":"F32","shape":[1],"data_offsets":[0,4]'), 4), "NaN"),
    "Infinity": (raw(text('"dtype":"F32","shape":[1],"data_offsets":[0,Infinity]'), 4), "Infinity is no JSON"),
    "a list": (raw("[]"), "'{' expected"),
    "trailing comma": (raw(HEADER[:-1] + ",}", 24), "a key in quotes expected"),
    "no end": (raw(HEADER[:-1], 24), "',' expected"),
    "two objects": (raw(HEADER + "{}", 24), "something follows the JSON"),
    "padded with zero bytes": (raw(HEADER + "\0\0", 24), "something follows the JSON"),
    "nested too deeply": (raw(text('"n":' + "[" * 100_000 + "]" * 100_000), 4), "nested too deeply"),
    "part of a byte": (raw({"w": entry(dtype="F4", shape=[3], stop=2)}, 2), "ends inside a byte"),
}

# What the library reads although it has two meanings, or is not what any writer writes: refused here.
WE_REFUSE: dict[str, tuple[bytes, str]] = {
    "name twice, same range": (raw(HEADER[:-1] + "," + HEADER[1:], 24), "tensor 'w': is described twice"),
    "metadata key twice": (raw('{"__metadata__":{"a":"1","a":"2"}}'), "the key 'a' is given twice"),
    "unknown field twice": (raw(text('"n":1,"n":2,"dtype":"F32","shape":[1],"data_offsets":[0,4]'), 4), "'n' is given"),
    "a list for an object": (raw('{"w":["F32",[1],[0,4]]}', 4), "not by an object"),
}

BOTH_READ: dict[str, bytes] = {
    "plain": whole(W),
    "unknown field": raw({"w": entry(note={"a": [1, None, -1, 1.5]})}, 4),
    "other order of fields": raw(text('"data_offsets": [0, 4], "shape": [1], "dtype": "F32"'), 4),
    "path as a name": whole({"../../w": ("F32", [1]), "/etc/w": ("F32", [1]), "": ("U8", [1])}),
    "zero byte in a name": whole({"w\0x": ("F32", [1])}),
    "escapes in a name": whole({'a"b\\c\n\u2028😀': ("F32", [1])}),
    "surrogate pair": raw('{"\\ud83d\\ude00":' + json.dumps(A) + "}", 4),
    "names that differ in composition": whole({"\u00e9": ("U8", [1]), "e\u0301": ("U8", [1])}),
    "unaligned data": whole({"a": ("U8", [3]), "b": ("F64", [1])}),
    "header of odd length": raw(HEADER + " ", 24),
    "blanks around": raw(" \n" + HEADER + "\t\r\n", 24),
    "no dimensions": whole({"w": ("F32", [])}),
    "no elements": whole({"a": ("F32", [0]), "b": ("F32", [1]), "c": ("F32", [2, 0, 3]), "d": ("I8", [0])}),
    "zero before an overflow": raw({"w": entry(shape=[0, 2**63, 2**63], stop=0)}),
    "no tensors": raw("{}"),
    "no tensors, with metadata": raw('{"__metadata__":{"format":"pt"}}'),
    "empty metadata": raw('{"__metadata__":{}}'),
    "metadata null": raw('{"__metadata__":null}'),
    "entries not in the order of their bytes": raw({"b": B, "a": A}, 8),
}


def opened(folder: Path, data: bytes) -> Checkpoint:
    return open_checkpoint(single(folder, data))


@pytest.mark.parametrize("name", [*BOTH_REFUSE, *WE_REFUSE])
def test_refused(tmp_path: Path, name: str) -> None:
    data, message = (BOTH_REFUSE | WE_REFUSE)[name]
    with pytest.raises(CheckpointError, match=message) as caught:
        opened(tmp_path, data)
    assert caught.value.issues
    assert all(issue.file == SINGLE for issue in caught.value.issues)
    assert "downloaded or saved again" in str(caught.value)
    if name in BOTH_REFUSE:
        with pytest.raises(SafetensorError):
            library_reads(tmp_path / SINGLE)
    else:
        assert library_reads(tmp_path / SINGLE) is not None  # stricter than the library, on purpose


@pytest.mark.parametrize("name", BOTH_READ)
def test_read(tmp_path: Path, name: str) -> None:
    checkpoint = opened(tmp_path, BOTH_READ[name])
    assert {name: list(info.shape) for name, info in checkpoint.tensors.items()} == library_reads(tmp_path / SINGLE)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_element_type_of_the_library(tmp_path: Path, dtype: str) -> None:
    checkpoint = opened(tmp_path, whole({"w": (dtype, [2, 8])}))
    assert checkpoint.tensors["w"].dtype == dtype
    assert library_reads(tmp_path / SINGLE) == {"w": [2, 8]}


def test_places_are_absolute_and_in_the_order_of_the_file(tmp_path: Path) -> None:
    data = raw({"b": B, "a": A, "__metadata__": {"format": "pt"}}, b"aaaabbbb")
    checkpoint = opened(tmp_path, data)
    assert [(info.name, data[info.start : info.stop]) for info in checkpoint.tensors.values()] == [
        ("a", b"aaaa"),
        ("b", b"bbbb"),
    ]
    assert checkpoint.shards[0].metadata == {"format": "pt"}
    assert checkpoint.shards[0].size == len(data)
    assert checkpoint.tensor_bytes == 8


def test_all_faults_of_a_header_at_once(tmp_path: Path) -> None:
    wrong = {"x": entry(dtype="I4"), "y": entry(shape=[3]), "z": {"dtype": "F32"}, "__metadata__": {"n": 1}}
    with pytest.raises(CheckpointError) as caught:
        opened(tmp_path, raw(wrong, 4))
    assert [issue.where for issue in caught.value.issues] == ["tensor 'x'", "tensor 'y'", "tensor 'z'", ""]


def test_a_million_faults_make_a_message_of_bounded_length(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="2,000 faults; nothing was written") as caught:
        opened(tmp_path, raw({f"w{number}": entry(dtype="I4") for number in range(2000)}, 4))
    assert len(caught.value.issues) == 2000
    assert "and 1,000 more" in str(caught.value)


def test_names_cannot_forge_a_message(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        opened(tmp_path, raw({"w\n\x1b[31mall is well" + "x" * 10_000: entry(dtype="I4")}, 4))
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_claimed_length_is_not_allocated(tmp_path: Path) -> None:
    single(tmp_path, struct.pack("<Q", 99_999_999) + b"{}")
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError):
            open_checkpoint(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_a_hundred_thousand_tensors_are_light(tmp_path: Path) -> None:
    """At most 1 KB held per tensor, as the aims have it; the text of the header is 9 MB on top while it is read."""
    count = 100_000
    parts = {
        f"model.layers.{number // 512}.mlp.experts.{number % 512}.down_proj.weight": ("U8", [number % 7, 1])
        for number in range(count)
    }
    single(tmp_path, whole(parts))
    header = int.from_bytes((tmp_path / SINGLE).read_bytes()[:8], "little")
    del parts
    tracemalloc.start()
    try:
        checkpoint = open_checkpoint(tmp_path)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(checkpoint.tensors) == count
    assert held < 600 * count
    assert peak < 600 * count + 3 * header


def test_nothing_else_is_loaded_by_import() -> None:
    heavy = {"torch", "transformers", "safetensors", "numpy", "pydantic", "rich", "yaml"}
    code = f"import sys, rewire.checkpoint; print({heavy!r} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
