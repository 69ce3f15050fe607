"""Whether the parts of a split are what they are called.

A split that takes per-head rows for stacked ones and puts them together again the same way changes no output
and no gradient: only the names are wrong, and an adapter on `q` would train rows of keys. So the untouched
model is asked what each row does, by trying (see `rewire.probe`), without looking at the edit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import chain

from torch import nn

from rewire.probe import Probed, probe_rows
from rewire.proof.pair import Pair
from rewire.proof.report import Check
from rewire.tensor_rules import Rule, SplitRows

_ROLES = {"q": "q", "k": "k", "v": "v", "g": "gate", "u": "up"}
"""By the first letter of a part's name, in all conventions that models use."""


def meaning_check(pair: Pair) -> Check | None:
    """Compares the names of the parts of every split with what their rows do; None if nothing was split.

    Layers alike are looked at once. `value` is the share of rows that are not what they are called.
    """
    findings = [_finding(pair.before, step) for step in _splits(pair)]
    if not findings:
        return None
    wrong = [(share, text) for share, text in findings if share]
    unknown = [text for share, text in findings if share is None]
    if wrong:
        return Check("names of parts", False, max(share for share, _ in wrong), 0.0, "; ".join(t for _, t in wrong))
    if len(unknown) == len(findings):
        return Check("names of parts", True, math.inf, math.inf, f"not checked: {unknown[0]}")
    texts = [f"{len(findings) - len(unknown)} of {len(findings)} kinds of split: every row is what it is called"]
    return Check("names of parts", True, 0.0, 0.0, "; ".join([*texts, *unknown]))


def _splits(pair: Pair) -> Iterator[SplitRows]:
    """One split of a weight for every kind of place."""
    seen: set[tuple[object, ...]] = set()
    for step in _weights(pair.rules):
        path = step.whole.removesuffix(".weight")
        owner, _, leaf = path.rpartition(".")
        try:
            kind = type(pair.before.get_submodule(owner))
        except AttributeError:
            continue  # an earlier edit made the place
        key = (kind, leaf, roles(step), step.sizes, step.groups)
        if all(roles(step)) and key not in seen:
            seen.add(key)
            yield step


def _weights(rules: Rule) -> Iterator[SplitRows]:
    for step in rules:
        if isinstance(step, SplitRows) and step.whole.endswith(".weight") and step.dim == 0:
            yield step


def roles(step: SplitRows) -> tuple[str, ...]:
    """What the parts of a split are called; empty text for names that say nothing.

    >>> roles(SplitRows("qkv.weight", ("qkv.query.weight", "qkv.a.weight"), (2, 2)))
    ('q', '')
    """
    names = [part.removesuffix(".weight").rpartition(".")[2] for part in step.parts]
    return tuple(_ROLES.get(name[:1].lower(), "") for name in names)


def _finding(model: nn.Module, step: SplitRows) -> tuple[float | None, str]:
    """The share of rows that do not do what their part's name says (None: unknown), and a sentence."""
    path = step.whole.removesuffix(".weight")
    rows = sum(step.sizes)
    probed = probe_rows(model, path, path.rpartition(".")[0], rows)
    if not isinstance(probed, Probed):
        return None, f"{path}: {probed}"
    called = spread(roles(step), step.sizes, step.groups)
    found = spread(probed.roles, probed.sizes, probed.groups)
    wrong = sum(one != other for one, other in zip(called, found, strict=True))
    if not wrong:
        return 0.0, path
    row = next(row for row, (one, other) in enumerate(zip(called, found, strict=True)) if one != other)
    return (
        wrong / rows,
        f"{path}: {wrong} of {rows} rows, such as row {row}: called {called[row]}, acts as {found[row]}",
    )


def spread(names: Sequence[str], sizes: Sequence[int], groups: int) -> tuple[str, ...]:
    """The role of every row.

    >>> spread(("q", "k"), (4, 2), 2)
    ('q', 'q', 'k', 'q', 'q', 'k')
    """
    group = chain.from_iterable([name] * (size // groups) for name, size in zip(names, sizes, strict=True))
    return tuple(group) * groups
