"""`rewire convert`."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rewire.cli.guard import Code, complain
from rewire.cli.options import AllowCode, Debug, Json, Quiet
from rewire.cli.screen import Screen

if TYPE_CHECKING:
    from rewire.plan import Plan
    from rewire.stream import Conversion

EXAMPLE = "Example: [cyan]rewire convert ./my-model ./edited --plan plan.yaml[/]"

_GOING_ON = "About going on"
_MACHINES = "About several machines"


def convert(
    source: Annotated[
        Path,
        typer.Argument(metavar="SRC", show_default=False, help="A folder with safetensors. It is only read."),
    ],
    destination: Annotated[
        Path, typer.Argument(metavar="DST", show_default=False, help="The folder to write; new or empty.")
    ],
    plan: Annotated[
        Path | None,
        typer.Option("--plan", "-p", metavar="FILE", show_default=False, help="The plan: what to change."),
    ] = None,
    revert: Annotated[
        bool, typer.Option("--revert", metavar="", help="Bring an edited folder back to its original layout.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", metavar="", help="Show what would become of every tensor, and the space needed; write nothing."
        ),
    ] = False,
    max_shard_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", show_default=False, help="Largest shard, such as 5GB. By default sharded as SRC is."
        ),
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", metavar="N", help="Threads that write at the same time.")] = 1,
    checksums: Annotated[
        bool,
        typer.Option("--checksums/--no-checksums", metavar="", help="Record checksums of all bytes read and written."),
    ] = True,
    verify: Annotated[
        bool,
        typer.Option("--verify", metavar="", help="Read everything again before publishing, and compare checksums."),
    ] = False,
    manifest: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", show_default=False, help="Write SHA-256 sums of all files there, for sha256sum --check."
        ),
    ] = None,
    repair_index: Annotated[
        bool,
        typer.Option("--repair-index", metavar="", help="Make a missing or wrong index of SRC anew, in memory."),
    ] = False,
    follow_links: Annotated[
        bool,
        typer.Option("--follow-links", metavar="", help="Let files of SRC be links to files elsewhere."),
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", metavar="", rich_help_panel=_GOING_ON, help="Go on with what an earlier conversion left."
        ),
    ] = False,
    restart: Annotated[
        bool,
        typer.Option("--restart", metavar="", rich_help_panel=_GOING_ON, help="Throw that away and begin anew."),
    ] = False,
    shards: Annotated[
        str | None,
        typer.Option(
            metavar="K/N",
            show_default=False,
            rich_help_panel=_MACHINES,
            help="Write one part of the shards only: 3/16 is the third of sixteen.",
        ),
    ] = None,
    finish: Annotated[
        bool,
        typer.Option(
            "--finish", metavar="", rich_help_panel=_MACHINES, help="Check that all parts are written, and publish."
        ),
    ] = False,
    allow_code: AllowCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Edit a checkpoint on disk, of any size, without loading the model.

    DST appears whole or not at all. After an interruption, a full disk or a crash, --resume goes on where it stopped.
    A plan that is resolved already (rewire plan resolve) needs neither PyTorch nor Transformers.
    """
    screen = Screen(quiet, as_json)
    wanted = None if plan is None else _read(plan)
    options = {
        "revert": revert,
        "dry_run": dry_run,
        "max_shard_size": max_shard_size,
        "jobs": jobs,
        "checksums": checksums,
        "verify": verify,
        "manifest": manifest,
        "repair_index": repair_index,
        "follow_links": follow_links,
        "resume": resume,
        "restart": restart,
        "shards": shards,
        "finish": finish,
        "allow_code": allow_code,
    }
    with _no_collector():
        done = _run(screen, source, destination, wanted, options)
        screen.listing(done.to_dict, "fates", (fate.to_dict() for fate in done.fates()) if dry_run else None)
        if not (quiet or as_json):
            _show(screen, done)


@contextmanager
def _no_collector() -> Iterator[None]:
    """Planning makes millions of small objects and no garbage; to look for some takes a fifth of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _read(path: Path) -> Plan:
    import rewire

    return rewire.Plan.read(path)


def _run(screen: Screen, source: Path, destination: Path, plan: Plan | None, options: dict[str, Any]) -> Conversion:
    import rewire

    try:
        with screen.writing("converting") as progress:
            done: Conversion = rewire.convert(source, destination, plan, progress=progress, **options)
            return done
    except KeyboardInterrupt:
        complain("interrupted", f"{destination} is not written; what is done so far is kept: go on with --resume")
        raise typer.Exit(Code.INTERRUPTED) from None


def _show(screen: Screen, done: Conversion) -> None:
    from rewire.stream.report import fate_table

    if done.state == "planned":
        screen.show(fate_table(done.fates()), "")
    screen.show(done)
