"""`rewire modular`: single files from modular files, and everything around it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rewire.cli.guard import Code
from rewire.cli.modular_options import (
    CacheFolder,
    Everything,
    Form,
    Jobs,
    PackageName,
    Places,
    Reference,
    RulesOption,
    files,
    show_problems,
    write,
)
from rewire.cli.modular_reports import copies, explain, graph, lint, new
from rewire.cli.options import Debug, Quiet, prose
from rewire.cli.screen import Screen

if TYPE_CHECKING:
    from rewire.source import Problem
    from rewire.source.cache_build import Drift, Site, Stamps


def build(
    places: Places = None,
    package: PackageName = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", show_default=False, file_okay=False, help="Write below this folder instead."),
    ] = None,
    jobs: Jobs = 1,
    watch: Annotated[
        bool, typer.Option("--watch", metavar="", help="Go on, and build whenever a file changes, until Ctrl-C.")
    ] = False,
    everything: Everything = False,
    cache: CacheFolder = None,
    rules: RulesOption = None,
    reference: Reference = False,
    form: Form = "text",
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write the single files that modular files give, beside them or into a folder.

    Only what is out of date is built. Files appear whole, or, where a modular file has errors, not at all. Exits with
    2 if there were errors.
    """
    from rewire.source.cache_build import stamps

    if watch and form != "text":
        raise typer.BadParameter("--watch reports as text only")
    screen = Screen(quiet, form != "text")
    site = _site(places, package, out, cache, rules, reference, jobs)
    before = stamps(site) if watch else {}
    is_good, written = _build_once(site, everything, screen, form)
    with suppress(KeyboardInterrupt):  # the way to end --watch
        while watch:
            is_good, written = _build_again(site, screen, before, written)
    if not is_good:
        raise typer.Exit(Code.REFUSED)


def _build_once(site: Site, everything: bool, screen: Screen, form: Form) -> tuple[bool, list[Path]]:
    """Whether all went well, and which files were written."""
    from rewire.source.cache_build import build_stale, put

    with screen.doing("building") as progress:
        built = build_stale(site, everything=everything, progress=lambda done, total: progress("", done, total))
    written = put(site, built)
    errors = [problem for one in built.values() for problem in one.errors]
    show_problems(errors, form)
    failed = sum(bool(one.errors) for one in built.values())
    screen.show(_summary(len(site.paths), len(built) - failed, failed, len(written)))
    return not errors, written


def _build_again(site: Site, screen: Screen, before: Stamps, written: Sequence[Path]) -> tuple[bool, list[Path]]:
    """Waits, and builds what has changed since `before`, what was written then left out."""
    from rewire.source.cache_build import stamps, wait_for_change

    sys.stdout.flush()
    now = stamps(site)
    known = {path: now[path] if path in written or path not in before else before[path] for path in now}
    changed = wait_for_change(known)
    before |= stamps(site)
    site.contents.forget(changed)
    site.overlay.clear()
    return _build_once(site, False, screen, "text")


def _summary(total: int, built: int, failed: int, written: int) -> str:
    parts = [f"{total} modular file{'s' * (total != 1)}", f"{built} built", f"{total - built - failed} up to date"]
    parts += [f"{failed} with errors"] if failed else []
    return f"{', '.join(parts)}; {written} file{'s' * (written != 1)} written"


def check(
    places: Places = None,
    package: PackageName = None,
    jobs: Jobs = 1,
    everything: Everything = False,
    cache: CacheFolder = None,
    rules: RulesOption = None,
    reference: Reference = False,
    form: Form = "text",
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compare generated files with what their modular files give, and show the differences.

    Writes nothing. Exits with 1 if a generated file differs, is missing or is left over, with 2 if a modular file has
    errors.
    """
    from rewire.source.cache_build import drifted

    screen = Screen(quiet, form != "text")
    site = _site(places, package, None, cache, rules, reference, jobs)
    with screen.doing("building") as progress:
        found, built = drifted(site, everything=everything, progress=lambda done, total: progress("", done, total))
    errors = [problem for one in built.values() for problem in one.errors]
    problems = [*errors, *map(_as_problem, found)]
    if form == "text":
        show_problems(errors, form)
        write("" if quiet else "".join(map(_drift_text, found)))
    else:
        show_problems(problems, form)
    failed = sum(bool(one.errors) for one in built.values())
    checked = len(site.paths) - failed
    screen.show(f"{checked} modular file{'s' * (checked != 1)} checked, {len(found)} generated files differ")
    if problems:
        raise typer.Exit(Code.REFUSED if errors else Code.PROOF_FAILED)


def _drift_text(one: Drift) -> str:
    return one.diff() if one.what == "differs" else f"{one.path}: {one.what} (by {one.modular.name})\n"


def _as_problem(one: Drift) -> Problem:
    from rewire.source import Problem

    line = next(
        (int(part.split(",")[0].lstrip("-")) for part in one.diff().split() if part[:1] == "-" and part[1:2].isdigit()),
        1,
    )
    message = f"{one.what}: not what {one.modular.name} gives"
    return Problem(one.path, max(1, line), 1, "drift", message, "run rewire modular build")


def _site(
    places: Sequence[Path] | None,
    package: str | None,
    out: Path | None,
    cache: Path | None,
    rules: str | None,
    reference: bool,
    jobs: int,
) -> Site:
    from rewire.source.cache import cache_folder
    from rewire.source.cache_build import Site

    found = files(places, package)
    return Site(
        list(found),
        out=out.resolve() if out else None,
        base=found,
        cache=(cache or cache_folder()).resolve(),
        rules=rules,
        jobs=jobs,
        reference=reference,
    )


# ---------------------------------------------------------------- the group

app = typer.Typer(
    no_args_is_help=True,
    help="Write a model as its differences to others, and get the single files that users import.",
)

_EXAMPLES: dict[Callable[..., Any], str] = {
    build: "build modular_my_llama.py[/] · [cyan]rewire modular build --package transformers --out build",
    check: "check src/transformers/models",
    graph: "graph models --format svg > graph.svg[/] · [cyan]rewire modular graph models --changed modeling_llama.py",
    explain: "explain models/gemma/modeling_gemma.py GemmaMLP",
    lint: "lint modular_my_llama.py --format sarif",
    new: "new my_llama --from llama",
    copies: "copies src/transformers/models --fix",
}

for _command, _example in _EXAMPLES.items():
    app.command(_command.__name__, help=prose(_command), epilog=f"Example: [cyan]rewire modular {_example}[/]")(
        _command
    )
