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
from rewire.cli.models import CONFIG, Source, configuration, parse_values
from rewire.cli.options import AllowCode, Debug, Json, Model, Quiet, Values, prose
from rewire.cli.screen import Screen, stdout
from rewire.errors import OutputError

if TYPE_CHECKING:
    from rich.table import Table

    from rewire.errors import Issue
    from rewire.plan import Edit, Plan, Resolved


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
    resolved = () if plan.resolved is None else ("", Text(_resolved(plan.resolved)))
    screen.show(title, *description, "", _table(plan.edits), *resolved)


def _resolved(found: Resolved) -> str:
    """What the block with the tensor steps comes to, in one line."""
    from rewire.plan.data import thaw
    from rewire.step_patterns import expand

    steps = ((len(expand(records)), word) for records, word in ((found.reading, "to read"), (found.steps, "to edit")))
    counts = ", ".join(f"{count:,} tensor step{'s' * (count != 1)} {word}" for count, word in steps)
    values = f" · config: {_plain(thaw(found.config))}" if found.config else ""
    return f"resolved for {found.model or 'tensors by name'}: {counts}{values}"


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


def resolve(
    file: Annotated[Path, typer.Argument(metavar="FILE", show_default=False, help="A plan file.")],
    model: Model,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            show_default=False,
            help="Write the plan to a new file instead of printing it.",
        ),
    ] = None,
    values: Values = None,
    allow_code: AllowCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Make a plan explicit for one model: every place named, every layout stated, with the tensor steps it comes to.

    The result needs neither PyTorch nor the model any more: [bold]rewire convert[/] carries it out on files. Nothing is
    loaded but the configuration and the headers of the checkpoint.
    """
    import rewire

    plan, screen = rewire.Plan.read(file), Screen(quiet, as_json)
    source = Source(model, parse_values(values))
    source.check()
    if out is not None and out.exists():
        raise OutputError(f"{out} exists; name another file")
    with screen.models(), screen.doing(f"resolving {file} for {model}"):
        origin = configuration(model.removeprefix(CONFIG), source.values) if source.is_config else source.location
        found = rewire.resolve_plan(plan, origin, allow_code=allow_code)
    _deliver(found, out, screen)


def _deliver(plan: Plan, out: Path | None, screen: Screen) -> None:
    """The plan on stdout or in a file, and what it comes to on stderr."""
    from rewire.plan import check

    text = plan.to_yaml()
    if issues := check(text):
        raise OutputError(
            f"the resolved plan is too large for a file ({issues[0]}); resolve a part of the model at a time"
        )
    screen.result(lambda: {"plan": plan.to_dict(), "hash": plan.hash})
    if out is not None:
        plan.write(out)
    elif not screen.as_json:
        sys.stdout.write(text)
    if plan.resolved is not None and not screen.quiet:
        count = f"{len(plan.edits)} edit{'s' * (len(plan.edits) != 1)}"
        typer.echo(f"{f'{out}: ' if out else ''}{count}, {_resolved(plan.resolved)}", err=True)


app = typer.Typer(no_args_is_help=True, help="Check plan files, show what they say, resolve them, print their schema.")
app.command(
    "check",
    help=prose(check_files),
    epilog="Example: [cyan]rewire plan check plan.yaml[/] · [cyan]rewire plan check examples/plans/*[/]",
)(check_files)
app.command("show", help=prose(show), epilog="Example: [cyan]rewire plan show plan.yaml[/]")(show)
app.command(
    "resolve",
    help=prose(resolve),
    epilog="Example: [cyan]rewire plan resolve plan.yaml ./my-model --out resolved.yaml[/]",
)(resolve)
app.command(
    "schema",
    help=prose(schema),
    epilog="Example: [cyan]rewire plan schema > plan.schema.json[/], for an editor that checks YAML",
)(schema)
