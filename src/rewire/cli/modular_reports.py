"""The commands of `rewire modular` that report: graph, explain, lint, copies; and new."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from rewire.cli.guard import Code
from rewire.cli.modular_options import (
    Form,
    PackageName,
    Places,
    RulesOption,
    files,
    package_folder,
    show_problems,
    write,
)
from rewire.cli.options import ABOUT_OUTPUT, Debug, Json, Quiet
from rewire.cli.screen import Screen
from rewire.errors import OutputError, RewireError

if TYPE_CHECKING:
    from rich.table import Table

    from rewire.source.copies_check import Copy
    from rewire.source.explain import Entry, Explanation


def graph(
    places: Places = None,
    package: PackageName = None,
    changed: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            show_default=False,
            help="Show only what a change in this file makes necessary: a modular file, or one that is inherited from.",
        ),
    ] = None,
    form: Annotated[
        Literal["text", "json", "svg"],
        typer.Option("--format", metavar="FORM", rich_help_panel=ABOUT_OUTPUT, help="text, json, or svg: a picture."),
    ] = "text",
    rules: RulesOption = None,
    debug: Debug = False,
) -> None:
    """Show who inherits from whom, by depth, and what a change regenerates."""
    from rewire.source import graph_view

    found = graph_view.inheritance_of(files(places, package), rules=rules)
    affected = found.affected(changed) if changed else []
    if form == "svg":
        write(graph_view.as_svg(found, affected))
    elif form == "json":
        data = graph_view.as_data(found) | (
            {"changed": str(changed), "affected": list(map(str, affected))} if changed else {}
        )
        write(json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    elif changed:
        write("".join(f"{path}\n" for path in affected))
        typer.echo(f"a change in {changed.name} regenerates what {len(affected)} modular files give", err=True)
    else:
        write(graph_view.as_text(found))


# ---------------------------------------------------------------- explain


def explain(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", show_default=False, exists=True, dir_okay=False, help="A generated file, or a modular file."
        ),
    ],
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", show_default=False, help="Only this class, method or function."),
    ] = None,
    annotate: Annotated[
        bool,
        typer.Option(
            "--annotate", metavar="", rich_help_panel=ABOUT_OUTPUT, help="Print the code, with its origin beside it."
        ),
    ] = False,
    rules: RulesOption = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Say for everything in a generated file where it came from: file, line, and the renaming that was applied."""
    from rewire.source import SourceError
    from rewire.source.explain import explain as explained

    try:
        found = explained(file, rules=rules)
    except SourceError as error:
        show_problems(error.problems, "text")
        raise typer.Exit(Code.REFUSED) from None
    if not any(one.named(name) for one in found):
        raise RewireError(f"{file.name} has no {name}")
    screen = Screen(as_json=as_json)
    screen.result(lambda: [_explanation_data(one, name) for one in found])
    for one in found if not as_json else ():
        if annotate:
            write("".join(_annotated(one, name)))
        elif entries := one.named(name):
            screen.show(f"{one.path.name}, from {one.modular.name}", _origin_table(entries))


def _explanation_data(one: Explanation, name: str | None) -> dict[str, Any]:
    entries = [entry.to_dict() for entry in one.named(name)]
    return {"file": str(one.path), "modular": str(one.modular), "entries": entries}


def _origin_table(entries: Sequence[Entry]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table("lines", "kind", "name", "origin", box=None, pad_edge=False)
    for one in entries:
        origins = "\n".join(
            f"{origin.path.name}:{_lines(origin.line, origin.last_line)}"
            + (f" ({origin.renamed[0]} -> {origin.renamed[1]})" if origin.renamed else "")
            for origin in one.origins
        )
        table.add_row(_lines(one.line, one.last_line), one.kind, Text(one.name, "bold"), Text(origins))
    return table


def _lines(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def _annotated(one: Explanation, name: str | None) -> Iterable[str]:
    lines = one.text.splitlines()
    wanted = range(len(lines))
    if name is not None:
        found = next((entry for entry in one.entries if entry.name == name), None)
        wanted = range(found.line - 1, found.last_line) if found else range(0)
    notes = [f"{origin.path.name}:{origin.line}" if origin else "" for origin in one.origins]
    width = max((len(notes[number]) for number in wanted), default=0)
    for number in wanted:
        yield f"{notes[number]:{width}} | {lines[number]}".rstrip() + "\n"


# ---------------------------------------------------------------- lint


def lint(
    places: Places = None,
    package: PackageName = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(metavar="RULE", show_default=False, help="Leave out this rule. May be given several times."),
    ] = None,
    rules: RulesOption = None,
    form: Form = "text",
    debug: Debug = False,
) -> None:
    """Report what conversion passes over in silence. Exits with 1 if anything was found.

    Definitions that no class uses, statements that are dropped, methods that were to be deleted and are not, words cut
    by renaming, functions that came along for nothing, classes that ask for competing names, names that the generated
    file does not know.
    """
    from rewire.source.lint import LINT_RULES
    from rewire.source.lint import lint as linted

    unknown = [rule for rule in ignore or () if rule not in LINT_RULES]
    if unknown:
        raise typer.BadParameter(f"--ignore {unknown[0]}: known are {', '.join(LINT_RULES)}")
    found = [one for one in linted(files(places, package), rules=rules) if one.rule not in (ignore or ())]
    if form == "text":
        from rewire.source.diagnostics import as_text

        write(as_text(found, LINT_RULES))
        typer.echo(f"{len(found)} findings", err=True)
    else:
        show_problems(found, form)
    if found:
        raise typer.Exit(Code.PROOF_FAILED)


# ---------------------------------------------------------------- new


def new(
    name: Annotated[
        str, typer.Argument(metavar="NAME", show_default=False, help="The new model, as files carry it: my_llama.")
    ],
    parent: Annotated[
        str, typer.Option("--from", metavar="MODEL", show_default=False, help="The model to begin from: llama.")
    ],
    folder: Annotated[
        Path | None,
        typer.Option(
            "--dir",
            metavar="DIR",
            show_default=False,
            file_okay=False,
            help="Where to put it; by default a folder NAME.",
        ),
    ] = None,
    kind: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TYPE",
            show_default=False,
            help="Types of files to inherit: configuration and modeling unless others are given, such as processing.",
        ),
    ] = None,
    package: Annotated[
        str, typer.Option("--package", metavar="NAME", help="The package that has the model.")
    ] = "transformers",
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Start a modular file that inherits every public class of a model, and builds at once."""
    from rewire.source.names import FILE_TYPES
    from rewire.source.scaffold import KINDS, start

    unknown = [one for one in kind or () if one not in FILE_TYPES]
    if unknown:
        raise typer.BadParameter(f"--kind {unknown[0]}: known are {', '.join(FILE_TYPES)}")
    path, texts = start(name, parent, folder or Path(name), kinds=tuple(kind or KINDS), package=package)
    shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    Screen(quiet).show(f"{shown} is written; it gives {', '.join(texts)}", f"Now: rewire modular build {shown}")


# ---------------------------------------------------------------- copies


def copies(
    places: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[PATHS]...", show_default=False, exists=True, help="Python files and folders."),
    ] = None,
    package: Annotated[
        str | None,
        typer.Option("--package", metavar="NAME", show_default=False, help="All files of an installed package."),
    ] = None,
    fix: Annotated[bool, typer.Option("--fix", metavar="", help="Put drifted copies right.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Verify that code under "# Copied from X with A->B" still says what X says.

    Shows the differences. Exits with 1 if a copy has drifted or if there is no original (with --fix: if that is still
    so afterwards).
    """
    from rewire.source.copies_check import check_copies, fix_copies

    paths = [*(places or ()), *([package_folder(package)] if package else ())]
    if not paths:
        raise typer.BadParameter("name files, folders or --package NAME")
    screen = Screen(quiet, as_json)
    changed = fix_copies(paths) if fix else {}
    if changed:
        _rewrite(changed)
    found = check_copies(paths)
    screen.result(lambda: {"copies": [one.to_dict() for one in found], "changed": list(map(str, changed))})
    if not as_json:
        _show_copies(found, screen)
    if changed:
        screen.show(f"{len(changed)} file{'s' * (len(changed) != 1)} put right")
    if any(one.is_failure for one in found):
        raise typer.Exit(Code.PROOF_FAILED)


def _rewrite(texts: dict[Path, str]) -> None:
    from rewire.source.cache import write_whole

    try:
        write_whole(texts)
    except OSError as error:
        raise OutputError(f"{error.filename}: {error.strerror}; nothing was changed") from error


def _show_copies(found: Sequence[Copy], screen: Screen) -> None:
    for one in found:
        place = f"{one.marker.path}:{one.marker.line}"
        if one.status == "drifted":
            write(one.diff() + (f"{place}: {one.note}\n" if one.note else ""))
        elif one.is_failure:
            write(f"{place}: {one.status}: {one.note}\n")
        elif not screen.quiet and (one.note or one.status in ("misplaced", "unreadable")):
            write(f"{place}: {one.status}: {one.note or one.marker.text}\n")
    counts = Counter(one.status for one in found)
    said = ", ".join(f"{number} {status}" for status, number in counts.most_common()) or "none"
    screen.show(f"{len(found)} markers: {said}")
