"""Everything that can go wrong in Rewire, as one tree.

```
RewireError                 base of all; never raised itself
├── PlanError               a plan file or record is malformed (all errors at once, with lines)
├── ResolveError            the plan does not fit the model; nothing was changed
│   ├── NoMatchError        a target matches nothing
│   └── RefusedError        a target matched, but the edit would be wrong there
├── RuleError               a tensor rule does not fit the names or shapes given
├── ConsentError            running code named by a plan or checkpoint was not allowed
├── CheckpointError         a checkpoint is damaged, incomplete, ambiguous or in a format that is not read
├── OutputError             the destination cannot be written (exists, not empty, disk full)
├── RevertError             a model cannot be brought back to its original form
├── EncodeError             texts cannot be encoded with these settings
├── MeasureError            something cannot be measured
└── ProofError              a proof could not be carried out (a proof that *fails* is a result, not an error)
```

Messages say what was found, where, and what to do next.
"""

from __future__ import annotations

from dataclasses import dataclass


class RewireError(Exception):
    """Base class of every error that Rewire raises on purpose."""


@dataclass(frozen=True)
class Issue:
    """One problem in a plan file: what is wrong and where."""

    message: str
    file: str | None = None
    line: int | None = None
    where: str = ""

    def __str__(self) -> str:
        place = ":".join(str(part) for part in (self.file, self.line) if part is not None)
        return ": ".join(part for part in (place, self.where, self.message) if part)


class PlanError(RewireError):
    """A plan is malformed. `issues` lists every problem found, not only the first."""

    def __init__(self, message: str, issues: tuple[Issue, ...] = ()) -> None:
        self.issues = issues
        super().__init__("\n".join([message, *(f"  {issue}" for issue in issues)]))


class ResolveError(RewireError):
    """The plan does not fit the model. Nothing was changed."""


class NoMatchError(ResolveError):
    """A target matches no module (or parameter) of the model."""


class RefusedError(ResolveError):
    """A target matched, but carrying out the edit there would be wrong or ambiguous."""


class RuleError(RewireError):
    """A tensor rule does not fit the tensors it is given."""


class ConsentError(RewireError):
    """A plan or checkpoint names code to run and the caller has not allowed it."""


class CheckpointError(RewireError):
    """A checkpoint is damaged, incomplete, ambiguous, or in a format that Rewire does not read.

    Where a whole checkpoint was examined, `issues` lists every fault of it, with file and tensor.
    """

    def __init__(self, message: str, issues: tuple[Issue, ...] = ()) -> None:
        self.issues = issues
        super().__init__(message)


class OutputError(RewireError):
    """The destination cannot be written; what was there before is untouched."""


class RevertError(RewireError):
    """A model cannot be brought back to its original form."""


class EncodeError(RewireError):
    """Texts cannot be encoded with this model and these settings."""


class MeasureError(RewireError):
    """Something cannot be measured, or what was found is no measurement (not finite, too short, not comparable)."""


class ProofError(RewireError):
    """A proof could not be carried out."""
