"""Many modular files in one go: parents read once, ruff run once a level, several processes if wanted."""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from multiprocessing.pool import Pool
from pathlib import Path

from rewire.source.build import Parents, Workspace, broken_outputs, collector_paused, workspace
from rewire.source.errors import Problem, SourceError
from rewire.source.graph import Outline, circle, inheritance, levels, outline
from rewire.source.modules import Package, generating_file
from rewire.source.rules import Rules
from rewire.source.tidy import find_ruff, tidy


@dataclass(frozen=True)
class Built:
    """The generated files of one modular file, by name; none if `problems` has errors."""

    path: Path
    texts: dict[str, str]
    problems: tuple[Problem, ...] = ()

    @property
    def errors(self) -> tuple[Problem, ...]:
        """What stood in the way."""
        return tuple(one for one in self.problems if one.severity == "error")


Progress = Callable[[int, int], None]


def build_many(
    paths: Iterable[str | Path],
    *,
    package_root: str | Path | None = None,
    parents: Parents = "disk",
    rules: str | Rules | None = None,
    ruff: str | None = None,
    jobs: int = 1,
    progress: Progress | None = None,
) -> dict[Path, Built]:
    """Builds modular files, by path in the order given; one that fails does not keep others from being built.

    With `parents="memory"` the modular files of all parents are built as well, level by level, from nothing.
    `progress` is called with how many files are done and how many there are. The other arguments are those of `build`.
    """
    found = [Path(path).resolve() for path in paths]
    shop = workspace(package_root, parents, rules, find_ruff(ruff))
    with collector_paused(), _workers(jobs) as pool:
        outlines = _outlines(found, shop) if parents == "memory" else {}
        steps = _levels(outlines) if outlines else [(found, [])]
        built = dict(_run(steps, shop, outlines, pool, progress))
    return {path: built[path] for path in found}


Step = tuple[list[Path], list[Built]]
"""Files to build together, and some that cannot be built."""


def _run(
    steps: Sequence[Step],
    shop: Workspace,
    outlines: Mapping[Path, Outline],
    pool: Pool | None,
    progress: Progress | None,
) -> Iterator[tuple[Path, Built]]:
    done, total = 0, sum(len(paths) + len(failed) for paths, failed in steps)
    for paths, failed in steps:
        raw: list[Built] = list(failed)
        for one in _converted(paths, shop, outlines, pool):
            raw.append(one)
            done += 1
            if progress:
                progress(done, total)
        for one in _tidied(raw, shop):
            shop.generated |= {one.path.with_name(name): text for name, text in one.texts.items()}
            yield one.path, one


def _converted(
    paths: Sequence[Path], shop: Workspace, outlines: Mapping[Path, Outline], pool: Pool | None
) -> Iterator[Built]:
    """The files, not formatted yet."""
    if pool is None:
        yield from (_convert(path, shop) for path in paths)
        return
    settings = Settings(shop.package, shop.parents, shop.rules, shop.ruff)
    tasks = [(settings, path, _needed(outlines.get(path), shop)) for path in paths]
    yield from pool.imap_unordered(_convert_in_worker, tasks, chunksize=max(1, min(8, len(tasks) // 8)))


def _convert(path: Path, shop: Workspace) -> Built:
    try:
        conversion = shop.convert(path)
    except SourceError as error:
        return Built(path, {}, error.problems)
    return Built(path, conversion.texts, conversion.problems)


def _tidied(raw: Sequence[Built], shop: Workspace) -> Iterator[Built]:
    names = {f"{number}/{name}": text for number, one in enumerate(raw) for name, text in one.texts.items()}
    tidied = tidy(names, find_ruff(shop.ruff)) if names else {}
    for number, one in enumerate(raw):
        texts = {name: tidied[f"{number}/{name}"] for name in one.texts if f"{number}/{name}" in tidied}
        broken = broken_outputs(one.path, one.texts, texts)
        yield Built(one.path, {} if broken else texts, (*one.problems, *broken))


# ---------------------------------------------------------------- the order, from nothing


def _levels(outlines: Mapping[Path, Outline]) -> list[Step]:
    """The files by depth; those in a circle come last, failed."""
    graph = inheritance(outlines)
    ordered = levels(graph)
    left = graph.keys() - {path for level in ordered for path in level}
    failed = [Built(path, {}, (_circular(graph, path),)) for path in sorted(left)]
    return [*((level, []) for level in ordered), ([], failed)]


def _outlines(paths: Sequence[Path], shop: Workspace) -> dict[Path, Outline]:
    """The files and all modular files that they inherit from."""
    found: dict[Path, Outline] = {}
    todo = list(paths)
    while todo:
        path = todo.pop()
        if path not in found:
            found[path] = outline(path, shop.names_for(path), shop.package_of(path), shop.rules_of(path))
            sources = (generating_file(parent.path) for parent in found[path].parents)
            todo += [source for source in sources if source]
    return {path: found[path] for path in sorted(found)}


def _circular(graph: Mapping[Path, Iterable[Path]], path: Path) -> Problem:
    message = " inherits from ".join(one.name for one in circle(graph, path))
    return Problem(path, 1, 1, "circular-inheritance", message, "take one of these out of the circle")


# ---------------------------------------------------------------- processes


@dataclass(frozen=True)
class Settings:
    """What a worker process needs to know of the workspace."""

    package: Package | None
    parents: Parents
    rules: Rules | None
    ruff: str | None


@contextmanager
def _workers(jobs: int) -> Iterator[Pool | None]:
    if jobs == 1:
        yield None
        return
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield pool


@cache
def _workspace_of_worker(settings: Settings) -> Workspace:
    """The workspace of this process, which it keeps from task to task."""
    gc.disable()
    return Workspace(settings.package, settings.parents, settings.rules, settings.ruff)


def _convert_in_worker(task: tuple[Settings, Path, dict[Path, str]]) -> Built:
    settings, path, needed = task
    shop = _workspace_of_worker(settings)
    shop.generated |= needed
    return _convert(path, shop)


def _needed(found: Outline | None, shop: Workspace) -> dict[Path, str]:
    """The generated parents that a worker needs and does not find on disk."""
    parents = (one.path for one in found.parents) if found else ()
    return {path: shop.generated[path] for path in parents if path in shop.generated}
