"""Writes one output shard, and checks one that was written."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rewire.checkpoint import Sources, pread_exact
from rewire.errors import CheckpointError, OutputError
from rewire.stream import engine
from rewire.stream.engine import OUTPUT, Place, Range, Target
from rewire.stream.job import Job, OutputShard, size_of
from rewire.stream.journal import Entry

Advance = Callable[[int], None]
"""Called with bytes that have been written."""

_UNFINISHED = ".part"
_PIECES = 4
"""Parts per worker into which a shard is divided, so that all end at about the same time."""


def write_shard(job: Job, number: int, folder: Path, *, checksums: bool, jobs: int, advance: Advance) -> Entry:
    """Writes a shard into `folder`. It has its name only once it is whole and on disk.

    Raises:
        CheckpointError: the source is damaged, or changed meanwhile. The unfinished file is taken away again.
        OSError: what the system says, such as that the disk is full; likewise.
    """
    shard = job.shard(number)
    places, files = job.places(shard)
    unfinished = folder / (shard.name + _UNFINISHED)
    unfinished.unlink(missing_ok=True)  # never written into: it could be another name of a file that somebody needs
    with Sources(job.checkpoint, files) as sources, _removed_on_error(unfinished):
        handle = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            _allocate(handle, shard.size)
            _write_all(handle, shard.header)
            handles = [sources.files[file] for file in files]
            ranges = _write_body(list(shard.targets()), places, handles, handle, checksums, jobs, advance)
            os.fdatasync(handle)
        finally:
            os.close(handle)
        sources.check_unchanged()
        unfinished.rename(folder / shard.name)
    return Entry(number, shard.size, tuple(_numbered(one, files) for one in ranges) if checksums else None)


def _numbered(one: Range, files: Sequence[int]) -> Range:
    """With the number that its file has among the shards of the checkpoint."""
    return one if one.file == OUTPUT else replace(one, file=files[one.file])


@contextmanager
def _removed_on_error(path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _allocate(handle: int, size: int) -> None:
    """Reserves the space, so that a full disk is noticed before anything is written to it."""
    try:
        os.posix_fallocate(handle, 0, size)
    except OSError as error:
        if error.errno not in {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}:
            raise
        os.ftruncate(handle, size)


def _write_all(handle: int, data: bytes) -> None:
    view, start = memoryview(data), 0
    while start < len(view):
        start += os.pwrite(handle, view[start:], start)


def _write_body(
    targets: Sequence[Target],
    places: dict[str, Place],
    files: Sequence[int],
    handle: int,
    checksums: bool,
    jobs: int,
    advance: Advance,
) -> list[Range]:
    memory = engine.MEMORY // jobs

    def write(part: Sequence[Target]) -> list[Range]:
        return engine.write(part, places, files, handle, checksums=checksums, advance=advance, memory=memory)

    if jobs == 1:
        return write(targets)
    from concurrent.futures import ThreadPoolExecutor  # it brings logging with it, and most runs need neither

    with ThreadPoolExecutor(jobs) as pool:
        done = [pool.submit(write, part) for part in _divided(targets, jobs * _PIECES)]
        return [one for part in done for one in part.result()]


def _divided(targets: Sequence[Target], count: int) -> list[list[Target]]:
    """At most `count` runs of targets of about the same number of bytes."""
    share = sum(size_of(target.made) for target in targets) / count
    parts: list[list[Target]] = [[]]
    filled = 0
    for target in targets:
        if filled >= share * len(parts) and parts[-1]:
            parts.append([])
        parts[-1].append(target)
        filled += size_of(target.made)
    return parts


# ---------------------------------------------------------------- checking


def is_whole(shard: OutputShard, folder: Path) -> bool:
    """Whether the file lies there with its header and its full length."""
    try:
        handle = os.open(folder / shard.name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        if os.fstat(handle).st_size != shard.size:
            return False
        found = bytearray(len(shard.header))
        pread_exact(handle, 0, found, shard.name)
        return found == shard.header
    finally:
        os.close(handle)


def verify_shard(job: Job, entry: Entry, folder: Path) -> None:
    """Reads all bytes of a shard and of its sources again and compares their checksums.

    Raises:
        CheckpointError: some are others than they were.
        OutputError: there are no checksums.
    """
    if entry.ranges is None:
        raise OutputError(f"shard {entry.number} was written without checksums, so it cannot be verified")
    shard = job.shard(entry.number)
    files = sorted({one.file for one in entry.ranges if one.file != OUTPUT})
    number = {file: index for index, file in enumerate(files)}
    ranges = [one if one.file == OUTPUT else replace(one, file=number[one.file]) for one in entry.ranges]
    with Sources(job.checkpoint, files) as sources:
        handle = os.open(folder / shard.name, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)  # from the disk, not from memory
            wrong = engine.verify(ranges, [sources.files[file] for file in files], handle)
        finally:
            os.close(handle)
    if wrong:
        raise CheckpointError(_differences(job, shard, files, wrong))


def _differences(job: Job, shard: OutputShard, files: Sequence[int], wrong: Sequence[Range]) -> str:
    def name(one: Range) -> str:
        file = shard.name if one.file == OUTPUT else job.checkpoint.shards[files[one.file]].name
        return f"{file}: bytes {one.start:,} to {one.stop:,}"

    return (
        f"{len(wrong)} ranges do not read as they were written: {'; '.join(map(name, wrong[:4]))}. The disk or the "
        "memory is faulty, or somebody wrote there; begin anew with restart=True (--restart)"
    )
