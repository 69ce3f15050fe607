"""Records with patterns stand for exactly the steps they were made from, in an order that works, and for no flood."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewire.errors import RuleError
from rewire.plan.text import MAX_BYTES, to_yaml
from rewire.step_patterns import MAX_NAMES, boxes, compress, count_names, expand
from rewire.tensor_rules import (
    Cast,
    Drop,
    JoinRows,
    KeepRows,
    PermuteRows,
    Rename,
    Rule,
    SplitRows,
    Stack,
    Step,
    Transpose,
    Unstack,
    invert,
    kept,
    run,
    visible,
)

# Names with numbers that vary, numbers that only look like some, braces, and what YAML or `format` may stumble over.
PIECES = st.sampled_from(
    ["layers", "0", "1", "2", "10", "007", "w", "{", "}", "{0}", "{1..3}", "{{", "größe", "%s", "4x", "", "!r:x"]
)
NAMES = st.lists(PIECES, min_size=1, max_size=4).map(".".join).filter(bool)


@st.composite
def rules(draw: st.DrawFn) -> tuple[Rule, dict[str, np.ndarray[Any, Any]]]:
    """A rule that fits the tensors beside it; names are used again once they are free."""
    names = draw(st.lists(NAMES, min_size=1, max_size=6, unique=True))
    arrays = {name: np.arange(24.0, dtype=np.float32).reshape(4, 6) + 100 * number for number, name in enumerate(names)}
    tensors, steps = dict(arrays), list[Step]()
    for _ in range(draw(st.integers(0, 8))):
        step = draw(_steps(tensors))
        if set(step.outputs) & (set(tensors) - set(step.inputs)) or kept(step.inputs[0]) in tensors:
            continue
        tensors = run((step,), tensors, np)
        steps.append(step)
    return tuple(steps), arrays


@st.composite
def _steps(draw: st.DrawFn, tensors: dict[str, np.ndarray[Any, Any]]) -> Step:
    name = draw(st.sampled_from([name for name in tensors if not name.startswith("kept:")] or ["nothing"]))
    shape: tuple[int, ...] = tensors[name].shape if name in tensors else ()
    new, other, third = draw(st.lists(NAMES, min_size=3, max_size=3, unique=True))
    choices: list[Step] = [Rename(name, new), Cast(name, new, "float64", "float32")]
    if len(shape) > 1:
        choices += [Transpose(name, new), Unstack(name, tuple(f"{new}.{n}" for n in range(shape[0])))]
    if shape and shape[0] > 2:
        choices += [
            SplitRows(name, (new, other, third), (1, 1, shape[0] - 2)),
            PermuteRows(name, new, (1, shape[0]), (1, 0)),
            KeepRows(name, new, (1, 0), shape[0]),
        ]
    alike = [other for other in tensors if tensors[other].shape == shape and other != name and ":" not in other]
    if alike and shape:
        choices += [Stack(new, (name, alike[0])), JoinRows(new, (name, alike[0]), (shape[0], shape[0]))]
    return draw(st.sampled_from(choices))


@given(rules())
def test_expanded_records_do_what_the_rule_did(case: tuple[Rule, dict[str, np.ndarray[Any, Any]]]) -> None:
    rule, tensors = case
    again = expand(compress(rule))
    assert Counter(again) == Counter(rule)
    before, after = run(rule, tensors, np), run(again, tensors, np)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    back = visible(run(invert(again), after, np))
    assert all(np.array_equal(back[name], tensors[name]) for name in tensors)


@given(st.sets(st.tuples(*[st.integers(0, 3)] * 3), max_size=30))
def test_boxes_cover_every_row_once(rows: set[tuple[int, ...]]) -> None:
    covered = Counter(row for box in boxes(sorted(rows)) for row in itertools.product(*box))
    assert covered == Counter(rows)


def test_layers_and_experts_become_one_record_each() -> None:
    rule = tuple(
        Stack(f"layers.{layer}.wi", tuple(f"layers.{layer}.experts.{expert}.wi.weight" for expert in range(64)))
        for layer in (0, 2, 3, 4)
    )
    assert compress(rule) == [
        {
            "step": "stack",
            "whole": "layers.{0}.wi",
            "parts": ["layers.{0}.experts.{0..63}.wi.weight"],
            "each": ["0,2..4"],
        }
    ]


def test_numbers_that_do_not_vary_together_are_listed_apart() -> None:
    rule = tuple(
        Rename(f"{block}.{layer}.a", f"{block}.{layer}.b")
        for block, layers in ((0, 2), (1, 3))
        for layer in range(layers)
    )
    assert [record["each"] for record in compress(rule)] == [["0..1"], ["0..2"]]
    assert Counter(expand(compress(rule))) == Counter(rule)


def test_a_name_is_given_anew_only_after_it_was_taken() -> None:
    rule = tuple(
        step
        for layer in range(3)
        for step in (Rename(f"{layer}.norm1", f"{layer}.norm2"), Rename(f"{layer}.norm0", f"{layer}.norm1"))
    )
    assert [record["source"] for record in compress(rule)] == ["{0}.norm1", "{0}.norm0"]
    assert run(expand(compress(rule)), {f"{layer}.norm{n}": n for layer in range(3) for n in (0, 1)}, np) == {
        f"{layer}.norm{n + 1}": n for layer in range(3) for n in (0, 1)
    }


def test_the_experts_of_deepseek_v3_fit_a_plan_file() -> None:
    layers, experts, parts = range(3, 61), range(256), ("gate_proj", "up_proj", "down_proj")
    rule = tuple(
        Unstack(
            f"model.layers.{layer}.mlp.experts.{part}",
            tuple(f"model.layers.{layer}.mlp.experts.{n}.{part}.weight" for n in experts),
        )
        for layer in layers
        for part in parts
    )
    records = compress(rule)
    assert len(records) == 3
    assert len(to_yaml({"steps": records})) < 1000 < MAX_BYTES
    assert Counter(expand(records)) == Counter(rule)


def test_a_hundred_thousand_names_are_quick() -> None:
    records = [{"step": "rename", "source": "h.{0}.a.{1}", "target": "h.{0}.b.{1}", "each": ["0..99", "0..499"]}]
    start = time.process_time()
    rule = expand(records)
    assert time.process_time() - start < 0.5
    assert (len(rule), rule[-1]) == (50_000, Rename("h.99.a.499", "h.99.b.499"))


# ---------------------------------------------------------------- what is written by hand, or by an enemy


@pytest.mark.parametrize(
    "record",
    [
        {"step": "drop", "source": "{0}", "each": ["0..999999999"]},
        {"step": "drop", "source": "{0}{1}{2}", "each": ["0..999", "0..999", "0..999"]},
        {"step": "unstack", "whole": "w", "parts": ["{0..999999999}"]},
        {"step": "unstack", "whole": "w", "parts": ["{0..9999}.{0..9999}.{0..9999}.{0..9999}"]},
        {"step": "unstack", "whole": "{0}", "parts": ["{0}.{0..9999}"], "each": ["0..9999"]},
    ],
)
def test_floods_are_counted_not_made(record: dict[str, Any]) -> None:
    start = time.process_time()
    for attempt in (lambda: expand([record]), lambda: count_names(record)):
        with pytest.raises(RuleError, match=f"more than the {MAX_NAMES:,} that are allowed"):
            attempt()
    assert time.process_time() - start < 0.1


def test_a_flood_of_many_records() -> None:
    record = {"step": "drop", "source": "{0}", "each": ["0..999999"]}
    assert count_names(record) == 1_000_000
    with pytest.raises(RuleError, match="3,000,000 names"):
        expand([record] * 3)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({}, "no step None; known steps: rename"),
        ({"step": ["rename"]}, "no step"),
        ({"step": "rename", "source": "a"}, "rename: missing key 'target'"),
        (
            {"step": "rename", "source": "a", "target": "b", "dim": 1},
            "unknown key 'dim' (allowed: source, target, each)",
        ),
        ({"step": "rename", "source": 1, "target": "b"}, "source must be text, but is 1"),
        ({"step": "rename", "source": "", "target": "b"}, "source must be text"),
        ({"step": "rename", "source": "kept:a", "target": "b"}, "begin with kept: are for what steps put aside"),
        ({"step": "rename", "source": "a{", "target": "b"}, "a single `{`"),
        ({"step": "rename", "source": "a}", "target": "b"}, "a single `}`"),
        ({"step": "rename", "source": "{x}", "target": "b"}, "'x' is no list of numbers such as 0,2,4..6"),
        ({"step": "rename", "source": "{0..2}", "target": "b"}, "source takes one name"),
        ({"step": "rename", "source": "{0}", "target": "b"}, "{0} stands in the names, and `each` lists numbers for 0"),
        ({"step": "rename", "source": "a", "target": "b", "each": ["0..1"]}, "{0} stands in no name"),
        ({"step": "rename", "source": "{0}", "target": "b", "each": ["3..1"]}, "the range 3..1 runs backwards"),
        ({"step": "rename", "source": "{0}", "target": "b", "each": ["01"]}, "'01' is no list of numbers"),
        ({"step": "rename", "source": "{0}", "target": "b", "each": "0..1"}, "each must be a list"),
        ({"step": "split", "whole": "w", "parts": ["a", "a"], "sizes": [1, 1]}, "parts lists a name twice"),
        ({"step": "split", "whole": "w", "parts": ["a", "b"], "sizes": [1]}, "2 parts but 1 sizes"),
        ({"step": "split", "whole": "w", "parts": ["a"], "sizes": [True]}, "sizes must be a whole number of 0 or more"),
        ({"step": "split", "whole": "w", "parts": ["a"], "sizes": [4], "groups": 0}, "do not divide by 0 groups"),
        ({"step": "split", "whole": "w", "parts": ["a"], "sizes": [4], "dim": 99}, "no tensor has 16 dimensions"),
        ({"step": "split", "whole": "w", "parts": ["a"], "sizes": [4], "dim": -1}, "dim must be a whole number of 0"),
        (
            {"step": "cast", "source": "a", "target": "a", "dtype": "load", "from_dtype": "float32"},
            "dtype must be a type",
        ),
        (
            {"step": "permute", "source": "a", "target": "a", "grid": [2], "order": [1]},
            "is not an order of 1 dimensions",
        ),
        ({"step": "keep_rows", "source": "a", "target": "a", "rows": [5], "total": 2}, "rows must be distinct"),
    ],
)
def test_what_is_wrong_with_a_record_is_said(record: dict[str, Any], said: str) -> None:
    for attempt in (lambda: expand([record]), lambda: count_names(record)):
        with pytest.raises(RuleError) as failure:
            attempt()
        assert said in str(failure.value)


JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5) | NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
KEYS = st.sampled_from(
    ["step", "source", "target", "whole", "parts", "sizes", "groups", "dim", "each", "rows", "grid", "order", "total"]
)
KINDS = st.sampled_from(["rename", "split", "stack", "permute", "keep_rows", "cast", "drop", "restore"])


@given(st.dictionaries(KEYS, JSON, max_size=6), KINDS)
def test_any_data_is_a_step_or_a_clear_error(record: dict[str, Any], kind: str) -> None:
    try:
        steps = expand([{**record, "step": kind}])
    except RuleError:
        return
    assert {step.kind for step in steps} <= {kind}


def test_a_drop_and_its_inverse_stay_in_order() -> None:
    rule = (Drop("a"), Rename("b", "a"))
    assert expand(compress(rule)) == rule
    assert expand(compress(invert(rule))) == invert(rule)
