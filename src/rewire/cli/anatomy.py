"""`rewire anatomy`: what is a model made of, and what memory does it take?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from rewire.cli.models import Source, configuration, parse_values
from rewire.cli.options import ABOUT_MODEL, ABOUT_OUTPUT, AllowCode, Debug, Dtype, Json, Model, Quiet, Values, html_name
from rewire.cli.screen import Screen
from rewire.errors import CheckpointError

if TYPE_CHECKING:
    from rewire.measure.anatomy import Anatomy, Blueprint, Settings

EXAMPLE = (
    "Example: [cyan]rewire anatomy config:bert --train[/] · "
    "[cyan]rewire anatomy ./my-model --length 4096 --plan lora.yaml --train[/]"
)


def anatomy(
    model: Model,
    plan: Annotated[
        Path | None,
        typer.Option("--plan", "-p", metavar="FILE", show_default=False, help="A plan: the model before and after it."),
    ] = None,
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Sequences, images or recordings at once.")] = 1,
    length: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of each sequence.")] = 128,
    cache: Annotated[
        Literal["dynamic", "static", "none"],
        typer.Option(metavar="KIND", help="How keys and values are kept at inference: dynamic, static or none."),
    ] = "dynamic",
    train: Annotated[bool, typer.Option("--train", metavar="", help="The memory of a training step too.")] = False,
    optimizer: Annotated[
        Literal["adamw", "adamw-8bit", "sgd-momentum", "sgd"],
        typer.Option(metavar="NAME", help="With --train: adamw, adamw-8bit, sgd-momentum or sgd."),
    ] = "adamw",
    mixed_precision: Annotated[
        bool, typer.Option("--mixed-precision", metavar="", help="Matrix products in bfloat16, weights as they are.")
    ] = False,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option("--gradient-checkpointing", metavar="", help="With --train: compute activations once more."),
    ] = False,
    measure: Annotated[
        bool,
        typer.Option("--measure", metavar="", help="Run the model for real, with random weights, and compare."),
    ] = False,
    depth: Annotated[int, typer.Option(metavar="N", min=0, help="Levels of the tree to print.")] = 4,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            show_default=False,
            callback=html_name,
            rich_help_panel=ABOUT_OUTPUT,
            help="Write a page with a map of the modules.",
        ),
    ] = None,
    architecture: Annotated[
        str | None,
        typer.Option(
            metavar="CLASS",
            show_default=False,
            rich_help_panel=ABOUT_MODEL,
            help="With config: the class, such as LlamaForCausalLM; else the one without a head.",
        ),
    ] = None,
    values: Values = None,
    dtype: Dtype = "auto",
    allow_code: AllowCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show what a model is made of and what memory it takes.

    Parameters, bytes, operations and activations of every module, and the memory to load the model, to run it and to
    train it, from the configuration alone: no weights are read or allocated, so a model of any size takes seconds.
    """
    screen = Screen(quiet, as_json)
    source = Source(model, parse_values(values), dtype=dtype, allow_code=allow_code)
    source.check()
    wanted = None if plan is None else _read_plan(plan)
    with screen.models():
        from rewire.measure.anatomy import Settings

        settings = Settings(batch, length, cache, train, optimizer, mixed_precision, gradient_checkpointing)
        job = _Job(settings, measure, screen)
        blueprint = _blueprint(source, architecture)
        before = job.look(blueprint)
        after = None if wanted is None else job.look(blueprint.with_plan(wanted, allow_code=allow_code))
        _show(before, after, depth, html, screen)


def _read_plan(path: Path) -> Any:
    import rewire

    return rewire.Plan.read(path)


def _blueprint(source: Source, architecture: str | None) -> Blueprint:
    from rewire import hf_seam
    from rewire.measure.anatomy import Blueprint

    if architecture is not None and not hf_seam.is_model_class(architecture):
        raise CheckpointError(f"--architecture {architecture}: Transformers has no class of this name")
    if not source.is_config:
        if architecture is not None:
            raise typer.BadParameter("--architecture is for config:TYPE; a folder says itself what was saved")
        return Blueprint.saved(source.location, source.dtype)
    config = configuration(source.text.removeprefix("config:"), source.values)
    return Blueprint.of(source.text, config, architecture, source.dtype)


class _Job:
    """The same questions for the model before a plan and after it."""

    def __init__(self, settings: Settings, measure: bool, screen: Screen) -> None:
        self.settings, self.measure, self.screen = settings, measure, screen

    def look(self, blueprint: Blueprint) -> Anatomy:
        from rewire.measure.anatomy import anatomy, measure

        what = blueprint.name if blueprint.plan is None else f"{blueprint.name} after the plan"
        with self.screen.doing(f"taking {what} apart"):
            found = anatomy(blueprint, self.settings)
        if not self.measure:
            return found
        with self.screen.doing(f"running {what}"):
            return measure(found, blueprint)


def _show(before: Anatomy, after: Anatomy | None, depth: int, html: Path | None, screen: Screen) -> None:
    from rewire.measure.anatomy import Change
    from rewire.measure.anatomy.page import page
    from rewire.measure.anatomy.view import view

    if html is not None:
        html.write_text(page(before, after), "utf-8")
    screen.result(before.to_dict if after is None else Change(before, after).to_dict)
    screen.show(view(before, after, depth))
