"""The folder that an edited model is kept in: names of its files, and how it appears whole or not at all.

```
folder/
  config.json, model.safetensors (or shards + index), generation_config.json   as Transformers writes them
  rewire.json       layout, plan and receipt
  adapter/NAME/     adapters, as peft writes them
```
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewire.errors import CheckpointError, OutputError

RECORD = "rewire.json"
ADAPTERS = "adapter"
LAYOUTS = ("original", "edited")

_WEIGHTS = (
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
)
_OWN = {RECORD, "config.json", "generation_config.json"}


@dataclass(frozen=True)
class Record:
    """What `rewire.json` says of a folder."""

    layout: str
    plan: Mapping[str, Any]
    receipt: Mapping[str, Any]
    adapters: tuple[str, ...] = ()


def read_record(folder: Path) -> Record | None:
    """The record of a folder; None if it has none. Raises `CheckpointError` for one that cannot be read."""
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text("utf-8"))
        if data["rewire"] != 1 or data["layout"] not in LAYOUTS:
            raise CheckpointError(f"{path} is of another version of Rewire ({data['rewire']!r})")
        return Record(data["layout"], data["plan"], data["receipt"], tuple(data["adapters"]))
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); load the folder with an explicit plan") from error


def write_record(folder: Path, record: Record) -> None:
    """Writes the record into a folder that is being made."""
    data = {
        "rewire": 1,
        "layout": record.layout,
        "plan": record.plan,
        "adapters": list(record.adapters),
        "receipt": record.receipt,
    }
    (folder / RECORD).write_text(json.dumps(data, indent=1) + "\n", "utf-8")


@contextmanager
def new_folder(destination: Path, *, overwrite: bool = False, needed_bytes: int = 0) -> Iterator[Path]:
    """A folder to fill, which becomes `destination` when the block ends well; otherwise nothing has changed.

    It is filled beside its destination, flushed to disk and renamed. With `overwrite` the files of an existing
    destination that are not the model's (a tokenizer, a README) are kept.

    Raises:
        OutputError: the destination is a file, or not empty without `overwrite`, or the disk is full.
    """
    destination = Path(os.path.realpath(destination))
    check_destination(destination, overwrite=overwrite)
    destination.parent.mkdir(parents=True, exist_ok=True)
    _check_space(destination.parent, needed_bytes)
    building = destination.parent / f".{destination.name}.rewire-{uuid.uuid4().hex[:8]}"
    building.mkdir()
    try:
        yield building
        if destination.exists():
            _keep_others(destination, building)
        settle(building)
        _publish(building, destination)
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise OutputError(
                f"the disk is full: {destination} needs {needed_bytes:,} bytes; what was there before is untouched"
            ) from error
        raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def check_destination(destination: Path, *, overwrite: bool) -> None:
    """Raises `OutputError` if a folder may not be written there."""
    if destination.exists() and not destination.is_dir():
        raise OutputError(f"{destination} is a file; name a folder")
    if destination.is_dir() and any(destination.iterdir()) and not overwrite:
        raise OutputError(f"{destination} is not empty; choose another folder, or allow overwriting it (--overwrite)")


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OutputError(f"{folder} has {free:,} bytes free, {needed:,} are needed; nothing was written")


def is_weights(name: str) -> bool:
    """Whether a file of this name holds weights (or says where they are).

    >>> is_weights("model-00001-of-00002.safetensors"), is_weights("tokenizer.json")
    (True, False)
    """
    return name.endswith(_WEIGHTS)


def side_files(folder: Path) -> Iterator[Path]:
    """The files of a model folder that an edit leaves alone: tokenizer, processor, README, …"""
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name not in _OWN and not is_weights(path.name):
            yield path


def copy_side_files(old: Path, new: Path) -> None:
    """Copies what an edit leaves alone from a model folder into one that is being made."""
    for path in side_files(old):
        shutil.copy2(path, new / path.name)
    for name in side_folders(old):
        shutil.copytree(old / name, new / name)


def side_folders(folder: Path) -> Iterator[str]:
    """Folders that belong to the model: more chat templates, and the other modules of sentence-transformers."""
    names = {"additional_chat_templates"}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # no sentence-transformers model
        names |= {str(module["path"]) for module in json.loads((folder / "modules.json").read_text("utf-8"))}
    found = {path.name for path in folder.iterdir() if path.is_dir()} - {ADAPTERS}
    yield from sorted(names & found)


def _keep_others(old: Path, new: Path) -> None:
    for path in side_files(old):
        if not (new / path.name).exists():
            shutil.copy2(path, new / path.name)
    for path in old.iterdir():
        if path.is_dir() and path.name != ADAPTERS and not (new / path.name).exists():
            shutil.copytree(path, new / path.name, symlinks=True)


def settle(folder: Path) -> None:
    """Gives the files of a folder that is being made the permissions that the umask asks for, and has them on disk."""
    mask = os.umask(0)
    os.umask(mask)
    for path in (*folder.rglob("*"), folder):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _publish(building: Path, destination: Path) -> None:
    if not destination.exists():
        building.rename(destination)
    else:
        old = destination.parent / f"{building.name}.old"
        destination.rename(old)
        try:
            building.rename(destination)
        except BaseException:
            old.rename(destination)
            raise
        shutil.rmtree(old, ignore_errors=True)
    _sync(destination.parent)
