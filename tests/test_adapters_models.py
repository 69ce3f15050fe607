"""A trained adapter does on the edited model what it did on the untouched one, and comes back bit for bit."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import rewire
from cli_runner import rewire as command
from rewire.adapters import Carried, carry_adapter, load_adapter
from rewire.errors import CheckpointError, OutputError, RefusedError, ResolveError
from rewire.plan import Edit, Join, Lora, Plan, Rename, Split, Stack, Unstack
from rewire.tensor_rules import run, visible
from tiny import ids, output, snapshot, tiny

QKV = ("q_proj", "k_proj", "v_proj")
JOIN = Join("**.self_attn", parts=QKV)
SPLIT = Split("@attention", into=("q", "k", "v"))
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


@dataclass(frozen=True)
class Case:
    """A model, edits, and a LoRA configuration."""

    model: str
    edits: tuple[Edit, ...]
    lora: dict[str, Any]
    rounded: int = 0
    notes: int = 0
    values: dict[str, Any] = field(default_factory=dict)
    head: bool = False


def case(model: str, *edits: Edit, rounded: int = 0, notes: int = 0, head: bool = False, **lora: Any) -> Case:
    return Case(model, edits, {"r": 4, "lora_alpha": 8, **lora}, rounded, notes, {}, head)


CASES = {
    "transposed layer in three": case("gpt2", SPLIT, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True),
    "rows per head": case("gpt_neox", SPLIT, target_modules=["query_key_value", "dense"]),
    "grouped rows": case("falcon", SPLIT, target_modules=["query_key_value"]),
    "all linear layers": case("phi3", SPLIT, Split("@mlp"), target_modules="all-linear"),
    "by an expression": case("phi3", SPLIT, target_modules=r"layers\.1\..*(qkv|down)_proj"),
    "three in one": case("llama", JOIN, target_modules=[*QKV, "o_proj"]),
    "one without an adapter": case("llama", JOIN, target_modules=["q_proj", "v_proj"]),
    "ranks and alphas": case(
        "llama", JOIN, Join("@mlp", parts=("gate_proj", "up_proj")), rounded=2, target_modules=[*QKV, "gate_proj"],
        rank_pattern={"q_proj": 3}, alpha_pattern={"v_proj": 16, r"0\.self_attn\.k_proj": 5},
    ),
    "powers of two": case("llama", JOIN, target_modules=list(QKV), alpha_pattern={"q_proj": 2, "v_proj": 64}),
    "rank-stabilised": case("llama", JOIN, target_modules=list(QKV), use_rslora=True, rank_pattern={"k_proj": 16}),
    "magnitudes, joined": case("llama", JOIN, target_modules=list(QKV), use_dora=True),
    "magnitudes, split": case("gpt2", SPLIT, target_modules=["c_attn"], fan_in_fan_out=True, use_dora=True),
    "biases of the adapter": case(
        "bert", Join("**.self", parts=("query", "key", "value")), target_modules=["query", "key"], lora_bias=True,
        rank_pattern={"key": 2},
    ),
    "biases of the model": case(
        "gpt2", SPLIT, target_modules=["c_attn"], fan_in_fan_out=True, bias="all", modules_to_save=["wpe"]
    ),
    "biases of adapted layers": case(
        "bert", Join("**.self", parts=("query", "key", "value")), target_modules=["query", "key", "value"],
        bias="lora_only",
    ),
    "a layer trained whole": case("gpt_neox", SPLIT, target_modules=["dense"], modules_to_save=["query_key_value"]),
    "layers trained whole, joined": case("llama", JOIN, target_modules=["o_proj"], modules_to_save=list(QKV)),
    "some layers": case(
        "llama", Rename("model.layers.*.self_attn.o_proj", to="out"), head=True, target_modules=["o_proj", "q_proj"],
        layers_to_transform=[1], modules_to_save=["down_proj"],
    ),
    "embeddings": case("llama", Rename("embed_tokens", to="tokens"), target_modules=["embed_tokens", "q_proj"]),
    "dropout": case("gpt2", SPLIT, notes=1, target_modules=["c_attn"], fan_in_fan_out=True, lora_dropout=0.1),
    "experts apart": case(
        "mixtral", Unstack("@experts"), target_modules=["q_proj"], target_parameters=EXPERTS,
        exclude_modules=["0.self_attn.q_proj"],
    ),
    "experts apart, of names that peft converts": case(
        "qwen3_moe", Unstack("@experts"), notes=1, target_modules=["q_proj"], target_parameters=EXPERTS
    ),
    "experts apart, alternating rows": case(
        "gpt_oss", Unstack("@experts"), target_modules=[], target_parameters=["gate_up_proj"], r=3
    ),
    "experts stacked": case("nllb-moe", Stack("@experts"), target_modules=["fc1", "fc2"]),
    "experts stacked and joined": case(
        "nllb-moe", Stack("@experts"), JOIN, target_modules=["fc1", *QKV], rank_pattern={"expert_1.fc1": 2}
    ),
}  # fmt: skip


def model_of(of: Case) -> nn.Module:
    """In float64, and with experts run one by one: the kernel for all of them knows no float64."""
    model = tiny(of.model, head=of.head).double()
    if hasattr(model.config, "_experts_implementation"):
        model.config._experts_implementation = "eager"
    return model


def trained(model: nn.Module, seed: int = 3) -> nn.Module:
    """Every trainable weight moved, A and B far from zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.empty_like(parameter).normal_(0, 0.3, generator=generator))
    return model.eval()


def adapted(model: nn.Module, lora: dict[str, Any], folder: Path) -> PeftModel:
    found = trained(get_peft_model(copy.deepcopy(model), LoraConfig(**lora), autocast_adapter_dtype=False))
    found.save_pretrained(folder)
    return found


def given(model: nn.Module) -> dict[str, Tensor]:
    inputs = {"input_ids": ids()}
    return inputs | ({"decoder_input_ids": ids(seed=2)} if getattr(model.config, "is_encoder_decoder", False) else {})


def edited(model: nn.Module, plan: Plan) -> tuple[nn.Module, Any]:
    copied = copy.deepcopy(model)
    return copied, rewire.apply_(copied, plan)


def attached(model: nn.Module, folder: Path) -> nn.Module:
    load_adapter(model, folder)
    return model.eval()


def same_files(first: Path, second: Path) -> bool:
    """The same bytes of weights and the same configuration."""
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (first, second)]
    weights = [(folder / "adapter_model.safetensors").read_bytes() for folder in (first, second)]
    return configs[0] == configs[1] and weights[0] == weights[1]


def settings_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return found


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")  # peft's own, on unedited models too
@pytest.mark.parametrize("name", CASES)
def test_the_same_outputs_and_weights_and_the_way_back(name: str, tmp_path: Path) -> None:
    of = CASES[name]
    base, plan = model_of(of), Plan(of.edits)
    before = adapted(base, of.lora, tmp_path / "a")
    report = carry_adapter(tmp_path / "a", tmp_path / "b", plan, model=base)
    assert (len(report.rounded), len(report.notes)) == (of.rounded, of.notes)
    assert report.exact == (not of.rounded)

    expected, plain = output(before, **given(base)), output(base, **given(base))
    assert float((expected - plain).abs().max()) > 0.1  # the adapter matters
    for load in loaders(of):
        model, receipt = edited(base, plan)
        after = load(model, tmp_path / "b")
        torch.testing.assert_close(output(after, **given(base)), expected, rtol=1e-10, atol=1e-10)

    merged = before.merge_and_unload()
    model, receipt = edited(base, plan)
    with_adapter = attached(model, tmp_path / "b")
    assert_merged(merged, with_adapter, receipt.rules)

    back = carry_adapter(tmp_path / "b", tmp_path / "c", model=base, revert=True)
    assert back.exact
    assert same_files(tmp_path / "a", tmp_path / "c")


Loader = Callable[[nn.Module, Path], nn.Module]


def loaders(of: Case) -> list[Loader]:
    """What puts the adapter into the edited model; Transformers' own method knows no DoRA, peft not all names."""

    def with_peft(model: nn.Module, folder: Path) -> nn.Module:
        return PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False).eval()

    def with_transformers(model: nn.Module, folder: Path) -> nn.Module:
        model.load_adapter(str(folder))
        return model.eval()

    if of.notes and "experts" in str(of.lora.get("target_parameters")):
        return [attached]
    return [attached, with_peft] if of.lora.get("use_dora") else [attached, with_peft, with_transformers]


def assert_merged(before: nn.Module, after: nn.Module, rule: Any) -> None:
    """The merged weights of the edited model are those of the untouched one under the tensor rule."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    expected = visible(run(rule, dict(before.state_dict()), torch))
    for module in list(after.modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
    saved = {path for path, module in after.named_modules() if isinstance(module, ModulesToSaveWrapper)}
    found = {
        key.replace(".base_layer", "").replace(".modules_to_save.default", ""): tensor
        for key, tensor in after.state_dict().items()
        if ".lora_" not in key and "original_module" not in key
    }
    assert saved or set(found) == set(expected)
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------- what the files say


def test_a_split_shares_a_and_divides_b(tmp_path: Path) -> None:
    base = tiny("gpt2")
    adapted(base, CASES["transposed layer in three"].lora, tmp_path / "a")
    (tmp_path / "a" / "notes.md").write_text("mine")
    report = carry_adapter(tmp_path / "a", tmp_path / "b", Plan([SPLIT]), model=base)
    old, new = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    place = "base_model.model.h.0.attn.c_attn"
    parts = [new[f"{place}.{part}.lora_B.weight"] for part in "qkv"]
    assert torch.equal(torch.cat(parts), old[f"{place}.lora_B.weight"])
    for part in "qkv":
        assert torch.equal(new[f"{place}.{part}.lora_A.weight"], old[f"{place}.lora_A.weight"])
    config = settings_of(tmp_path / "b")
    assert config["target_modules"] == ["c_proj", "k", "q", "v"]
    assert (config["r"], config["lora_alpha"], config["fan_in_fan_out"]) == (4, 8, False)
    assert (tmp_path / "b" / "notes.md").read_text() == "mine"
    assert (tmp_path / "b" / "README.md").read_text() == (tmp_path / "a" / "README.md").read_text()
    assert "10 after" in str(report)
    assert "bit for bit" in str(report)
    assert report.to_dict()["exact"] is True


def test_a_join_puts_the_ranks_side_by_side(tmp_path: Path) -> None:
    base = tiny("llama")
    adapted(base, CASES["three in one"].lora, tmp_path / "a")
    carry_adapter(tmp_path / "a", tmp_path / "b", Plan([JOIN]), model=base)
    new = load_file(tmp_path / "b" / "adapter_model.safetensors")
    b = new["base_model.model.layers.0.self_attn.qkv_proj.lora_B.weight"]
    assert b.shape == (64, 12)
    blocks = [(slice(0, 32), slice(0, 4)), (slice(32, 48), slice(4, 8)), (slice(48, 64), slice(8, 12))]
    outside = b.clone()
    for rows, ranks in blocks:
        assert b[rows, ranks].any()
        outside[rows, ranks] = 0
    assert not outside.any()
    config = settings_of(tmp_path / "b")
    assert (config["r"], config["lora_alpha"]) == (4, 8)  # as o_proj has it
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({"qkv_proj": 12}, {"qkv_proj": 24})


def test_low_precision_stays_as_it_is(tmp_path: Path) -> None:
    base = tiny("llama").bfloat16()
    adapted(base, CASES["powers of two"].lora, tmp_path / "a")
    assert carry_adapter(tmp_path / "a", tmp_path / "b", Plan([JOIN]), model=base).exact
    new = load_file(tmp_path / "b" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in new.values()} == {torch.bfloat16}
    carry_adapter(tmp_path / "b", tmp_path / "c", model=base, revert=True)
    assert same_files(tmp_path / "a", tmp_path / "c")


def test_an_adapter_that_is_not_trained_yet_comes_back(tmp_path: Path) -> None:
    base = tiny("llama")
    get_peft_model(copy.deepcopy(base), LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).save_pretrained(
        tmp_path / "a"
    )
    carry_adapter(tmp_path / "a", tmp_path / "b", Plan([JOIN]), model=base)
    carry_adapter(tmp_path / "b", tmp_path / "c", model=base, revert=True)
    assert same_files(tmp_path / "a", tmp_path / "c")


@pytest.mark.parametrize("edit", [JOIN, SPLIT])
def test_an_adapter_trained_further_comes_back_with_what_it_learned(edit: Edit, tmp_path: Path) -> None:
    base = tiny("llama" if edit is JOIN else "phi3").double()
    targets = ["q_proj", "v_proj"] if edit is JOIN else ["qkv_proj"]
    adapted(base, {"r": 4, "lora_alpha": 8, "target_modules": targets}, tmp_path / "a")
    carry_adapter(tmp_path / "a", tmp_path / "b", Plan([edit]), model=base)
    model, _ = edited(base, Plan([edit]))
    further = PeftModel.from_pretrained(model, tmp_path / "b", is_trainable=True, autocast_adapter_dtype=False)
    trained(further, 5).save_pretrained(tmp_path / "b")
    carry_adapter(tmp_path / "b", tmp_path / "c", model=base, revert=True)
    plain = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "c", autocast_adapter_dtype=False).eval()
    expected = output(further, input_ids=ids())
    torch.testing.assert_close(output(plain, input_ids=ids()), expected, rtol=1e-10, atol=1e-10)


def test_an_adapter_trained_on_the_edited_model_fits_the_plain_one(tmp_path: Path) -> None:
    base = tiny("gpt2").double()
    plan = Plan([SPLIT, Lora(("q", "v"), r=4, lora_alpha=16)])
    model, _ = edited(base, plan)
    trained(model)
    rewire.save(model, tmp_path / "saved")
    report = carry_adapter(tmp_path / "saved" / "adapter" / "default", tmp_path / "c", plan, model=base, revert=True)
    assert report.reverted
    plain = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "c", autocast_adapter_dtype=False).eval()
    expected = output(model, input_ids=ids())
    torch.testing.assert_close(output(plain, input_ids=ids()), expected, rtol=1e-10, atol=1e-10)


def test_the_class_is_found_by_the_task(tmp_path: Path) -> None:
    """The base model is a causal one; the adapter was trained for classification, with a head of its own."""
    from transformers import LlamaForSequenceClassification

    tiny("llama", head=True).save_pretrained(tmp_path / "base")
    base = LlamaForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3).double()
    lora = {"r": 4, "target_modules": list(QKV), "task_type": "SEQ_CLS"}
    before = adapted(base, lora, tmp_path / "a")
    report = carry_adapter(tmp_path / "a", tmp_path / "b", Plan([JOIN]))  # the adapter says where its base model is
    assert report.model == "LlamaForSequenceClassification"
    model, _ = edited(base, Plan([JOIN]))
    after = PeftModel.from_pretrained(model, tmp_path / "b", autocast_adapter_dtype=False).eval()
    expected = output(before, input_ids=ids())
    torch.testing.assert_close(output(after, input_ids=ids()), expected, rtol=1e-10, atol=1e-10)
    assert sorted(settings_of(tmp_path / "b")["modules_to_save"]) == ["classifier", "score"]


# ---------------------------------------------------------------- refusals and damage


def refusal(tmp_path: Path, model: nn.Module, lora: dict[str, Any], *edits: Edit) -> str:
    adapted(model, lora, tmp_path / "a")
    with pytest.raises(RefusedError) as caught:
        carry_adapter(tmp_path / "a", tmp_path / "b", Plan(edits), model=model)
    assert not (tmp_path / "b").exists()
    return str(caught.value)


def test_magnitudes_of_some_parts_only(tmp_path: Path) -> None:
    lora = {"r": 4, "target_modules": ["q_proj", "v_proj"], "use_dora": True}
    message = refusal(tmp_path, tiny("llama"), lora, JOIN)
    assert "join of layers.0.self_attn.q_proj.weight" in message
    assert "has none for layers.0.self_attn.k_proj.weight" in message


def test_dropout_and_parameters(tmp_path: Path) -> None:
    lora = {"r": 2, "target_modules": ["fc1"], "lora_dropout": 0.1}
    message = refusal(tmp_path, tiny("nllb-moe"), lora, Stack("@experts"))
    assert "peft has no lora_dropout; set it to 0" in message


def test_biases_of_some_parts_only(tmp_path: Path) -> None:
    lora = {"r": 2, "target_modules": ["query"], "bias": "lora_only"}
    message = refusal(tmp_path, tiny("bert"), lora, Join("**.self", parts=("query", "key", "value")))
    assert "nothing of encoder.layer.0.attention.self.key.bias" in message


def test_some_parts_trained_whole(tmp_path: Path) -> None:
    lora = {"r": 2, "target_modules": ["o_proj"], "modules_to_save": ["q_proj"]}
    assert "nothing of layers.0.self_attn.k_proj.weight" in refusal(tmp_path, tiny("llama"), lora, JOIN)


def test_another_model(tmp_path: Path) -> None:
    adapted(tiny("llama"), {"r": 2, "target_modules": ["q_proj"]}, tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"does not have: layers\.0\.self_attn\.q_proj.*right model"):
        carry_adapter(tmp_path / "a", tmp_path / "b", Plan([SPLIT]), model=tiny("gpt2"))


def test_a_model_that_is_edited_already(tmp_path: Path) -> None:
    base = tiny("llama")
    adapted(base, {"r": 2, "target_modules": ["q_proj"]}, tmp_path / "a")
    model, _ = edited(base, Plan([JOIN]))
    with pytest.raises(ResolveError, match="give the untouched one"):
        carry_adapter(tmp_path / "a", tmp_path / "b", Plan([JOIN]), model=model)


def test_places_that_may_not_be_written(tmp_path: Path) -> None:
    base = tiny("llama")
    adapted(base, {"r": 2, "target_modules": ["q_proj"]}, tmp_path / "a")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    for place in ("a", "full"):
        with pytest.raises(OutputError):
            carry_adapter(tmp_path / "a", tmp_path / place, Plan([JOIN]), model=base, overwrite=place == "a")
    carry_adapter(tmp_path / "a", tmp_path / "full", Plan([JOIN]), model=base, overwrite=True)
    assert (tmp_path / "full" / "mine").read_text() == "x"


def test_damaged_adapters(tmp_path: Path) -> None:
    base = tiny("llama")
    adapted(base, {"r": 2, "target_modules": ["q_proj"]}, tmp_path / "a")
    weights = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(weights)

    def fails(match: str, **options: Any) -> None:
        with pytest.raises(CheckpointError, match=match):
            carry_adapter(tmp_path / "a", tmp_path / "b", Plan([JOIN]), **{"model": base, **options})
        assert not (tmp_path / "b").exists()

    fails("does not say what its base model is", model=None)
    name = "base_model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({**tensors, name: torch.zeros(3, 32)}, weights)
    fails("has rank 3, its adapter_config.json says 2")
    save_file({**tensors, name: torch.zeros(2, 30)}, weights)
    fails(r"does not fit its shape \[32, 32\]")
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, weights)
    fails(r"lacks lora_A\.weight")
    save_file({"layers.0.q": torch.zeros(2)}, weights)
    fails("a name that peft does not give")
    weights.write_bytes(b"\x10" + bytes(40))
    fails("damaged or cut off")
    weights.unlink()
    fails("has no adapter_model.safetensors")
    (tmp_path / "a" / "adapter_model.bin").write_bytes(b"")
    fails("pickled weights can run code")
    (tmp_path / "a" / "adapter_config.json").write_text("{")
    (tmp_path / "a" / "adapter_config.json").unlink()
    fails("is no adapter")


def test_an_adapter_that_does_not_fit_is_not_loaded(tmp_path: Path) -> None:
    base = tiny("llama")
    adapted(base, {"r": 2, "target_modules": ["q_proj"]}, tmp_path / "a")
    carry_adapter(tmp_path / "a", tmp_path / "b", Plan([JOIN]), model=base)
    with pytest.raises(CheckpointError, match=r"for a module layers\.0\.self_attn\.qkv_proj"):
        load_adapter(base, tmp_path / "b")
    config = settings_of(tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["q_proj", "o_proj"]}))
    with pytest.raises(CheckpointError, match=r"disagree about layers\.0\.self_attn\.o_proj"):
        load_adapter(base, tmp_path / "a")
    assert not hasattr(base, "peft_config")


# ---------------------------------------------------------------- the command


def plan_file(folder: Path) -> Path:
    (folder / "plan.yaml").write_text(
        "rewire: 1\nedits:\n- join: {target: '**.self_attn', parts: [q_proj, k_proj, v_proj]}\n"
    )
    return folder / "plan.yaml"


def test_the_command_there_and_back(tmp_path: Path) -> None:
    base = tiny("llama")
    base.save_pretrained(tmp_path / "base")
    adapted(base, {"r": 2, "target_modules": ["q_proj", "v_proj"]}, tmp_path / "a")
    plan, model = plan_file(tmp_path), tmp_path / "base"
    done = command("adapters", tmp_path / "a", tmp_path / "b", "--plan", plan, "--model", model)
    assert (done.code, done.err) == (0, "")
    assert "adapter carried across plan" in done.out
    assert "bit for bit" in done.out
    done = command("adapters", tmp_path / "b", tmp_path / "c", "--revert", "--model", model, "--json")
    assert done.code == 0
    assert done.json["reverted"] is True
    assert len(done.json["after"]) == 4
    assert same_files(tmp_path / "a", tmp_path / "c")


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    base = tiny("llama")
    adapted(base, {"r": 2, "target_modules": ["q_proj"], "use_dora": True}, tmp_path / "a")
    base.save_pretrained(tmp_path / "base")
    plan = plan_file(tmp_path)
    for args, message in {
        (): "--plan is needed",
        ("--plan", plan, "--frozen", "x"): "--frozen goes with --optimizer",
        ("--plan", plan): "does not say what its base model is",
        ("--plan", plan, "--model", tmp_path / "base"): "DoRA magnitude",
        ("--plan", plan, "--model", "config:llama", "--set", "num_hidden_layers=1"): "does not have",
    }.items():
        done = command("adapters", tmp_path / "a", tmp_path / "b", *args)
        assert done.code == 2
        assert message in done.err
        assert not (tmp_path / "b").exists()


def test_the_report_is_data(tmp_path: Path) -> None:
    report = Carried("adapter", "a", "b", "Model", "0" * 64, False, ("x",), ("y",), 0, ("y",))
    assert not report.exact
    assert "1 rounded once: y" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["rounded"] == ["y"]


def test_snapshot_of_the_given_model_is_untouched(tmp_path: Path) -> None:
    base = tiny("llama")
    before = snapshot(base)
    adapted(base, {"r": 2, "target_modules": ["q_proj"]}, tmp_path / "a")
    carry_adapter(tmp_path / "a", tmp_path / "b", Plan([JOIN]), model=base)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
