"""Binary search for the first of several steps after which a check fails."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rewire.errors import MeasureError

if TYPE_CHECKING:
    from rich.console import Group

State = Literal["good", "bad", "skipped"]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Point:
    """One state of what is searched: after so many edits, at a commit, with a version.

    `about` says more for people: author, date and subject of a commit.
    """

    id: str
    label: str
    about: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """What a check said of a point, with what it printed. `skipped`: it could not be run there."""

    state: State
    output: str = ""


Check = Callable[[Point], Verdict]


@dataclass(frozen=True)
class Bisection:
    """What the search found.

    Attributes:
        what: `"edit"`, `"commit"` or `"version"`.
        outcome: `"found"`, `"flaky"` (the check said different things of one point), or `"narrowed"` (it could not be
            run between the last good point and the first bad one).
        good: the last point before the break.
        bad: the first point after it; for `flaky` the point in question.
        good_output: what the check printed at `good`.
        bad_output: what it printed at `bad`.
        skipped: points between the two where the check could not be run.
        states: what the check said of every point that was tried, in their order.
        runs: how often the check was run in all, earlier runs that were resumed included.
    """

    what: str
    outcome: Literal["found", "flaky", "narrowed"]
    good: Point
    bad: Point
    good_output: str
    bad_output: str
    skipped: tuple[Point, ...]
    states: Mapping[str, tuple[State, ...]]
    runs: int

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data."""
        return asdict(self)

    def summary(self) -> str:
        """One sentence for people."""
        if self.outcome == "flaky":
            said = ", ".join(self.states[self.bad.id])
            return f"the check is flaky: of {self.bad.label} it said {said}; nothing can be searched with it"
        if self.outcome == "narrowed":
            names = ", ".join(point.label for point in (*self.skipped, self.bad))
            return f"the first bad {self.what} is one of {names}; the check could not be run at the others"
        return f"the first bad {self.what} is {self.bad.label} ({self.runs} runs of the check)"

    def __rich__(self) -> Group:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table("", "point", "about", "the check", box=None, pad_edge=False)
        for name, point, output in (("last good", self.good, self.good_output), (self._bad, self.bad, self.bad_output)):
            about = "\n".join(point.about.values())
            table.add_row(name, Text(point.label), Text(about), Text(_tail(output)))
        return Group(Text(self.summary(), "bold"), table)

    @property
    def _bad(self) -> str:
        return "flaky" if self.outcome == "flaky" else "first bad"


def _tail(text: str, lines: int = 6) -> str:
    return "\n".join(text.strip().splitlines()[-lines:])


class Memory:
    """What a check has said so far, kept in a file so that an interrupted search goes on.

    Raises `MeasureError` if the file belongs to another search.
    """

    def __init__(self, path: Path | None, points: Sequence[Point], check: str) -> None:
        self.path = path
        text = json.dumps([check, *(point.id for point in points)])
        self.search = hashlib.sha256(text.encode("utf-8")).hexdigest()
        self.said: dict[str, list[Verdict]] = {}
        if path is not None and path.is_file():
            self._read(path)

    def _read(self, path: Path) -> None:
        try:
            data = json.loads(path.read_text("utf-8"))
            said = {name: [Verdict(**one) for one in found] for name, found in data["said"].items()}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise MeasureError(f"{path} is no record of a search ({error}); delete it or name another file") from error
        if data.get("search") != self.search:
            raise MeasureError(f"{path} is of another search (other points or another check); name another file")
        self.said = said

    def add(self, point: Point, verdict: Verdict) -> None:
        """Notes a verdict, on disk too."""
        from rewire.plan.text import write

        self.said.setdefault(point.id, []).append(verdict)
        if self.path is not None:
            said = {name: [asdict(one) for one in found] for name, found in self.said.items()}
            write(self.path, json.dumps({"search": self.search, "said": said}, indent=1))


class _Flaky(Exception):
    """A check contradicted itself."""

    def __init__(self, point: Point) -> None:
        self.point = point


def bisect(
    what: str,
    points: Sequence[Point],
    check: Check,
    *,
    repeats: int = 1,
    memory: Memory | None = None,
    progress: Progress | None = None,
) -> Bisection:
    """Finds the first of `points` that a check finds bad.

    The first point must be good and the last one bad; both are verified before anything else.

    Args:
        what: what a point adds: `"edit"`, `"commit"`, `"version"`.
        points: from good to bad.
        check: tries one point.
        repeats: how often every point is tried; verdicts that differ make the check flaky, and end the search.
        memory: what was said before, for a search that goes on.
        progress: called before every run, with the runs so far and an upper limit of all.

    Raises:
        MeasureError: the first point is not good, or the last one not bad.
    """
    if len(points) < 2:
        raise MeasureError(f"there is nothing to search: {len(points)} points, at least 2 are needed")
    search = _Search(points, check, repeats, memory or Memory(None, points, ""), progress)
    low, high = 0, len(points) - 1
    try:
        _expect(search, points[0], "good", "first")
        _expect(search, points[-1], "bad", "last")
        while (middle := search.between(low, high)) is not None:
            if search.state(points[middle]) == "good":
                low = middle
            elif search.state(points[middle]) == "bad":
                high = middle
    except _Flaky as flaky:
        return search.result(what, "flaky", points[low], flaky.point, ())
    outcome: Literal["found", "narrowed"] = "found" if high - low == 1 else "narrowed"
    return search.result(what, outcome, points[low], points[high], points[low + 1 : high])


class _Search:
    """The points, and what is known of them."""

    def __init__(
        self, points: Sequence[Point], check: Check, repeats: int, memory: Memory, progress: Progress | None
    ) -> None:
        self.points, self.check, self.repeats, self.memory, self.progress = points, check, repeats, memory, progress

    @property
    def said(self) -> Mapping[str, Sequence[Verdict]]:
        return self.memory.said

    def state(self, point: Point) -> State:
        """What the check says of a point; it is run as often as is needed."""
        while len(self.said.get(point.id, ())) < self.repeats:
            if self.progress is not None:
                self.progress(point.label, self._runs(), self._limit())
            self.memory.add(point, self.check(point))
            self._agreed(point)
        return self._agreed(point)

    def _agreed(self, point: Point) -> State:
        states = {verdict.state for verdict in self.said[point.id]}
        if len(states) > 1:
            raise _Flaky(point)
        return states.pop()

    def _runs(self) -> int:
        return sum(map(len, self.said.values()))

    def _limit(self) -> int:
        return self.repeats * (2 + (len(self.points) - 1).bit_length())

    def between(self, low: int, high: int) -> int | None:
        """The point nearest to the middle at which the check can be run; None if there is none."""
        for number in _from_the_middle(low, high):
            known = self.said.get(self.points[number].id)
            if known is None or known[0].state != "skipped":
                return number
        return None

    def result(
        self,
        what: str,
        outcome: Literal["found", "flaky", "narrowed"],
        good: Point,
        bad: Point,
        skipped: Sequence[Point],
    ) -> Bisection:
        states = {
            point.id: tuple(verdict.state for verdict in self.said[point.id])
            for point in self.points
            if point.id in self.said
        }
        outputs = [self.said[point.id][-1].output if point.id in self.said else "" for point in (good, bad)]
        return Bisection(what, outcome, good, bad, outputs[0], outputs[1], tuple(skipped), states, self._runs())


def _from_the_middle(low: int, high: int) -> Iterator[int]:
    """The numbers strictly between, the middle first.

    >>> list(_from_the_middle(0, 5))
    [2, 3, 4, 1]
    """
    yield from sorted(range(low + 1, high), key=lambda number: (abs(2 * number - low - high), -number % 2))


def _expect(search: _Search, point: Point, wanted: State, which: str) -> None:
    state = search.state(point)
    if state == wanted:
        return
    output = _tail(search.said[point.id][-1].output)
    if state == "skipped":
        raise MeasureError(
            f"the check cannot be run at {point.label}, the {which} point; if a file is missing there, bring it along "
            f"(--overlay). It said: {output}"
        )
    raise MeasureError(f"{point.label}, the {which} point, is {state}, not {wanted}: the check said: {output}")
