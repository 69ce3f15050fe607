"""A run as a table on the screen, as Markdown and as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from suite.machine import Limit
from suite.results import Result
from suite.timing import Spread


@dataclass(frozen=True)
class Run:
    """Everything that one run found."""

    facts: Mapping[str, str]
    limits: Sequence[Limit]
    results: Sequence[Result]
    seconds: float
    quick: bool

    @property
    def name(self) -> str:
        """What its files are called: date and commit."""
        day = self.facts["date"].split()[0]
        return f"{day}-{self.facts['commit']}" + ("-quick" if self.quick else "")


HEADINGS = ("case", "variant", "ms", "quartiles", "ratio", "quartiles", "aim", "rounds", "checked", "besides")


def write(run: Run, folder: Path) -> list[Path]:
    """Writes JSON and Markdown; returns the paths. A second run of the same day and commit gets a number."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = _unused(folder, run.name)
    paths = [folder / f"{stem}.json", folder / f"{stem}.md"]
    paths[0].write_text(json.dumps({"rewire_benchmark": 1, **data(run)}, indent=1) + "\n", "utf-8")
    paths[1].write_text(markdown(run), "utf-8")
    return paths


def data(run: Run) -> dict[str, Any]:
    """The run as JSON data, with the outcome of every result."""
    whole = asdict(run)
    for record, result in zip(whole["results"], run.results, strict=True):
        record["outcome"] = result.outcome
    return whole


def _unused(folder: Path, name: str) -> str:
    names = (name, *(f"{name}-{number}" for number in range(2, 1000)))
    return next(one for one in names if not (folder / f"{one}.json").exists())


def markdown(run: Run) -> str:
    """The run as a page."""
    return "\n".join(_page(run))


def _page(run: Run) -> Iterator[str]:
    yield f"# Benchmarks, {run.facts['date']}, commit {run.facts['commit']}\n"
    if run.quick:
        yield "A quick run: a look, not a result.\n"
    yield (
        "All variants of a case ran in turn, round by round. A ratio is taken within each round, against the first "
        f"variant of its case; medians and quartiles over the rounds. {run.seconds:.0f} s in all.\n"
    )
    yield from _table(("", ""), list(run.facts.items()))
    yield "## What the machine can do at most\n"
    yield from _table(("", "", ""), [(one.name, f"{one.value:.1f}", one.unit) for one in run.limits])
    for group in dict.fromkeys(result.group for result in run.results):
        yield f"## {group}\n"
        yield from _table(HEADINGS, [row(result) for result in run.results if result.group == group])


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(headings)} |"
    yield f"|{'---|' * len(headings)}"
    yield from (f"| {' | '.join(re.sub(r'[|]', '/', cell) for cell in row)} |" for row in rows)
    yield ""


def row(result: Result) -> tuple[str, ...]:
    """The cells of one result."""
    aim = "" if result.aim is None else f"≤ {result.aim:.2f} {result.outcome}"
    check = result.check if result.is_right else f"WRONG: {result.check}"
    notes = ", ".join(f"{name} {value}" for name, value in result.notes.items())
    times, ratio = result.seconds, result.ratio
    milliseconds = Spread(1e3 * times.median, 1e3 * times.lower, 1e3 * times.upper, times.count)
    return (
        result.case,
        result.variant,
        _number(milliseconds.median),
        f"{_number(milliseconds.lower)}–{_number(milliseconds.upper)}",
        f"{ratio.median:.3f}",
        f"{ratio.lower:.3f}–{ratio.upper:.3f}",
        aim,
        str(times.count),
        check,
        notes,
    )


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def line(result: Result) -> str:
    """A result on one line, for the screen.

    >>> line(Result("load", "SAM", "plan", Spread(0.07, 0.06, 0.08, 9), Spread(1.05, 1.0, 1.1, 9), aim=1.1))
    'SAM, plan: 70.0 ms (60.0–80.0), ratio 1.050 (1.000–1.100) ≤ 1.10 met'
    """
    case, variant, median, quartiles, ratio, ratio_quartiles, *others = row(result)
    shown = f"{case}, {variant}: {median} ms ({quartiles}), ratio {ratio} ({ratio_quartiles})"
    return " ".join([shown, *(cell for cell in (others[0], others[2], others[3]) if cell)])
