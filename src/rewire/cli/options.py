"""Arguments and options that several commands share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer

from rewire.cli.guard import DEBUG

MODEL_HELP = (
    "A folder, a name on the Hub, or [bold]config:TYPE[/]: a model of that type with random weights, "
    "such as config:bert."
)


def remember_debug(ctx: typer.Context, wanted: bool) -> bool:
    """Lets the guard around all commands know."""
    ctx.meta[DEBUG] = wanted
    return wanted


def html_name(path: Path | None) -> Path | None:
    """A proof goes to HTML by its ending; and the folder is there before minutes are spent."""
    if path is not None and path.suffix.lower() != ".html":
        raise typer.BadParameter(f"{path} must end in .html")
    if path is not None and not path.absolute().parent.is_dir():
        raise typer.BadParameter(f"the folder {path.absolute().parent} does not exist")
    return path


ABOUT_MODEL = "About the model"
ABOUT_OUTPUT = "About the output"

Model = Annotated[str, typer.Argument(metavar="MODEL", show_default=False, help=MODEL_HELP)]
Values = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        show_default=False,
        rich_help_panel=ABOUT_MODEL,
        help="With config: a configuration value, such as num_hidden_layers=2 or vision_config.hidden_size=64. "
        "May be given several times.",
    ),
]
Seed = Annotated[
    int,
    typer.Option(metavar="N", rich_help_panel=ABOUT_MODEL, help="With config: the seed of the random weights."),
]
Dtype = Annotated[
    Literal["auto", "float64", "float32", "bfloat16", "float16"],
    typer.Option(
        metavar="TYPE",
        rich_help_panel=ABOUT_MODEL,
        help="Type of the weights: float64, float32, bfloat16, float16, or auto: as they are stored.",
    ),
]
Allow = Annotated[
    list[str] | None,
    typer.Option(
        metavar="GLOB",
        show_default=False,
        rich_help_panel=ABOUT_MODEL,
        help="Tensors that may be missing or superfluous in a checkpoint, such as 'classifier.*'. "
        "May be given several times.",
    ),
]
AllowCode = Annotated[
    bool,
    typer.Option(
        "--allow-code",
        metavar="",
        rich_help_panel=ABOUT_MODEL,
        help="Let a plan import and run the classes that it names.",
    ),
]
Html = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        show_default=False,
        callback=html_name,
        rich_help_panel=ABOUT_OUTPUT,
        help="Write the proof as a page, with a heat map of the differences per layer.",
    ),
]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", metavar="", rich_help_panel=ABOUT_OUTPUT, help="Print nothing but errors."),
]
Json = Annotated[
    bool,
    typer.Option(
        "--json",
        metavar="",
        rich_help_panel=ABOUT_OUTPUT,
        help="Print JSON for programs, and nothing else, on stdout.",
    ),
]
Debug = Annotated[
    bool,
    typer.Option(
        "--debug",
        metavar="",
        callback=remember_debug,
        rich_help_panel=ABOUT_OUTPUT,
        help="Show the traceback of an error.",
    ),
]


def prose(command: Callable[..., object]) -> str:
    """The docstring of a command with its paragraphs in one line each, for a terminal of any width."""
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
