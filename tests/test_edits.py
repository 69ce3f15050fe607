"""Every edit on tiny models: same outputs, the same tensors in every way of running it, and all the way back."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXAttention

import rewire
from rewire.plan import (
    Cast,
    Edit,
    Freeze,
    Join,
    Lora,
    Pack,
    Plan,
    Rename,
    Replace,
    Split,
    SplitTensor,
    Stack,
    Unfreeze,
    Unstack,
)
from tiny import ids, output, same, snapshot, strengthen, tiny, tree

QKV = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Case:
    """A model, a plan, and what the outputs may differ by."""

    model_type: str
    edits: tuple[Edit, ...]
    values: dict[str, Any] = field(default_factory=dict)
    tolerance: float = 0.0

    def model(self) -> PreTrainedModel:
        return tiny(self.model_type, **self.values)

    @property
    def plan(self) -> Plan:
        return Plan(self.edits)

    def inputs(self) -> dict[str, Tensor]:
        if self.model_type == "vit":
            return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
        if self.model_type == "whisper":
            features = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0))
            return {"input_features": features, "decoder_input_ids": ids()}
        if self.model_type == "switch_transformers":
            return {"input_ids": ids(), "decoder_input_ids": ids(seed=2)}
        return {"input_ids": ids()}


class SplitNeoX(GPTNeoXAttention):
    """A user's own attention: three projections, put back together per head."""

    def __init__(self, config: Any, layer_idx: int | None = None) -> None:
        super().__init__(config, layer_idx)
        del self.query_key_value
        self.heads = config.num_attention_heads
        self.q, self.k, self.v = (nn.Linear(config.hidden_size, config.hidden_size) for _ in range(3))

    @property
    def query_key_value(self) -> Callable[[Tensor], Tensor]:
        def fused(x: Tensor) -> Tensor:
            parts = [part(x).unflatten(-1, (self.heads, -1)) for part in (self.q, self.k, self.v)]
            return torch.cat(parts, dim=-1).flatten(-2)

        return fused


_NEOX = "layers.*.attention.query_key_value"
_FALCON = "h.*.self_attention.query_key_value"
CASES = {
    "split stacked": Case("phi3", (Split("layers.*.self_attn.qkv_proj"),)),
    "split gate and up": Case("phi3", (Split("layers.*.mlp.gate_up_proj"),)),
    "split per head": Case("gpt_neox", (Split(_NEOX),)),
    "split per head, told": Case("bloom", (Split("h.*.self_attention.query_key_value", layout="per_head"),)),
    "split grouped": Case(
        "falcon", (Split(_FALCON),), {"new_decoder_architecture": True, "num_kv_heads": 2, "num_attention_heads": 4}
    ),
    "split multi-query": Case("falcon", (Split(_FALCON),), {"multi_query": True}, 1e-6),
    "split falcon per head": Case("falcon", (Split(_FALCON),), {"multi_query": False, "bias": True}),
    "split transposed": Case("gpt2", (Split("h.*.attn.c_attn", into=("q", "k", "v")),)),
    "split four blocks": Case("codegen", (Split("h.*.attn.qkv_proj"),)),
    "split some layers": Case("phi3", (Split("layers.[1-1].self_attn.qkv_proj"),)),
    "join": Case("bert", (Join("encoder.layer.*.attention.self", parts=("query", "key", "value")),), tolerance=1e-6),
    "join uneven": Case("llama", (Join("layers.*.self_attn", parts=QKV),), tolerance=1e-6),
    "join gate and up": Case("llama", (Join("layers.*.mlp", parts=("gate_proj", "up_proj")),), tolerance=1e-6),
    "join key and value": Case("llama", (Join("layers.*.self_attn", parts=("k_proj", "v_proj")),), tolerance=1e-6),
    "join biased in part": Case("whisper", (Join("**:WhisperAttention", parts=QKV),), tolerance=1e-6),
    "join cross-attention": Case("bart", (Join("**:BartAttention", parts=QKV),), tolerance=1e-6),
    "join images": Case("vit", (Join("**.attention", parts=QKV),), tolerance=1e-6),
    "unstack": Case("mixtral", (Unstack("layers.*.mlp.experts"),), tolerance=1e-6),
    "unstack alternating": Case("gpt_oss", (Unstack("@experts"),), tolerance=1e-6),
    "unstack folded": Case("dbrx", (Unstack("@experts"),), tolerance=1e-6),
    "unstack as views": Case("qwen3_moe", (Unstack("@experts", views=True),), tolerance=1e-6),
    "unstack alternating as views": Case("gpt_oss", (Unstack("@experts", views=True),), tolerance=1e-6),
    "unstack with surplus": Case("longcat_flash", (Unstack("@experts", views=True),), tolerance=1e-6),
    "unstack and stack": Case("nemotron_h", (Unstack("@experts"), Stack("@experts"))),
    "unstack and stack while loading": Case("gpt_oss", (Unstack("@experts"), Stack("@experts"))),
    "stack": Case("switch_transformers", (Stack("@experts"),), tolerance=1e-6),
    "adapter on experts": Case(
        "qwen3_moe", (Unstack("@experts"), Lora(("gate_proj", "up_proj", "down_proj"), r=2)), tolerance=1e-6
    ),
    "replace": Case(
        "gpt_neox",
        (
            Replace(
                "layers.*.attention",
                with_=SplitNeoX,
                tensors=(SplitTensor("query_key_value.*", into=("q.*", "k.*", "v.*"), layout="per_head", groups=4),),
            ),
        ),
    ),
    "rename": Case("llama", (Rename("layers.*.self_attn.o_proj", to="out"),)),
    "freeze": Case("bert", (Freeze("embeddings.**"), Unfreeze("embeddings.LayerNorm"))),
    "cast": Case("bert", (Cast("**", dtype="bfloat16"),), tolerance=0.2),
    "pack": Case("bert", (Pack("@encoder"),), tolerance=1e-5),
    "pack images": Case("vit", (Pack("layers"),), tolerance=1e-5),
    "pack an encoder with a decoder": Case("bart", (Pack("@encoder"),), tolerance=1e-5),
    "join and pack": Case(
        "bert", (Join("encoder.layer.*.attention.self", parts=("query", "key", "value")), Pack("encoder")), {}, 1e-5
    ),
    "split, join and rename": Case(
        "phi3",
        (
            Split("layers.*.self_attn.qkv_proj", into=("q", "k", "v")),
            Split("layers.*.mlp.gate_up_proj"),
            Rename("layers.*.mlp.down_proj", to="down"),
        ),
    ),
    "adapter on parts": Case("gpt2", (Split("h.*.attn.c_attn", into=("q", "k", "v")), Lora(("q", "v"), r=4))),
    "adapter on a join": Case("llama", (Join("layers.*.self_attn", parts=QKV), Lora("qkv_proj", r=4)), {}, 1e-6),
    "adapter after a rename": Case(
        "llama", (Rename("layers.*.self_attn.o_proj", to="out"), Lora("out", r=4, use_dora=True)), {}, 1e-6
    ),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    return found


def difference(first: Tensor, second: Tensor) -> float:
    return float((first.double() - second.double()).abs().max() / first.double().abs().max())


def test_outputs_are_the_same_and_everything_comes_back(case: Case) -> None:
    model = case.model()
    inputs, before, tensors, modules = case.inputs(), output(model, **case.inputs()), snapshot(model), tree(model)
    flags = [parameter.requires_grad for parameter in model.parameters()]

    receipt = rewire.apply_(model, case.plan)

    assert difference(before, output(model, **inputs)) <= case.tolerance
    assert receipt.count("changed") == len(receipt.decisions) > 0
    assert rewire.receipt(model).rules == receipt.rules
    assert isinstance(model, PreTrainedModel)

    rewire.revert_(model)

    assert same(snapshot(model), tensors)
    assert tree(model) == modules
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert torch.equal(output(model, **inputs), before)
    assert "_rewire" not in model.__dict__


def test_loading_gives_the_same_tensors_as_applying(case: Case, tmp_path: Path) -> None:
    case.model().save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path)
    torch.manual_seed(1)
    rewire.apply_(model, case.plan)
    torch.manual_seed(1)
    loaded = rewire.load(tmp_path, case.plan)
    assert tree(loaded) == tree(model)
    assert same(snapshot(loaded), snapshot(model))
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in loaded.named_parameters()} == flags
    live, while_loading = rewire.receipt(model), rewire.receipt(loaded)
    assert live.decisions == while_loading.decisions
    assert live.rules == while_loading.rules
    assert (live.before, live.after) == (while_loading.before, while_loading.after)
    rewire.revert_(loaded)
    assert same(snapshot(loaded), snapshot(AutoModel.from_pretrained(tmp_path)))


@pytest.mark.parametrize("layout", ["original", "edited"])
def test_saved_and_loaded_again(case: Case, layout: str, tmp_path: Path) -> None:
    model = case.model()
    model.save_pretrained(tmp_path / "untouched")
    untouched = snapshot(AutoModel.from_pretrained(tmp_path / "untouched"))
    rewire.apply_(model, case.plan)
    before = output(model, **case.inputs())
    rewire.save(model, tmp_path / layout, layout)

    again = rewire.load(tmp_path / layout, allow_code=True)

    # Tensors of a file need not lie at addresses that the same product wants.
    assert difference(before, output(again, **case.inputs())) <= min(case.tolerance, 1e-6)
    assert tree(again) == tree(model)
    if layout == "original" and case.tolerance < 0.1:
        plain = AutoModel.from_pretrained(tmp_path / layout)
        assert same(snapshot(plain), untouched)
    rewire.revert_(again)
    assert [name for name, _ in tree(again)] == [name for name, _ in tree(case.model())]


def test_save_pretrained_writes_the_original_names(case: Case, tmp_path: Path) -> None:
    """`Trainer` saves that way: a checkpoint must not come back with random weights."""
    model = case.model()
    before = snapshot(model)
    rewire.apply_(model, case.plan)
    if any(isinstance(edit, Lora) for edit in case.edits):
        pytest.skip("with an adapter save_pretrained writes the adapter alone, by Transformers' own rule")
    model.save_pretrained(tmp_path)
    assert {
        name: t.float() for name, t in snapshot(AutoModel.from_pretrained(tmp_path)).items()
    }.keys() == before.keys()
    if case.tolerance < 0.1:
        assert same(snapshot(AutoModel.from_pretrained(tmp_path)), before)


def test_a_copy_is_edited_by_itself(case: Case) -> None:
    model = case.model()
    rewire.apply_(model, case.plan)
    before = output(model, **case.inputs())
    twin = copy.deepcopy(model)
    rewire.revert_(model)
    assert torch.equal(output(twin, **case.inputs()), before)
    rewire.revert_(twin)
    assert same(snapshot(twin), snapshot(model))


def test_a_pickled_model_is_edited_too(case: Case) -> None:
    """What a worker process gets."""
    model = case.model()
    tensors = snapshot(model)
    rewire.apply_(model, case.plan)
    twin = pickle.loads(pickle.dumps(model))
    assert same(snapshot(twin), snapshot(model))
    assert torch.equal(output(twin, **case.inputs()), output(model, **case.inputs()))
    rewire.revert_(twin)
    assert same(snapshot(twin), tensors)


def test_training_moves_the_same_way(case: Case) -> None:
    """One step of gradient descent, then back: the original model's step, up to rounding."""
    if case.tolerance >= 0.1 or any(isinstance(edit, Lora | Freeze) for edit in case.edits):
        pytest.skip("this plan changes what is trained")
    results = []
    for edited in (False, True):
        model = case.model()
        if edited:
            rewire.apply_(model, case.plan)
        loss = model(**case.inputs())[0].square().mean()
        loss.backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        if edited:
            rewire.revert_(model)
        results.append(snapshot(model))
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, rtol=1e-4, atol=1e-5)


def test_gradients_follow_their_tensors() -> None:
    model = tiny("phi3")
    model(input_ids=ids())[0].square().mean().backward()
    fused = {name: p.grad.clone() for name, p in model.named_parameters() if "qkv_proj" in name}
    rewire.apply_(model, Split("layers.*.self_attn.qkv_proj", into=("q", "k", "v")))
    for name, gradient in fused.items():
        path = name.removesuffix(".weight")
        parts = [model.get_parameter(f"{path}.{part}.weight").grad for part in "qkv"]
        assert torch.equal(torch.cat(parts), gradient)


def test_no_more_than_one_layer_is_in_memory_twice() -> None:
    model = tiny("phi3", hidden_size=64)
    receipt = rewire.apply_(model, Split("layers.*.self_attn.qkv_proj"))
    layer = sum(p.nbytes for p in model.layers[0].self_attn.qkv_proj.parameters())
    assert receipt.largest_change_bytes == layer
    # Nothing of the fused weights is held on to: every part has a storage of its own, no original has any.
    for part in model.layers[0].self_attn.qkv_proj.children():
        assert part.weight.untyped_storage().nbytes() == part.weight.nbytes
    for one in model.__dict__["_rewire"].done:
        for module in one.undo.originals.values():
            assert all(p.is_meta for p in module.parameters())


def test_plans_can_be_applied_one_after_the_other() -> None:
    model = tiny("phi3")
    before, tensors = output(model, input_ids=ids()), snapshot(model)
    rewire.apply_(model, Split("layers.*.self_attn.qkv_proj", into=("q", "k", "v")))
    rewire.apply_(model, Split("layers.*.mlp.gate_up_proj"))
    receipt = rewire.receipt(model)
    assert [decision.edit for decision in receipt.decisions] == [0, 0, 1, 1]
    assert len(receipt.plan["edits"]) == 2
    assert torch.equal(output(model, input_ids=ids()), before)
    rewire.revert_(model)
    assert same(snapshot(model), tensors)


def test_every_part_has_its_own_flag_and_is_an_ordinary_linear() -> None:
    model = tiny("gpt2")
    rewire.apply_(model, Plan([Split("h.*.attn.c_attn", into=("q", "k", "v")), Freeze("**.k")]))
    fused = model.h[0].attn.c_attn
    assert type(fused.q) is nn.Linear
    assert [part.weight.requires_grad for part in (fused.q, fused.k, fused.v)] == [True, False, True]


def test_default_names_follow_the_models_habit() -> None:
    phi, neox = tiny("phi3"), tiny("gpt_neox")
    rewire.apply_(phi, Split("layers.*.self_attn.qkv_proj"))
    rewire.apply_(neox, Split(_NEOX))
    assert [name for name, _ in phi.layers[0].self_attn.qkv_proj.named_children()] == list(QKV)
    assert [name for name, _ in neox.layers[0].attention.query_key_value.named_children()] == ["q", "k", "v"]


def test_tensors_trained_since_come_back_trained() -> None:
    model = tiny("phi3")
    rewire.apply_(model, Split("layers.*.self_attn.qkv_proj", into=("q", "k", "v")))
    with torch.no_grad():
        model.layers[0].self_attn.qkv_proj.k.weight.fill_(7)
    rewire.revert_(model)
    assert (model.layers[0].self_attn.qkv_proj.weight[32:48] == 7).all()


def test_a_module_of_the_users_own_may_make_itself() -> None:
    class Doubled(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(size, size))
            self.bias = nn.Parameter(torch.empty(size))

        @classmethod
        def from_module(cls, old: nn.Linear) -> Doubled:
            return cls(old.out_features)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight, self.bias)

    model = tiny("bert")
    before, tensors = output(model, input_ids=ids()), snapshot(model)
    rewire.apply_(model, Replace("encoder.layer.*.attention.output.dense", with_=Doubled))
    assert isinstance(model.encoder.layer[0].attention.output.dense, Doubled)
    assert torch.equal(output(model, input_ids=ids()), before)
    rewire.revert_(model)
    assert same(snapshot(model), tensors)


@pytest.mark.parametrize(
    ("model_type", "edit", "path"),
    [
        ("phi3", Split("layers.*.self_attn.qkv_proj"), "layers.0.self_attn.qkv_proj"),
        ("llama", Join("layers.*.self_attn", parts=QKV), "layers.0.self_attn.k_proj"),
    ],
)
def test_hooks_stay_where_they_were(model_type: str, edit: Edit, path: str) -> None:
    model = tiny(model_type)
    seen: list[tuple[int, ...]] = []
    handle = model.get_submodule(path).register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    output(model, input_ids=ids())
    rewire.apply_(model, edit)
    output(model, input_ids=ids())
    assert len(seen) == 2
    assert seen[0] == seen[1]
    rewire.revert_(model)
    output(model, input_ids=ids())
    assert len(seen) == 3
    rewire.apply_(model, edit)
    handle.remove()
    output(model, input_ids=ids())
    assert len(seen) == 3


def test_a_forward_replaced_on_the_instance_is_not_lost_silently() -> None:
    model = tiny("phi3")
    model.layers[1].self_attn.qkv_proj.forward = lambda x: x
    with pytest.raises(rewire.RewireError, match="forward was replaced"):
        rewire.apply_(model, Split("layers.*.self_attn.qkv_proj"))


def test_a_replaced_attention_is_still_recorded() -> None:
    """Transformers listens to attention modules to record what it is asked for."""
    model = tiny("gpt_neox", attn_implementation="eager")
    with torch.no_grad():
        before = model(ids(), output_attentions=True).attentions
        rewire.apply_(model, CASES["replace"].plan)
        after = model(ids(), output_attentions=True).attentions
    assert len(after) == len(before) == 2
    for first, second in zip(before, after, strict=True):
        torch.testing.assert_close(first, second)


def test_sam_of_the_guide() -> None:
    """The published recipe's aim, as one edit: fused qkv gone, q and v reachable, nothing else changed."""
    model = tiny("sam")
    strengthen(model, 3)
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    points = torch.rand(1, 1, 2, 2, generator=torch.Generator().manual_seed(1)) * 64

    def masks() -> Tensor:
        with torch.no_grad():
            return model(pixel_values=images, input_points=points).pred_masks.clone()

    before = masks()
    plan = Plan([Split("vision_encoder.layers.*.attn.qkv", into=("q", "k", "v")), Lora(("q", "v"), r=2)])
    receipt = rewire.apply_(model, plan)
    assert torch.equal(masks(), before)
    assert receipt.after.trainable == 3 * 2 * 2 * (32 + 32)
    assert not any(name.endswith("qkv.weight") for name, _ in model.named_parameters())
    trained = {name.split(".")[-4] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"q", "v"}
