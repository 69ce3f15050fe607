"""`rewire demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from rewire.cli.options import ABOUT_OUTPUT, Debug
from rewire.cli.screen import Screen

EXAMPLE = "Example: [cyan]rewire demo minilm[/]"


def demo(
    which: Annotated[
        Literal["sam", "minilm", "all"], typer.Argument(metavar="NAME", help="sam, minilm or all.")
    ] = "all",
    folder: Annotated[
        Path | None,
        typer.Option(metavar="DIR", show_default=False, help="Keep what is written, in this new or empty folder."),
    ] = None,
    quiet: Annotated[
        bool,
        typer.Option("--quiet", "-q", metavar="", rich_help_panel=ABOUT_OUTPUT, help="Print the verdicts only."),
    ] = False,
    debug: Debug = False,
) -> None:
    """Watch two real models being changed, proven and saved.

    [bold]sam[/] splits the fused attention of a full-size SAM and trains LoRA on its parts; [bold]minilm[/] joins the
    attention of all-MiniLM-L6-v2 and embeds real sentences. Minutes on two cores; nothing is downloaded.
    """
    with Screen(quiet).models():
        from rewire.demo import run

        raise typer.Exit(run(which, folder=folder, quiet=quiet))
