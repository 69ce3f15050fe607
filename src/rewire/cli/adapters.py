"""`rewire adapters`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rewire.cli.models import Source, is_config, parse_values
from rewire.cli.options import ABOUT_MODEL, MODEL_HELP, AllowCode, Debug, Json, Quiet, Values
from rewire.cli.screen import Screen

if TYPE_CHECKING:
    from rewire import Plan
    from rewire.adapters import Carried

EXAMPLE = "Example: [cyan]rewire adapters ./my-adapter ./carried --plan plan.yaml --model ./my-model[/]"


def adapters(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SRC",
            show_default=False,
            help="The adapter's folder; with --optimizer a checkpoint folder of Trainer, or its optimizer.pt.",
        ),
    ],
    destination: Annotated[
        Path, typer.Argument(metavar="DST", show_default=False, help="What to write: a folder, new or empty.")
    ],
    plan: Annotated[
        Path | None,
        typer.Option(
            "--plan",
            "-p",
            metavar="FILE",
            show_default=False,
            help="The plan of the edit. With --revert it may be left out: a carried adapter knows its plan.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            show_default=False,
            rich_help_panel=ABOUT_MODEL,
            help=f"The untouched model, of which only the configuration is read: {MODEL_HELP} By default the one that "
            "SRC names, or whose configuration it holds.",
        ),
    ] = None,
    revert: Annotated[
        bool,
        typer.Option("--revert", metavar="", help="SRC belongs to the edited model; make it fit the untouched one."),
    ] = False,
    optimizer: Annotated[
        bool,
        typer.Option("--optimizer", metavar="", help="Carry the optimizer state of a checkpoint, not an adapter."),
    ] = False,
    frozen: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GLOB",
            show_default=False,
            help="With --optimizer: parameters that were not trained. May be given several times.",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", metavar="", help="Replace what DST holds.")] = False,
    values: Values = None,
    allow_code: AllowCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Carry a LoRA adapter, or the state of an optimizer, across an edit.

    An adapter trained on the untouched model fits the edited one afterwards, and does exactly the same there: numbers
    are moved, and where one has to be rounded the tensor is named. Where no adapter does the same, it is refused.
    """
    screen = Screen(quiet, as_json)
    if frozen and not optimizer:
        raise typer.BadParameter("--frozen goes with --optimizer")
    if plan is None and (optimizer or not revert):
        raise typer.BadParameter("--plan is needed; only an adapter that goes back (--revert) may know its plan itself")
    given = Source(model, parse_values(values), allow_code=allow_code) if model is not None else None
    if given is not None:
        given.check()
    options: dict[str, Any] = {"revert": revert, "overwrite": overwrite, "allow_code": allow_code}
    with screen.models():
        with screen.doing(f"carrying {source}"):
            done = _carry(source, destination, _read(plan), _opened(given), optimizer, frozen or (), options)
        screen.result(done.to_dict)
        screen.show(str(done), f"saved to {destination}")


def _read(path: Path | None) -> Plan | None:
    import rewire

    return None if path is None else rewire.Plan.read(path)


def _opened(source: Source | None) -> Any:
    """A model for one made from a configuration; else where it is."""
    if source is None:
        return None
    return source.skeleton() if is_config(source.text) else source.location


def _carry(
    source: Path,
    destination: Path,
    plan: Plan | None,
    model: Any,
    optimizer: bool,
    frozen: Sequence[str],
    options: dict[str, Any],
) -> Carried:
    import rewire

    if optimizer and plan is not None:
        return rewire.carry_optimizer(source, destination, plan, model, frozen=frozen, **options)
    return rewire.carry_adapter(source, destination, plan, model=model, **options)
