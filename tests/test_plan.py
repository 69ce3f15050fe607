"""The records of a plan, and the plan itself, as Python values."""

from __future__ import annotations

import copy
import importlib.util
import pickle
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields, replace
from inspect import Parameter, signature
from typing import Any

import pytest
from hypothesis import given

import rewire.plan.lora_options as options_module
from plan_strategies import EDITS as ANY_EDIT
from plan_strategies import PLANS
from rewire.errors import PlanError
from rewire.plan import (
    EDITS,
    PROMISES,
    TENSOR_RULES,
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
    Split,
    SplitTensor,
    Stack,
    TransposeTensor,
    Unfreeze,
    Unstack,
    import_path_of,
)


def said(error: pytest.ExceptionInfo[PlanError]) -> dict[str, str]:
    """The messages by the place they speak of."""
    return {issue.where: issue.message for issue in error.value.issues}


# ---------------------------------------------------------------- records


def test_the_target_is_the_first_argument_and_lists_become_tuples() -> None:
    into: Any = ["q", "k", "v"]
    split = Split("a.*.qkv", into=into)
    assert (split.target, split.into, split.layout, split.optional) == (
        "a.*.qkv",
        ("q", "k", "v"),
        "auto",
        False,
    )
    assert split == Split("a.*.qkv", into=("q", "k", "v")) == Split(target="a.*.qkv", into=("q", "k", "v"))
    assert hash(split) == hash(Split("a.*.qkv", into=("q", "k", "v")))
    assert split != Split("a.*.qkv", into=("q", "v", "k"))
    assert repr(split) == "Split(target='a.*.qkv', into=('q', 'k', 'v'))"


def test_kinds_and_promises() -> None:
    assert {cls.kind: cls.promise for cls in EDITS} == {
        "split": "exact",
        "join": "exact",
        "unstack": "exact",
        "stack": "exact",
        "replace": "exact",
        "lora": "additive",
        "freeze": "exact",
        "unfreeze": "exact",
        "cast": "lossy",
        "rename": "exact",
        "pack": "rounding",
    }
    assert [cls.kind for cls in TENSOR_RULES] == ["split", "join", "rename", "transpose", "drop", "cast"]


@given(ANY_EDIT)
def test_edits_are_frozen_values(edit: Edit) -> None:
    again = eval(repr(edit).replace("<class 'rewire.plan.rules.TransposeTensor'>", "TransposeTensor"))  # noqa: S307
    for same in (again, copy.deepcopy(edit), pickle.loads(pickle.dumps(edit)), replace(edit)):
        assert same == edit
        assert hash(same) == hash(edit)
    with pytest.raises(FrozenInstanceError):
        edit.target = "other"  # type: ignore[misc]
    assert replace(edit, optional=not edit.optional) != edit
    assert edit.targets


WITH: dict[str, Any] = {"with": "a:B"}  # the key of a file is no argument in Python

WRONG: list[tuple[Any, str, str]] = [
    (Split, "target", "missing"),
    (lambda: Split(""), "target", "`**` stands for everything"),
    (lambda: Split("a..b"), "target", "empty level"),
    (lambda: Split(3), "target", "must be text, but is 3"),  # type: ignore[arg-type]
    (lambda: Split(("a", "b")), "target", "must be text"),  # type: ignore[arg-type]
    (lambda: Split("a\ud800"), "target", "surrogate"),
    (lambda: Split("a", layuot="auto"), "layuot", "did you mean 'layout'?"),  # type: ignore[call-arg]
    (lambda: Split("a", layout="stackd"), "layout", "did you mean 'stacked'?"),  # type: ignore[arg-type]
    (lambda: Split("a", into="qkv"), "into", 'must be a list, but is "qkv"'),  # type: ignore[arg-type]
    (lambda: Split("a", into=("q",)), "into", "at least two"),
    (lambda: Split("a", into=("q", "q")), "into", 'lists "q" more than once'),
    (lambda: Split("a", into=("q", "a.b")), "into[1]", "plain name"),
    (lambda: Split("a", into=("q", "0")), "into[1]", "plain name"),
    (lambda: Split("a", into=("q", "k"), sizes=(1, 2, 3)), "sizes", "2 parts, 3 sizes"),
    (lambda: Split("a", sizes=(1, 0)), "sizes[1]", "at least 1"),
    (lambda: Split("a", sizes=(1, True)), "sizes[1]", "whole number"),
    (lambda: Split("a", sizes=(1, 2**70)), "sizes[1]", "64 bits"),
    (lambda: Split("a", sizes=(4, 2), groups=4), "sizes", "divisible by groups=4"),
    (lambda: Split("a", sizes=(4, 2), layout="interleaved"), "sizes", "all be equal"),
    (lambda: Split("a", groups=0), "groups", "at least 1"),
    (lambda: Split("a", groups=2, layout="stacked"), "groups", "must be 1"),
    (lambda: Split("a", optional="yes"), "optional", 'true or false, but is "yes"'),  # type: ignore[arg-type]
    (lambda: Split("a", None, "auto", None, None, True), "", "takes 5 positional"),  # type: ignore[call-arg]
    (lambda: Split("a", target="b"), "target", "given twice"),  # type: ignore[misc]
    (lambda: Join("a", parts=("q",)), "parts", "at least two"),
    (lambda: Join("a", parts=("q", "k"), name="a.b"), "name", "plain name"),
    (lambda: Replace("a", with_="pkg.Class"), "with_", '"package.module:Class"'),
    (lambda: Replace("a", **WITH), "with", "did you mean 'with_'?"),
    (lambda: Replace("a", with_="a:B", tensors=(Split("a"),)), "tensors[0].split", "object of type Split"),  # type: ignore[arg-type]
    (lambda: Lora("q", target_modules=["q"]), "target_modules", "use 'target'"),
    (lambda: Lora("q", use_dorra=True), "use_dorra", "did you mean 'use_dora'?"),
    (lambda: Lora("q", options={}), "options", "unknown key 'options'"),
    (lambda: Lora("q", r=object()), "r", "plain data"),
    (lambda: Lora("q", rank_pattern={0: 4}), "rank_pattern", "keys must be text"),
    (lambda: Lora("q", lora_alpha=float("nan")), "lora_alpha", "finite"),
    (lambda: Lora("q", r=2**63), "r", "64 bits"),
    (lambda: Lora("all-linear"), "target", '"**:Linear"'),
    (lambda: Lora(()), "target", "at least one place"),
    (lambda: Lora(("q", "x{")), "target", "a `}` is missing"),
    (lambda: Lora("q", "a.b"), "adapter", "without dots"),
    (lambda: Cast("a", "int8"), "dtype", "allowed: float32, bfloat16, float16, float64"),  # type: ignore[arg-type]
    (lambda: Unstack("a.*.experts", views="yes"), "views", "true or false"),  # type: ignore[arg-type]
    (lambda: Stack(""), "target", "must not be empty"),
    (lambda: Rename("a", to="b.c"), "to", "last part of a path"),
    (lambda: Rename("a", to=0), "to", 'put it in quotes: "0"'),  # type: ignore[arg-type]
    (lambda: SplitTensor("a.*", into=("b.*", "c")), "into", "`*` in every name"),
    (lambda: RenameTensor("a", into="b.*"), "into", "`*` in every name"),
    (lambda: RenameTensor("*.*", into="b"), "source", "at most one `*`"),
    (lambda: TransposeTensor("a.*", into="b"), "into", "`*` in every name"),
    (lambda: JoinTensor(("a", "b.*"), into="c"), "into", "`*` in every name"),
    (lambda: DropTensor("a..b"), "source", "tensor's name"),
    (lambda: CastTensor("a", dtype="int8"), "dtype", "allowed"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("make", "where", "message"), WRONG)
def test_wrong_records(make: Any, where: str, message: str) -> None:
    with pytest.raises(PlanError) as caught:
        make()
    assert message in said(caught)[where]
    assert message in str(caught.value)


def test_all_problems_of_a_record_are_told_at_once() -> None:
    with pytest.raises(PlanError) as caught:
        Split("a..b", into=("q", "q"), layuot="x", groups=0)  # type: ignore[call-arg]
    assert said(caught).keys() == {"target", "into", "layuot", "groups"}
    assert "allowed: target, into, layout, sizes, groups, optional" in str(caught.value)
    with pytest.raises(PlanError) as caught:
        Lora("a..b", "a.b", rank=3, r=object())
    assert said(caught).keys() == {"target", "adapter", "rank", "r"}


# ---------------------------------------------------------------- targets of edits


def test_a_bare_name_means_any_depth_for_lora_only() -> None:
    deep = "model.layers.0.attn.qkv.q"
    lora = Lora(("q", "model.layers.*.mlp"), r=4)
    assert lora.targets[0].path_matches(deep)
    assert lora.targets[0].path_matches("q")
    assert not lora.targets[0].path_matches("model.q_proj")
    assert not lora.targets[1].path_matches("encoder.model.layers.0.mlp")
    assert lora.target == ("q", "model.layers.*.mlp")
    assert Lora("{q,v}:Linear").targets[0].path_matches(deep)
    assert Lora("{q,v}:Linear").targets[0].class_glob == "Linear"
    assert Lora("**").targets[0].text == "**"
    assert Lora("@attention").targets[0].structural == "attention"
    assert not Freeze("q").targets[0].path_matches(deep)


# ---------------------------------------------------------------- lora options


def test_lora_options_are_frozen_and_given_back_plain() -> None:
    given_options: dict[str, Any] = {"r": 8, "modules_to_save": ["head"], "rank_pattern": {"q": 4}}
    lora = Lora("q", **given_options)
    given_options["modules_to_save"].append("changed later")
    assert lora.options == {"r": 8, "modules_to_save": ["head"], "rank_pattern": {"q": 4}}
    assert lora.options["modules_to_save"] == ("head",)
    plain = lora.peft_options()
    assert plain == {"r": 8, "modules_to_save": ["head"], "rank_pattern": {"q": 4}}
    plain["modules_to_save"].append("x")
    assert lora.options["modules_to_save"] == ("head",)
    with pytest.raises(TypeError):
        lora.options["r"] = 3  # type: ignore[index]


def test_deep_options_are_frozen_in_one_pass() -> None:
    deep: Any = 1
    for _ in range(30):
        deep = {"a": deep}
    assert Lora("q", rank_pattern=deep).peft_options() == {"rank_pattern": deep}
    looped: dict[str, Any] = {}
    looped["a"] = [looped]
    with pytest.raises(PlanError, match="within itself"):
        Lora("q", rank_pattern=looped)


def test_replacing_settings_of_lora() -> None:
    lora = replace(Lora("q", r=8, lora_alpha=16), target="v", r=4)  # type: ignore[call-arg]
    assert lora == Lora("v", r=4, lora_alpha=16)


def test_options_compare_as_data() -> None:
    assert Lora("q", r=16) == Lora("q", r=16.0)
    assert Lora("q", use_dora=True) != Lora("q", use_dora=1)
    assert FrozenMapping({"a": [1]}) == {"a": (1,)}
    assert FrozenMapping({"a": 1}) != {"a": object()}
    assert FrozenMapping({"a": 1}) != 3


def test_every_field_of_peft_is_known_and_no_other() -> None:
    """The names read from peft's source are the fields that the imported class has."""
    peft = pytest.importorskip("peft", reason="peft is what the names are compared with")
    assert options_module.lora_option_names() == frozenset(field.name for field in fields(peft.LoraConfig))


def test_without_peft_any_option_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options_module, "lora_option_names", lambda: None)
    assert Lora("q", brand_new=3).options == {"brand_new": 3}
    with pytest.raises(PlanError, match="use 'target'"):
        Lora("q", target_modules="x")


def test_peft_is_looked_for_without_importing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    options_module.lora_option_names.cache_clear()
    try:
        assert options_module.lora_option_names() is None
    finally:
        monkeypatch.undo()
        options_module.lora_option_names.cache_clear()


# ---------------------------------------------------------------- replace


class Importable:
    """Stands at the top of a module."""


def test_replace_takes_a_class_or_its_path() -> None:
    edit = Replace("a", with_=TransposeTensor)
    assert edit.with_ is TransposeTensor
    assert edit.to_dict() == {"replace": {"target": "a", "with": "rewire.plan.rules:TransposeTensor"}}
    by_path = Replace("a", with_="rewire.plan.rules:TransposeTensor")
    assert edit == by_path
    assert hash(edit) == hash(by_path)
    assert edit != Replace("a", with_="rewire.plan.rules:DropTensor")
    assert Plan([edit]).hash == Plan([by_path]).hash


def test_a_plan_with_a_local_class_stays_in_python() -> None:
    class Local:
        pass

    other_local = Local

    class Local:  # type: ignore[no-redef]
        pass

    plan = Plan([Replace("a", with_=Local)])
    assert plan == Plan([Replace("a", with_=Local)])
    assert plan != Plan([Replace("a", with_=other_local)])
    assert import_path_of(Local) is None
    for use in (lambda: plan.hash, plan.to_yaml, plan.to_json, plan.to_dict):
        with pytest.raises(PlanError, match="cannot be imported by a path"):
            use()


def test_signatures_are_what_can_be_given() -> None:
    assert list(signature(Lora).parameters) == ["target", "adapter", "optional", "options"]
    assert signature(Lora).parameters["options"].kind is Parameter.VAR_KEYWORD
    assert list(signature(Split).parameters) == ["target", "into", "layout", "sizes", "groups", "optional"]


def test_what_can_be_imported_by_path(monkeypatch: pytest.MonkeyPatch) -> None:
    assert import_path_of(dict) == "builtins:dict"
    shadow = type("TransposeTensor", (), {"__module__": "rewire.plan.rules"})
    assert import_path_of(shadow) is None
    monkeypatch.setattr(Importable, "__module__", "__main__")
    assert import_path_of(Importable) is None


# ---------------------------------------------------------------- plans


def test_a_plan_is_a_frozen_list_of_edits() -> None:
    edits = [Split("a"), Freeze("b")]
    plan = Plan(edits, name="n")
    edits.append(Unfreeze("c"))
    assert len(plan) == 2
    assert list(plan) == [Split("a"), Freeze("b")] == list(plan.edits)
    assert plan == Plan((Split("a"), Freeze("b")), name="n")
    assert plan != Plan((Freeze("b"), Split("a")), name="n")
    assert hash(plan) == hash(Plan((Split("a"), Freeze("b")), name="n"))
    assert replace(plan, name="m") == Plan(plan.edits, name="m")
    with pytest.raises(FrozenInstanceError):
        plan.name = "other"  # type: ignore[misc]


def test_a_plan_takes_edits_only() -> None:
    bad: Any = [Split("a"), {"split": {"target": "a"}}, DropTensor("a"), Edit("a")]
    with pytest.raises(PlanError) as caught:
        Plan(bad)
    assert said(caught).keys() == {"edits[1]", "edits[2]", "edits[3]"}
    with pytest.raises(PlanError, match="name: must be text"):
        Plan([], name=3)  # type: ignore[arg-type]


def test_the_weakest_promise_counts() -> None:
    exact, additive = Split("a"), Lora("q")
    joined, lossy = Join("a", ("q", "k")), Cast("a", "float16")
    assert Plan([]).promise == "exact"
    assert Plan([exact, exact]).promise == "exact"
    assert Plan([exact, additive]).promise == "additive"
    assert Plan([joined, exact]).promise == "exact"
    assert Plan([joined, additive, exact]).promise == "additive"
    assert Plan([lossy, joined, additive]).promise == "lossy"
    assert PROMISES == ("exact", "additive", "rounding", "lossy")
    assert Plan([joined, Pack("@encoder")]).promise == "rounding"
    assert Plan([joined, Pack("@encoder", dtype="int8")]).promise == "lossy"


# ---------------------------------------------------------------- hash


def test_the_hash_is_of_what_is_done() -> None:
    plan = Plan([Split("a", into=("q", "k")), Lora("q", r=16, lora_alpha=32)])
    same = [
        Plan(plan.edits, name="other", description="words"),
        Plan([Split("a", into=("q", "k"), layout="auto"), Lora("q", "default", lora_alpha=32.0, r=16)]),
        Plan.from_yaml(
            "edits: [{split: {into: [q, k], target: a, optional: false}}, {lora: {r: 16, lora_alpha: 3.2e1, "
            "target: q}}]\nrewire: 1\n"
        ),
        Plan.from_json(plan.to_json()),
    ]
    assert {other.hash for other in same} == {plan.hash}
    other = [
        Plan(plan.edits[:1]),
        Plan(plan.edits[::-1]),
        Plan([Split("a", into=("k", "q")), plan.edits[1]]),
        Plan([plan.edits[0], Lora("q", r=16, lora_alpha=32.5)]),
    ]
    assert len({plan.hash, *(plan.hash for plan in other)}) == 5


def test_the_hash_stays_what_it_was() -> None:
    """Receipts hold hashes, so they may not change from one release to the next."""
    plan = Plan([Split("a.*.qkv", into=("q", "k", "v")), Lora(("q", "v"), r=16, lora_dropout=0.1)])
    assert plan.hash == "d29f61e4baaa0a0f5aac4290d1ce9a6014a57d08967dd19f92008a407e8e9464"


@given(PLANS, PLANS)
def test_equal_edits_have_equal_hashes_and_others_do_not(one: Plan, other: Plan) -> None:
    assert (one.hash == other.hash) == (one.edits == other.edits)
    assert len(one.hash) == 64


# ---------------------------------------------------------------- imports


def test_plans_need_no_heavy_import() -> None:
    code = (
        "import sys; from rewire.plan import Lora, Plan; import rewire.targets;"
        "Plan([Lora('q', r=4)]).hash;"
        "print([m for m in ('torch', 'transformers', 'peft', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
