"""Plans for hypothesis: every kind of edit with any settings it may have."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from rewire.plan import (
    Cast,
    CastTensor,
    DropTensor,
    Edit,
    Freeze,
    FrozenMapping,
    Join,
    JoinTensor,
    Lora,
    Pack,
    Plan,
    Rename,
    RenameTensor,
    Replace,
    Resolved,
    Split,
    SplitTensor,
    Stack,
    TensorRule,
    TransposeTensor,
    Unfreeze,
    Unstack,
)

# Anything a file can hold (not half a surrogate pair), and often words that YAML may take for something else.
TEXT = st.one_of(
    st.sampled_from(["no", "on", "null", "~", "1", "1e-4", "010", "0o17", "1:30", "2024-01-01", "<<", "=", ""]),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
)
NAMES = st.sampled_from(["q", "k", "v", "qkv", "no", "on", "null", "true", "y", "_", "größe", "c_attn"])
SEGMENTS = st.one_of(NAMES, st.sampled_from(["*", "**", "0", "[0-11]", "[0,2]", "{q,k}_proj", "layer[1-3]", "?v"]))
PATHS = st.lists(SEGMENTS, min_size=1, max_size=4).map(".".join)
TARGETS = st.one_of(
    PATHS,
    PATHS.map("{}:*Attention".format),
    st.sampled_from(["@attention", "@mlp:Foo", "@encoder(a.**)", "@experts"]),
)
MANY_TARGETS = st.one_of(TARGETS, st.lists(TARGETS, min_size=1, max_size=3).map(tuple))
DTYPES = st.sampled_from(["float32", "bfloat16", "float16", "float64"])
LAYOUTS = st.sampled_from(["stacked", "per_head", "grouped"])
COUNTS = st.one_of(st.none(), st.integers(1, 2**40))
NUMBERS = st.one_of(st.integers(-(2**63) + 1, 2**63 - 1), st.floats(allow_nan=False, allow_infinity=False))
JSON: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=5,
)
OPTIONS = st.dictionaries(st.sampled_from(["r", "lora_alpha", "init_lora_weights", "rank_pattern"]), JSON)


def distinct(items: st.SearchStrategy[str]) -> st.SearchStrategy[tuple[str, ...]]:
    return st.lists(items, min_size=2, max_size=4, unique=True).map(tuple)


@st.composite
def split_settings(draw: st.DrawFn, names: st.SearchStrategy[str]) -> dict[str, Any]:
    """Parts, layout, sizes and groups that agree with each other."""
    into, layout = draw(distinct(names)), draw(LAYOUTS)
    groups = None if layout == "stacked" else draw(st.one_of(st.none(), st.integers(1, 64)))
    sizes = draw(st.none() | st.tuples(*[st.integers(1, 999).map(lambda n: n * (groups or 1)) for _ in into]))
    return {"into": into, "layout": layout, "sizes": sizes, "groups": groups}


@st.composite
def split_tensors(draw: st.DrawFn) -> SplitTensor:
    star = draw(st.sampled_from(["", ".*"]))
    settings = draw(split_settings(NAMES.map(lambda name: name + star)))
    return SplitTensor("qkv" + star, **settings, dim=draw(st.integers(-2, 2)))


@st.composite
def join_tensors(draw: st.DrawFn) -> JoinTensor:
    settings = draw(split_settings(NAMES))
    return JoinTensor(settings.pop("into"), "all", **settings)


RULES: st.SearchStrategy[TensorRule] = st.one_of(
    split_tensors(),
    join_tensors(),
    st.builds(RenameTensor, NAMES, NAMES),
    st.builds(TransposeTensor, NAMES, st.none() | NAMES),
    st.builds(DropTensor, NAMES),
    st.builds(CastTensor, NAMES, DTYPES),
)
SPLITS = st.builds(
    lambda target, settings, optional: Split(target, **settings, optional=optional),
    TARGETS,
    split_settings(NAMES),
    st.booleans(),
)
LORAS = st.builds(
    lambda target, adapter, optional, options: Lora(target, adapter, optional=optional, **options),
    MANY_TARGETS,
    NAMES,
    st.booleans(),
    OPTIONS,
)
EDITS: st.SearchStrategy[Edit] = st.one_of(
    SPLITS,
    st.builds(Join, TARGETS, distinct(NAMES), st.none() | NAMES, optional=st.booleans()),
    st.builds(Unstack, TARGETS, st.booleans(), optional=st.booleans()),
    st.builds(Stack, TARGETS, optional=st.booleans()),
    st.builds(Replace, TARGETS, st.sampled_from(["a.b:C", "a:B.C", TransposeTensor]), st.lists(RULES, max_size=3)),
    LORAS,
    st.builds(Freeze, MANY_TARGETS, optional=st.booleans()),
    st.builds(Unfreeze, MANY_TARGETS, optional=st.booleans()),
    st.builds(Cast, MANY_TARGETS, DTYPES, st.booleans()),
    st.builds(Rename, TARGETS, st.one_of(NAMES, st.sampled_from(["0", "007"]))),
    st.builds(
        Pack,
        TARGETS,
        st.sampled_from([None, "bfloat16", "int8"]),
        st.sampled_from(["zeros", "original"]),
        st.booleans(),
        optional=st.booleans(),
    ),
)
STEPS = st.sampled_from(
    [
        {"step": "rename", "source": "h.{0}.a", "target": "h.{0}.b", "each": ["0..3,7"]},
        {"step": "split", "whole": "w", "parts": ["w.{0..2}"], "sizes": [1, 2, 3], "dim": 1},
        {"step": "drop", "source": "{{x}}"},
    ]
)
RESOLVED = st.builds(
    lambda model, plan, reading, steps, config: Resolved(model, plan, tuple(reading), tuple(steps), config),
    st.none() | TEXT,
    st.none() | st.sampled_from(["0" * 64, "af" * 32]),
    st.lists(STEPS, max_size=2),
    st.lists(STEPS, max_size=2),
    st.dictionaries(TEXT, JSON, max_size=2).map(FrozenMapping),
)
PLANS = st.builds(Plan, st.lists(EDITS, max_size=4), st.none() | TEXT, st.none() | TEXT, st.none() | RESOLVED)
