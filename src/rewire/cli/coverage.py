"""`rewire coverage`."""

from __future__ import annotations

import fnmatch
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rewire.cli.guard import Code, complain
from rewire.cli.options import ABOUT_OUTPUT, Debug, Json, Quiet
from rewire.cli.screen import Screen
from rewire.errors import CheckpointError, OutputError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from rewire.coverage import Coverage, Finding

EXAMPLE = "Example: [cyan]rewire coverage --only 'qwen*' --jobs 2[/] · [cyan]rewire coverage --markdown coverage.md[/]"


def coverage(
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TYPE", show_default=False, help="Only these model types; globs such as 'qwen*' may be used."
        ),
    ] = None,
    edit: Annotated[
        list[str] | None,
        typer.Option(metavar="EDIT", show_default=False, help="Only these edits: split, join, unstack, stack."),
    ] = None,
    jobs: Annotated[int, typer.Option(metavar="N", min=1, help="Processes at work side by side.")] = 1,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            show_default=False,
            help="Keep every finished type in this file, and do not do again what it holds from the same versions.",
        ),
    ] = None,
    markdown: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", show_default=False, rich_help_panel=ABOUT_OUTPUT, help="Write the table as a page."
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Prove every edit on every model type of Transformers, each made small.

    Builds a tiny model of every type from its own configuration, splits, joins, unstacks and stacks all that can be,
    and proves each edit: outputs, gradients, the way back, saving and loading. Nothing is downloaded. All types take
    some minutes. Exits with 1 if any edit failed.
    """
    screen = Screen(quiet, as_json)
    edits = _edits(edit)
    if markdown is not None and not markdown.absolute().parent.is_dir():
        raise OutputError(f"the folder {markdown.absolute().parent} does not exist")
    with screen.models():
        from rewire.coverage import measure_coverage

        types = _chosen(only)
        with screen.doing("proving edits") as progress:
            found = measure_coverage(types, edits=edits, jobs=jobs, state=resume, progress=progress)
    if markdown is not None:
        from rewire.coverage.markdown import to_markdown

        _write(markdown, to_markdown(found))
    screen.show(*_summary(found, edits))
    screen.result(found.to_dict)
    if found.failed:
        if quiet or as_json:
            complain("failed", ", ".join(one.model_type for one in found.failed))
        raise typer.Exit(Code.PROOF_FAILED)


def _edits(names: list[str] | None) -> tuple[str, ...]:
    from rewire.coverage.record import EDITS

    unknown = [name for name in names or () if name not in EDITS]
    if unknown:
        raise typer.BadParameter(f"--edit {unknown[0]}: known are {', '.join(EDITS)}")
    return tuple(dict.fromkeys(names)) if names else EDITS


def _chosen(globs: list[str] | None) -> list[str]:
    """The model types that the globs name. Raises `CheckpointError` for a glob that names none."""
    from rewire import hf_seam
    from rewire.cli.models import nearest

    known = hf_seam.auto_model_types()
    chosen: dict[str, None] = {}
    for glob in globs or ["*"]:
        matched = fnmatch.filter(known, glob)
        if not matched:
            raise CheckpointError(f"no model type is called {glob!r}{nearest(glob, known)}")
        chosen |= dict.fromkeys(matched)
    return sorted(chosen)


def _write(path: Path, text: str) -> None:
    """The file appears whole or not at all."""
    building = path.with_name(f".{path.name}.{os.getpid()}")
    building.write_text(text, "utf-8")
    os.replace(building, path)


def _summary(found: Coverage, edits: tuple[str, ...]) -> list[RenderableType]:
    from rich.table import Table
    from rich.text import Text

    from rewire.coverage.record import OUTCOMES

    table = Table("edit", *OUTCOMES, box=None)
    for name in edits:
        totals = found.totals(name)
        table.add_row(name, *(str(totals[outcome] or "") for outcome in OUTCOMES))
    head = f"{len(found.available)} of {len(found.types)} model types are built and run"
    few = len(found.types) <= _FEW
    wanted = set(OUTCOMES) - {"not applicable"} if few else {"in part", "refused", "failed"}
    lines = [
        _line(one.model_type, finding) for one in found.types for finding in one.findings if finding.outcome in wanted
    ]
    return [Text(head), table, *map(Text, lines)]


_FEW = 10


def _line(model_type: str, finding: Finding) -> str:
    texts = [f"{model_type}: {finding.edit} {finding.outcome}"]
    if finding.places:
        texts.append(f"{finding.places} place{'s' * (finding.places > 1)}")
    if finding.difference is not None:
        texts.append(f"largest difference {finding.difference:.1e}" if finding.difference else "no difference")
    return ", ".join(texts) + (f": {finding.detail}" if finding.detail else "")
