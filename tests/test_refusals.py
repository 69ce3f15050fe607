"""Bad input: refused with a reason, all of it at once, and nothing changed."""

from __future__ import annotations

import signal
import threading
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

import rewire
from rewire.errors import ConsentError, NoMatchError, RefusedError, ResolveError, RevertError
from rewire.plan import (
    Cast,
    DropTensor,
    Edit,
    Freeze,
    Join,
    Lora,
    Plan,
    Rename,
    Replace,
    Split,
    SplitTensor,
    Stack,
    Unstack,
)
from rewire.surgery import Swap
from tiny import ids, output, same, snapshot, tiny, tree

PHI = "layers.*.self_attn.qkv_proj"


def refused(model: nn.Module, plan: Plan | Edit, error: type[Exception] = RefusedError, **kwargs: Any) -> str:
    """The message with which `plan` is refused; the model must be untouched."""
    before, modules = snapshot(model), tree(model)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with pytest.raises(error) as caught:
        rewire.apply_(model, plan, **kwargs)
    assert same(snapshot(model), before)
    assert tree(model) == modules
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    return str(caught.value)


def test_no_match_names_the_nearest_paths() -> None:
    message = refused(tiny("phi3"), Split("layers.*.self_atn.qkv_proj"), NoMatchError)
    assert "edits[0] (split)" in message
    assert "self_attn.qkv_proj" in message


def test_a_typo_in_one_of_several_targets_is_an_error() -> None:
    assert "'vv'" in refused(tiny("llama"), Lora(("q_proj", "vv"), r=2), NoMatchError)


def test_every_refusal_is_listed() -> None:
    plan = Plan([Join("layers.*.self_attn", parts=("q_proj", "kproj")), Split("layers.*.mlp.up_proj")])
    message = refused(tiny("llama"), plan)
    assert "layers.*.self_attn (2 of them): has no child kproj" in message
    assert "layers.*.mlp.up_proj (2 of them): ambiguous layout" in message
    assert "4 places" in message


def test_a_later_refusal_undoes_nothing_because_nothing_was_done() -> None:
    refused(tiny("phi3"), Plan([Split(PHI), Split("layers.*.mlp.down_proj")]))


def test_optional_edits_may_miss_and_be_refused() -> None:
    model = tiny("phi3")
    receipt = rewire.apply_(
        model,
        Plan([Split("nowhere.*", optional=True), Split("layers.*.mlp.down_proj", optional=True), Split(PHI)]),
    )
    assert [(d.edit, d.outcome) for d in receipt.decisions] == [
        (0, "unmatched"),
        (1, "refused"),
        (1, "refused"),
        (2, "changed"),
        (2, "changed"),
    ]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (Split(PHI, into=("a", "b"), layout="stacked", sizes=(30, 30)), "64 is not 30 + 30"),
        (Split(PHI, into=tuple("abcde"), layout="stacked"), "5"),
        (Split("layers.0.input_layernorm"), "Phi3RMSNorm"),
        (Split("layers.0"), "Phi3DecoderLayer"),
        (Join("layers", parts=("0", "1"), name="x"), "ModuleList"),
        (Join("layers.0.mlp", parts=("gate_up_proj", "down_proj")), "inputs of different size"),
        (Join("layers.0.self_attn", parts=("qkv_proj", "o_proj"), name="config"), "has an attribute 'config'"),
        (Unstack("layers.0.mlp"), "Phi3MLP holds no stacked experts"),
        (Stack("layers.0.mlp"), "no list or dict of experts"),
        (Stack("layers.0.mlp.down_proj"), "no list or dict of experts"),
        (Rename("layers.0", to="first"), "ModuleList"),
        (Rename("layers.0.mlp", to="self_attn"), "exists already"),
        (Freeze("layers.0.self_attn.nothing", optional=False), ""),
        (Lora("norm", r=2), "peft refuses"),
        (Lora("o_proj", r=2, task_type="mask-generation"), "Invalid task type"),
        (Cast("layers.0.mlp.activation_fn", dtype="bfloat16"), "no floating-point tensors"),
    ],
)
def test_refusals_say_what_was_found(edit: Edit, message: str) -> None:
    assert message in refused(tiny("phi3"), edit, ResolveError)


def test_an_ambiguous_layout_must_be_stated() -> None:
    class Unknown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24)

    model = nn.ModuleDict({"attn": Unknown()})
    message = refused(model, Split("attn.qkv"))
    assert "ambiguous" in message
    assert "stacked | per_head" in message
    rewire.apply_(model, Split("attn.qkv", into=("q", "k", "v"), layout="stacked"))


def test_the_same_target_twice() -> None:
    message = refused(tiny("phi3"), Plan([Split(PHI), Split(PHI)]))
    assert "edits[0] (split) of this plan changes it already" in message


def test_adapted_and_quantised_layers_are_left_alone() -> None:
    adapted = get_peft_model(tiny("phi3"), LoraConfig(target_modules=["qkv_proj"], r=2))
    assert "already adapted" in refused(adapted, Split("**.self_attn.qkv_proj"))
    assert "already adapted" in refused(adapted, Lora("qkv_proj", r=2))

    class Linear4bit(nn.Linear):
        """What a quantiser puts in place of a linear: the weight is packed bytes."""

    model = tiny("phi3")
    packed = Linear4bit(32, 64, bias=False)
    packed.weight = nn.Parameter(torch.zeros(64 * 16, 1, dtype=torch.uint8), requires_grad=False)
    model.layers[0].self_attn.qkv_proj = packed
    assert "quantised" in refused(model, Split("layers.0.self_attn.qkv_proj", layout="stacked"))


def test_ties_are_not_broken_silently() -> None:
    model = tiny("gpt2", head=True)
    assert model.lm_head.weight is model.transformer.wte.weight
    message = refused(model, Split("lm_head", into=("a", "b"), layout="stacked"))
    assert "tied to" in message
    assert "transformer.wte.weight" in message
    assert "tied to" in refused(model, Cast("lm_head", dtype="bfloat16"))
    rewire.apply_(model, Cast("{lm_head,transformer.wte}", dtype="bfloat16"))
    assert model.lm_head.weight is model.transformer.wte.weight


def test_parts_must_be_trained_alike() -> None:
    model = tiny("llama")
    model.layers[0].self_attn.k_proj.requires_grad_(False)
    assert "frozen" in refused(model, Join("layers.*.self_attn", parts=("q_proj", "k_proj")))


def test_a_model_without_weights_is_for_load() -> None:
    with torch.device("meta"):
        model = type(tiny("phi3"))(tiny("phi3").config)
    with pytest.raises(ResolveError, match=r"rewire\.load"):
        rewire.apply_(model, Split(PHI))


def test_a_compiled_model_is_refused() -> None:
    with pytest.raises(ResolveError, match="compiled"):
        rewire.apply_(torch.compile(tiny("phi3")), Split("**.qkv_proj"))


class Two(nn.Module):
    """Takes the place of a linear, in two halves."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 16, bias=False), nn.Linear(32, 16, bias=False)

    @classmethod
    def from_module(cls, old: nn.Module) -> Two:
        return cls()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.a(x), self.b(x)], -1)


O_PROJ = "layers.*.self_attn.o_proj"


def test_weights_that_no_rule_fills_are_an_error() -> None:
    assert "would stay random: a.weight, b.weight" in refused(tiny("phi3"), Replace(O_PROJ, with_=Two))


def test_weights_that_no_rule_takes_are_an_error() -> None:
    rules = (SplitTensor("weight", into=("a.weight", "b.weight")),)
    model = tiny("bert")
    message = refused(model, Replace("encoder.layer.*.attention.output.dense", with_=Two, tensors=rules))
    assert "would be lost: bias" in message
    receipt = rewire.apply_(
        model,
        Replace("encoder.layer.*.attention.output.dense", with_=Two, tensors=(*rules, DropTensor("bias"))),
    )
    assert receipt.count("changed") == 2
    before = snapshot(tiny("bert"))
    rewire.revert_(model)
    assert same(snapshot(model), before)  # what was dropped was put aside


def test_a_rule_that_gives_the_wrong_shape() -> None:
    rules = (SplitTensor("weight", into=("a.weight", "b.weight"), sizes=(8, 24)),)
    assert "would get shape [8, 32]" in refused(tiny("phi3"), Replace(O_PROJ, with_=Two, tensors=rules))


def test_a_rule_that_fits_no_tensor() -> None:
    rules = (SplitTensor("wait", into=("a.weight", "b.weight")),)
    assert "no tensor fits 'wait'" in refused(tiny("phi3"), Replace(O_PROJ, with_=Two, tensors=rules))


def test_code_named_by_a_plan_needs_consent() -> None:
    plan = Plan.from_yaml(f"rewire: 1\nedits:\n- replace: {{target: '{O_PROJ}', with: 'os:getcwd'}}")
    assert "allow_code" in refused(tiny("phi3"), plan, ConsentError)
    assert "not a subclass" in refused(tiny("phi3"), plan, ConsentError, allow_code=True)


class Picky(nn.Module):
    """Cannot be built from what the old module was built from."""

    def __init__(self, colour: str) -> None:
        super().__init__()


def test_a_class_that_cannot_be_built() -> None:
    assert "cannot be built" in refused(tiny("phi3"), Replace(O_PROJ, with_=Picky))
    assert "from_module" in refused(nn.ModuleDict({"a": nn.Linear(2, 2)}), Replace("a", with_=Picky))


def test_nothing_to_take_back() -> None:
    with pytest.raises(RevertError, match="no edits"):
        rewire.revert_(tiny("phi3"))


@pytest.mark.parametrize("order", ["first", "last"])
def test_what_was_replaced_since_cannot_be_taken_back(order: str) -> None:
    model = tiny("phi3")
    rewire.apply_(model, Plan([Split(PHI), Rename("layers.*.mlp.down_proj", to="down")]))
    before, modules = snapshot(model), tree(model)
    layer = model.layers[0 if order == "first" else 1]
    kept = layer.self_attn.qkv_proj.q_proj
    layer.self_attn.qkv_proj.q_proj = nn.Sequential(kept)
    with pytest.raises(RevertError, match="remove that first"):
        rewire.revert_(model)
    layer.self_attn.qkv_proj.q_proj = kept
    assert same(snapshot(model), before)
    assert tree(model) == modules
    rewire.revert_(model)


def test_a_cast_whose_originals_were_thrown_away() -> None:
    model = tiny("phi3")
    rewire.apply_(model, Plan([Cast("layers.0.mlp.**", dtype="bfloat16", keep_original=False), Split(PHI)]))
    with pytest.raises(RevertError, match="keep_original"):
        rewire.revert_(model)
    assert "q_proj" in dict(model.layers[0].self_attn.qkv_proj.named_children())


def test_a_failure_half_way_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("phi3")
    before, modules = snapshot(model), tree(model)
    carry_out, calls = Swap.__call__, []

    def failing(self: Swap, target: nn.Module) -> Any:
        calls.append(target is model)
        if sum(calls) == 2:
            raise MemoryError("no more")
        return carry_out(self, target)

    monkeypatch.setattr(Swap, "__call__", failing)
    with pytest.raises(MemoryError):
        rewire.apply_(model, Split(PHI))
    assert same(snapshot(model), before)
    assert tree(model) == modules


def test_ctrl_c_leaves_nothing_half_changed() -> None:
    model = tiny("phi3")
    before, modules, result = snapshot(model), tree(model), output(model, input_ids=ids())

    def interrupt(text: str, done: int, total: int) -> None:
        if done == 1:
            signal.raise_signal(signal.SIGINT)

    assert threading.current_thread() is threading.main_thread()
    with pytest.raises(KeyboardInterrupt):
        rewire.apply_(model, Split(PHI), progress=interrupt)
    assert same(snapshot(model), before)
    assert tree(model) == modules
    assert torch.equal(output(model, input_ids=ids()), result)


def test_save_refuses_what_is_not_a_pretrained_model() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 4)})
    rewire.apply_(model, Split("a", into=("x", "y"), layout="stacked"))
    assert not isinstance(model, PreTrainedModel)
    with pytest.raises(rewire.RewireError, match="not a PreTrainedModel"):
        rewire.save(model, "anywhere")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model_type", "edit"),
    [
        ("gpt_neox", Split("layers.*.attention.query_key_value", layout="stacked")),
        ("gpt_neox", Split("layers.*.attention.query_key_value", layout="interleaved")),
        ("gpt2", Split("h.*.attn.c_attn", into=("q", "k", "v"), layout="per_head", groups=4)),
        ("phi3", Split(PHI, into=("q", "k", "v"), layout="stacked", sizes=(40, 12, 12))),
        ("phi3", Split(PHI, into=("q", "k", "v"), layout="grouped", groups=2)),
    ],
)
def test_a_stated_layout_that_contradicts_the_known_family(model_type: str, edit: Split) -> None:
    message = refused(tiny(model_type), edit)
    assert "the plan states" in message
    assert "known family" in message


def test_a_coarser_or_finer_cut_is_no_contradiction() -> None:
    for into, sizes in ((("q", "kv"), (32, 32)), (("q0", "q1", "k", "v"), (16, 16, 16, 16))):
        model = tiny("phi3")
        rewire.apply_(model, Split(PHI, into=into, layout="stacked", sizes=sizes))
        assert [part.out_features for part in model.layers[0].self_attn.qkv_proj.children()] == list(sizes)


def test_names_that_say_their_role_stand_where_their_rows_are() -> None:
    model = tiny("codegen")
    rewire.apply_(model, Split("h.*.attn.qkv_proj", into=("q", "k", "v")))
    assert [name for name, _ in model.h[0].attn.qkv_proj.named_children()] == ["q", "v", "k"]
    model = tiny("phi3")
    rewire.apply_(model, Split("layers.*.mlp.gate_up_proj", into=("up_proj", "gate_proj"), layout="stacked"))
    assert [name for name, _ in model.layers[0].mlp.gate_up_proj.named_children()] == ["gate_proj", "up_proj"]
