"""`rewire bisect`: which edit, commit or version broke it?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rewire.cli.guard import EXIT_CODES, Code
from rewire.cli.models import Source, parse_values
from rewire.cli.options import AllowCode, Debug, Dtype, Json, Model, Quiet, Seed, Values, prose
from rewire.cli.screen import Screen

if TYPE_CHECKING:
    from rewire.measure.bisection import Bisection, Check, Point

CheckCommand = Annotated[
    str,
    typer.Option(
        "--check",
        metavar="COMMAND",
        show_default=False,
        help="What to run: exit code 0 is good, 125 means that it cannot tell, anything else is bad.",
    ),
]
Repeats = Annotated[
    int,
    typer.Option(
        metavar="N", min=1, help="How often to run the check everywhere; if it says different things, it is flaky."
    ),
]
Timeout = Annotated[
    float | None,
    typer.Option(metavar="SECONDS", min=0.1, show_default=False, help="A check that takes longer is bad."),
]
StateFile = Annotated[
    Path | None,
    typer.Option(
        "--state",
        metavar="FILE",
        show_default=False,
        help="Keep here what the check has said, so that an interrupted search goes on where it was.",
    ),
]


def plan(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", show_default=False, help="The plan to search.")],
    model: Model,
    check: Annotated[
        str | None,
        typer.Option(
            "--check",
            metavar="COMMAND",
            show_default=False,
            help="What to run in place of a proof; {model} stands for a folder with the model after the first edits.",
        ),
    ] = None,
    repeats: Repeats = 1,
    timeout: Timeout = None,
    state: StateFile = None,
    dtype: Dtype = "auto",
    values: Values = None,
    seed: Seed = 0,
    allow_code: AllowCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Find the first edit of a plan that breaks a model.

    The untouched model must be good, and the whole plan bad. Without --check, every step is proven against the
    untouched model, as by rewire prove.
    """
    import rewire

    screen = Screen(quiet, as_json)
    source = Source(model, parse_values(values), seed, dtype, (), allow_code)
    source.check()
    wanted = rewire.Plan.read(plan)
    with screen.models():
        from rewire.measure import plan_edits

        if check is None:
            how = plan_edits.proof_check(wanted, source.open)
        else:
            how = plan_edits.command_check(wanted, source.open, check, sides=_sides(source), timeout=timeout)
        about = f"{check or 'proof'} {model} {wanted.hash}"
        found = _search("edit", plan_edits.edits(wanted), how, about, repeats, state, screen)
    _show(found, screen)


def _sides(source: Source) -> Path | None:
    from rewire import hf_seam

    return None if source.is_config else hf_seam.side_folder(source.location)


def commits(
    good: Annotated[str, typer.Option("--good", metavar="COMMIT", show_default=False, help="A commit that is good.")],
    check: CheckCommand,
    bad: Annotated[str, typer.Option("--bad", metavar="COMMIT", help="A commit that is bad.")] = "HEAD",
    repository: Annotated[
        Path, typer.Option("--repository", metavar="DIR", help="The repository; its working tree is not touched.")
    ] = Path("."),
    overlay: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            show_default=False,
            help="A file of the working tree to put on top of every commit, such as a new test. May be repeated.",
        ),
    ] = None,
    repeats: Repeats = 2,
    timeout: Timeout = None,
    state: StateFile = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Find the first commit that breaks a check.

    Commits are checked out into a folder of their own, along first parents.
    """
    from rewire.measure import commits as history

    screen = Screen(quiet, as_json)
    points = history.commits(repository, good, bad)
    with history.commit_check(repository, check, overlay=overlay or (), timeout=timeout) as how:
        about = f"{check} {sorted(map(str, overlay or ()))}"
        found = _search("commit", points, how, about, repeats, state, screen)
    _show(found, screen)


def versions(
    package: Annotated[
        str, typer.Argument(metavar="PACKAGE", show_default=False, help="The package, as pip names it.")
    ],
    listed: Annotated[
        list[str], typer.Argument(metavar="VERSION...", show_default=False, help="Its versions, from good to bad.")
    ],
    check: CheckCommand,
    pip: Annotated[
        list[str] | None,
        typer.Option(metavar="OPTION", show_default=False, help="An option for pip install. May be repeated."),
    ] = None,
    repeats: Repeats = 2,
    timeout: Timeout = None,
    state: StateFile = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Find the first version of a package that breaks a check.

    Each version is installed by itself into a folder that PYTHONPATH names first; the environment is not touched.
    """
    from rewire.measure import package_versions

    screen = Screen(quiet, as_json)
    points = package_versions.versions(package, listed)
    with package_versions.version_check(Path.cwd(), check, pip=pip or (), timeout=timeout) as how:
        found = _search("version", points, how, check, repeats, state, screen)
    _show(found, screen)


def _search(
    what: str,
    points: Sequence[Point],
    how: Check,
    about: str,
    repeats: int,
    state: Path | None,
    screen: Screen,
) -> Bisection:
    from rewire.measure.bisection import Memory, bisect

    memory = Memory(state, points, about)
    with screen.doing("checking") as progress:
        return bisect(what, points, how, repeats=repeats, memory=memory, progress=progress)


def _show(found: Any, screen: Screen) -> None:
    """Prints what was found; a search that found nothing definite exits with 1."""
    screen.result(found.to_dict)
    screen.show(found)
    if found.outcome != "found":
        raise typer.Exit(Code.PROOF_FAILED)


app = typer.Typer(
    no_args_is_help=True, help="Which edit of a plan, which commit or which version first breaks a check?"
)
app.command(
    "plan",
    help=prose(plan),
    epilog=f"Example: [cyan]rewire bisect plan plan.yaml ./my-model[/]\n\n{EXIT_CODES}",
)(plan)
app.command(
    "commits",
    help=prose(commits),
    epilog=f"Example: [cyan]rewire bisect commits --good v1.0 --check 'pytest -q tests/test_x.py'[/]\n\n{EXIT_CODES}",
)(commits)
app.command(
    "versions",
    help=prose(versions),
    epilog=f"Example: [cyan]rewire bisect versions peft 0.20.0 0.21.0 0.21.2 --check 'python a.py'[/]\n\n{EXIT_CODES}",
)(versions)
