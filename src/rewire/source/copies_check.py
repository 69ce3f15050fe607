"""Verifies the `# Copied from` markers of files, and puts right those that have drifted."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rewire.errors import RewireError
from rewire.source.build import collector_paused
from rewire.source.copies import MARKER, Code, Marker, Module, indented, markers
from rewire.source.copies_compare import corrected, expected, is_same
from rewire.source.copies_format import formatted
from rewire.source.modules import Package, installed, package_around

Status = Literal["same", "ignored", "itself", "drifted", "missing", "misplaced", "unreadable"]

MEANING: dict[Status, str] = {
    "same": "the copy says what the original says",
    "ignored": "the copy takes itself out of the comparison",
    "itself": "the marker names the very object below it",
    "drifted": "copy and original differ",
    "missing": "the original does not exist",
    "misplaced": "no class or function stands below the marker",
    "unreadable": "the marker names nothing in an installed package",
}
"""Every status of a marker, with what it means."""

FAILURES: tuple[Status, ...] = ("drifted", "missing")
"""What must not be; the others are not verified."""


@dataclass(frozen=True)
class Copy:
    """A marker with what became of it.

    `observed` and `should` are the copy's text and what it should be, both from the left margin on; `original` is
    where the original stands. `note` says what is wrong with the marker or with finding its original.
    """

    marker: Marker
    status: Status
    name: str = ""
    original: tuple[Path, int] | None = None
    observed: str = ""
    should: str = ""
    note: str = ""

    @property
    def is_failure(self) -> bool:
        """Has it drifted, or is there no original?"""
        return self.status in FAILURES

    def diff(self, root: Path | None = None) -> str:
        """From what stands there to what should; empty unless it drifted."""
        path = self.marker.path.relative_to(root) if root else self.marker.path
        found, should = (one.splitlines(keepends=True) for one in (self.observed, self.should))
        if self.status != "drifted":
            return ""
        return "".join(difflib.unified_diff(found, should, f"{path}:{self.marker.line}", self.marker.dotted))

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        place = f"{self.original[0]}:{self.original[1]}" if self.original else None
        said = {"file": str(self.marker.path), "line": self.marker.line, "marker": self.marker.text}
        return {**said, "status": self.status, "copy": self.name, "original": place, "note": self.note}


def check_copies(
    paths: Iterable[str | Path], *, package_root: str | Path | None = None, texts: dict[Path, str] | None = None
) -> list[Copy]:
    """Verifies every marker in Python files and folders. Nothing is imported or written.

    Args:
        paths: files, and folders to search for them.
        package_root: folder of the package that the files belong to; by default the outermost one around each.
        texts: files that stand for those on disk.

    >>> check_copies([])
    []
    """
    with collector_paused():
        return Copies(package_root, texts).check(python_files(paths))


def fix_copies(paths: Iterable[str | Path], *, package_root: str | Path | None = None) -> dict[Path, str]:
    """New texts of the files in which copies have drifted. Copies of copies follow. Nothing is written.

    Generated files are left out: their modular file is to be changed.
    Raises `RewireError` if the markers contradict each other.
    """
    files = list(python_files(paths))
    changed: dict[Path, str] = {}
    for _ in range(_ROUNDS):
        copies = Copies(package_root, changed)
        new = copies.fixed(copies.check(files))
        if not new:
            return changed
        changed = changed | new
    raise RewireError(f"markers contradict each other in {', '.join(map(str, new))}: each change undoes another")


_ROUNDS = 12


def python_files(paths: Iterable[str | Path]) -> Iterator[Path]:
    """The files, and the `.py` files of the folders, in order."""
    for path in map(Path, paths):
        if path.is_dir():
            yield from sorted(path.rglob("*.py"))
        else:
            yield path


class Copies:
    """Files with markers and files with originals, each read once."""

    def __init__(self, package_root: str | Path | None = None, texts: dict[Path, str] | None = None) -> None:
        root = Path(package_root).resolve() if package_root is not None else None
        self.package = Package(root.name, root) if root else None
        self.texts = texts or {}
        self._modules: dict[Path, Module] = {}

    def check(self, files: Iterable[Path]) -> list[Copy]:
        """Every marker of the files, in order; the drifted ones with what they should be, formatted."""
        found: list[Copy] = []
        for path in files:
            text = self._text(path)
            if MARKER.search(text):
                found += [self._check(one) for one in markers(path, text)]
        return formatted(found)

    def fixed(self, found: Iterable[Copy]) -> dict[Path, str]:
        """New texts of the files with drifted copies, as far as these do not overlap."""
        texts: dict[Path, str] = {}
        for copy in sorted(found, key=lambda one: one.marker.line, reverse=True):
            module = self._modules.get(copy.marker.path)
            one = module.below(copy.marker) if module else None
            if module is None or one is None or copy.status != "drifted" or module.is_generated:
                continue
            before = texts.get(module.path, module.text).splitlines(keepends=True)
            first, last = module.span(one)
            if before[first - 1 : last] == module.lines[first - 1 : last]:  # else a copy inside it is changed first
                new = indented(corrected(copy.observed, copy.should), one.column)
                texts[module.path] = "".join([*before[: first - 1], new, *before[last:]])
        return texts

    # ------------------------------------------------------------ one marker

    def _check(self, marker: Marker) -> Copy:
        original, note = self._original(marker)
        if original is None:
            is_known = bool(note)
            return Copy(marker, "missing" if is_known else "unreadable", note=note or marker.fault or _UNKNOWN)
        module, source = original
        place = module.path, source.line
        copy_module = self._module(marker.path)
        one = copy_module.below(marker)
        if one is None:
            return Copy(marker, "misplaced", original=place, note=marker.fault)
        if source is one:
            return Copy(marker, "itself", one.name, place, note=marker.fault)
        observed = copy_module.code(one)
        should = expected(module.code(source), observed, marker.replacements)
        status: Status = "ignored" if should is None else "same" if is_same(observed, should) else "drifted"
        is_fixed_elsewhere = status == "drifted" and copy_module.is_generated
        note = marker.fault or ("generated: change its modular file" if is_fixed_elsewhere else "")
        return Copy(marker, status, one.name, place, observed, should or "", note)

    def _original(self, marker: Marker) -> tuple[tuple[Module, Code] | None, str]:
        """The original, or what is wrong with the way to it; neither if the marker is not about any known package."""
        parts = marker.dotted.split(".")
        package = self._package(parts[0], marker.path) if len(parts) > 1 else None
        if package is None:
            return None, ""
        for length in range(len(parts) - 1, 0, -1):
            path = package.root.joinpath(*parts[1:length]).with_suffix(".py") if length > 1 else None
            if path and path.is_file():
                module = self._module(path)
                found = module.find(parts[length:])
                missing = "" if found else f"{path.name} has no {'.'.join(parts[length:])}"
                return (module, found) if found else None, missing
        return None, f"{package.name} has no module {'.'.join(parts[1:-1])}"

    def _package(self, name: str, path: Path) -> Package | None:
        around = self.package or package_around(path.resolve())
        return around if around and around.name == name else installed(name)

    # ------------------------------------------------------------ files

    def _text(self, path: Path) -> str:
        try:
            return self.texts[path] if path in self.texts else path.read_text("utf-8-sig")
        except UnicodeDecodeError as error:
            raise RewireError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from None

    def _module(self, path: Path) -> Module:
        if path not in self._modules:
            try:
                self._modules[path] = Module(path, self._text(path))
            except SyntaxError as error:
                raise RewireError(f"{path}:{error.lineno}: not valid Python: {error.msg}") from None
        return self._modules[path]


_UNKNOWN = "no package of that name is known"
