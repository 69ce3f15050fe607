"""Exit codes, and errors as one message instead of a traceback."""

from __future__ import annotations

import os
import sys
import traceback
from enum import IntEnum
from typing import Any

import typer
from typer.core import TyperGroup

from rewire.errors import CheckpointError, RewireError


class Code(IntEnum):
    """What a command ends with."""

    DONE = 0
    PROOF_FAILED = 1
    REFUSED = 2
    UNEXPECTED = 3
    INTERRUPTED = 130
    PIPE_CLOSED = 141


EXIT_CODES = (
    "[dim]Exit codes: [bold]0[/] done · [bold]1[/] the proof failed · [bold]2[/] wrong usage, bad input, refused plan "
    "· [bold]3[/] unexpected error · [bold]130[/] interrupted[/]"
)

DEBUG = "rewire.debug"
"""Where a context keeps whether tracebacks are wanted."""


class Guarded(TyperGroup):
    """A group of commands whose errors reach the user as messages on stderr."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the command; what it raises becomes a message and an exit code."""
        try:
            return super().invoke(ctx)
        except (Exception, KeyboardInterrupt) as error:
            if _is_typers(error):
                raise
            if ctx.meta.get(DEBUG):
                traceback.print_exc()
            raise typer.Exit(report(error)) from None


def _is_typers(error: BaseException) -> bool:
    """Usage errors and exits, for which typer has its own ways."""
    return any(cls.__module__.startswith("typer.") for cls in type(error).__mro__)


def report(error: BaseException) -> Code:
    """Prints an error and says what to exit with."""
    match error:
        case KeyboardInterrupt():
            complain("interrupted", "nothing half-written is left behind")
            return Code.INTERRUPTED
        case BrokenPipeError():
            # Whoever read the output has seen enough; Python would complain again at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return Code.PIPE_CLOSED
        case OSError(filename=str(name), strerror=str(reason)):
            complain("error", f"{name}: {reason}")
        case RewireError() | OSError():
            complain("error", str(error) or type(error).__name__, _hint(error))
        case _:
            complain("unexpected error", f"{type(error).__name__}: {error}", "--debug shows the traceback.")
            return Code.UNEXPECTED
    return Code.REFUSED


def _hint(error: BaseException) -> str:
    """What the message of the library means on the command line."""
    if isinstance(error, CheckpointError) and "allow=(" in str(error):
        return "On the command line: --allow 'classifier.*'"
    return ""


def complain(head: str, text: str, hint: str = "") -> None:
    """Writes a message to stderr."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True)
    message = Text.assemble((f"{head}: ", "bold red"), text.strip())
    if hint:
        message.append(f"\n{hint}", style="dim")
    console.print(message, soft_wrap=not console.is_terminal)
