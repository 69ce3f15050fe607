"""Coverage as a Markdown page, and what can be read back from it."""

from __future__ import annotations

import re
from collections.abc import Iterator

from rewire.coverage.record import EDITS, OUTCOMES, Coverage, Finding, TypeReport

_DASH = "–"

ABOUT = """\
Every model type of Transformers is made small from its own configuration (`rewire.zoo`), given strong random weights
and inputs of every kind that it takes, and edited in every way: all fused projections are split, all separate ones
joined, all experts unstacked, and stacked again. **Proven** means that all of this holds at every place of the edit:

- the outputs agree (the figure is the largest relative difference of any output tensor),
- the gradients of every parameter agree, led through the tensor rule,
- every tensor is bit for bit what the rule says, and bit for bit the original on the way back (`revert_`),
- saved in the original layout it is bit for bit what the untouched model saves, `from_pretrained` gives the untouched
  model, and `rewire.load` the edited one.

**In part**: what could be compared holds; the reason says what could not be. **Refused**: every such place was, with
the reason, and the model is bit for bit as before. A dash: the type has no such place. **Unavailable**: the tiny model
cannot be built or run here, for a reason outside Rewire."""


def to_markdown(coverage: Coverage) -> str:
    """The page: what was done with which versions, totals, a row for each type, and the reasons."""
    versions = ", ".join(f"{name} {version}" for name, version in coverage.versions.items())
    built = f"{len(coverage.available)} of {len(coverage.types)} model types are built and run"
    parts = [
        "# Coverage",
        f"Measured on {coverage.date} with {versions}, float32 on a CPU, by `rewire coverage --markdown FILE`.",
        ABOUT,
        "## Totals",
        f"{built}; {sum(one.seconds for one in coverage.types):,.0f} s of computing time.",
        "\n".join(_totals(coverage)),
        "## Every type",
        "The number behind an outcome is that of the places edited, the figure the largest difference of an output.",
        "\n".join(_rows(coverage)),
        "## Reasons",
        "\n".join(_reasons(coverage)),
    ]
    return "\n\n".join(parts) + "\n"


def _totals(coverage: Coverage) -> Iterator[str]:
    yield f"| edit | {' | '.join(OUTCOMES)} |"
    yield "|---" * (len(OUTCOMES) + 1) + "|"
    for edit in EDITS:
        totals = coverage.totals(edit)
        yield f"| {edit} | {' | '.join(str(totals[outcome]) for outcome in OUTCOMES)} |"


def _rows(coverage: Coverage) -> Iterator[str]:
    yield f"| type | {' | '.join(EDITS)} |"
    yield "|---" * (len(EDITS) + 1) + "|"
    for one in coverage.types:
        yield f"| `{one.model_type}` | {' | '.join(_cell(one.finding(edit)) for edit in EDITS)} |"


def _cell(finding: Finding) -> str:
    """One outcome in brief.

    >>> (
    ...     _cell(Finding("split", "proven", 2, 1.25e-7)),
    ...     _cell(Finding("split", "refused")),
    ...     _cell(Finding("split", "failed")),
    ... )
    ('proven, 2, 1.2e-07', 'refused', '**failed**')
    """
    if finding.outcome == "not applicable":
        return _DASH
    if finding.outcome == "failed":
        return "**failed**"
    texts = [finding.outcome]
    if finding.places:
        texts.append(str(finding.places))
    if finding.difference is not None:
        texts.append(f"{finding.difference:.1e}" if finding.difference else "0")
    return ", ".join(texts)


def _reasons(coverage: Coverage) -> Iterator[str]:
    yield "| type | edit | outcome | reason |"
    yield "|---|---|---|---|"
    for one in coverage.types:
        if one.problem:
            yield f"| `{one.model_type}` | all | unavailable | {_plain(one.problem)} |"
        else:
            yield from (_reason(one, finding) for finding in one.findings if _has_reason(finding))


def _has_reason(finding: Finding) -> bool:
    return bool(finding.detail) and not finding.detail.startswith("nothing to ")


def _reason(one: TypeReport, finding: Finding) -> str:
    return f"| `{one.model_type}` | {finding.edit} | {finding.outcome} | {_plain(finding.detail)} |"


def _plain(text: str) -> str:
    """Text that breaks no table.

    >>> _plain("a | b\\nc")
    'a / b c'
    """
    return re.sub(r"\s+", " ", text.replace("|", "/")).strip()


def read_outcomes(page: str) -> dict[str, dict[str, str]]:
    """Type to edit to outcome, from a page that `to_markdown` made.

    >>> page = to_markdown(
    ...     Coverage((TypeReport("bert", findings=(Finding("join", "proven", 2, 0.0),)),), {}, "2026-01-01")
    ... )
    >>> read_outcomes(page)["bert"]["join"]
    'proven'
    """
    found: dict[str, dict[str, str]] = {}
    for line in page.partition("## Every type")[2].partition("## Reasons")[0].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == len(EDITS) + 1 and cells[0].startswith("`"):
            outcomes = ("not applicable" if cell == _DASH else cell.partition(",")[0].strip("*") for cell in cells[1:])
            found[cells[0].strip("`")] = dict(zip(EDITS, outcomes, strict=True))
    return found
