"""Opens a checkpoint: finds its files, reads every header, and reports all that is wrong at once."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rewire.artefact import is_weights
from rewire.checkpoint.faults import Faults
from rewire.checkpoint.header import LONGEST, Header, read_header
from rewire.checkpoint.index import (
    INDEX,
    REPAIR,
    SINGLE,
    by_number,
    check_against,
    check_named,
    complete_set,
    read_index,
    shard_number,
)
from rewire.checkpoint.reading import open_read_only, opened, read_bytes
from rewire.checkpoint.records import Checkpoint, Shard, TensorInfo
from rewire.checkpoint.strict_json import shown
from rewire.errors import CheckpointError

_CONFIG = "config.json"


def open_checkpoint(
    folder: str | os.PathLike[str], *, repair_index: bool = False, follow_links: bool = False
) -> Checkpoint:
    """Reads the headers of a checkpoint and checks them, its index and its configuration; no weights are read.

    Taken are `model.safetensors`, or the shards that `model.safetensors.index.json` names. Variants
    (`model.fp16.safetensors`), pickled weights and files that the index does not name are left aside and listed in
    `Checkpoint.ignored`. A file may be a link to another in the folder, or into the `blobs` of the hub cache that
    the folder belongs to.

    Args:
        folder: a folder, or a snapshot in a hub cache.
        repair_index: whether a missing or wrong index is made anew, in memory, from the shards.
        follow_links: whether links may also lead to files elsewhere.

    Raises:
        CheckpointError: something is wrong; the message lists every fault, and `issues` has them as records.
    """
    path = Path(folder)
    faults = Faults()
    present = _listed(path)
    config = _read_config(path, present, faults, follow_links)
    _check_pickles(path, present)
    files, weight_map = _choose(path, present, config, faults, repair_index, follow_links)
    shards, tensors = _read_shards(path, sorted(files, key=by_number), faults, follow_links)
    numbers = {shard.name: number for number, shard in shards.items()}
    if weight_map is not None:
        check_against(weight_map, tensors, numbers, faults)
    _check_links(path, present.difference(files, {_CONFIG, INDEX}), faults, follow_links)
    faults.check(path)
    ignored = sorted(name for name in present if is_weights(name) and name not in {*files, INDEX})
    repaired = repair_index and SINGLE not in files
    return Checkpoint(path, tuple(shards.values()), tensors, config, tuple(ignored), repaired)


def _check_links(folder: Path, names: Iterable[str], faults: Faults, follow_links: bool) -> None:
    """What lies beside the weights is copied along, so a link must not lead to somebody's private file."""
    for name in sorted(names):
        if (folder / name).is_symlink():
            try:
                _resolved(folder, name, follow_links)
            except CheckpointError as error:
                faults.add(str(error), file=name)


def check_format(folder: Path) -> None:
    """Raises `CheckpointError` if the weights in a folder are all in formats that are not read."""
    if folder.is_dir():
        _check_pickles(folder, {entry.name for entry in folder.iterdir()})


def _check_pickles(folder: Path, present: Iterable[str]) -> None:
    names = sorted(name for name in present if is_weights(name))
    if names and not any(".safetensors" in name for name in names):
        raise CheckpointError(
            f"{folder} holds no safetensors ({', '.join(names[:3])}); pickled weights can run code when they are "
            "read, so Rewire does not. Where you trust them: AutoModel.from_pretrained(folder).save_pretrained(…)"
        )


def _listed(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} does not exist; name a folder that holds a model (a model of the Hub is downloaded first: "
            "hf download NAME)"
        ) from None
    except NotADirectoryError:
        raise CheckpointError(f"{folder} is a file; name the folder that it lies in") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} cannot be read: {_reason(error)}") from error


def _read_config(folder: Path, present: set[str], faults: Faults, follow_links: bool) -> Mapping[str, Any] | None:
    if _CONFIG not in present:
        return None
    try:
        with opened(_resolved(folder, _CONFIG, follow_links)) as handle:
            size = os.fstat(handle).st_size
            if size > LONGEST:
                raise ValueError(f"it has {size:,} bytes")
            config = json.loads(read_bytes(handle, 0, size, _CONFIG))
        if not isinstance(config, dict):
            raise ValueError(f"it is {shown(config)}, no object")
    except (OSError, ValueError, RecursionError, CheckpointError) as error:
        faults.add(f"cannot be read: {_reason(error)}", file=_CONFIG)
        return None
    return config


def _choose(
    folder: Path,
    present: set[str],
    config: Mapping[str, Any] | None,
    faults: Faults,
    repair: bool,
    follow_links: bool,
) -> tuple[list[str], dict[str, str] | None]:
    """The files that hold the weights, and the index to compare them with."""
    weight_map = _read_weight_map(folder, faults, repair, follow_links) if INDEX in present else None
    other = (config or {}).get("transformers_weights")
    if other not in (None, SINGLE, INDEX):
        faults.add(
            f"names {shown(other)} as the file of the weights (transformers_weights), which Rewire does not read: "
            f"give it the name {SINGLE} and take the entry out",
            file=_CONFIG,
        )
    if SINGLE in present:
        if INDEX in present and set((weight_map or {}).values()) != {SINGLE}:
            faults.add(
                f"lies beside {INDEX}, and they are two checkpoints. Transformers would load {SINGLE}; move away "
                "whichever is out of date",
                file=SINGLE,
            )
        return [SINGLE], None
    if repair:
        files = complete_set(present, weight_map, faults)
    elif INDEX in present:
        files = check_named(weight_map, present, faults) if weight_map else []
        _check_unnamed(present, files, faults)
    else:
        files = []
    if not files and not faults.issues:
        _nothing(present, faults)
    return files, None if repair else weight_map


def _read_weight_map(folder: Path, faults: Faults, repair: bool, follow_links: bool) -> dict[str, str] | None:
    """The weight map; an index that is to be made anew may be as damaged as it likes."""
    faults = Faults() if repair else faults
    try:
        with opened(_resolved(folder, INDEX, follow_links)) as handle:
            return read_index(handle, faults)
    except (OSError, CheckpointError) as error:
        faults.add(f"cannot be read: {_reason(error)}", file=INDEX)
        return None


def _check_unnamed(present: set[str], files: Sequence[str], faults: Faults) -> None:
    """A shard of the same set that the index does not name would be lost."""
    counts = {found[1] for file in files if (found := shard_number(file))}
    for name in sorted(present.difference(files), key=by_number):
        found = shard_number(name)
        if found and found[1] in counts:
            faults.add("belongs to the set of shards, but the index does not name it", file=name, advice=REPAIR)


def _nothing(present: set[str], faults: Faults) -> None:
    """Says what a folder without a readable checkpoint holds instead."""
    others = sorted(name for name in present if name.endswith(".safetensors"))
    if any(map(shard_number, others)):
        faults.add(f"{INDEX} is missing, though there are shards", advice=REPAIR)
    elif "adapter_model.safetensors" in others:
        faults.add("it holds an adapter, not a model; name the folder of the model")
    elif others:
        faults.add(
            f"it has neither {SINGLE} nor {INDEX}, but {', '.join(map(shown, others[:5]))}; give the one that is meant "
            f"the name {SINGLE} (in a folder of its own, with its config.json)"
        )
    else:
        faults.add(f"it has neither {SINGLE} nor {INDEX}; name a folder that a model was saved in")


def _read_shards(
    folder: Path, files: Sequence[str], faults: Faults, follow_links: bool
) -> tuple[dict[int, Shard], dict[str, TensorInfo]]:
    """The readable shards by number, and their tensors; each header's text is freed before the next is read."""
    shards: dict[int, Shard] = {}
    tensors: dict[str, TensorInfo] = {}
    for number, name in enumerate(files):
        read = _read_shard(folder, number, name, faults, follow_links)
        if read is None:
            continue
        shards[number], header = read
        for info in header.tensors:
            first = tensors.setdefault(info.name, info)
            if first is not info:
                there = shards[first.shard].name
                faults.add(f"is in {there} too; take it out of one of them", file=name, tensor=info.name)
    return shards, tensors


def _read_shard(
    folder: Path, number: int, name: str, faults: Faults, follow_links: bool
) -> tuple[Shard, Header] | None:
    try:
        path = _resolved(folder, name, follow_links)
        handle = open_read_only(path)
        try:
            facts = os.fstat(handle)
            header = read_header(handle, number, name, faults)
        finally:
            os.close(handle)
    except (OSError, CheckpointError) as error:
        faults.add(f"cannot be read: {_reason(error)}", file=name)
        return None
    if header is None:
        return None
    inode = (facts.st_dev, facts.st_ino)
    return Shard(
        name, path, facts.st_size, facts.st_mtime_ns, inode, header.digest, header.metadata, header.body_start
    ), header


def _resolved(folder: Path, name: str, follow_links: bool) -> Path:
    """Where a file of the folder really lies. Raises `CheckpointError` for a link that leads elsewhere."""
    real = Path(os.path.realpath(folder / name))
    if not follow_links and not any(real.is_relative_to(root) for root in _roots(folder)):
        raise CheckpointError(
            f"it is a link to {real}, outside the folder. Copy the file here, or follow such links "
            "(--follow-links, follow_links=True) if you made them yourself"
        )
    return real


def _roots(folder: Path) -> Iterator[Path]:
    """The folders that links may lead into: this one, and the blobs of its hub cache."""
    real = Path(os.path.realpath(folder))
    yield real
    for path in (real, *real.parents):
        if path.parent.name == "snapshots":
            yield path.parent.parent / "blobs"
            return


def _reason(error: BaseException) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)
