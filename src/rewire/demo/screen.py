"""What a demonstration shows: steps, claims that hold or do not, progress, and a verdict."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.rule import Rule
from rich.text import Text

from rewire.plan import Edit, Plan
from rewire.proof import Check, Proof
from rewire.receipts import Progress as Tell

INDENT = 3
PIPE_WIDTH = 120
"""Columns where the output is no terminal."""


@dataclass(frozen=True)
class Claim:
    """Something that a demonstration says, and whether it was found to hold."""

    text: str
    holds: bool


class Screen:
    """Writes to the terminal and remembers every claim made.

    Args:
        quiet: whether only verdicts and errors are written.
        console: where to; by default standard output.

    >>> screen = Screen(quiet=True, console=Console(width=80))
    >>> screen.claim("the tensors are bit-equal", True)
    True
    >>> screen.verdict("SAM", 12.3)
    ✓ SAM: all 1 claims hold (12 s)
    True
    """

    def __init__(self, *, quiet: bool = False, console: Console | None = None) -> None:
        self.quiet = quiet
        self.console = console or _standard_output()
        self.bars = Console(stderr=True)
        self.claims: list[Claim] = []

    def title(self, text: str) -> None:
        """Begins a demonstration."""
        self.claims = []
        self._print(Rule(Text(f"{text} ", "bold"), align="left"))

    @contextmanager
    def step(self, text: str) -> Iterator[None]:
        """One step: its heading before, the time it took after."""
        start = time.perf_counter()
        self._print(Text.assemble("\n", ("▸ ", "cyan"), (text, "bold")))
        yield
        self.note(f"{time.perf_counter() - start:.1f} s")

    def note(self, text: str) -> None:
        """A remark."""
        self.show(Text(text, "dim"))

    def say(self, text: str) -> None:
        """Plain text."""
        self.show(Text(text))

    def plan(self, *edits: Edit) -> None:
        """A plan, as it would stand in a file."""
        self.show(Text(Plan(edits).to_yaml().rstrip(), "cyan"))

    def show(self, what: RenderableType) -> None:
        """A table or the like, below the current step."""
        self._print(Padding(what, (0, 0, 0, INDENT)))

    def proof(self, proof: Proof) -> None:
        """The checks of a proof, those of one kind on one line."""
        word, style = ("passed", "green") if proof.passed else ("FAILED", "bold red")
        summary = f"{len(proof.checks) - len(proof.failures)} of {len(proof.checks)} checks, {proof.seconds:.1f} s"
        self.show(Text.assemble("proof ", (word, style), f": {summary}"))
        for checks in _kinds(proof.checks):
            self.show(_line(checks))
        if proof.first_divergence is not None:
            self.say(f"first divergence: {proof.first_divergence}")

    def claim(self, text: str, holds: bool) -> bool:
        """Says something that was checked, marked with whether it holds."""
        self.claims.append(Claim(text, holds))
        mark = ("✓ ", "green") if holds else ("✗ ", "bold red")
        self.show(Text.assemble(mark, text))
        return holds

    def verdict(self, name: str, seconds: float) -> bool:
        """One line about all claims since the title; whether all hold."""
        broken = [claim.text for claim in self.claims if not claim.holds]
        good = bool(self.claims) and not broken
        summary = f"all {len(self.claims)} claims hold"
        if not good:
            summary = f"{len(broken)} of {len(self.claims)} claims do not hold: {'; '.join(broken)}"
        mark, style = ("✓", "bold green") if good else ("✗", "bold red")
        self.console.print(Text(f"{mark} {name}: {summary} ({seconds:.0f} s)", style))
        return good

    def error(self, text: str) -> None:
        """Why there is nothing to show."""
        self.console.print(Text(text, "bold red"))

    @contextmanager
    def progress(self, text: str) -> Iterator[Tell]:
        """A bar for what takes longer than two seconds; yields the function that moves it on."""
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
        )
        hidden = self.quiet or not self.bars.is_terminal
        with Progress(*columns, console=self.bars, transient=True, disable=hidden) as bar:
            task = bar.add_task(text, total=None)

            def tell(what: str, done: int, total: int) -> None:
                bar.update(task, description=f"{text}: {what}", completed=done, total=total)

            yield tell

    def _print(self, what: RenderableType) -> None:
        if not self.quiet:
            self.console.print(what)


def _standard_output() -> Console:
    has_width = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if has_width else PIPE_WIDTH, highlight=False)


def _kinds(checks: Iterable[Check]) -> Iterable[list[Check]]:
    """Checks of one kind with one result together: `outputs · len 7` and `outputs · len 17`, if both passed."""
    found: dict[tuple[str, bool], list[Check]] = {}
    for check in checks:
        found.setdefault((_kind(check), check.passed), []).append(check)
    return found.values()


def _kind(check: Check) -> str:
    return check.name.partition(" · ")[0]


def _line(checks: Sequence[Check]) -> Text:
    """The worst of some checks of one kind, cut off where the terminal ends."""
    worst = max(checks, key=lambda check: check.value)
    mark = ("✓ ", "green") if worst.passed else ("✗ ", "bold red")
    detail = worst.detail if len(checks) == 1 else f"{len(checks)} inputs, the worst: {worst.detail}"
    numbers = f" {worst.value:<8.2g} {worst.limit:<10} "
    return Text.assemble(
        mark, f"{_kind(worst):<16}", (numbers, "cyan"), (detail, "dim"), no_wrap=True, overflow="ellipsis"
    )
