"""Reading bytes of shards exactly, noticing changes, and the files that are written."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

from checkpoint_files import library_reads, sharded, single
from rewire.checkpoint import (
    DTYPES,
    INDEX,
    SINGLE,
    Checkpoint,
    Entry,
    Sources,
    aligned_order,
    code_of,
    entry_bytes,
    header_bytes,
    index_bytes,
    open_checkpoint,
    parse_size,
    partition,
    shard_name,
    torch_name,
)
from rewire.errors import CheckpointError, OutputError

ONE, TWO = {"a": ("U8", [100])}, {"b": ("U8", [50])}

# ---------------------------------------------------------------- reading


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return open_checkpoint(sharded(tmp_path / "model", ONE, TWO))


def bytes_of(sources: Sources, name: str) -> bytes:
    info = sources.checkpoint.tensors[name]
    view = bytearray(info.stop - info.start)
    sources.pread_exact(info.shard, info.start, memoryview(view))
    return bytes(view)


def test_bytes_are_read_from_the_right_places(checkpoint: Checkpoint) -> None:
    with Sources(checkpoint) as sources:
        assert bytes_of(sources, "a") == bytes(range(100))
        assert bytes_of(sources, "b") == bytes(range(50))
        held = list(sources.files)
    assert sources.files == [-1, -1]
    for handle in held:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(handle)


def test_handles_can_neither_write_nor_outlive_the_process(checkpoint: Checkpoint) -> None:
    with Sources(checkpoint) as sources:
        for handle in sources.files:
            assert not os.get_inheritable(handle)
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.pwrite(handle, b"x", 0)


def test_short_reads_are_carried_on(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda handle, views, start: real(handle, [views[0][:7]], start))
    with Sources(checkpoint) as sources:
        assert bytes_of(sources, "a") == bytes(range(100))


def test_short_reads_of_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda handle, views, start: real(handle, [views[0][:3]], start))
    assert set(open_checkpoint(sharded(tmp_path, ONE, TWO)).tensors) == {"a", "b"}


def test_a_file_that_ends_too_soon(checkpoint: Checkpoint) -> None:
    with Sources(checkpoint) as sources:
        os.truncate(checkpoint.shards[0].path, checkpoint.tensors["a"].stop - 1)
        with pytest.raises(CheckpointError, match=r"ends at byte .* where 1 more were to be read"):
            bytes_of(sources, "a")


def test_only_some_shards(checkpoint: Checkpoint) -> None:
    with Sources(checkpoint, only=[1, 1]) as sources:
        assert sources.files[0] == -1
        assert bytes_of(sources, "b") == bytes(range(50))
    with Sources(checkpoint, only=()) as sources:
        assert sources.files == [-1, -1]


def test_too_many_files(checkpoint: Checkpoint) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    spare = os.open(os.devnull, os.O_RDONLY)  # the lowest free number
    os.close(spare)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (spare + 1, hard))
        with pytest.raises(CheckpointError, match=r"may not hold 2 files open, see ulimit -n"), Sources(checkpoint):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    os.close(os.open(os.devnull, os.O_RDONLY))  # nothing was left open
    assert os.open(os.devnull, os.O_RDONLY) == spare
    os.close(spare)


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def touch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


def other_header(path: Path) -> None:
    """As an edit in place by somebody who puts the time back."""
    times = path.stat()
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"a"', b'"x"'))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def replace(path: Path) -> None:
    times = path.stat()
    (path.parent / "new").write_bytes(path.read_bytes())
    os.utime(path.parent / "new", ns=(times.st_atime_ns, times.st_mtime_ns))
    (path.parent / "new").rename(path)


CHANGES = {
    "has changed its size": grow,
    "was written to": touch,
    "has another header": other_header,
    "was replaced by another file": replace,
    "was moved or deleted": Path.unlink,
}


@pytest.mark.parametrize("message", CHANGES)
def test_a_change_is_noticed(checkpoint: Checkpoint, message: str) -> None:
    with Sources(checkpoint) as sources:
        sources.check_unchanged()
        CHANGES[message](checkpoint.shards[0].path)
        with pytest.raises(CheckpointError, match=message) as caught:
            sources.check_unchanged()
    assert [issue.file for issue in caught.value.issues] == [shard_name(1, 2)]
    wanted = "cannot be read" if message == "was moved or deleted" else message.replace("by another file", "")
    if message != "was replaced by another file":
        with pytest.raises(CheckpointError, match=wanted), Sources(checkpoint):  # nor can one begin with it
            pass


# ---------------------------------------------------------------- element types


@pytest.mark.parametrize("code", DTYPES)
def test_names_of_element_types_are_torchs(code: str) -> None:
    name = torch_name(code)
    if name is not None:
        assert code_of(name) == code_of(f"torch.{name}") == code
        elements_in_one = 2 if code == "F4" else 1
        assert getattr(torch, name).itemsize * 8 == DTYPES[code] * elements_in_one
    else:
        assert code.startswith("F6")


def test_an_element_type_that_the_format_lacks() -> None:
    with pytest.raises(CheckpointError, match=r"no element type for torch.complex128; it has bfloat16, bool"):
        code_of("torch.complex128")


# ---------------------------------------------------------------- writing

NAMES = st.text(max_size=8).filter(lambda name: name != "__metadata__" and name.isprintable())
ENTRIES = st.lists(
    st.tuples(NAMES, st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 3), max_size=3).map(lambda s: (*s, 8))),
    unique_by=lambda entry: entry[0],
    max_size=6,
)


@given(entries=ENTRIES, metadata=st.dictionaries(NAMES, NAMES, max_size=2), align_to=st.none() | st.integers(0, 10_000))
def test_what_is_written_is_read_by_us_and_by_the_library(
    tmp_path_factory: pytest.TempPathFactory, entries: list[Entry], metadata: dict[str, str], align_to: int | None
) -> None:
    header = header_bytes(entries, metadata, align_to=align_to)
    assert header == header_bytes(entries, metadata, align_to=align_to)
    folder = single(tmp_path_factory.mktemp("written"), header + bytes(sum(map(entry_bytes, entries))))
    checkpoint = open_checkpoint(folder)
    read = {info.name: (info.dtype, info.shape) for info in checkpoint.tensors.values()}
    assert read == {name: (dtype, shape) for name, dtype, shape in entries}
    assert checkpoint.shards[0].metadata == metadata
    assert {name: tuple(shape) for name, shape in library_reads(folder / SINGLE).items()} == {
        name: shape for name, _, shape in entries
    }
    start = checkpoint.shards[0].body_start
    assert start == len(header)
    assert start % 8 == 0
    if align_to is not None and align_to % 8 == 0:
        assert start % 4096 == align_to % 4096


def torch_entries() -> Iterator[tuple[str, torch.Tensor]]:
    torch.manual_seed(0)
    for code in DTYPES:
        name = torch_name(code)
        if name is not None and code != "F4":  # safetensors 0.8 gives F4 half its shape
            dtype = getattr(torch, name)
            raw = torch.randint(0, 2 if code == "BOOL" else 256, (6 * dtype.itemsize,), dtype=torch.uint8)
            yield code, raw.view(dtype).reshape(2, 3)


def test_files_load_bit_equal(tmp_path: Path) -> None:
    tensors = dict(torch_entries())
    entries: list[Entry] = [(code, code, (2, 3)) for code in tensors]
    entries += [("none", "F32", (0, 4)), ("scalar", "I64", ())]
    tensors |= {"none": torch.empty(0, 4), "scalar": torch.tensor(7)}
    body = b"".join(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors.values())
    (tmp_path / SINGLE).write_bytes(header_bytes(entries, {"format": "pt"}) + body)
    loaded = load_file(tmp_path / SINGLE)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert loaded[name].reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8)), name


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([("__metadata__", "U8", (1,))], "cannot be called __metadata__"),
        ([("a", "U8", (1,)), ("a", "U8", (1,))], "two tensors are called 'a'"),
        ([("a", "F4", (3,))], r"'a' cannot be written \(F4 of shape \[3\]\): 12 bits"),
        ([("a", "F32", (2**62,))], "more than 2..64 bits"),
        ([("a\ud800", "U8", (1,))], "cannot be written as UTF-8"),
    ],
)
def test_what_could_not_be_read_again_is_not_written(entries: list[Entry], message: str) -> None:
    with pytest.raises(OutputError, match=message):
        header_bytes(entries, {})


def test_a_header_that_safetensors_would_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewire.checkpoint.writing.LONGEST", 50)
    with pytest.raises(OutputError, match=r"2 tensors takes .* bytes; 50 are the most .* Write smaller shards"):
        header_bytes([("a", "U8", (1,)), ("b", "U8", (1,))], {})


@given(entries=ENTRIES)
def test_the_order_that_aligns(entries: list[Entry]) -> None:
    ordered = aligned_order(entries)
    assert sorted(ordered) == sorted(entries)
    assert aligned_order(ordered) == ordered
    start = 0
    for entry in ordered:
        if DTYPES[entry[1]] >= 8:
            assert start % (DTYPES[entry[1]] // 8) == 0
        start += entry_bytes(entry)


@given(sizes=st.lists(st.integers(0, 9), max_size=12), most=st.integers(1, 12))
def test_shards_keep_order_and_size(sizes: list[int], most: int) -> None:
    entries: list[Entry] = [(str(number), "U8", (size,)) for number, size in enumerate(sizes)]
    shards = partition(entries, most)
    assert [entry for shard in shards for entry in shard] == entries
    filled = [sum(map(entry_bytes, shard)) for shard in shards]
    for size, shard in zip(filled, shards, strict=True):
        assert size <= most or max(map(entry_bytes, shard)) == size  # alone but for tensors without bytes
    assert all(first + entry_bytes(later[0]) > most for first, later in zip(filled, shards[1:], strict=False))


@pytest.mark.parametrize(
    ("text", "count"), [("5GB", 5 * 10**9), (" 500 mb", 5 * 10**8), ("0.5KB", 500), ("7", 7), (7, 7)]
)
def test_sizes(text: int | str, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "GB", "5GiB", "-1GB", "0", 0, "nanGB", "infGB", "1e400TB", "5 apples"])
def test_sizes_that_are_none(text: int | str) -> None:
    with pytest.raises(OutputError, match="is no size of a shard"):
        parse_size(text)


def test_shards_and_index_are_those_of_save_pretrained(tmp_path: Path) -> None:
    """No tensor here is above the limit: Transformers would give it a shard of its own before its turn."""
    config = BertConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=50)
    config.max_position_embeddings = 64
    model = BertModel(config)
    model.save_pretrained(tmp_path, max_shard_size="0.005MB")
    entries: list[Entry] = [(name, "F32", tuple(tensor.shape)) for name, tensor in model.state_dict().items()]
    shards = partition(entries, "0.005MB")
    names = [shard_name(number, len(shards)) for number in range(1, len(shards) + 1)]
    weight_map = {entry[0]: name for name, shard in zip(names, shards, strict=True) for entry in shard}
    checkpoint = open_checkpoint(tmp_path)
    assert len(shards) > 2
    assert index_bytes(weight_map, checkpoint.tensor_bytes, model.num_parameters()) == (tmp_path / INDEX).read_bytes()
    assert checkpoint.shards[0].metadata == {"format": "pt"}


def test_no_tensors_make_one_empty_shard(tmp_path: Path) -> None:
    assert partition([]) == [[]]
    assert open_checkpoint(single(tmp_path, header_bytes([], {}))).tensors == {}
