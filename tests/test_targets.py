"""Targets match what they say, and only that; a malformed one says what is wrong with it."""

from __future__ import annotations

import fnmatch
import pickle
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewire.errors import PlanError
from rewire.targets import STRUCTURAL, Target

# ---------------------------------------------------------------- what matches

PATHS = [
    "",
    "model",
    "model.layers",
    "model.layers.0",
    "model.layers.1.attn.q_proj",
    "model.layers.2.attn.k_proj",
    "model.layers.10.attn.q_proj",
    "model.layers.10.mlp",
    "model.layer1",
    "model.layer10",
    "lm_head",
]

MATCHES = {
    "": [""],
    "**": PATHS,
    "*": ["model", "lm_head"],
    "model": ["model"],
    "model.**": PATHS[1:-1],
    "**.mlp": ["model.layers.10.mlp"],
    "**.**.mlp": ["model.layers.10.mlp"],
    "**.model": ["model"],
    "model.layers.*": ["model.layers.0"],
    "model.layers.[0-9]": ["model.layers.0"],
    "model.layers.[0-2].**": ["model.layers.0", "model.layers.1.attn.q_proj", "model.layers.2.attn.k_proj"],
    "model.layers.[1-10].**.q_proj": ["model.layers.1.attn.q_proj", "model.layers.10.attn.q_proj"],
    "model.layers.[0,2,9-11].**": [
        "model.layers.0",
        "model.layers.2.attn.k_proj",
        "model.layers.10.attn.q_proj",
        "model.layers.10.mlp",
    ],
    "model.layers.[!0-2].**": ["model.layers.10.attn.q_proj", "model.layers.10.mlp"],
    "**.{q,k}_proj": [
        "model.layers.1.attn.q_proj",
        "model.layers.2.attn.k_proj",
        "model.layers.10.attn.q_proj",
    ],
    "model.{layers.0,layer1}": ["model.layers.0", "model.layer1"],
    "model.{layers.{[0-1],7},layer?}": ["model.layers", "model.layers.0", "model.layer1"],
    "model.layer{,s}": ["model.layers"],
    "model.layer[1-9]": ["model.layer1"],
    "model.layer[!s]": ["model.layer1"],
    "model.layer?": ["model.layers", "model.layer1"],
    "model.layer*": ["model.layers", "model.layer1", "model.layer10"],
    "*_*": ["lm_head"],
    "**.?_*o*": [
        "model.layers.1.attn.q_proj",
        "model.layers.2.attn.k_proj",
        "model.layers.10.attn.q_proj",
    ],
    "model.layers.*.attn": [],
    "layers.0": [],
    "Model": [],
}


@pytest.mark.parametrize("text", MATCHES)
def test_path_matches(text: str) -> None:
    target = Target.parse(text)
    assert [path for path in PATHS if target.path_matches(path)] == MATCHES[text]


def reference(glob: list[str], path: list[str]) -> bool:
    """The same for `*`, `?`, sets and `**`, by trying everything."""
    if not glob:
        return not path
    if glob[0] == "**":
        return any(reference(glob[1:], path[start:]) for start in range(len(path) + 1))
    return bool(path) and fnmatch.fnmatchcase(path[0], glob[0]) and reference(glob[1:], path[1:])


LEVELS = st.one_of(
    st.just("**"),
    st.lists(st.sampled_from(["a", "b", "ab", "*", "?", "[ab]", "[!a]", "[a-b]"]), min_size=1, max_size=4)
    .map("".join)
    .filter(lambda level: "**" not in level),
)


@given(
    st.lists(LEVELS, min_size=1, max_size=5),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=5),
)
def test_globs_match_as_fnmatch_does_level_by_level(glob: list[str], path: list[str]) -> None:
    assert Target.parse(".".join(glob)).path_matches(".".join(path)) == reference(glob, path)


@given(st.integers(0, 300), st.integers(0, 300), st.integers(0, 400))
def test_ranges_count(low: int, high: int, number: int) -> None:
    low, high = sorted((low, high))
    path = f"layers.{number}.mlp"
    assert Target.parse(f"layers.[{low}-{high}].mlp").path_matches(path) == (low <= number <= high)
    assert Target.parse(f"layers.[!{low}-{high}].mlp").path_matches(path) != (low <= number <= high)


@given(st.lists(st.lists(LEVELS, min_size=1, max_size=3).map(".".join), min_size=1, max_size=4), st.data())
def test_alternatives_match_what_any_of_them_matches(globs: list[str], data: st.DataObject) -> None:
    path = ".".join(data.draw(st.lists(st.text("ab", min_size=1, max_size=3), max_size=4)))
    together = Target.parse(f"{{{','.join(globs)}}}")
    assert together.path_matches(path) == any(Target.parse(glob).path_matches(path) for glob in globs)


@given(st.lists(st.text("abz019_-", min_size=1, max_size=5), min_size=1, max_size=5).map(".".join))
def test_a_plain_path_matches_itself_alone(path: str) -> None:
    target = Target.parse(path)
    assert target.path_matches(path)
    assert not any(map(target.path_matches, ("", f"{path}.a", f"a.{path}", f"{path}a", path.upper() + "Z")))


def test_classes() -> None:
    assert Target.parse("a").class_matches([])
    assert Target.parse("**:Linear").class_matches(["MyLinear", "Linear", "Module"])
    assert not Target.parse("**:Linear").class_matches(["LinearNorm", "Module"])
    assert Target.parse("**:*Attention").class_matches(["Sam2Attention"])
    assert Target.parse("**:{Linear,Conv[12]d}").class_matches(["Conv2d"])
    assert not Target.parse("**:{Linear,Conv[12]d}").class_matches(["Conv3d"])
    assert Target.parse("a.*:Linear").path_matches("a.b")


def test_structural() -> None:
    for name in STRUCTURAL:
        assert Target.parse(f"@{name}").structural == name
        assert Target.parse(f"@{name}").path_matches("any.where")
    narrowed = Target.parse("@attention(vision.**):Sam*")
    assert (narrowed.structural, narrowed.glob, narrowed.class_glob) == ("attention", "vision.**", "Sam*")
    assert [narrowed.path_matches(path) for path in ("vision.layers.0", "text.layers.0")] == [True, False]
    assert Target.parse("attention").structural is None


def test_targets_are_values() -> None:
    one = Target.parse("a.{b,c}:D")
    assert one == pickle.loads(pickle.dumps(one))
    assert hash(one) == hash(Target.parse("a.{b,c}:D"))
    assert one != Target.parse("a.{c,b}:D")
    assert str(one) == "a.{b,c}:D"


# ---------------------------------------------------------------- what is refused

MALFORMED = {
    ".a": "empty level",
    "a.": "empty level",
    "a..b": "empty level",
    "a b": "blank",
    "a.b\n": "blank",
    "a[": "a `]` is missing",
    "a.{b": "a `}` is missing",
    "a.{b]": "closes nothing",
    "a}": "closes nothing",
    "[]": "empty",
    "a[!]": "is empty",
    "a[b.c]": "may not stand inside",
    "layers.[5-0]": "runs backwards",
    "a[z-a]": "runs backwards",
    "layers.[0-]": "no list of numbers",
    "layers.[,]": "no list of numbers",
    "layers.[00]": "no list of numbers",
    "layers.[12]": "write `12` or `[1,2]`",
    "layers.[0-99999999]": "longer than",
    "layer[0-11]": "stands for one character",
    "a**": "must be a whole level",
    "***": "must be a whole level",
    "@atention": "did you mean `@attention`?",
    "@": "unknown `@`",
    "@attention()": "nothing between the parentheses",
    "@attention.qkv": "only `(glob)` and `:ClassName` may stand",
    "@attention(a": "a `)` is missing",
    "@attention(@mlp)": "may only begin a target",
    "a(b)": "parentheses",
    "a.@mlp": "may only begin a target",
    "a:B:C": "more than one `:`",
    "a:": "no class name",
    "a:b.C": "no class name",
    ":Linear": "write `**:Linear`",
    "{a:B,c:D}": "`:ClassName` only end it",
    "{a,b}" * 9: "more than 256 alternatives",
    "{" * 9 + "a" + "}" * 9: "nested more than",
    "a" * 2001: "longer than",
    "{" + ",".join("a.[0-4000]" for _ in range(30)) + "}": "too many alternatives and numbers",
}


@pytest.mark.parametrize("text", MALFORMED)
def test_malformed(text: str) -> None:
    with pytest.raises(PlanError) as caught:
        Target.parse(text)
    assert MALFORMED[text] in str(caught.value)
    assert "`{a,b}` (either)" in str(caught.value)  # what is allowed


@given(st.text(st.sampled_from("ab01.*?[]{}(),:@!-\\^&|~$ "), max_size=25))
def test_any_text_is_a_target_or_a_plan_error(text: str) -> None:
    try:
        target = Target.parse(text)
    except PlanError:
        return
    target.path_matches("a.b.0")
    target.class_matches(["a"])
    target.nearest(["a.b.0", "b"])


def test_no_glob_matches_for_long() -> None:
    start = time.perf_counter()
    name = "a" * 200
    assert not Target.parse("*a" * 60 + "b").path_matches(name)
    assert not Target.parse("**." + "*." * 10 + "**.a." * 20 + "b").path_matches(".".join("a" * 60))
    assert not Target.parse("**:" + "*a" * 60 + "b").class_matches([name])
    assert time.perf_counter() - start < 1


# ---------------------------------------------------------------- what was probably meant

SAM = [
    "",
    "vision_encoder",
    *(f"vision_encoder.layers.{n}{leaf}" for n in range(12) for leaf in ("", ".attn", ".attn.qkv", ".mlp.lin1")),
    "mask_decoder.transformer.layers.0.self_attn.q_proj",
    "mask_decoder.transformer.layers.1.self_attn.q_proj",
]


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("vision_encoder.layers.*.attn.qkvs", "vision_encoder.layers.0.attn.qkv"),
        ("vison_encoder.layers.*.attn.qkv", "vision_encoder.layers.0.attn.qkv"),
        ("encoder.layers.*.attn.qkv", "vision_encoder.layers.0.attn.qkv"),
        ("vision_encoder.layers.[20-23].attn", "vision_encoder.layers.0.attn"),
        ("vision_encoder.layers.30.mlp.lin1", "vision_encoder.layers.0.mlp.lin1"),
        ("**.qkw", "vision_encoder.layers.0.attn.qkv"),
        ("vision_encoder.{block,blocks}.*.mlp.lin1", "vision_encoder.layers.0.mlp.lin1"),
        ("mask_decoder.layers.*.self_attn.q_proj", "mask_decoder.transformer.layers.0.self_attn.q_proj"),
    ],
)
def test_nearest(text: str, meant: str) -> None:
    assert Target.parse(text).nearest(SAM)[0] == meant


def test_nearest_names_each_family_of_layers_once() -> None:
    found = Target.parse("vision_encoder.layers.*.attn.q").nearest(SAM, n=20)
    assert len(found) == 6
    assert set(found) <= set(SAM) - {""}
    assert Target.parse("x").nearest(SAM, n=2) == Target.parse("x").nearest(SAM)[:2]
    assert Target.parse("x").nearest([]) == []
