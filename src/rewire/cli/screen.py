"""What a command shows: results on stdout, progress and errors on stderr."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and out of how much (0: nobody knows)."""

PIPE_WIDTH = 120
"""Columns when the output is no terminal."""


@dataclass(frozen=True)
class Screen:
    """How much a command shows. `as_json`: data for programs on stdout, and nothing else there."""

    quiet: bool = False
    as_json: bool = False

    def show(self, *parts: RenderableType) -> None:
        """Prints for people; nothing with --quiet or --json."""
        if not (self.quiet or self.as_json):
            stdout().print(*parts, sep="\n")

    def result(self, data: Callable[[], Any]) -> None:
        """Prints data for programs, with --json only."""
        if self.as_json:
            sys.stdout.write(json.dumps(data(), indent=1, ensure_ascii=False) + "\n")

    def listing(self, data: Callable[[], dict[str, Any]], name: str, items: Iterable[Any] | None) -> None:
        """As `result`, with one more key whose many items are written one at a time; None: without that key."""
        if items is None or not self.as_json:
            self.result(data)
            return
        sys.stdout.write(json.dumps(data(), indent=1, ensure_ascii=False).removesuffix("\n}") + f',\n "{name}": [')
        for number, item in enumerate(items):
            sys.stdout.write(",\n  " * bool(number) + json.dumps(item, ensure_ascii=False))
        sys.stdout.write("]\n}\n")

    @contextmanager
    def doing(self, what: str) -> Iterator[Progress]:
        """Shows on a terminal that something takes time; gives what to call as it advances."""
        from rich.console import Console

        console = Console(stderr=True)
        if self.quiet or not console.is_terminal:
            yield _ignore
            return
        with _bar(console, what) as advance:
            yield advance

    @contextmanager
    def writing(self, what: str) -> Iterator[Progress | None]:
        """As `doing`, for bytes: with rate and time left. Gives None where nobody sees it."""
        if self.quiet or not sys.stderr.isatty():
            yield None
            return
        from rich.console import Console

        with _byte_bar(Console(stderr=True), what) as advance:
            yield advance

    @contextmanager
    def models(self) -> Iterator[None]:
        """PyTorch and Transformers loaded, and silent."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with self.doing("starting PyTorch and Transformers"):
                from rewire import hf_seam
            with hf_seam.quiet():
                yield


def stdout() -> Console:
    """The console for results."""
    from rich.console import Console

    class Results(Console):
        """Rich would exit with 1, our code for a failed proof, when nobody reads any more."""

        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    has_width = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Results(width=None if has_width else PIPE_WIDTH, highlight=False)


def _ignore(text: str, done: int, total: int) -> None:
    pass


@contextmanager
def _bar(console: Console, what: str) -> Iterator[Progress]:
    from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars
    from rich.table import Column

    text = TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis"))
    columns = (SpinnerColumn(), text, BarColumn(bar_width=20), TimeElapsedColumn())
    with Bars(*columns, console=console, transient=True) as bars:
        task = bars.add_task(what, total=None)

        def advance(text: str, done: int, total: int) -> None:
            share = f"{done:,} of {total:,}" if total else f"{done:,}"
            bars.update(task, description=f"{what} · {share} · {text}", completed=done, total=total or None)

        yield advance


@contextmanager
def _byte_bar(console: Console, what: str) -> Iterator[Progress]:
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    columns = TextColumn("{task.description}"), BarColumn(bar_width=20), DownloadColumn(), TransferSpeedColumn()
    with Bars(*columns, TimeRemainingColumn(), console=console, transient=True) as bars:
        task = bars.add_task(what, total=None)

        def advance(text: str, done: int, total: int) -> None:
            bars.update(task, description=f"{what} · {text}", completed=done, total=total or None)

        yield advance
