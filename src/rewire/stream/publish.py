"""What follows when all shards are written: everything beside them, the checks, the index, and the one rename."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewire.artefact import RECORD, Record, copy_side_files, is_weights, settle, side_folders, write_record
from rewire.checkpoint import INDEX, Sources, index_bytes
from rewire.errors import CheckpointError, OutputError
from rewire.stream.job import Job
from rewire.stream.shards import is_whole
from rewire.stream.task import Task
from rewire.stream.workspace import Workspace, sync_folder

CONFIG = "config.json"
_GENERATION = "generation_config.json"


@dataclass(frozen=True)
class Publication:
    """How a result is published: what its record says, and where its list of SHA-256 sums goes."""

    receipt: Mapping[str, Any]
    manifest: Path | None = None


def publish(job: Job, work: Workspace, how: Publication, check: Callable[[], None]) -> None:
    """Makes the work folder a model and gives it its name.

    `check` is called once all files but the index are there; what it raises stops the publication.

    Raises:
        CheckpointError: the source changed meanwhile, or a shard is not as it was written.
        OutputError: something has come to lie at the destination.
    """
    _check_sources(job)
    shards = {shard.name for shard in job.shards()}
    _clear_others(work.model, shards)
    _write_sides(job, work.model, how.receipt)
    wrong = [shard.name for shard in job.shards() if not is_whole(shard, work.model)]
    if wrong:
        raise CheckpointError(f"{work.model} has shards that are not as they were written: {', '.join(wrong[:4])}")
    check()
    if job.count > 1:
        _write_index(job, work.model)
    if how.manifest is not None:
        write_manifest(work.model, how.manifest)
    settle(work.model)
    _rename(work)


def _check_sources(job: Job) -> None:
    for number in range(len(job.checkpoint.shards)):
        with Sources(job.checkpoint, (number,)):
            pass  # entering compares size, time and header


def _clear_others(folder: Path, shards: set[str]) -> None:
    """Leaves nothing but the shards: what an earlier attempt copied is copied again."""
    for path in folder.iterdir():
        if path.name not in shards:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _write_sides(job: Job, folder: Path, receipt: Mapping[str, Any]) -> None:
    source = job.checkpoint.folder
    copy_side_files(source, folder)
    if (source / _GENERATION).is_file():
        shutil.copy2(source / _GENERATION, folder / _GENERATION)
    if job.checkpoint.config is not None:
        _write_config(job, folder)
    if not job.task.revert:
        write_record(folder, Record("edited", job.task.plan.to_dict(), receipt))


def _write_config(job: Job, folder: Path) -> None:
    """Byte for byte as in the source, where nothing in it changes."""
    if not (job.task.config or job.task.unset):
        shutil.copy2(job.checkpoint.folder / CONFIG, folder / CONFIG)
        return
    assert job.checkpoint.config is not None
    text = json.dumps(config_after(job.checkpoint.config, job.task), indent=2, ensure_ascii=False)
    (folder / CONFIG).write_text(text + "\n", "utf-8")


def config_after(config: Mapping[str, Any], task: Task) -> dict[str, Any]:
    """`config.json` of the result. On the way back, values are those recorded, as they were."""
    kept = {key: value for key, value in config.items() if key not in task.unset}
    return {**kept, **task.config} if task.revert else merged(kept, task.config)


def merged(config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with other values; a mapping changes the values that it names and no others.

    >>> merged({"a": 1, "b": {"c": 2, "d": 3}}, {"b": {"c": 4}})
    {'a': 1, 'b': {'c': 4, 'd': 3}}
    """
    changed = dict(config)
    for key, value in values.items():
        old = changed.get(key)
        changed[key] = merged(old, value) if isinstance(value, Mapping) and isinstance(old, Mapping) else value
    return changed


def config_before(config: Mapping[str, Any] | None, values: Mapping[str, Any]) -> dict[str, Any]:
    """What to set and to take out to have the configuration as it was before `values`.

    >>> config_before({"a": 1}, {"a": 2, "b": 3})
    {'set': {'a': 1}, 'unset': ['b']}
    """
    config = config or {}
    return {
        "set": {key: config[key] for key in values if key in config},
        "unset": [key for key in values if key not in config],
    }


def left_behind(job: Job) -> list[str]:
    """Files and folders of the source that the result has no use for or that would no longer be true."""
    source = job.checkpoint.folder
    return sorted(name + ("/" if (source / name).is_dir() else "") for name in _not_carried(job))


def _not_carried(job: Job) -> Iterator[str]:
    source = job.checkpoint.folder
    carried = set(side_folders(source)) | {shard.name for shard in job.checkpoint.shards} | {INDEX, RECORD}
    for name in os.listdir(source):
        if name not in carried and ((source / name).is_dir() or is_weights(name)):
            yield name


# ---------------------------------------------------------------- the last files


def _write_index(job: Job, folder: Path) -> None:
    """Under a provisional name first: an index that is there is whole."""
    weight_map = {made.name: shard.name for shard in job.shards() for made in shard.tensors}
    unfinished = folder / (INDEX + ".part")
    unfinished.write_bytes(index_bytes(weight_map, job.bytes))
    unfinished.rename(folder / INDEX)


def write_manifest(folder: Path, manifest: Path) -> None:
    """SHA-256 of every file, as `sha256sum --check` reads it, with paths relative to the model's folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{_sha256(path)}  {path.relative_to(folder)}\n" for path in files]
    manifest.parent.mkdir(parents=True, exist_ok=True)
    unfinished = manifest.with_name(manifest.name + ".part")
    unfinished.write_text("".join(lines), "utf-8")
    unfinished.rename(manifest)


def _sha256(path: Path) -> str:
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _rename(work: Workspace) -> None:
    """An empty folder at the destination gives way; anything else does not."""
    try:
        os.rename(work.model, work.destination)
    except OSError as error:
        raise OutputError(
            f"{work.destination} cannot be put in its place ({error.strerror}); the result is whole and lies in "
            f"{work.model}. Move away what is there and go on with resume=True (--resume)"
        ) from error
    sync_folder(work.destination.parent)
    work.remove()
    sync_folder(work.destination.parent)
