"""Builds what is out of date, and finds generated files that are not what their modular file gives."""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rewire.source.build import Workspace, broken_outputs, collector_paused, workspace
from rewire.source.cache import Contents, Record, Records, converter_digest, digest, write_whole
from rewire.source.corpus import Built, build_many
from rewire.source.errors import Problem, SourceError
from rewire.source.graph import Outline, circle, inheritance, levels, outline
from rewire.source.modules import LIBRARY, generating_file, installed, modular_files, package_around
from rewire.source.rules import Rules
from rewire.source.tidy import find_ruff, ruff_version, tidy

Progress = Callable[[int, int], None]

NEVER_SILENT = ("dropped", "nothing-to-delete")
"""Rules that are errors unless one asks for what the reference does, which is to pass over them."""


@dataclass
class Site:
    """Modular files, where what they give goes, and how it is made.

    Attributes:
        paths: the modular files.
        out: a folder for the generated files; by default they lie beside the modular files.
        base: the folder that paths under `out` begin from, by modular file.
        cache: the folder of the records; without one everything is built.
        reference: pass over what cannot be kept, as the reference does, instead of refusing it.
    """

    paths: Sequence[Path]
    out: Path | None = None
    base: Mapping[Path, Path] = field(default_factory=dict)
    cache: Path | None = None
    package_root: Path | None = None
    rules: str | Rules | None = None
    ruff: str | None = None
    jobs: int = 1
    reference: bool = False

    def __post_init__(self) -> None:
        self.ruff = find_ruff(self.ruff)
        self.contents = Contents()
        self.records = Records(self.cache, _tree(self.paths)) if self.cache and self.paths else None
        self.overlay: dict[Path, str] = {}
        self._outlines: dict[tuple[Path, str], Outline] = {}

    def place(self, path: Path, name: str) -> Path:
        """Where a generated file goes."""
        if self.out is None:
            return path.with_name(name)
        return self.out / path.relative_to(self.base.get(path, path.parent)).with_name(name)

    def workspace(self) -> Workspace:
        """For files that are built one by one."""
        shop = workspace(self.package_root, "disk", self.rules, self.ruff)
        shop.generated |= self.overlay
        return shop

    # ------------------------------------------------------------ what is current

    def stale(self) -> list[Path]:
        """The modular files of which something has changed since they were built."""
        self._take_standing()
        return [path for path in self.paths if not self._is_current(path)]

    def _is_current(self, path: Path) -> bool:
        record = self.records.builds.get(path) if self.records else None
        outputs = record is not None and all(Path(one).parent == self.place(path, "x").parent for one in record.outputs)
        return record is not None and outputs and record.is_current(self.contents, self._settings(path))

    def _take_standing(self) -> None:
        """What was built into another folder is what stands for the generated files beside the sources."""
        if self.out is None or self.records is None:
            return
        for path in self.paths:
            record = self.records.builds.get(path)
            for place, value in record.outputs.items() if record else ():
                source = path.with_name(Path(place).name)
                if self.contents[Path(place)] == value != self.contents[source]:
                    self.overlay[source] = Path(place).read_text("utf-8")
                    self.contents.put(source, self.overlay[source])

    def _settings(self, path: Path) -> str:
        """All that shapes the result besides the files that are read."""
        beside = ",".join(sorted(one.name for one in path.parent.glob("modular_*.py")))
        version = ".".join(map(str, ruff_version(self.ruff or "")))
        return f"{converter_digest()} ruff {version} rules {self.rules} {self.reference} {beside}"

    # ------------------------------------------------------------ what was built

    def note(self, built: Built) -> None:
        """Keeps a record of a build whose files stand in their places."""
        if self.records is None:
            return
        if not built.texts or built.errors:
            self.records.builds.pop(built.path, None)
            return
        inputs = {str(one): self.contents[one] for one in self._inputs(built.path)}
        places = [self.place(built.path, name) for name in built.texts]
        outputs = {str(one): self.contents[one] for one in places}
        self.records.builds[built.path] = Record(inputs, outputs, self._settings(built.path))

    def _inputs(self, path: Path) -> Iterator[Path]:
        """The modular file, its parents (and what missing ones are made from) and the tables of names."""
        found = dict.fromkeys([path])
        for one in self.parents(path):
            found[one] = None
            if not self.contents[one] and (source := generating_file(one)):
                found |= dict.fromkeys(self._inputs(source))
        yield from found
        package = package_around(path) or installed(LIBRARY)
        library = package if package and package.name == LIBRARY else installed(LIBRARY)
        if library:
            yield library.root / "__init__.py"
            yield from (library.root / "models" / "auto" / name for name in _TABLES)

    def take(self, built: Iterable[Built]) -> dict[Path, str]:
        """Lets what was built stand for the files on disk; returns what is not as it was there."""
        changed: dict[Path, str] = {}
        for one in built:
            for name, text in one.texts.items():
                path = one.path.with_name(name)
                if self.contents[path] != digest(text.encode()):
                    changed[path] = text
                    self.contents.put(path, text)
        self.overlay |= changed
        return changed

    def parents(self, path: Path) -> tuple[Path, ...]:
        """The parent files that a modular file names."""
        return tuple(one.path for one in self.outline(path).parents)

    def outline(self, path: Path) -> Outline:
        """What a modular file inherits from; read again when it has changed."""
        key = path, self.contents[path]
        if key not in self._outlines:
            shop = workspace(self.package_root, "disk", self.rules, self.ruff)
            names, package, rules = shop.names_for(path), shop.package_of(path), shop.rules_of(path)
            self._outlines[key] = outline(path, names, package, rules) if key[1] else Outline(path, (), frozenset())
        return self._outlines[key]


_TABLES = ("auto_mappings.py", "configuration_auto.py")


def _tree(paths: Sequence[Path]) -> Path:
    """The package, or the folder, that a record is about."""
    package = package_around(paths[0])
    return package.root if package else paths[0].parent


def site_files(places: Iterable[Path]) -> dict[Path, Path]:
    """Modular files, given themselves or by folders, with the folder that paths under `--out` begin from."""
    found: dict[Path, Path] = {}
    for place in places:
        one = place.resolve()
        if one.is_dir():
            found |= {path: one for path in modular_files(one) if path not in found}
        else:
            found.setdefault(one, one.parent)
    return found


# ---------------------------------------------------------------- building


def build_stale(site: Site, *, everything: bool = False, progress: Progress | None = None) -> dict[Path, Built]:
    """Builds what is out of date, in memory: also what depends on a file that comes out changed.

    Where nothing is known of earlier builds all are built at once, from parents as they stand; where some of these are
    missing, level by level in memory. What is left, which is what inherits from files that came out changed, goes by
    level, so that each file is built once, from its final parents.
    """
    stale = list(site.paths) if everything else site.stale()
    built = dict(_circular(site, stale)) if stale else {}
    first = [path for path in stale if path not in built]
    parents = {one for path in first for one in site.parents(path)}
    is_missing = any(not site.contents[one] and generating_file(one) for one in parents)
    by_level, final = set(first), built.keys() - set(first)
    if first and (is_missing or len(first) in (1, len(site.paths))) and not site.overlay:
        built |= _strict(site, _many(site, first, "memory" if is_missing else "disk", progress))
        by_level = set()
        final |= set(first) if is_missing else set()
    if by_level or site.take(built.values()):
        with collector_paused():
            built |= _by_level(site, by_level, final, progress)
    return {path: built[path] for path in site.paths if path in built}


def _by_level(
    site: Site, stale: set[Path], final: set[Path], progress: Progress | None
) -> Iterator[tuple[Path, Built]]:
    """Builds stale files and what inherits from changed ones, parents first; the `final` ones are left out."""
    shop, wanted, done = site.workspace(), set(site.paths) - final, 0
    for level in levels(inheritance(_with_ancestors(site, site.paths))):
        files = [path for path in level if path in stale or not site.overlay.keys().isdisjoint(site.parents(path))]
        fresh = _strict(site, _one_by_one(site, shop, [path for path in files if path in wanted]))
        shop.generated |= site.take(fresh.values())
        yield from fresh.items()
        done += len(stale.intersection(level))
        if progress and stale:
            progress(done, len(stale))


def _many(site: Site, paths: Sequence[Path], parents: str, progress: Progress | None) -> dict[Path, Built]:
    return build_many(
        paths,
        package_root=site.package_root,
        parents="memory" if parents == "memory" else "disk",
        rules=site.rules,
        ruff=site.ruff,
        jobs=min(site.jobs, len(paths)),
        progress=progress,
    )


def _one_by_one(site: Site, shop: Workspace, paths: Sequence[Path]) -> dict[Path, Built]:
    """Files built in a workspace that knows what has come out changed in this run."""
    raw: list[Built] = []
    for path in paths:
        try:
            conversion = shop.convert(path)
            raw.append(Built(path, conversion.texts, conversion.problems))
        except SourceError as error:
            raw.append(Built(path, {}, error.problems))
    names = {f"{number}/{name}": text for number, one in enumerate(raw) for name, text in one.texts.items()}
    tidied = tidy(names, find_ruff(site.ruff)) if names else {}
    found: dict[Path, Built] = {}
    for number, one in enumerate(raw):
        texts = {name: tidied[f"{number}/{name}"] for name in one.texts if f"{number}/{name}" in tidied}
        broken = broken_outputs(one.path, one.texts, texts)
        found[one.path] = Built(one.path, {} if broken else texts, (*one.problems, *broken))
    return found


def _strict(site: Site, found: dict[Path, Built]) -> dict[Path, Built]:
    """What must not be passed over in silence is an error."""
    return found if site.reference else {path: _refused(one) for path, one in found.items()}


def _refused(built: Built) -> Built:
    problems = tuple(replace(one, severity="error") if one.rule in NEVER_SILENT else one for one in built.problems)
    strict = replace(built, problems=problems)
    return replace(strict, texts={}) if strict.errors else strict


def _circular(site: Site, paths: Sequence[Path]) -> Iterator[tuple[Path, Built]]:
    graph = inheritance(_with_ancestors(site, paths))
    left = graph.keys() - {one for level in levels(graph) for one in level}
    for path in sorted(left.intersection(paths)):
        message = " inherits from ".join(one.name for one in circle(graph, path))
        problem = Problem(path, 1, 1, "circular-inheritance", message, "take one of these out of the circle")
        yield path, Built(path, {}, (problem,))


def _with_ancestors(site: Site, paths: Sequence[Path]) -> dict[Path, Outline]:
    found: dict[Path, Outline] = {}
    todo = list(paths)
    while todo:
        path = todo.pop()
        if path not in found:
            found[path] = site.outline(path)
            todo += [source for one in found[path].parents if (source := generating_file(one.path))]
    return found


def put(site: Site, built: Mapping[Path, Built]) -> list[Path]:
    """Writes what was built, each file whole; returns those that were not there or have changed."""
    texts = {site.place(one.path, name): text for one in built.values() for name, text in one.texts.items()}
    different = {path: text for path, text in texts.items() if not _says(path, text)}
    write_whole(different)
    site.contents.forget(different)
    if site.out is not None:  # what depends on these is to count them as they are there
        for one in built.values():
            for name, text in one.texts.items():
                site.contents.put(one.path.with_name(name), text)
    for one in built.values():
        site.note(one)
    if site.records is not None:
        site.records.save()
    return list(different)


def _says(path: Path, text: str) -> bool:
    return path.is_file() and path.read_bytes() == text.encode()


Stamps = dict[Path, tuple[int, int]]
"""When files were last changed, and their sizes."""


def stamps(site: Site) -> Stamps:
    """Of all modular files and their parents."""
    files = dict.fromkeys(one for path in site.paths for one in (path, *site.parents(path)))
    return {path: _stamp(path) for path in files}


def wait_for_change(before: Stamps, interval: float = 0.3) -> list[Path]:
    """Returns the files that have changed, as soon as some have."""
    while not (changed := [path for path, stamp in before.items() if _stamp(path) != stamp]):
        time.sleep(interval)
    return changed


def _stamp(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_mtime_ns, found.st_size


# ---------------------------------------------------------------- checking


@dataclass(frozen=True)
class Drift:
    """A generated file that is not what the modular file gives; `found` is nothing where there is no such file."""

    modular: Path
    path: Path
    found: str | None
    should: str | None

    @property
    def what(self) -> str:
        """In one word."""
        if self.found is None:
            return "missing"
        return "left over" if self.should is None else "differs"

    @property
    def line(self) -> int:
        """The first line that differs."""
        pairs = zip((self.found or "").splitlines(), (self.should or "").splitlines(), strict=False)
        return next((number for number, (found, should) in enumerate(pairs, 1) if found != should), 1)

    def diff(self) -> str:
        """From what stands there to what should."""
        found, should = ((one or "").splitlines(keepends=True) for one in (self.found, self.should))
        return "".join(difflib.unified_diff(found, should, str(self.path), f"from {self.modular.name}"))


def drifted(
    site: Site, *, everything: bool = False, progress: Progress | None = None
) -> tuple[list[Drift], dict[Path, Built]]:
    """Compares generated files with what their modular files give. Writes nothing but the record.

    Returns the differences, and what was built to find them.
    """
    stale = list(site.paths) if everything else site.stale()
    built = _strict(site, _many(site, stale, "disk", progress)) if stale else {}
    found = [drift for one in built.values() if not one.errors for drift in _drift_of(site, one)]
    if site.records is not None:
        wrong = {one.modular for one in found}
        for path, one in built.items():
            if path not in wrong:
                site.note(one)
        site.records.save()
    return found, built


def _drift_of(site: Site, built: Built) -> Iterator[Drift]:
    for name, text in built.texts.items():
        path = site.place(built.path, name)
        found = path.read_text("utf-8") if path.is_file() else None
        if found != text:
            yield Drift(built.path, path, found, text)
    for path in _generated_by(site, built.path):
        if path.name not in built.texts:
            yield Drift(built.path, path, path.read_text("utf-8"), None)


def _generated_by(site: Site, modular: Path) -> Iterator[Path]:
    """Files whose banner names a modular file."""
    name = modular.stem.removeprefix("modular_")
    for path in sorted(site.place(modular, "x").parent.glob(f"*_{name}.py")):
        if path != modular and generating_file(path) == modular:
            banner = path.read_text("utf-8")[:700].partition("automatically generated from ")[2]
            if banner.partition("\n")[0].rstrip(".").removesuffix(".py").endswith(modular.stem):
                yield path
