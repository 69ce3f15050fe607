"""What is known of earlier builds: of which inputs the generated files were made, as hashes of their contents.

The record lies outside the tree. Losing it costs a rebuild, nothing else.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

FORMAT = 1


def cache_folder() -> Path:
    """Where programs of this platform keep what can be made anew."""
    home = Path.home()
    match sys.platform:
        case "darwin":
            base = home / "Library" / "Caches"
        case "win32":
            base = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
        case _:
            base = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return base / "rewire" / "modular"


def digest(data: bytes) -> str:
    """A short hash."""
    return blake2b(data, digest_size=16).hexdigest()


@cache
def converter_digest() -> str:
    """A hash of the converter itself: another version may write something else."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return digest(b"".join(file.read_bytes() for file in files))


@dataclass
class Contents:
    """Hashes of files, each read once; `forget` after a file was written."""

    _known: dict[Path, str] = field(default_factory=dict)

    def __getitem__(self, path: Path) -> str:
        """The hash of a file, empty where there is none."""
        if path not in self._known:
            try:
                self._known[path] = digest(path.read_bytes())
            except OSError:
                self._known[path] = ""
        return self._known[path]

    def put(self, path: Path, text: str) -> None:
        """The file counts as having this text."""
        self._known[path] = digest(text.encode())

    def forget(self, paths: Iterable[Path]) -> None:
        """The files may have changed."""
        for path in paths:
            self._known.pop(path, None)


@dataclass
class Record:
    """One build of one modular file: hashes of what was read and of what came out, by path."""

    inputs: dict[str, str]
    outputs: dict[str, str]
    settings: str

    def is_current(self, contents: Contents, settings: str) -> bool:
        """Are all files as they were?"""
        files = self.inputs | self.outputs
        return self.settings == settings and all(contents[Path(path)] == value for path, value in files.items())


class Records:
    """The records of one tree, in one file of the cache folder."""

    def __init__(self, folder: Path, tree: Path) -> None:
        self.path = folder / f"{tree.name}-{digest(str(tree).encode())[:12]}.json"
        self.builds: dict[Path, Record] = {}
        for path, values in _read(self.path).items():
            self.builds[Path(path)] = Record(*values)

    def save(self) -> None:
        """Writes the file, whole or not at all."""
        data = {str(path): [one.inputs, one.outputs, one.settings] for path, one in self.builds.items()}
        write_whole({self.path: json.dumps({"format": FORMAT, "builds": data})})


def _read(path: Path) -> Mapping[str, Any]:
    """The builds of a file; none of one that is missing, damaged or of another format."""
    try:
        data = json.loads(path.read_text("utf-8"))
        builds = data["builds"] if data["format"] == FORMAT else {}
        return {name: (dict(one[0]), dict(one[1]), str(one[2])) for name, one in builds.items()}
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return {}


def write_whole(texts: Mapping[Path, str]) -> None:
    """Writes files beside their places first and then puts them there, so that no half-written file appears."""
    ready: list[tuple[Path, Path]] = []
    try:
        for path, text in texts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            beside = path.with_name(f".{path.name}.{os.getpid()}")
            ready.append((beside, path))
            beside.write_bytes(text.encode())
        for beside, path in ready:
            os.replace(beside, path)
    finally:
        for beside, _ in ready:
            beside.unlink(missing_ok=True)
