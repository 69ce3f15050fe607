"""The commands put together."""

from __future__ import annotations

import platform
from typing import Annotated

import typer

import rewire
from rewire.cli import (
    adapters,
    anatomy,
    apply,
    bench,
    bisect,
    convert,
    coverage,
    demo,
    encode,
    inspect,
    modular,
    perplexity,
    plan,
    prove,
)
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
app.command("convert", help=prose(convert.convert), epilog=f"{convert.EXAMPLE}\n\n{EXIT_CODES}")(convert.convert)
app.command("adapters", help=prose(adapters.adapters), epilog=f"{adapters.EXAMPLE}\n\n{EXIT_CODES}")(adapters.adapters)
app.command("prove", help=prose(prove.prove), epilog=f"{prove.EXAMPLE}\n\n{EXIT_CODES}")(prove.prove)
app.command("encode", help=prose(encode.encode), epilog=f"{encode.EXAMPLE}\n\n{EXIT_CODES}")(encode.encode)
app.command("perplexity", help=prose(perplexity.perplexity), epilog=f"{perplexity.PERPLEXITY}\n\n{EXIT_CODES}")(
    perplexity.perplexity
)
app.command("quality", help=prose(perplexity.quality), epilog=f"{perplexity.QUALITY}\n\n{EXIT_CODES}")(
    perplexity.quality
)
app.add_typer(bench.app, name="bench")
app.command("anatomy", help=prose(anatomy.anatomy), epilog=f"{anatomy.EXAMPLE}\n\n{EXIT_CODES}")(anatomy.anatomy)
app.add_typer(bisect.app, name="bisect")
app.add_typer(plan.app, name="plan")
app.add_typer(modular.app, name="modular")
app.command("coverage", help=prose(coverage.coverage), epilog=f"{coverage.EXAMPLE}\n\n{EXIT_CODES}")(coverage.coverage)
app.command("demo", help=prose(demo.demo), epilog=f"{demo.EXAMPLE}\n\n{EXIT_CODES}")(demo.demo)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib import metadata

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
