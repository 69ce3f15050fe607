"""`rewire plan`: check, schema and show."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rewire.cli.guard import Code
from rewire.cli.options import Debug, Json, Quiet, prose
from rewire.cli.screen import Screen, stdout

if TYPE_CHECKING:
    from rich.table import Table

    from rewire.errors import Issue
    from rewire.plan import Edit


def check_files(
    files: Annotated[list[Path], typer.Argument(metavar="FILE", show_default=False, help="Plan files.")],
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Report everything that is wrong with plan files, with line numbers. Exits with 2 if anything is."""
    from rewire.plan import check

    screen = Screen(quiet, as_json)
    found = {str(path): check(path) for path in files}
    screen.result(lambda: _data(found))
    if not as_json:
        _show(found, screen)
    if any(found.values()):
        raise typer.Exit(Code.REFUSED)


def _data(found: dict[str, list[Issue]]) -> dict[str, Any]:
    files = [
        {"file": file, "valid": not issues, "issues": [asdict(issue) for issue in issues]}
        for file, issues in found.items()
    ]
    return {"valid": not any(found.values()), "files": files}


def _show(found: dict[str, list[Issue]], screen: Screen) -> None:
    from rich.text import Text

    for file, issues in found.items():
        if not issues:
            screen.show(Text.assemble((f"{file}: ", ""), ("valid", "green")))
        for issue in issues:
            stdout().print(Text(str(issue)), soft_wrap=True)


def schema(debug: Debug = False) -> None:
    """Print the JSON Schema of a plan file."""
    from rewire.plan import json_schema

    sys.stdout.write(json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n")


def show(
    file: Annotated[Path, typer.Argument(metavar="FILE", show_default=False, help="A plan file.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show the edits of a plan, what each promises, and the hash of the whole.

    Promises, from the strongest to the weakest: [bold]exact[/] (same tensors, same outputs up to the order of sums),
    [bold]additive[/] (equal until it is trained), [bold]rounding[/] (same mathematics in another order),
    [bold]lossy[/].
    """
    from rich.text import Text

    import rewire

    plan = rewire.Plan.read(file)
    screen = Screen(as_json=as_json)
    screen.result(lambda: {"plan": plan.to_dict(), "promise": plan.promise, "hash": plan.hash})
    title = Text.assemble((plan.name or str(file), "bold"), f" · promise {plan.promise} · hash {plan.hash}")
    description = [Text(plan.description.strip())] if plan.description else []
    screen.show(title, *description, "", _table(plan.edits))


def _table(edits: Sequence[Edit]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table("", "edit", "target", "settings", "promise", box=None, pad_edge=False)
    for number, edit in enumerate(edits):
        settings = dict(edit.to_dict()[edit.kind])
        target = settings.pop("target")
        targets = target if isinstance(target, str) else "\n".join(target)
        said = "\n".join(f"{key}: {_plain(value)}" for key, value in settings.items())
        table.add_row(str(number), Text(edit.kind, "bold"), Text(targets), Text(said), edit.promise)
    return table


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


app = typer.Typer(no_args_is_help=True, help="Check plan files, show what they say, print their schema.")
app.command(
    "check",
    help=prose(check_files),
    epilog="Example: [cyan]rewire plan check plan.yaml[/] · [cyan]rewire plan check examples/plans/*[/]",
)(check_files)
app.command("show", help=prose(show), epilog="Example: [cyan]rewire plan show plan.yaml[/]")(show)
app.command(
    "schema",
    help=prose(schema),
    epilog="Example: [cyan]rewire plan schema > plan.schema.json[/], for an editor that checks YAML",
)(schema)
