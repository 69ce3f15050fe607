"""`rewire.inspect`: what is found, as which targets, and whether what it offers can really be done."""

from __future__ import annotations

import json
import time

import pytest
import torch
from rich.console import Console
from torch import nn

import rewire
from cli_runner import BERT, GPT2, JOIN, small
from rewire import hf_seam
from rewire.inspection import Family, Inspection, Node
from rewire.inspection.patterns import patterns
from rewire.plan import Plan
from rewire.targets import Target

TINY = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 99}
MODELS = {
    "bert": BERT,
    "gpt2": GPT2,
    "llama": {**TINY, "num_key_value_heads": 2},
    "phi3": {**TINY, "num_key_value_heads": 2, "pad_token_id": 0},
    "t5": {"num_layers": 2, "d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 48, "vocab_size": 99},
    "falcon": {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 99},
    "mixtral": {**TINY, "num_key_value_heads": 2, "num_local_experts": 4},
    "gpt_oss": {**TINY, "num_key_value_heads": 2, "num_local_experts": 4, "head_dim": 8},
    "switch_transformers": {
        "num_layers": 2,
        "d_model": 32,
        "d_kv": 8,
        "num_heads": 4,
        "d_ff": 48,
        "vocab_size": 99,
        "num_experts": 4,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
    },
    "vit": {**{k: v for k, v in TINY.items() if k != "vocab_size"}, "image_size": 16, "patch_size": 8},
}


def meta(model_type: str, **values: object) -> nn.Module:
    return hf_seam.build(hf_seam.model_config(model_type, values), meta=True)


def family(found: Inspection, kind: str) -> Family:
    (one,) = [one for one in found.families if one.kind == kind]
    return one


def text(found: Inspection, width: int = 120) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(found)
    return capture.get()


def test_separate_projections_of_bert() -> None:
    found = rewire.inspect(small("bert", BERT))
    one = family(found, "separate attention")
    assert (found.model, found.model_type, found.dtypes) == ("BertModel", "bert", ("float32",))
    assert (one.path, one.count) == ("encoder.layer.*.attention.self", 2)
    assert (one.parts, one.sizes, one.in_features) == (("query", "key", "value"), (32, 32, 32), 32)
    assert one.edit == {"join": {"target": one.path, "parts": ["query", "key", "value"]}}
    assert one.evidence


def test_fused_projections_of_gpt2() -> None:
    one = family(rewire.inspect(small("gpt2", GPT2)), "fused attention")
    assert (one.path, one.count, one.module, one.owner) == (
        "h.*.attn.c_attn",
        2,
        "Conv1D",
        "GPT2Attention",
    )
    assert (one.sizes, one.layout, one.groups, one.transposed) == ((32, 32, 32), "stacked", 1, True)
    assert one.edit is not None
    assert set(one.edit) == {"split"}


def test_stacked_experts() -> None:
    one = family(rewire.inspect(meta("gpt_oss", **MODELS["gpt_oss"])), "stacked experts")
    assert (one.path, one.count, one.module, one.owner) == ("layers.*.mlp.experts", 2, "GptOssExperts", "GptOssMLP")
    assert (one.experts, one.parts, one.sizes) == (4, ("gate_proj", "up_proj", "down_proj"), (48, 48, 32))
    assert (one.in_features, one.transposed) == (32, True)
    assert "GptOssExperts declares slices [in, out], gate and up rows alternating" in one.evidence
    assert one.edit == {"unstack": {"target": "layers.*.mlp.experts"}}


def test_separate_experts() -> None:
    found = rewire.inspect(meta("switch_transformers", **MODELS["switch_transformers"]))
    first, second = [one for one in found.families if one.kind == "separate experts"]
    assert (first.path, second.path) == ("encoder.block.1.layer.1.mlp.experts", "decoder.block.1.layer.2.mlp.experts")
    assert (first.experts, first.parts, first.sizes) == (4, ("wi", "wo"), (48, 32))
    assert first.edit == {"stack": {"target": first.path}}
    assert "separate experts: 4 × wi 48, wo 32" in text(found)


def test_experts_that_are_not_understood_say_why() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 8, 6))

    found = rewire.inspect(nn.ModuleDict({"experts": Experts()}))
    (one,) = found.families
    assert (one.kind, one.edit) == ("stacked experts", None)
    assert "is not known" in str(one.refusal)
    assert found.plan is None


@pytest.mark.parametrize("model_type", MODELS)
def test_what_is_offered_can_be_done(model_type: str) -> None:
    model = small(model_type, MODELS[model_type])
    found = rewire.inspect(model)
    assert found.plan is not None
    receipt = rewire.apply_(model, found.plan)
    assert receipt.count("changed") == sum(one.count for one in found.families if one.edit and not one.alone)
    rewire.revert_(model)


@pytest.mark.parametrize("model_type", MODELS)
def test_targets_match_exactly_the_places_counted(model_type: str) -> None:
    model = meta(model_type, **MODELS[model_type])
    paths = [path for path, _ in model.named_modules()]
    for one in rewire.inspect(model).families:
        matched = [path for path in paths if Target.parse(one.path).path_matches(path)]
        assert len(matched) == one.count


def test_edits_that_exclude_each_other_are_not_put_into_one_plan() -> None:
    found = rewire.inspect(meta("qwen3_next"))
    alone = [one for one in found.families if one.alone]
    assert [one.kind for one in alone] == ["separate attention"]
    assert alone[0].edit is not None
    assert found.plan is not None
    assert alone[0].path not in {edit.target for edit in found.plan.edits}


def test_what_cannot_be_edited_says_why() -> None:
    model = nn.ModuleDict({"attn": nn.ModuleDict({"qkv": nn.Linear(8, 24)})})
    (one,) = rewire.inspect(model).families
    assert one.edit is None
    assert "ambiguous" in str(one.refusal)
    assert "cannot be edited" in text(rewire.inspect(model))


def test_layers_that_differ_get_targets_of_their_own() -> None:
    def layer(rows: int) -> nn.ModuleDict:
        return nn.ModuleDict({name: nn.Linear(8, rows) for name in ("q_proj", "k_proj", "v_proj")})

    model = nn.ModuleDict({"layers": nn.ModuleList([layer(8), layer(8), layer(4), layer(8)])})
    assert {one.path: one.count for one in rewire.inspect(model).families} == {
        "layers.[0,1,3]": 3,
        "layers.2": 1,
    }


@pytest.mark.parametrize(
    ("paths", "others", "expected"),
    [
        (["a.0.b", "a.1.b", "a.2.b"], [], ["a.*.b"]),
        (["a.0.b", "a.1.b", "a.2.b"], ["a.x.b"], ["a.[0-2].b"]),
        (["a.0.b.0", "a.0.b.1", "a.1.b.0", "a.1.b.1"], [], ["a.*.b.*"]),
        (["a.0.b.0", "a.0.b.1", "a.1.b.0", "a.1.b.1", "a.1.b.2"], [], ["a.0.b.*", "a.1.b.*"]),
        (["a.b"], ["a.c"], ["a.b"]),
        ([], ["a"], []),
    ],
)
def test_patterns_cover_their_paths_and_nothing_else(paths: list[str], others: list[str], expected: list[str]) -> None:
    found = patterns(paths, [*paths, *others])
    covered = [path for path in (*paths, *others) if any(Target.parse(one).path_matches(path) for one in found)]
    assert covered == paths
    assert found == expected


def test_alike_layers_are_one_node() -> None:
    found = rewire.inspect(meta("sam"))
    assert find(found.tree, "vision_encoder", "layers") == [
        ("SamVisionLayer", ("0", "1", "3", "4", "6", "7", "9", "10")),
        ("SamVisionLayer", ("2", "5", "8", "11")),
    ]
    assert found.tree.parameters == found.counts.parameters == 93_735_728
    assert "0, 1, 3, …, 10 · 8 × SamVisionLayer" in text(found)


def find(node: Node, *names: str) -> list[tuple[str, tuple[str, ...]]]:
    for name in names:
        (node,) = [child for child in node.children if child.names == (name,)]
    return [(child.module, child.names) for child in node.children]


def test_a_model_of_any_size_takes_seconds() -> None:
    model = meta("deepseek_v3")
    start = time.perf_counter()
    found = rewire.inspect(model)
    assert found.counts.parameters > 600 * 10**9
    assert time.perf_counter() - start < 20  # 1 s on an idle machine


def test_nothing_is_changed() -> None:
    model = small("bert", BERT)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    classes = [type(module) for module in model.modules()]
    rewire.inspect(model)
    assert [type(module) for module in model.modules()] == classes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_edited_model_says_so() -> None:
    model = small("bert", BERT)
    plan = Plan.from_yaml(f"rewire: 1\nedits:\n- {JOIN}\n")
    rewire.apply_(model, plan)
    found = rewire.inspect(model)
    assert found.plan_hash == plan.hash
    assert plan.hash[:12] in text(found)
    assert found.plan is None


def test_a_model_without_projections() -> None:
    found = rewire.inspect(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    assert (found.families, found.plan, found.model_type) == ((), None, None)
    assert "none" in text(found)


def test_json() -> None:
    found = rewire.inspect(small("gpt2", GPT2))
    data = json.loads(found.to_json())
    assert data == json.loads(json.dumps(found.to_dict()))
    assert data["rewire_inspection"] == 1
    assert data["families"][0]["edit"]["split"]["target"] == "h.*.attn.c_attn"
    assert data["tree"]["children"][0]["names"] == ["wte"]


@pytest.mark.parametrize("width", [40, 80, 200])
def test_it_shows_on_screens_of_any_width(width: int) -> None:
    shown = text(rewire.inspect(small("gpt2", GPT2)), width)
    assert max(map(len, shown.splitlines())) <= width
    assert "h.*.attn.c_attn" in shown


def test_the_plan_on_the_screen_can_be_copied() -> None:
    shown = text(rewire.inspect(small("gpt2", GPT2)))
    copied = "\n".join(line.rstrip() for line in shown[shown.index("rewire: 1") :].splitlines())
    found = rewire.inspect(small("gpt2", GPT2)).plan
    assert found is not None
    assert Plan.from_yaml(copied) == found


def test_encoders_are_looked_at_on_request() -> None:
    model = meta("bart", d_model=32, encoder_layers=2, decoder_layers=2)
    assert rewire.inspect(model).encoders is None
    found = rewire.inspect(model, pack=True)
    assert found.encoders is not None
    packed, refused = found.encoders
    assert (packed.path, packed.module, packed.count) == ("encoder.layers", "BartEncoderLayer", 2)
    assert packed.how == "recipe bart"
    assert (refused.path, refused.how) == ("decoder.layers", None)
    assert refused.refusal is not None
    assert "encoder_attn attends to another sequence" in refused.refusal
    shown = text(found, width=200)
    assert "can be packed: recipe bart" in shown
    assert "cannot be packed: BartDecoderLayer: encoder_attn" in shown
