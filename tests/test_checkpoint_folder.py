"""Which files of a folder make a checkpoint, and what is wrong with an index or a link."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import BertModel

from checkpoint_files import index, sharded, single, whole
from rewire.checkpoint import INDEX, SINGLE, Checkpoint, check_format, open_checkpoint, shard_name
from rewire.errors import CheckpointError

ONE = {"a": ("F32", [2]), "b": ("BF16", [3])}
TWO = {"c": ("U8", [5])}
FIRST, SECOND = shard_name(1, 2), shard_name(2, 2)
RIGHT = {"a": FIRST, "b": FIRST, "c": SECOND}


def refused(folder: Path, message: str, **options: bool) -> CheckpointError:
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(folder, **options)
    return caught.value


def repaired(folder: Path) -> Checkpoint:
    checkpoint = open_checkpoint(folder, repair_index=True)
    assert set(checkpoint.tensors) == {"a", "b", "c"}
    assert checkpoint.repaired
    return checkpoint


def tree(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---------------------------------------------------------------- what is taken


def test_a_single_file(tmp_path: Path) -> None:
    (single(tmp_path, whole(ONE)) / "config.json").write_text('{"hidden_size": 3}')
    checkpoint = open_checkpoint(str(tmp_path))
    assert [shard.name for shard in checkpoint.shards] == [SINGLE]
    assert checkpoint.config == {"hidden_size": 3}
    assert not checkpoint.repaired


def test_shards(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(sharded(tmp_path, ONE, TWO))
    assert [(info.name, info.shard) for info in checkpoint.tensors.values()] == [("a", 0), ("b", 0), ("c", 1)]
    assert [shard.name for shard in checkpoint.shards] == [FIRST, SECOND]
    assert checkpoint.config is None
    assert checkpoint.tensor_bytes == 8 + 6 + 5


def test_shards_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    names = ["model-100000-of-100001.safetensors", "model-99999-of-100001.safetensors", "other-٣.safetensors"]
    for name, tensor in zip(names, "abc", strict=True):
        (tmp_path / name).write_bytes(whole({tensor: ("U8", [1])}))
    index(tmp_path, dict(zip("abc", names, strict=True)))
    assert [shard.name for shard in open_checkpoint(tmp_path).shards] == [names[1], names[0], names[2]]


def test_variants_and_pickles_are_left_aside_and_said(tmp_path: Path) -> None:
    single(tmp_path, whole(ONE))
    for name in ("model.fp16.safetensors", "pytorch_model.bin", "tokenizer.json"):
        (tmp_path / name).write_bytes(b"")
    assert open_checkpoint(tmp_path).ignored == ("model.fp16.safetensors", "pytorch_model.bin")


def test_shards_of_an_older_save_are_left_aside_and_said(tmp_path: Path) -> None:
    (sharded(tmp_path, ONE, TWO) / shard_name(3, 3)).write_bytes(b"")
    assert open_checkpoint(tmp_path).ignored == (shard_name(3, 3),)


@pytest.mark.parametrize("metadata", [{}, {"total_size": 1}, {"total_size": "many"}])
def test_what_an_index_says_of_sizes_is_not_needed(tmp_path: Path, metadata: dict[str, Any]) -> None:
    index(sharded(tmp_path, ONE, TWO), RIGHT, **metadata)
    assert set(open_checkpoint(tmp_path).tensors) == {"a", "b", "c"}


def test_an_index_without_metadata(tmp_path: Path) -> None:
    (sharded(tmp_path, ONE, TWO) / INDEX).write_text(json.dumps({"weight_map": RIGHT}))
    assert set(open_checkpoint(tmp_path).tensors) == {"a", "b", "c"}


def test_an_index_of_one_file(tmp_path: Path) -> None:
    index(single(tmp_path, whole(ONE)), {"a": SINGLE, "b": SINGLE})
    assert set(open_checkpoint(tmp_path).tensors) == {"a", "b"}


def test_the_fingerprint_is_that_of_every_copy(tmp_path: Path) -> None:
    first = open_checkpoint(sharded(tmp_path / "first", ONE, TWO))
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    os.utime(tmp_path / "second" / FIRST, ns=(1, 1))
    assert open_checkpoint(tmp_path / "second").fingerprint == first.fingerprint
    sharded(tmp_path / "third", ONE, {"c": ("U8", [6])})
    assert open_checkpoint(tmp_path / "third").fingerprint != first.fingerprint


def test_a_model_that_transformers_saved(minilm_path: Path, tmp_path: Path) -> None:
    BertModel.from_pretrained(minilm_path).save_pretrained(tmp_path, max_shard_size="20MB")
    checkpoint = open_checkpoint(tmp_path)
    saved = json.loads((tmp_path / INDEX).read_text())
    assert len(checkpoint.shards) > 2
    assert checkpoint.tensor_bytes == saved["metadata"]["total_size"]
    assert {info.name: checkpoint.shards[info.shard].name for info in checkpoint.tensors.values()} == saved[
        "weight_map"
    ]


# ---------------------------------------------------------------- folders that hold none


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    refused(tmp_path / "none", "does not exist; .*hf download")


def test_a_file_for_a_folder(tmp_path: Path) -> None:
    single(tmp_path, whole(ONE))
    refused(tmp_path / SINGLE, "is a file; name the folder")


def test_an_impossible_path() -> None:
    refused(Path("a\0b"), "cannot be read")


def test_a_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, "neither model.safetensors nor model.safetensors.index.json")


def test_a_folder_with_a_variant_only(tmp_path: Path) -> None:
    (tmp_path / "model.fp16.safetensors").write_bytes(whole(ONE))
    refused(tmp_path, "'model.fp16.safetensors'; give the one that is meant the name model.safetensors")


def test_an_adapter(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(whole(ONE))
    refused(tmp_path, "an adapter, not a model")


@pytest.mark.parametrize("check", [open_checkpoint, check_format])
def test_pickles(tmp_path: Path, check: Callable[[Path], object]) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"pickled weights can run code .*save_pretrained"):
        check(tmp_path)


def test_other_weights_named_by_the_configuration(tmp_path: Path) -> None:
    (single(tmp_path, whole(ONE)) / "config.json").write_text('{"transformers_weights": "../x.safetensors"}')
    refused(tmp_path, "config.json: names '../x.safetensors' as the file of the weights")


@pytest.mark.parametrize("text", ["", "[]", "{", '"\xff"', "[" * 100_000])
def test_a_damaged_configuration(tmp_path: Path, text: str) -> None:
    (single(tmp_path, whole(ONE)) / "config.json").write_text(text, "latin-1")
    refused(tmp_path, "config.json: cannot be read")


def test_what_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Permissions do not bind root, who runs the tests in containers; the refusal is that of the system call."""
    sharded(tmp_path, ONE, TWO)
    real = os.open

    def locked(path: os.PathLike[str], flags: int, *more: int) -> int:
        assert flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC) == 0
        assert flags & os.O_CLOEXEC
        if os.fspath(path).endswith(".safetensors"):
            raise PermissionError(13, "Permission denied")
        return real(path, flags, *more)

    monkeypatch.setattr(os, "open", locked)
    error = refused(tmp_path, "cannot be read: Permission denied")
    assert [issue.file for issue in error.issues] == [FIRST, SECOND]


@pytest.mark.parametrize("name", [SINGLE, "config.json"])
def test_a_pipe_is_not_waited_for(tmp_path: Path, name: str) -> None:
    single(tmp_path, whole(ONE))
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    refused(tmp_path, f"{name}: cannot be read: .* is not a regular file")


def test_a_folder_for_a_shard(tmp_path: Path) -> None:
    (tmp_path / SINGLE).mkdir()
    refused(tmp_path, "model.safetensors: cannot be read: .* is not a regular file")


# ---------------------------------------------------------------- the index


@pytest.mark.parametrize("file", ["../other/model.safetensors", "/etc/passwd", "a/../../b.safetensors", "..", "C:\\x"])
def test_an_index_that_leads_out_of_the_folder(tmp_path: Path, file: str) -> None:
    sharded(tmp_path / "other", TWO)
    (tmp_path / "other" / FIRST).rename(tmp_path / "other" / SINGLE)
    sharded(tmp_path / "model", ONE, weight_map={"a": FIRST, "b": FIRST, "c": file})
    error = refused(tmp_path / "model", "hostile")
    assert [issue.file for issue in error.issues] == [INDEX]


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("sub/model.safetensors", "shards lie beside their index"),
        ("pytorch_model.bin", "is no safetensors file"),
        ("", "is no safetensors file"),
        ("a\0.safetensors", "hostile"),
        ("x" * 5000 + ".safetensors", "is missing"),
    ],
)
def test_an_index_that_names_no_shard(tmp_path: Path, file: str, message: str) -> None:
    refused(sharded(tmp_path, ONE, TWO, weight_map=RIGHT | {"d": file}), message)


def test_missing_shards_are_all_named(tmp_path: Path) -> None:
    sharded(tmp_path, ONE, weight_map=RIGHT | {"d": "x.safetensors", "e": "x.safetensors"})
    error = refused(tmp_path, "2 faults; nothing was written")
    assert [str(issue) for issue in error.issues] == [
        f"{SECOND}: is missing; the index expects tensor 'c' in it",
        "x.safetensors: is missing; the index expects 2 tensors ('d', 'e') in it",
    ]


WRONG_INDEXES: dict[str, tuple[dict[str, str], str]] = {
    "wrong shard": (RIGHT | {"b": SECOND}, f"tensor 'b': is in {FIRST}; the index says '{SECOND}'"),
    "not in its shard": (RIGHT | {"d": SECOND}, f"tensor 'd': is not in {SECOND}, where the index says it is"),
    "not in the index": ({"a": FIRST, "c": SECOND}, "tensor 'b': is not in the index"),
    "shard not in the index": ({"a": FIRST, "b": FIRST}, "the index does not name it"),
    "empty": ({}, "its weight_map names no tensor"),
}


@pytest.mark.parametrize("name", WRONG_INDEXES)
def test_a_wrong_index_is_refused_and_can_be_repaired(tmp_path: Path, name: str) -> None:
    weight_map, message = WRONG_INDEXES[name]
    sharded(tmp_path, ONE, TWO, weight_map=weight_map)
    before = tree(tmp_path)
    assert "--repair-index" in str(refused(tmp_path, message))
    repaired(tmp_path)
    assert tree(tmp_path) == before  # the source is left alone


DAMAGED = {
    "no text": b"",
    "no UTF-8": b"\xff",
    "no JSON": b'{"weight_map":',
    "a list": b"[]",
    "no weight_map": b'{"metadata": {}}',
    "weight_map twice": b'{"weight_map": {"a": "m"}, "weight_map": {"a": "m"}}',
    "tensor twice": b'{"weight_map": {"a": "m.safetensors", "a": "m.safetensors"}}',
    "file a number": b'{"weight_map": {"a": 1}}',
    "half a surrogate": b'{"weight_map": {"a": "\\ud800"}}',
    "deep": b'{"metadata": ' + b"[" * 100_000,
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_index_is_refused_and_can_be_repaired(tmp_path: Path, name: str) -> None:
    (sharded(tmp_path, ONE, TWO) / INDEX).write_bytes(DAMAGED[name])
    assert "--repair-index" in str(refused(tmp_path, f"{INDEX}: is "))
    repaired(tmp_path)


def test_an_index_too_long_to_read(tmp_path: Path) -> None:
    with (sharded(tmp_path, ONE, TWO) / INDEX).open("r+b") as file:
        file.truncate(100_000_001)
    refused(tmp_path, "has 100,000,001 bytes; 100,000,000 are the most")


def test_shards_without_an_index(tmp_path: Path) -> None:
    (sharded(tmp_path, ONE, TWO) / INDEX).unlink()
    assert "--repair-index" in str(refused(tmp_path, f"{INDEX} is missing, though there are shards"))
    repaired(tmp_path)


def test_repair_of_an_index_that_names_other_files(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(whole(ONE | TWO))
    index(tmp_path, {"a": "x.safetensors"})
    repaired(tmp_path)


@pytest.mark.parametrize("weight_map", [RIGHT, {}])
def test_repair_needs_every_shard(tmp_path: Path, weight_map: dict[str, str]) -> None:
    sharded(tmp_path, ONE, weight_map=weight_map)
    refused(tmp_path, f"{SECOND}: is missing; 1 of 2 are there", repair_index=True)


def test_repair_does_not_count_up_to_a_number_in_a_name(tmp_path: Path) -> None:
    (tmp_path / f"model-00001-of-{'9' * 99}.safetensors").write_bytes(whole(ONE))
    refused(tmp_path, "is missing; 1 of", repair_index=True)


def test_repair_with_two_sets_of_shards(tmp_path: Path) -> None:
    sharded(tmp_path, ONE, TWO)
    (tmp_path / shard_name(1, 3)).write_bytes(whole(ONE))
    repaired(tmp_path)  # the index says which set is meant
    (tmp_path / INDEX).unlink()
    refused(tmp_path, r"several sets \(of 2, of 3\)", repair_index=True)


def test_a_tensor_in_two_shards_cannot_be_repaired(tmp_path: Path) -> None:
    sharded(tmp_path, ONE, TWO | {"a": ("F32", [2])}, weight_map=RIGHT)
    for repair in (False, True):
        refused(tmp_path, f"{SECOND}: tensor 'a': is in {FIRST} too", repair_index=repair)


def test_a_stale_single_file_beside_an_index(tmp_path: Path) -> None:
    single(sharded(tmp_path, ONE, TWO), whole(ONE))
    for repair in (False, True):
        refused(tmp_path, "two checkpoints. Transformers would load model.safetensors", repair_index=repair)


def test_all_faults_of_a_checkpoint_at_once(tmp_path: Path) -> None:
    third = {"x": ("U8", [1])}
    sharded(tmp_path, ONE, TWO, third, weight_map={"a": shard_name(2, 3), "b": shard_name(1, 3), "q": "../q"})
    (tmp_path / shard_name(2, 3)).write_bytes(whole(TWO)[:-1])
    (tmp_path / "config.json").write_text("{")
    error = refused(tmp_path, "5 faults")
    assert [(issue.file, issue.where) for issue in error.issues] == [
        ("config.json", ""),
        (INDEX, ""),  # ../q
        (shard_name(3, 3), ""),  # not named
        (shard_name(2, 3), ""),  # cut off; so whether "a" is in it is not known
        (INDEX, "tensor 'a'"),
    ]


# ---------------------------------------------------------------- links


def hub_cache(root: Path) -> tuple[Path, Path]:
    """A repository in a hub cache: its blobs, and a snapshot that links to them."""
    blobs, snapshot = root / "models--a--b" / "blobs", root / "models--a--b" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, (name, data) in enumerate(tree(sharded(root / "plain", ONE, TWO)).items()):
        (blobs / str(number)).write_bytes(data)
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    return blobs, snapshot


def test_a_snapshot_of_the_hub_cache(tmp_path: Path) -> None:
    blobs, snapshot = hub_cache(tmp_path)
    checkpoint = open_checkpoint(snapshot)
    assert {shard.path.parent for shard in checkpoint.shards} == {blobs.resolve()}
    assert [shard.name for shard in checkpoint.shards] == [FIRST, SECOND]
    (tmp_path / "link").symlink_to(snapshot)
    assert set(open_checkpoint(tmp_path / "link").tensors) == {"a", "b", "c"}
    shutil.copytree(snapshot, snapshot / "part", symlinks=False)
    assert set(open_checkpoint(snapshot / "part").tensors) == {"a", "b", "c"}


def test_a_link_inside_the_folder_is_followed(tmp_path: Path) -> None:
    (single(tmp_path, whole(ONE)) / SINGLE).rename(tmp_path / "real.safetensors")
    (tmp_path / SINGLE).symlink_to("real.safetensors")
    assert set(open_checkpoint(tmp_path).tensors) == {"a", "b"}


@pytest.mark.parametrize("name", [SINGLE, "config.json", "notes.txt"])
def test_a_link_to_elsewhere_needs_consent(tmp_path: Path, name: str) -> None:
    (single(tmp_path / "model", whole(ONE)) / "config.json").write_text("{}")
    (tmp_path / "model" / "notes.txt").write_text("copied along")
    (tmp_path / "model" / name).rename(tmp_path / "private")
    (tmp_path / "model" / name).symlink_to("../private")
    refused(tmp_path / "model", "a link to .*/private, outside the folder.*--follow-links")
    assert set(open_checkpoint(tmp_path / "model", follow_links=True).tensors) == {"a", "b"}


def test_a_link_out_of_a_hub_cache_needs_consent(tmp_path: Path) -> None:
    _, snapshot = hub_cache(tmp_path)
    (snapshot / FIRST).unlink()
    (snapshot / FIRST).symlink_to(tmp_path / "plain" / FIRST)
    refused(snapshot, "outside the folder")


@pytest.mark.parametrize("target", ["none", SINGLE])
def test_a_link_that_leads_nowhere(tmp_path: Path, target: str) -> None:
    (tmp_path / SINGLE).symlink_to(target)
    refused(tmp_path, "model.safetensors: cannot be read")
