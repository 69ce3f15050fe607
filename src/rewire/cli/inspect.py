"""`rewire inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rewire.cli.models import Source, parse_values
from rewire.cli.options import AllowCode, Debug, Json, Model, Quiet, Seed, Values
from rewire.cli.screen import Screen
from rewire.errors import OutputError

if TYPE_CHECKING:
    from rewire.plan import Plan

EXAMPLE = "Example: [cyan]rewire inspect config:gpt2[/] · [cyan]rewire inspect ./my-model --json[/]"


def inspect(
    model: Model,
    values: Values = None,
    seed: Seed = 0,
    allow_code: AllowCode = False,
    write_plan: Annotated[
        Path | None,
        typer.Option(metavar="FILE", show_default=False, help="Write a plan of every edit found possible."),
    ] = None,
    pack: Annotated[
        bool, typer.Option("--pack", help="Find out which encoders can run without padding, and why others cannot.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show what a model is made of and what a plan could change.

    Prints the module tree with alike layers drawn together, the attention and MLP projections found in it (fused or
    separate, and how their rows lie), and a plan that would edit them. No weights are read, so a model of any size
    takes seconds.
    """
    import rewire

    screen = Screen(quiet, as_json)
    source = Source(model, parse_values(values), seed, allow_code=allow_code)
    source.check()
    with screen.models():
        with screen.doing(f"looking at {model}"):
            found = rewire.inspect(source.skeleton(), pack=pack)
        if write_plan is not None:
            _write(found.plan, write_plan)
        screen.show(found)
        screen.result(found.to_dict)


def _write(plan: Plan | None, path: Path) -> None:
    if plan is None:
        raise OutputError(f"nothing was found that a plan could edit; {path} was not written")
    if path.exists():
        raise OutputError(f"{path} exists; name another file")
    plan.write(path)
