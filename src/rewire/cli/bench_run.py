"""`rewire bench run`: measuring."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from rewire.cli.guard import Code, complain
from rewire.cli.models import Source, parse_values
from rewire.cli.options import (
    ABOUT_MODEL,
    MODEL_HELP,
    AllowCode,
    Debug,
    Dtype,
    Json,
    Quiet,
    Seed,
    Values,
)
from rewire.cli.screen import Screen

if TYPE_CHECKING:
    from rewire import Plan
    from rewire.measure.bench import Bench
    from rewire.measure.bench.run import Failure
    from rewire.measure.store import Run, RunFacts, Store

ABOUT_EFFORT = "How much is measured"

Database = Annotated[
    str | None,
    typer.Option(
        "--db",
        metavar="URL",
        envvar="REWIRE_BENCH_DB",
        show_default=False,
        help="Where results are kept: a file, or postgresql+psycopg://USER@HOST/NAME. By default bench.db in your data "
        "directory.",
    ),
]
Task = Annotated[
    Literal["causal-lm", "seq-2-seq-lm", "seq-cls", "token-cls", "question-ans"] | None,
    typer.Option(
        metavar="TASK",
        show_default=False,
        rich_help_panel=ABOUT_MODEL,
        help="With config: the head of the model: causal-lm (as decode needs), seq-2-seq-lm, seq-cls, token-cls or "
        "question-ans. By default none.",
    ),
]


def run(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", show_default=False, help=MODEL_HELP)] = None,
    named_model: Annotated[
        str | None, typer.Option("--model", metavar="MODEL", show_default=False, help="The same as MODEL.")
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(
            "--plan", "-p", metavar="FILE", show_default=False, help="A plan: measures before and after it, in turns."
        ),
    ] = None,
    suite: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            show_default=False,
            help="What to measure: load, decode, encode, train, another package's suite, or all that fit the model "
            "(the default). May be given several times.",
        ),
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N",
            min=1,
            show_default=False,
            rich_help_panel=ABOUT_EFFORT,
            help="Batch size; may be given several times. By default those of each suite.",
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            show_default=False,
            rich_help_panel=ABOUT_EFFORT,
            help="Tokens that decode generates (else 32), and in the sequences of the others (else 128, load 64).",
        ),
    ] = None,
    prompt: Annotated[
        int, typer.Option(metavar="N", min=1, rich_help_panel=ABOUT_EFFORT, help="Tokens in the prompt of decode.")
    ] = 64,
    padding: Annotated[
        list[float] | None,
        typer.Option(
            metavar="X",
            min=0.0,
            max=0.95,
            show_default=False,
            rich_help_panel=ABOUT_EFFORT,
            help="Share of padding in the batches of encode, such as 0.5; may be given several times (else 0 and 0.5).",
        ),
    ] = None,
    repeats: Annotated[
        int, typer.Option(metavar="N", min=1, rich_help_panel=ABOUT_EFFORT, help="Rounds of each case at least.")
    ] = 7,
    seconds: Annotated[
        float, typer.Option(metavar="X", min=0.0, rich_help_panel=ABOUT_EFFORT, help="How long rounds go on.")
    ] = 3.0,
    warm_ups: Annotated[
        int, typer.Option(metavar="N", min=0, rich_help_panel=ABOUT_EFFORT, help="Rounds that are not counted.")
    ] = 2,
    backend: Annotated[
        str,
        typer.Option(
            "--compile",
            metavar="BACKEND",
            rich_help_panel=ABOUT_EFFORT,
            help="What torch.compile compiles with, as inductor or eager; none leaves compiled decoding out.",
        ),
    ] = "inductor",
    threads: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, show_default=False, help="Threads of torch; else as many as it takes."),
    ] = None,
    device: Annotated[str, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1 or mps.")] = "cpu",
    dtype: Dtype = "auto",
    values: Values = None,
    task: Task = None,
    seed: Seed = 0,
    allow_code: AllowCode = False,
    database: Database = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure the speed and the memory of a model, before and after a plan.

    The two models are compared first: nothing is timed if their outputs or their tokens differ by more than the plan
    promises. Then both are timed in turns, so that whatever slows the machine down hits both. Results are kept in a
    database. Exits with 1 if a suite fails.
    """
    screen = Screen(quiet, as_json)
    source = _source(model, named_model, Source("", parse_values(values), seed, dtype, (), allow_code, _task(task)))
    wanted = _read_plan(plan)
    names = tuple(suite or ("all",))
    with screen.models():
        from rewire.measure.bench import Bench, Settings, find_suites

        settings = Settings(
            batch=tuple(dict.fromkeys(batch or ())),
            tokens=tokens,
            prompt=prompt,
            padding=tuple(padding) if padding else Settings.padding,
            repeats=repeats,
            seconds=seconds,
            warm_ups=warm_ups,
            threads=threads,
            device=device,
            backend=None if backend == "none" else backend,
            seed=seed,
        )
        job = _Job(source, wanted, names, find_suites(names), Bench(_openers(source, wanted), settings))
        with opened(database) as store:
            found, failures = job.run(store, screen)
    _tell(found, failures, screen, debug)


def _task(name: str | None) -> str | None:
    return None if name is None else name.upper().replace("-", "_")


def _source(given: str | None, named: str | None, how: Source) -> Source:
    from dataclasses import replace

    if (given is None) == (named is None):
        raise typer.BadParameter("name one model, as in rewire bench run ./my-model")
    source = replace(how, text=given or named or "")
    source.check()
    if how.task is not None and not source.is_config:
        raise typer.BadParameter(f"--task is for config:TYPE; {source.text} is of the class that was saved")
    return source


def _read_plan(path: Path | None) -> Plan | None:
    import rewire

    return None if path is None else rewire.Plan.read(path)


@contextmanager
def opened(database: str | None, *, write: bool = True) -> Iterator[Store]:
    """The store that `--db` names, open."""
    from rewire.measure.store import open_store

    with open_store(database, write=write) as store:
        yield store


def _openers(source: Source, plan: Plan | None) -> dict[str, Any]:
    """What loads the model before the plan, and after it."""
    from rewire import Plan

    before = {"before": lambda: source.open(Plan([]))}
    return before if plan is None else {**before, "after": lambda: source.open(plan)}


@dataclass(frozen=True)
class _Job:
    """What is to be measured, and how."""

    source: Source
    plan: Plan | None
    names: Sequence[str]
    suites: Sequence[Any]
    bench: Bench

    def run(self, store: Store, screen: Screen) -> tuple[Run, list[Failure]]:
        from rewire.measure.bench import run_bench
        from rewire.measure.bench.sampler import Sampler

        with store.run(self.facts()) as recorder, screen.doing("measuring") as progress:
            with Sampler(recorder.sampled):
                outcome = run_bench(
                    self.bench, self.suites, is_all="all" in self.names, recorder=recorder, progress=progress
                )
            for failure in outcome.failures:
                store.fail(recorder.id, str(failure))
        return store.get(recorder.id), outcome.failures

    def facts(self) -> RunFacts:
        import torch

        from rewire.measure.bench.machine import machine_facts, revision
        from rewire.measure.store import RunFacts

        where = revision(Path.cwd())
        machine = machine_facts()
        if self.bench.settings.threads is not None:
            machine["threads"] = str(self.bench.settings.threads)
        kind = torch.device(self.bench.settings.device).type
        name = {"cpu": machine["processor"], "cuda": machine["gpu"]}.get(kind, "")
        config = {"values": dict(self.source.values), "task": self.source.task} if self.source.is_config else {}
        return RunFacts(
            model=self.source.text,
            device=f"{self.bench.settings.device} ({name})" if name else self.bench.settings.device,
            suites=[suite.name for suite in self.suites],
            settings={**self.bench.settings.to_dict(), "dtype": self.source.dtype, **config},
            machine=machine,
            plan=self.plan.to_dict() if self.plan is not None else None,
            plan_hash=self.plan.hash if self.plan is not None else None,
            branch=where.branch,
            commit=where.commit,
            message=where.message,
        )


def _tell(found: Run, failures: Sequence[Failure], screen: Screen, debug: bool) -> None:
    """Shows a run; one with failures ends with 1."""
    from rewire.measure.bench.show import run_view

    screen.result(found.to_dict)
    screen.show(*run_view(found))
    for failure in failures:
        complain("failed", str(failure), "" if not debug else failure.details)
    if failures:
        raise typer.Exit(Code.PROOF_FAILED)
