"""`rewire bench`: is it faster, and how much memory does it take?"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from rewire.cli.bench_run import Database, opened, run
from rewire.cli.guard import EXIT_CODES, Code, complain
from rewire.cli.options import ABOUT_OUTPUT, Debug, Json, Quiet, html_name, prose
from rewire.cli.screen import Screen

RunName = Annotated[
    str,
    typer.Argument(
        metavar="RUN", help="Number of a run, last, last~1, a branch, or the beginning of a commit.", show_default=False
    ),
]


class RunByDefault(TyperGroup):
    """`rewire bench MODEL` is `rewire bench run MODEL`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Puts `run` in front of what is no command."""
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = ["run", *args]
        return list(super().parse_args(ctx, args))


# ---------------------------------------------------------------- looking at results


def list_runs(
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", show_default=False, help="Only runs of this model.")
    ] = None,
    last: Annotated[
        int | None, typer.Option(metavar="N", min=1, show_default=False, help="Only the last N runs.")
    ] = None,
    database: Database = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """List the runs that are kept."""
    screen = Screen(quiet, as_json)
    with opened(database, write=False) as store:
        runs = store.runs(model=model, last=last)
    from rewire.measure.bench.show import runs_table

    screen.result(lambda: [run.to_dict() for run in runs])
    screen.show(runs_table(runs) if runs else "no runs")


def show(
    name: RunName,
    database: Database = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show one run: what was measured, checked and left out."""
    from rewire.measure.bench.show import run_view

    screen = Screen(quiet, as_json)
    with opened(database, write=False) as store:
        found = store.get(name, devices=as_json)
    screen.result(found.to_dict)
    screen.show(*run_view(found))


def compare(
    base: RunName,
    head: RunName,
    database: Database = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Set two runs side by side.

    A slowdown of more than 1 means that the second run is slower, with a 95 % interval.
    """
    from rewire.measure.bench.compare import compare_runs
    from rewire.measure.bench.show import comparison_view

    screen = Screen(quiet, as_json)
    with opened(database, write=False) as store:
        found = compare_runs(store.get(base), store.get(head))
    screen.result(found.to_dict)
    screen.show(*comparison_view(found))


def gate(
    base: RunName,
    head: RunName,
    max_slowdown: Annotated[
        str, typer.Option("--max-slowdown", metavar="SHARE", help="How much slower HEAD may be, as 5% or 0.05.")
    ] = "5%",
    database: Database = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Fail if a run is slower than another one, for continuous integration.

    Exits with 1, and shows the offending rows, where the median of HEAD is slower than allowed and the 95 % interval
    says that it is slower at all; also where HEAD has not measured what BASE has.
    """
    from rewire.measure.bench.compare import gate as judge
    from rewire.measure.bench.compare import parse_share
    from rewire.measure.bench.show import comparison_view

    screen = Screen(quiet, as_json)
    share = parse_share(max_slowdown)
    with opened(database, write=False) as store:
        verdict = judge(store.get(base), store.get(head), share)
    screen.result(verdict.to_dict)
    if verdict.passed:
        judged = len(verdict.comparison.rows) - len(verdict.unjudged)
        screen.show(f"passed: none of {judged} rows is more than {share:.1%} slower")
        return
    screen.show(*comparison_view(verdict.comparison, verdict.offending))
    complain(
        "failed", f"{len(verdict.offending)} of {len(verdict.comparison.rows)} rows are more than {share:.1%} slower"
    )
    raise typer.Exit(Code.PROOF_FAILED)


def export(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="RUN...", show_default=False, help="Runs, as for show; by default all of them."),
    ] = None,
    as_csv: Annotated[
        bool,
        typer.Option(
            "--csv", metavar="", rich_help_panel=ABOUT_OUTPUT, help="A line per case and side, times in seconds."
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", metavar="", rich_help_panel=ABOUT_OUTPUT, help="Everything, as a list of runs.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", show_default=False, rich_help_panel=ABOUT_OUTPUT, help="Else to stdout."),
    ] = None,
    database: Database = None,
    debug: Debug = False,
) -> None:
    """Write runs as CSV or JSON."""
    import json

    from rewire.measure.bench.show import to_csv

    if as_csv == as_json:
        raise typer.BadParameter("give one of --csv and --json")
    with opened(database, write=False) as store:
        chosen = names or [str(one.id) for one in store.runs()]
        runs = [store.get(name, devices=as_json) for name in chosen]
    text = to_csv(runs) if as_csv else json.dumps([one.to_dict() for one in runs], indent=1, ensure_ascii=False) + "\n"
    if out is None:
        sys.stdout.write(text)
    else:
        out.write_text(text, "utf-8")


def report(
    html: Annotated[
        Path,
        typer.Option("--html", metavar="FILE", show_default=False, callback=html_name, help="The page to write."),
    ],
    name: Annotated[
        str, typer.Option("--run", metavar="RUN", help="The run that is shown in full, as for show.")
    ] = "last",
    database: Database = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a page with plots: one run in full, and the trend over commits.

    The page needs no network.
    """
    from rewire.measure.report import write_report

    with opened(database, write=False) as store:
        write_report(store, name, html)
    Screen(quiet).show(f"written: {html}")


def dashboard(
    folder: Annotated[
        Path,
        typer.Option("--grafana", metavar="DIR", show_default=False, help="Folder for Grafana's provisioning files."),
    ],
    database: Database = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a Grafana dashboard for the database: data source, provisioning and panels.

    SQLite needs Grafana's plugin frser-sqlite-datasource; PostgreSQL is built in.
    """
    from rewire.measure.report import write_dashboard
    from rewire.measure.store.open import as_url

    for path in write_dashboard(folder, as_url(database)):
        Screen(quiet).show(f"written: {path}")


# ---------------------------------------------------------------- put together

app = typer.Typer(
    cls=RunByDefault,
    no_args_is_help=True,
    help="Is it faster, and how much memory does it take? Without a command: run.",
)


def _add(name: str, command: Any, example: str) -> None:
    epilog = f"Example: [cyan]rewire bench {name} {example}[/]\n\n{EXIT_CODES}"
    app.command(name, help=prose(command), epilog=epilog)(command)


_add("run", run, "./my-model --plan plan.yaml --suite encode")
_add("list", list_runs, "--last 10")
_add("show", show, "last")
_add("compare", compare, "last~1 last")
_add("gate", gate, "main last --max-slowdown 5%")
_add("export", export, "--csv --out runs.csv")
_add("report", report, "--html bench.html")
_add("dashboard", dashboard, "--grafana ./grafana")
