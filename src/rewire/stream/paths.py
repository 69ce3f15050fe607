"""Which destinations are refused before anything is read or written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from rewire.errors import CheckpointError, OutputError


def check_folders(source: Path, destination: Path) -> Path:
    """The real path of the destination.

    A folder is known by its inode, so that links, bind mounts and names in other letter case are seen through.

    Raises:
        CheckpointError: the source is no folder.
        OutputError: one of the two is the other, or lies within it; or the destination is a file or a dangling link.
    """
    if not source.is_dir():
        raise CheckpointError(f"{source} is no folder; name one that holds safetensors")
    if destination.is_symlink() and not destination.exists():
        raise OutputError(f"{destination} is a link to nothing; take it away")
    if destination.exists() and not destination.is_dir():
        raise OutputError(f"{destination} is a file; name a folder")
    real = Path(os.path.realpath(destination))
    if real.name in {"", ".", ".."}:
        raise OutputError(f"{destination} is the root of a file system; name a folder in it")
    if _inode(source) in set(_inodes(real)):
        raise OutputError(f"{destination} is the source {source}, or lies within it; choose a folder elsewhere")
    if real.exists() and _inode(real) in set(_inodes(Path(os.path.realpath(source)))):
        raise OutputError(f"the source {source} lies within {destination}; choose a folder elsewhere")
    return real


def is_taken(destination: Path) -> bool:
    """Whether something is in the way there. An empty folder is not."""
    return destination.is_dir() and any(destination.iterdir())


def _inodes(path: Path) -> Iterator[tuple[int, int]]:
    """Of a path and of all folders around it that exist."""
    return (_inode(folder) for folder in (path, *path.parents) if folder.exists())


def _inode(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino
