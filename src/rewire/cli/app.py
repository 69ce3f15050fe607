"""The commands put together."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Annotated

import typer

import rewire
from rewire.cli import apply, coverage, demo, inspect, modular, plan, prove
from rewire.cli.guard import EXIT_CODES, Guarded
from rewire.cli.options import prose

app = typer.Typer(
    name="rewire",
    cls=Guarded,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=EXIT_CODES,
)

app.command("inspect", help=prose(inspect.inspect), epilog=f"{inspect.EXAMPLE}\n\n{EXIT_CODES}")(inspect.inspect)
app.command("apply", help=prose(apply.apply), epilog=f"{apply.EXAMPLE}\n\n{EXIT_CODES}")(apply.apply)
app.command("prove", help=prose(prove.prove), epilog=f"{prove.EXAMPLE}\n\n{EXIT_CODES}")(prove.prove)
app.add_typer(plan.app, name="plan")
app.add_typer(modular.app, name="modular")
app.command("coverage", help=prose(coverage.coverage), epilog=f"{coverage.EXAMPLE}\n\n{EXIT_CODES}")(coverage.coverage)
app.command("demo", help=prose(demo.demo), epilog=f"{demo.EXAMPLE}\n\n{EXIT_CODES}")(demo.demo)


def _show_version(wanted: bool) -> None:
    if wanted:
        libraries = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "peft"))
        typer.echo(f"rewire {rewire.__version__} (Python {platform.python_version()}, {libraries})")
        raise typer.Exit


def root(
    version: Annotated[
        bool,
        typer.Option("--version", metavar="", callback=_show_version, is_eager=True, help="Show versions and stop."),
    ] = False,
) -> None:
    """Change any Transformers model by a plan, and prove that the change is right.

    A plan is a short YAML file that says what to change. [bold]inspect[/] shows what could be changed,
    [bold]apply[/] does it, [bold]prove[/] compares the result with the original.
    """


app.callback(help=prose(root))(root)


def main() -> None:
    """Runs the command line; the entry point `rewire`."""
    app()
