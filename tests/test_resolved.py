"""Resolved plans: the block in a plan file, what resolving states and refuses, and how results are loaded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils._safetensors import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, BertModel, PreTrainedModel

from rewire import hf_seam
from rewire.artefact import read_record, write_record
from rewire.errors import CheckpointError, ConsentError, NoMatchError, PlanError, RevertError
from rewire.explicit import resolve_plan, written_rule
from rewire.explicit.edits import explicit_edits
from rewire.explicit.globs import globs
from rewire.hf_conversions import operations
from rewire.live import apply_
from rewire.loading import load
from rewire.module_tree import place
from rewire.plan import (
    Cast,
    DropTensor,
    Edit,
    Freeze,
    Join,
    Lora,
    Plan,
    Rename,
    RenameTensor,
    Replace,
    Resolved,
    Split,
    Unstack,
    check,
    json_schema,
)
from rewire.resolve import resolve
from rewire.saving import save
from rewire.targets import Target
from rewire.tensor_rules import Rule, invert, run, visible
from tiny import same, snapshot, tiny

QKV = Join("@attention", parts=("q_proj", "k_proj", "v_proj"))

BLOCK = """\
rewire: 1
edits: []
resolved:
  model: Phi3ForCausalLM
  plan: {hash}
  reading:
  - step: rename
    source: transformer.h.{{0}}.w
    target: h.{{0}}.w
    each: [0..3]
  steps:
  - step: split
    whole: h.{{0}}.w
    parts: ['h.{{0}}.q', 'h.{{0}}.k']
    sizes: [4, 2]
    each: ['0,2..3']
  config:
    dtype: bfloat16
"""


def saved(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def steps(plan: Plan) -> Rule:
    assert plan.resolved is not None
    return plan.resolved.rule


def converted(plan: Plan, folder: Path) -> dict[str, Tensor]:
    return visible(run(steps(plan), hf_seam.read_tensors(folder), torch))


# ---------------------------------------------------------------- the block in a file


def test_a_plan_of_steps_alone_is_a_plan() -> None:
    plan = Plan.from_yaml(BLOCK.format(hash="f" * 64))
    assert plan.resolved is not None
    assert plan.to_yaml() == BLOCK.format(hash="f" * 64)
    assert Plan.from_json(plan.to_json()) == plan == Plan.from_dict(plan.to_dict())
    assert [step.outputs for step in plan.resolved.rule] == [
        *((f"h.{layer}.w",) for layer in range(4)),
        *((f"h.{layer}.q", f"h.{layer}.k") for layer in (0, 2, 3)),
    ]
    assert resolve_plan(plan, "nowhere") is plan


def test_the_hash_is_that_of_the_edits_and_the_block_has_its_own() -> None:
    plain, block = Plan([Unstack("@experts")]), Resolved(model="A", steps=({"step": "drop", "source": "a"},))  # type: ignore[arg-type]
    with_block = Plan(plain.edits, resolved=block)
    assert with_block.hash == plain.hash
    assert with_block != plain
    other = Resolved(model="B", steps=({"step": "drop", "source": "b"},))  # type: ignore[arg-type]
    assert block.hash == Resolved(model="B", steps=block.steps).hash != other.hash


@pytest.mark.parametrize(
    ("old", "new", "line", "said"),
    [
        ("step: split", "step: spilt", 12, "resolved.steps[0]: no step 'spilt'"),
        ("sizes: [4, 2]", "sizes: [4]", 12, "resolved.steps[0]: h.0.w: 2 parts but 1 sizes"),
        ("each: [0..3]", "each: [0..x]", 7, "resolved.reading[0]: '0..x' is no list of numbers"),
        ("each: [0..3]", "each: [0..3000000]", 7, "reading[0]: stands for 6,000,002 names, more than the 2,000,000"),
        ("  config:\n    dtype: bfloat16", "  config: 3", 17, "resolved.config: must be a mapping, but is 3"),
        ("  model:", "  modle:", 4, "unknown key 'modle'; did you mean 'model'?"),
        ("plan: f", "plan: x", 5, "resolved.plan: must be the hash of a plan, 64 hexadecimal digits"),
        ("resolved:", "resolvd:", 3, "unknown key 'resolvd'; did you mean 'resolved'?"),
    ],
)  # fmt: skip
def test_mistakes_in_the_block_are_told_with_their_line(old: str, new: str, line: int, said: str) -> None:
    text = BLOCK.format(hash="f" * 64)
    assert old in text
    issues = check(text.replace(old, new, 1))
    assert [issue.line for issue in issues if said in str(issue)] == [line], issues


def test_in_python_mistakes_are_plan_errors() -> None:
    with pytest.raises(PlanError, match="unknown key 'step'"):
        Resolved(step=[])  # type: ignore[call-arg]
    with pytest.raises(PlanError, match=r"steps\[0\]: no step 'x'"):
        Resolved(steps=({"step": "x"},))  # type: ignore[arg-type]


def test_the_schema_knows_the_block() -> None:
    schema = json_schema()
    assert schema["properties"]["resolved"]["anyOf"][0] == {"$ref": "#/$defs/Resolved"}
    assert schema["$defs"]["Resolved"]["properties"]["steps"]["items"]["required"] == ["step"]


# ---------------------------------------------------------------- what resolving states


def test_structural_targets_become_paths_layouts_and_sizes(tmp_path: Path) -> None:
    plan = resolve_plan(Split("@attention"), saved(tiny("phi3"), tmp_path))
    (edit,) = plan.edits
    assert edit == Split(
        "layers.*.self_attn.qkv_proj", into=("q_proj", "k_proj", "v_proj"), layout="stacked", sizes=(32, 16, 16)
    )
    assert plan.resolved is not None
    assert (plan.resolved.model, plan.resolved.plan) == ("Phi3Model", Plan([Split("@attention")]).hash)
    assert len(plan.resolved.steps) == 1


@pytest.mark.parametrize(("model_type", "layout", "groups"), [("gpt_neox", "per_head", 4), ("falcon", "stacked", None)])
def test_layouts_are_stated_as_they_are(model_type: str, layout: str, groups: int | None, tmp_path: Path) -> None:
    (edit,) = resolve_plan(Split("@attention"), saved(tiny(model_type), tmp_path)).edits
    assert isinstance(edit, Split)
    assert (edit.layout, edit.groups) == (layout, groups)


def test_places_that_differ_get_edits_of_their_own() -> None:
    model = tiny("phi3", num_hidden_layers=3)
    place(model, "layers.1.self_attn.qkv_proj", torch.nn.Linear(32, 48, bias=False))
    plan = Plan(
        [
            Split("layers.[0,2].*.qkv_proj"),
            Split("layers.1.*.qkv_proj", layout="stacked", sizes=(32, 8, 8), into=("q", "k", "v")),
        ]
    )
    found = explicit_edits(model, resolve(model, plan))
    assert [(edit.target, edit.sizes) for edit in found if isinstance(edit, Split)] == [
        ("layers.[0,2].self_attn.qkv_proj", (32, 16, 16)),
        ("layers.1.self_attn.qkv_proj", (32, 8, 8)),
    ]


def test_optional_edits_keep_the_places_where_they_were_made(tmp_path: Path) -> None:
    plan = Plan(
        [
            Split("**.{qkv_proj,o_proj}", layout="stacked", into=("a", "b", "c"), optional=True),
            Unstack("@experts", optional=True),
        ]
    )
    (edit,) = resolve_plan(plan, saved(tiny("phi3"), tmp_path)).edits
    assert (edit.target, edit.optional) == ("layers.*.self_attn.qkv_proj", False)


def test_a_join_is_named_and_comes_apart_again(tmp_path: Path) -> None:
    folder = saved(tiny("llama"), tmp_path)
    plan = resolve_plan(Plan([Freeze("@attention"), QKV, Lora("qkv_proj", r=2)]), folder)
    assert plan.edits[0] == Freeze("layers.*.self_attn")
    assert plan.edits[1] == Join("layers.*.self_attn", parts=("q_proj", "k_proj", "v_proj"), name="qkv_proj")
    assert plan.edits[2] == Lora("qkv_proj", r=2)
    # Flags and adapters are in no file of weights.
    assert {step.kind for step in steps(plan)} == {"join"}


def test_casts_start_from_what_is_stored_and_change_the_configuration(tmp_path: Path) -> None:
    folder = saved(tiny("gpt2", head=True), tmp_path)
    plan = resolve_plan(Plan([Split("@attention"), Cast("**", "bfloat16")]), folder)
    assert plan.resolved is not None
    assert dict(plan.resolved.config) == {"dtype": "bfloat16"}
    made = converted(plan, folder)
    assert "lm_head.weight" not in made, "tied, and stored once"
    wanted = load(folder, Plan([Split("@attention"), Cast("**", "bfloat16")]))
    save(wanted, tmp_path / "edited", layout="edited")
    assert same(dict(sorted(made.items())), dict(sorted(hf_seam.read_tensors(tmp_path / "edited").items())))
    again = resolve_plan(Plan([Cast("**", "float32")]), folder)
    assert steps(again) == ()
    assert again.resolved is not None
    assert not again.resolved.config


def test_a_cast_after_an_adapter_is_of_the_stored_name(tmp_path: Path) -> None:
    folder = saved(tiny("llama"), tmp_path)
    plan = resolve_plan(Plan([Lora("q_proj", r=2), Cast("layers.0.self_attn", "bfloat16")]), folder)
    assert {step.inputs[0] for step in steps(plan)} == {f"layers.0.self_attn.{name}_proj.weight" for name in "qkvo"}


def test_resolving_again_keeps_the_first_hash(tmp_path: Path) -> None:
    folder = saved(tiny("phi3"), tmp_path)
    once = resolve_plan(Split("@attention"), folder)
    assert resolve_plan(once, folder) == once


# ---------------------------------------------------------------- where it is resolved


def test_a_configuration_stands_for_what_transformers_would_write() -> None:
    config = hf_seam.model_config("mixtral", {"num_hidden_layers": 2, "num_local_experts": 3})
    for source in ("config:mixtral", config):
        plan = resolve_plan(Unstack("@experts"), source)
        assert plan.resolved is not None
        stacks = [record for record in plan.resolved.reading if record["step"] == "stack"]
        assert stacks[0]["parts"][0].startswith("layers.{0}.block_sparse_moe.experts.{0..")


def test_a_base_model_is_read_into_one_with_a_head(tmp_path: Path) -> None:
    config = BertConfig(vocab_size=30, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
    torch.manual_seed(0)
    folder = saved(BertModel(config), tmp_path)
    edit_config(folder, architectures=["BertForMaskedLM"])
    plan = resolve_plan(Join("**.self", parts=("query", "key", "value")), folder)
    assert plan.resolved is not None
    assert plan.resolved.model == "BertForMaskedLM"
    assert plan.edits[0].target == "bert.encoder.layer.*.attention.self"
    made = converted(plan, folder)
    model = load(folder, plan, allow=("cls.*", "pooler.*"), model_class=BertForMaskedLM)
    state = model.state_dict()
    assert all(torch.equal(state[name], made[name]) for name in state if not name.startswith("cls."))


def test_legacy_names_are_read(tmp_path: Path) -> None:
    folder = saved(tiny("bert"), tmp_path)
    wanted = snapshot(load(folder, Join("**.self", parts=("query", "key", "value"))))
    legacy = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma"): t
        for name, t in load_file(folder / "model.safetensors").items()
    }
    assert any("gamma" in name for name in legacy)
    save_file(legacy, folder / "model.safetensors", metadata={"format": "pt"})
    made = converted(resolve_plan(Join("**.self", parts=("query", "key", "value")), folder), folder)
    assert same(dict(sorted(made.items())), dict(sorted(wanted.items())))


def test_tensors_that_the_loader_ignores_pass_through(tmp_path: Path) -> None:
    folder = saved(tiny("phi3"), tmp_path)
    extra = {**load_file(folder / "model.safetensors"), "layers.0.self_attn.rotary_emb.inv_freq": torch.arange(4.0)}
    save_file(extra, folder / "model.safetensors", metadata={"format": "pt"})
    made = converted(resolve_plan(Split("@attention"), folder), folder)
    assert torch.equal(made["layers.0.self_attn.rotary_emb.inv_freq"], torch.arange(4.0))


def test_a_quantised_checkpoint_is_resolved_for_the_model_that_it_was(tmp_path: Path) -> None:
    folder = saved(tiny("phi3"), tmp_path)
    edit_config(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [8, 8]})
    assert len(steps(resolve_plan(Split("@attention"), folder))) == 2


def test_packed_weights_count_as_there(tmp_path: Path) -> None:
    folder = saved(tiny("phi3"), tmp_path)
    wanted = steps(resolve_plan(Split("@attention"), folder))
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("qkv_proj.weight")]:
        del tensors[name]
        tensors[name.replace(".weight", ".qweight")] = torch.zeros(4, 64, dtype=torch.int32)
        tensors[name.replace(".weight", ".scales")] = torch.zeros(1, 64)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert steps(resolve_plan(Split("@attention"), folder)) == wanted


def test_a_model_on_the_hub_is_its_local_copy_or_its_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tiny("phi3"), tmp_path)
    wanted = resolve_plan(Split("@attention"), folder)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(folder))
    assert resolve_plan(Split("@attention"), "some/model") == wanted

    def none_here(name: str, **_: Any) -> str:
        raise FileNotFoundError(name)

    tensors = {
        name: TensorInfo("F32", list(t.shape), (0, 0)) for name, t in load_file(folder / "model.safetensors").items()
    }
    headers = SafetensorsRepoMetadata(None, False, {}, {"model.safetensors": SafetensorsFileMetadata({}, tensors)})
    monkeypatch.setattr(huggingface_hub, "snapshot_download", none_here)
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", lambda name: headers)
    config = hf_seam.read_config(folder)
    monkeypatch.setattr(hf_seam, "read_config", lambda name: config)
    assert resolve_plan(Split("@attention"), "some/model") == wanted


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | values), "utf-8")


# ---------------------------------------------------------------- what is refused


def test_a_tensor_that_is_not_there_is_named(tmp_path: Path) -> None:
    folder = saved(tiny("phi3"), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["layers.1.self_attn.qkv_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"has no layers\.1\.self_attn\.qkv_proj\.weight, which the plan changes"):
        resolve_plan(Split("@attention"), folder)
    assert len(steps(resolve_plan(Split("layers.0.self_attn.qkv_proj"), folder))) == 1


def test_a_checkpoint_of_another_size_is_refused(tmp_path: Path) -> None:
    folder = saved(tiny("phi3"), tmp_path)
    edit_config(folder, intermediate_size=96)
    with pytest.raises(
        CheckpointError, match=r"do not fit Phi3Model.*gate_up_proj\.weight \[128, 32\], not \[192, 32\]"
    ):
        resolve_plan(Split("@attention"), folder)


def test_an_unknown_conversion_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tiny("mixtral"), tmp_path)
    monkeypatch.delitem(operations.OPERATIONS, "MergeModulelist")
    with pytest.raises(CheckpointError, match="is read with MergeModulelist, which cannot be told in tensor steps"):
        resolve_plan(Unstack("@experts"), folder)


def test_code_needs_consent(tmp_path: Path) -> None:
    folder = saved(tiny("bert"), tmp_path)
    with pytest.raises(ConsentError):
        resolve_plan(Replace("encoder.layer.*.output.dropout", with_="torch.nn:Dropout"), folder)


def test_no_match_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NoMatchError):
        resolve_plan(Unstack("@experts"), saved(tiny("bert"), tmp_path))


def test_an_edited_folder_is_not_resolved_again(tmp_path: Path) -> None:
    save(load(saved(tiny("phi3"), tmp_path / "a"), Split("@attention")), tmp_path / "b", layout="edited")
    with pytest.raises(CheckpointError, match="was edited already"):
        resolve_plan(Split("@attention"), tmp_path / "b")


# ---------------------------------------------------------------- loading and the way back


def test_a_folder_made_by_the_explicit_plan_takes_the_original_one_too(tmp_path: Path) -> None:
    folder = saved(tiny("phi3"), tmp_path / "a")
    original = Plan([Split("@attention")])
    explicit = resolve_plan(original, folder)
    save(load(folder, explicit), tmp_path / "b", layout="edited")
    as_converted(tmp_path / "b", explicit)
    wanted = snapshot(load(folder, original))
    for plan in (None, original, explicit):
        assert same(snapshot(load(tmp_path / "b", plan)), wanted)
    with pytest.raises(CheckpointError, match="edited by another plan"):
        load(tmp_path / "b", Plan([Split("@mlp")]))


def as_converted(folder: Path, plan: Plan) -> None:
    """Has the folder record what `convert` would record."""
    record = read_record(folder)
    assert record is not None
    write_record(folder, replace(record, plan=plan.to_dict()))


@pytest.mark.parametrize(
    "edits",
    [
        [QKV, Cast("**", "bfloat16")],
        [Lora("q_proj", r=2), Cast("layers.*.mlp", "bfloat16")],
        [Rename("layers.*.mlp", to="ffn")],
    ],
)
def test_the_rule_of_a_saved_folder_leads_to_it(edits: list[Edit], tmp_path: Path) -> None:
    folder = saved(tiny("llama"), tmp_path / "a")
    save(load(folder, Plan(edits)), tmp_path / "b", layout="edited")
    save(load(folder, Plan(edits)), tmp_path / "c")
    back = run(invert(written_rule(tmp_path / "b")), hf_seam.read_tensors(tmp_path / "b"), torch)
    assert same(dict(sorted(back.items())), dict(sorted(hf_seam.read_tensors(tmp_path / "c").items())))


class Plain(torch.nn.Module):
    """A projection that forgets its bias."""

    @classmethod
    def from_module(cls, old: torch.nn.Linear) -> Plain:
        new = cls()
        new.kernel = torch.nn.Parameter(old.weight.detach().clone())
        return new

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.kernel)  # type: ignore[arg-type]


def test_what_was_dropped_does_not_come_back(tmp_path: Path) -> None:
    plan = Plan(
        [
            Replace(
                "encoder.layer.*.output.dense",
                with_=Plain,
                tensors=(RenameTensor("weight", "kernel"), DropTensor("bias")),
            )
        ]
    )
    folder = saved(tiny("bert"), tmp_path / "a")
    resolved = resolve_plan(plan, folder, allow_code=True)
    assert {step.kind for step in steps(resolved)} == {"rename", "drop"}
    model = load(folder)
    apply_(model, plan, allow_code=True)
    save(model, tmp_path / "b", layout="edited")
    with pytest.raises(RevertError, match=r"dropped \(parts of\) encoder\.layer\.0\.output\.dense\.bias"):
        written_rule(tmp_path / "b", allow_code=True)


def test_only_an_edited_folder_has_such_a_rule(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not in the edited layout"):
        written_rule(saved(tiny("bert"), tmp_path))


# ---------------------------------------------------------------- globs

PATHS = st.lists(st.sampled_from(["a", "b", "a1", "0", "1", "2", "3", "10", "x*", "{y}"]), min_size=1, max_size=4).map(
    ".".join
)


@given(st.sets(PATHS, min_size=1, max_size=20), st.data())
def test_globs_match_what_is_wanted_and_nothing_else(paths: set[str], data: st.DataObject) -> None:
    wanted = data.draw(st.sets(st.sampled_from(sorted(paths)), min_size=1))
    targets = [Target.parse(glob) for glob in globs(sorted(wanted), {path: path for path in paths})]
    for path in paths:
        assert sum(target.path_matches(path) for target in targets) == (path in wanted), (path, targets)


def test_one_module_under_two_paths_is_matched_once() -> None:
    places = {"a.0.x": 1, "a.1.x": 2, "b.0.x": 1, "b.1.x": 3}
    assert globs(["a.0.x", "a.1.x", "b.1.x"], places) == ["a.*.x", "b.1.x"]
