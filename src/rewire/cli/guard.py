"""Exit codes, and errors as one message instead of a traceback."""

from __future__ import annotations

import os
import sys
from enum import IntEnum
from typing import Any

import typer
from typer.core import TyperGroup

from rewire.errors import CheckpointError, ConsentError, RewireError


class Code(IntEnum):
    """What a command ends with."""

    DONE = 0
    PROOF_FAILED = 1
    REFUSED = 2
    UNEXPECTED = 3
    INTERRUPTED = 130
    PIPE_CLOSED = 141


EXIT_CODES = (
    "[dim]Exit codes: [bold]0[/] done · [bold]1[/] the proof failed · [bold]2[/] wrong usage, bad input or refused plan "
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
        except (RewireError, OSError, KeyboardInterrupt) as error:
            if ctx.meta.get(DEBUG):
                raise
            raise typer.Exit(report(error)) from None
        except (typer.Exit, typer.Abort, typer.TyperException):
            raise
        except Exception as error:
            if ctx.meta.get(DEBUG) or type(error).__module__.startswith("typer."):
                raise
            raise typer.Exit(_report_unexpected(error)) from None


def report(error: BaseException) -> Code:
    """Prints an expected error and says what to exit with."""
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
        case _:
            complain("error", str(error) or type(error).__name__, _hint(error))
    return Code.REFUSED


def _report_unexpected(error: Exception) -> Code:
    text = f"{type(error).__name__}: {error}"
    complain("unexpected error", text, "Run again with --debug for the whole traceback.")
    return Code.UNEXPECTED


def _hint(error: BaseException) -> str:
    """What the message of the library means on the command line."""
    if isinstance(error, ConsentError):
        return "On the command line: --allow-code, if you trust it."
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
