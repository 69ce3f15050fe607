"""Arguments and options that the commands of `rewire modular` share, and how they report."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rewire.cli.options import ABOUT_OUTPUT

if TYPE_CHECKING:
    from rewire.source import Problem

ABOUT_RULES = "About the conversion"

Places = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="[FILES|FOLDERS]...",
        show_default=False,
        exists=True,
        help="Modular files, and folders with such files.",
    ),
]
PackageName = Annotated[
    str | None,
    typer.Option("--package", metavar="NAME", show_default=False, help="All modular files of an installed package."),
]
RulesOption = Annotated[
    str | None,
    typer.Option(
        "--rules",
        metavar="VERSION",
        show_default=False,
        rich_help_panel=ABOUT_RULES,
        help="Convert as this release of Transformers does, such as 5.10; by default what the tree shows.",
    ),
]
Reference = Annotated[
    bool,
    typer.Option(
        "--reference-behaviour",
        metavar="",
        rich_help_panel=ABOUT_RULES,
        help="Drop statements that no generated file can hold, as Transformers' own converter does, instead of "
        "refusing them.",
    ),
]
Jobs = Annotated[
    int, typer.Option(metavar="N", min=1, rich_help_panel=ABOUT_RULES, help="Processes at work side by side.")
]
CacheFolder = Annotated[
    Path | None,
    typer.Option(
        "--cache",
        metavar="DIR",
        show_default=False,
        file_okay=False,
        rich_help_panel=ABOUT_RULES,
        help="Where it is remembered what was built of what; by default the user's cache folder.",
    ),
]
Everything = Annotated[
    bool,
    typer.Option("--all", metavar="", rich_help_panel=ABOUT_RULES, help="Build also what has not changed."),
]
Form = Annotated[
    Literal["text", "json", "sarif"],
    typer.Option(
        "--format",
        metavar="FORM",
        rich_help_panel=ABOUT_OUTPUT,
        help="Problems as text, or as json or sarif on stdout and nothing else there.",
    ),
]


def files(places: Sequence[Path] | None, package: str | None) -> dict[Path, Path]:
    """The modular files that are meant, with the folder that each lies below."""
    from rewire.source.cache_build import site_files

    if not places and not package:
        raise typer.BadParameter("name modular files, folders with such files, or --package NAME")
    wrong = [path for path in places or () if path.is_file() and not path.name.startswith("modular_")]
    if wrong:
        raise typer.BadParameter(f"{wrong[0]} is no modular file: its name does not begin with modular_")
    found = site_files([*(places or ()), *([package_folder(package)] if package else ())])
    if not found:
        raise typer.BadParameter("there is no modular file")
    return found


def package_folder(name: str) -> Path:
    """The folder of an installed package, found without importing it."""
    from rewire.source.modules import installed

    package = installed(name)
    if package is None:
        raise typer.BadParameter(f"there is no installed package {name}")
    return package.root


def show_problems(problems: Sequence[Problem], form: Form) -> None:
    """Text on stderr, data on stdout."""
    import rewire
    from rewire.source.diagnostics import dumped
    from rewire.source.lint import LINT_RULES

    text = dumped(problems, form, rewire.__version__, LINT_RULES)
    if form == "text":
        sys.stderr.write(text)
    else:
        sys.stdout.write(text)


def write(text: str) -> None:
    """To stdout, as it is."""
    sys.stdout.write(text)
