"""One measured variant, as it is written down."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from suite.timing import Samples, Spread, ratios


@dataclass(frozen=True)
class Result:
    """One variant of one case.

    Attributes:
        group: the group of benchmarks.
        case: what was done to which model.
        variant: how.
        seconds: time per round.
        ratio: the same as a multiple of the baseline's time in the same round.
        aim: the largest median ratio that is wished for.
        check: what was verified about the result, with what came out.
        is_right: whether it was as it should be.
        notes: further figures, as text.
    """

    group: str
    case: str
    variant: str
    seconds: Spread
    ratio: Spread
    aim: float | None = None
    check: str = ""
    is_right: bool = True
    notes: Mapping[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The case and the variant."""
        return f"{self.case}: {self.variant}"

    @property
    def outcome(self) -> str:
        """Whether the aim is met, to the two decimals it is stated in; empty without one.

        Undecided: the median misses it, but the better quarter of the rounds does not.
        """
        if self.aim is None:
            return ""
        if round(self.ratio.median, 2) <= self.aim:
            return "met"
        return "undecided" if round(self.ratio.lower, 2) <= self.aim else "MISSED"


@dataclass(frozen=True)
class Verdict:
    """What was verified about a variant."""

    text: str
    is_right: bool


def results(
    group: str,
    case: str,
    samples: Samples,
    *,
    aims: Mapping[str, float] | None = None,
    verdicts: Mapping[str, Verdict] | None = None,
    notes: Mapping[str, Mapping[str, str]] | None = None,
) -> Iterator[Result]:
    """One result per variant; the first variant is the baseline."""
    base: Sequence[float] = next(iter(samples.values()))
    for name, numbers in samples.items():
        verdict = (verdicts or {}).get(name, Verdict("", True))
        yield Result(
            group,
            case,
            name,
            Spread.of(numbers),
            ratios(numbers, base),
            (aims or {}).get(name),
            verdict.text,
            verdict.is_right,
            (notes or {}).get(name, {}),
        )
