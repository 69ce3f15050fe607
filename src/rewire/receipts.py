"""The receipt: what was changed, refused and left, with counts, hashes and versions."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib import metadata
from typing import Any

import torch
import xxhash
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from rewire.errors import PlanError, RewireError
from rewire.plan import Plan
from rewire.surgery import Undo
from rewire.tensor_rules import Rule, from_record, to_record

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and out of how much."""


@dataclass(frozen=True)
class Decision:
    """What the plan means for one place.

    Attributes:
        edit: number of the edit in the plan.
        kind: its kind.
        target: the target as written.
        path: the place; empty where the target matched nothing.
        outcome: `"changed"`, `"refused"` or `"unmatched"` (the last two only for optional edits, or the
            plan would have failed).
        detail: what becomes of it, or the reason.
    """

    edit: int
    kind: str
    target: str
    path: str
    outcome: str
    detail: str


@dataclass(frozen=True)
class TensorFact:
    """One tensor: name, shape, type (as torch calls it) and a hash of its bytes (xxh3, 128 bits)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    hash: str | None


@dataclass(frozen=True)
class TensorChange:
    """The tensors that one change took, and those it gave."""

    edit: int
    path: str
    before: tuple[TensorFact, ...]
    after: tuple[TensorFact, ...]


@dataclass(frozen=True)
class Counts:
    """Elements and bytes of all parameters, each tied one counted once."""

    parameters: int
    trainable: int
    bytes: int

    @staticmethod
    def of(model: nn.Module) -> Counts:
        """Counts the parameters of `model`."""
        parameters = list(model.parameters())
        return Counts(
            sum(p.numel() for p in parameters),
            sum(p.numel() for p in parameters if p.requires_grad),
            sum(p.numel() * p.element_size() for p in parameters),
        )

    @property
    def trainable_share(self) -> float:
        """Trainable parameters as a share of all, 0 to 1."""
        return self.trainable / self.parameters if self.parameters else 0.0


@dataclass(frozen=True)
class Receipt:
    """What a plan did to a model.

    Attributes:
        how: `"apply"`, `"load"` or `"revert"`.
        model: class of the model.
        plan: the plan as data; None if it holds a class that has no import path.
        plan_hash: its hash.
        promise: the weakest promise of its edits.
        decisions: one for every place that a target matched.
        tensors: what each change took and gave.
        rules: the tensor rule, from the names before to the names after.
        before: parameter counts before.
        after: parameter counts after.
        seconds: wall time.
        largest_change_bytes: the largest amount of weights held twice at any time.
        peak_rss_bytes: the largest resident memory of the process so far.
        versions: of Python and the libraries.
    """

    how: str
    model: str
    plan: Mapping[str, Any] | None
    plan_hash: str | None
    promise: str
    decisions: tuple[Decision, ...]
    tensors: tuple[TensorChange, ...]
    rules: Rule = field(repr=False)
    before: Counts
    after: Counts
    seconds: float
    largest_change_bytes: int
    peak_rss_bytes: int
    versions: Mapping[str, str] = field(repr=False)

    def count(self, outcome: str) -> int:
        """How many places have this outcome."""
        return sum(decision.outcome == outcome for decision in self.decisions)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data."""
        data = asdict(replace(self, rules=()))
        return {"receipt": 1, **data, "rules": [to_record(step) for step in self.rules]}

    def to_json(self) -> str:
        """As JSON text."""
        return json.dumps(self.to_dict(), indent=1)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Receipt:
        """The inverse of `to_dict`. Raises `RewireError` for anything else."""
        values = dict(data)
        if values.pop("receipt", None) != 1:
            raise RewireError("not a receipt of this version of Rewire (expected `receipt: 1`)")
        try:
            values["decisions"] = tuple(Decision(**decision) for decision in values["decisions"])
            values["tensors"] = tuple(_tensor_change(change) for change in values["tensors"])
            values["rules"] = tuple(from_record(record) for record in values["rules"])
            values |= {when: Counts(**values[when]) for when in ("before", "after")}
            return Receipt(**values)
        except (KeyError, TypeError) as error:
            raise RewireError(f"not a receipt: {error}") from error

    @staticmethod
    def from_json(text: str) -> Receipt:
        """The inverse of `to_json`."""
        return Receipt.from_dict(json.loads(text))

    def summary(self) -> str:
        """One line for people."""
        changed = self.count("changed")
        places = f"{changed} place{'s' * (changed != 1)} changed"
        others = [f"{self.count(outcome)} {outcome}" for outcome in ("refused", "unmatched") if self.count(outcome)]
        trainable = f"{self.after.trainable:,} of {self.after.parameters:,} parameters trainable"
        return f"{', '.join([places, *others])}; {trainable} ({self.after.trainable_share:.4%}); {self.seconds:.2f} s"

    def __rich__(self) -> Group:
        return _table(self)


def _tensor_change(data: Mapping[str, Any]) -> TensorChange:
    before, after = (
        tuple(TensorFact(**{**fact, "shape": tuple(fact["shape"])}) for fact in data[when])
        for when in ("before", "after")
    )
    return TensorChange(data["edit"], data["path"], before, after)


@dataclass(frozen=True)
class Done:
    """A change that was carried out: its kind, its tensor rule, and the way back."""

    kind: str
    rule: Rule
    undo: Undo


@dataclass
class Edited:
    """What an edited model carries: its plan, its receipt, and what was done, in order."""

    plan: Plan
    receipt: Receipt
    done: list[Done]


_ATTRIBUTE = "_rewire"


def edited(model: nn.Module) -> Edited | None:
    """What `model` carries of its edits; None if it has none."""
    found = model.__dict__.get(_ATTRIBUTE)
    return found if isinstance(found, Edited) else None


def set_edited(model: nn.Module, state: Edited | None) -> None:
    """Attaches the state of the edits, or takes it off."""
    model.__dict__.pop(_ATTRIBUTE, None)
    if state is not None:
        model.__dict__[_ATTRIBUTE] = state


def receipt_of(model: nn.Module) -> Receipt | None:
    """The receipt of an edited model; None if it has no edits."""
    state = edited(model)
    return state.receipt if state else None


def combine(first: Edited | None, second: Edited) -> Edited:
    """The state of a model on which `second` was carried out after `first`."""
    if first is None:
        return second
    plan = Plan((*first.plan.edits, *second.plan.edits), name=first.plan.name)
    shift = len(first.plan.edits)
    data, digest = plan_record(plan)
    receipt = replace(
        second.receipt,
        plan=data,
        plan_hash=digest,
        promise=plan.promise,
        decisions=first.receipt.decisions + tuple(replace(d, edit=d.edit + shift) for d in second.receipt.decisions),
        tensors=first.receipt.tensors + tuple(replace(t, edit=t.edit + shift) for t in second.receipt.tensors),
        rules=first.receipt.rules + second.receipt.rules,
        before=first.receipt.before,
        seconds=first.receipt.seconds + second.receipt.seconds,
        largest_change_bytes=max(first.receipt.largest_change_bytes, second.receipt.largest_change_bytes),
    )
    return Edited(plan, receipt, [*first.done, *second.done])


def plan_record(plan: Plan) -> tuple[dict[str, Any] | None, str | None]:
    """A plan as data, and its hash; nothing for one that holds a class without an import path."""
    try:
        return plan.to_dict(), plan.hash
    except PlanError:
        return None, None


def tensor_fact(name: str, tensor: Tensor, *, hashed: bool = True) -> TensorFact:
    """Describes a tensor; on meta it has no hash."""
    digest = _hash(tensor) if hashed and not tensor.is_meta else None
    return TensorFact(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), digest)


def _hash(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return xxhash.xxh3_128_hexdigest(data.numpy().data)


@cache  # they cannot change while the process runs, and looking them up takes milliseconds
def versions() -> Mapping[str, str]:
    """Versions of Python and the libraries that a result depends on."""
    return {"python": platform.python_version(), **dict(_installed(("rewire", *_LIBRARIES)))}


_LIBRARIES = ("torch", "transformers", "peft", "safetensors", "accelerate")


def _installed(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    for name in names:
        try:
            yield name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue


def summarise(decisions: Sequence[Decision]) -> list[tuple[Decision, int]]:
    """Decisions that differ in layer numbers alone as one, with how many they are.

    >>> first, second = (Decision(0, "split", "l.*", f"l.{n}", "changed", "6 rows") for n in (0, 1))
    >>> [(d.path, n) for d, n in summarise([first, second])]
    [('l.*', 2)]
    """
    groups: dict[tuple[Any, ...], list[Decision]] = {}
    for d in decisions:
        general = ".".join("*" if part.isdigit() else part for part in d.path.split("."))
        groups.setdefault((d.edit, general, d.outcome, d.detail), []).append(d)
    return [
        (replace(found[0], path=key[1]) if len(found) > 1 else found[0], len(found)) for key, found in groups.items()
    ]


# --- On the screen ---

_COLOURS = {"changed": "green", "refused": "red", "unmatched": "yellow"}


def _table(receipt: Receipt) -> Group:
    """Decisions (layers alike in one row), then counts before and after."""
    title = f"{receipt.how} · {receipt.model} · plan {(receipt.plan_hash or 'without hash')[:12]}"
    return Group(Text(title, style="bold"), _decisions(receipt), _counts(receipt), Text(_footer(receipt), "dim"))


def _decisions(receipt: Receipt) -> Table:
    table = Table("edit", "where", "places", "outcome", "what", box=None, pad_edge=False)
    for decision, places in summarise(receipt.decisions):
        colour = _COLOURS[decision.outcome]
        table.add_row(
            f"{decision.edit} {decision.kind}",
            escape(decision.path or decision.target),
            str(places),
            f"[{colour}]{decision.outcome}[/]",
            escape(decision.detail),
        )
    return table


def _counts(receipt: Receipt) -> Table:
    table = Table("", "parameters", "trainable", "share", "bytes", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for when, counts in (("before", receipt.before), ("after", receipt.after)):
        table.add_row(when, *_cells(counts))
    return table


def _cells(counts: Counts) -> tuple[str, ...]:
    share = f"{counts.trainable_share:.4%}"
    return f"{counts.parameters:,}", f"{counts.trainable:,}", share, f"{counts.bytes:,}"


def _footer(receipt: Receipt) -> str:
    return (
        f"{len(receipt.tensors)} tensor groups · {receipt.seconds:.2f} s · largest change "
        f"{receipt.largest_change_bytes / 2**20:.1f} MiB · peak memory {receipt.peak_rss_bytes / 2**20:.0f} MiB"
    )
