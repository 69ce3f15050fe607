"""What memory a model takes, told from its configuration: known facts, real caches, real peaks."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import rewire
from cli_runner import config, save_model
from cli_runner import rewire as run_rewire
from rewire import hf_seam
from rewire.errors import CheckpointError, MeasureError, NoMatchError
from rewire.live import apply_
from rewire.measure.anatomy import Anatomy, Blueprint, Change, Settings, anatomy, measure, measured
from rewire.measure.anatomy.cache import UnknownCache, cache_size
from rewire.measure.anatomy.inputs import inputs_for
from rewire.measure.anatomy.memory import Training, optimizer_bytes, training
from rewire.measure.anatomy.meter import Meter
from rewire.measure.anatomy.page import HEIGHT, WIDTH, Box, page, squarify
from rewire.measure.anatomy.record import saving
from rewire.measure.anatomy.running import cached_bytes
from rewire.measure.anatomy.steps import infer, keeps_cache
from rewire.measure.anatomy.tree import Part, tree
from rewire.plan import Cast, Lora, Plan, Split
from rewire.zoo import Unavailable, tiny_config, tiny_model
from rewire.zoo.table import ENTRIES

LLAMA = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 704,
    "vocab_size": 4000,
}
LORA = Plan([Lora(target=("q_proj", "v_proj"), r=8)])


def blueprint(model_type: str, architecture: str | None = None, dtype: str = "auto", **values: Any) -> Blueprint:
    return Blueprint.of(f"config:{model_type}", hf_seam.model_config(model_type, values), architecture, dtype)


def llama(dtype: str = "auto", **values: Any) -> Blueprint:
    return blueprint("llama", "LlamaForCausalLM", dtype, **{**LLAMA, **values})


def known(step: Training | None) -> Training:
    assert step is not None
    return step


# ---------------------------------------------------------------- known facts


@pytest.mark.parametrize(
    ("model_type", "architecture", "values", "gigabytes", "tolerance"),
    [
        (
            "llama",
            "LlamaForCausalLM",
            {
                "hidden_size": 8192,
                "num_hidden_layers": 80,
                "num_attention_heads": 64,
                "num_key_value_heads": 8,
                "intermediate_size": 28672,
            },
            140,
            0.02,
        ),
        (
            "falcon",
            "FalconForCausalLM",
            {
                "hidden_size": 8192,
                "num_hidden_layers": 60,
                "num_attention_heads": 128,
                "num_kv_heads": 8,
                "new_decoder_architecture": True,
                "vocab_size": 65024,
            },
            80,
            0.05,  # it has 41.8 billion parameters, whatever its name says
        ),
        (
            "mpt",
            "MptForCausalLM",
            {"d_model": 7168, "n_layers": 48, "n_heads": 64, "vocab_size": 50432},
            60,
            0.01,
        ),
        ("bloom", "BloomForCausalLM", {"hidden_size": 14336, "n_layer": 70, "n_head": 112}, 352, 0.01),
    ],
)
def test_published_sizes_in_two_bytes(
    model_type: str, architecture: str, values: dict[str, Any], gigabytes: float, tolerance: float
) -> None:
    if model_type == "bloom":
        values = {**values, "vocab_size": 250880}
    found = tree(blueprint(model_type, architecture, "bfloat16", **values).on_meta())
    assert found.bytes == pytest.approx(gigabytes * 1e9, rel=tolerance)
    assert found.bytes == pytest.approx(2 * found.parameters, rel=1e-6)


def test_bert_large() -> None:
    values = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    found = tree(blueprint("bert", **values).on_meta())
    assert found.parameters == pytest.approx(335e6, rel=0.002)
    assert found.bytes == pytest.approx(1.34e9, rel=0.002)


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2), ("float16", 2), ("float64", 8)])
def test_bytes_of_a_parameter(dtype: str, size: int) -> None:
    model = llama(dtype).on_meta()
    assert sum(one.nbytes for one in model.parameters()) == size * sum(one.numel() for one in model.parameters())


def test_cache_of_16000_tokens() -> None:
    values = {"hidden_size": 48 * 128, "num_hidden_layers": 40, "num_attention_heads": 48, "num_key_value_heads": 48}
    found = cache_size(hf_seam.model_config("llama", values), Settings(length=16_000), torch.float16)
    assert found.values == 7_864_320_000
    assert found.bytes / 2**30 == pytest.approx(14.65, abs=0.01)  # "15 GB"
    assert found.kind == "multi-head (48)"


@pytest.mark.parametrize(("groups", "kind"), [(8, "grouped (8 of 48 heads)"), (1, "multi-query (1 of 48 heads)")])
def test_fewer_heads_make_the_cache_smaller_in_proportion(groups: int, kind: str) -> None:
    values = {"hidden_size": 48 * 128, "num_hidden_layers": 40, "num_attention_heads": 48}
    found = cache_size(
        hf_seam.model_config("llama", {**values, "num_key_value_heads": groups}), Settings(length=16_000), torch.float16
    )
    assert (found.values * 48, found.kind) == (7_864_320_000 * groups, kind)


def test_bytes_of_optimizers() -> None:
    sizes = {kind: optimizer_bytes(kind, 1000) for kind in ("adamw", "adamw-8bit", "sgd-momentum", "sgd")}  # type: ignore[arg-type]
    assert sizes == {"adamw": 8000, "adamw-8bit": 2000, "sgd-momentum": 4000, "sgd": 0}


def test_mixed_precision_takes_six_bytes_of_weights_for_each_parameter() -> None:
    model = llama().on_meta()
    parameters = sum(one.numel() for one in model.parameters())
    found = training(model, "no run", Settings(train=True, mixed_precision=True))
    assert found.weights + found.copies == pytest.approx(6 * parameters, rel=1e-4)
    assert (found.gradients, found.optimizer) == (4 * parameters, 8 * parameters)
    assert found.states == pytest.approx(18 * parameters, rel=1e-4)


def test_a_model_of_671_billion_parameters() -> None:
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = anatomy(blueprint("deepseek_v3", "DeepseekV3ForCausalLM", "bfloat16"), Settings(length=64))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # kilobytes
    assert found.tree.parameters == pytest.approx(671e9, rel=0.001)
    assert found.inference.cache.bytes == 64 * 61 * (512 + 64) * 2
    assert found.cache_kind == "latent"
    assert found.flops is not None
    assert 2 * 35e9 < found.flops < 2 * 40e9  # 37 billion parameters are active


# ---------------------------------------------------------------- the cache against real ones


def real_and_told(model_type: str, cache: Any) -> tuple[int | None, int | None]:
    """Bytes of the cache of a real model and by the formula; None for the one that is not known."""
    model = tiny_model(model_type).float()
    if not keeps_cache(model):
        return None, None
    settings = Settings(batch=2, length=24, cache=cache)
    inputs = inputs_for(model, settings)
    if "input_ids" not in inputs:
        return None, None
    settings = replace(settings, length=inputs["input_ids"].shape[-1])
    try:
        told = cache_size(model.config, settings, torch.float32).bytes
    except UnknownCache:
        return None, None
    return cached_bytes(infer(model, inputs, settings)), told


MULTI = ["gpt2", "opt", "bloom", "mpt", "gpt_neox", "gptj", "codegen"]
GROUPED = ["llama", "mistral", "qwen2", "phi3", "cohere", "dbrx", "falcon", "gpt_bigcode", "qwen3_moe"]
WINDOWS = ["gemma2", "gemma3_text", "gemma4_text", "gpt_oss", "llama4_text", "cohere2"]
LATENT = ["deepseek_v2", "deepseek_v3", "minicpm3", "youtu", "deepseek_v32", "hy_v4"]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("model_type", [*MULTI, *GROUPED, *WINDOWS, *LATENT])
def test_the_formula_gives_what_the_cache_really_holds(model_type: str, cache: str) -> None:
    if cache == "static" and not hf_seam.takes_static_cache(tiny_model(model_type)):
        pytest.skip(f"{model_type} takes no static cache")
    real, told = real_and_told(model_type, cache)
    assert real is not None
    assert told == real


@pytest.mark.parametrize("model_type", ["t5", "bart", "pegasus", "t5gemma"])
def test_the_cache_of_a_decoder_holds_the_encoder_too(model_type: str) -> None:
    real, told = real_and_told(model_type, "dynamic")
    assert real is not None
    assert told == real


def test_a_recording_is_as_long_for_the_decoder_as_the_run_says() -> None:
    found = anatomy(Blueprint.of("whisper", tiny_config("whisper")), Settings(length=16))
    assert found.inference.cache.bytes
    assert found.notes == ()


@pytest.mark.sweep
@pytest.mark.parametrize("model_type", hf_seam.auto_model_types())
def test_no_model_type_is_told_a_wrong_cache(model_type: str) -> None:
    try:
        real, told = real_and_told(model_type, "dynamic")
    except (Unavailable, MeasureError) as error:
        pytest.skip(str(error))
    except (TypeError, ValueError, RuntimeError) as error:
        pytest.skip(f"{model_type} does not run on these inputs: {error}")
    assert real is None or told == real


def test_where_the_configuration_does_not_tell_the_run_does() -> None:
    made = tiny_config("qwen3_next")
    with pytest.raises(UnknownCache, match="LinearAttentionLayer, whose size only a run tells"):
        cache_size(made, Settings(length=16), torch.float32)
    found = anatomy(Blueprint.of("qwen3_next", made, dtype="bfloat16"), Settings(length=16))
    assert found.inference.cache.bytes


# ---------------------------------------------------------------- predicted and real peaks

NEED_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak memory of a run")
VIT = {"hidden_size": 384, "num_hidden_layers": 4, "num_attention_heads": 6, "intermediate_size": 1536}
T5 = {"d_model": 256, "d_kv": 32, "d_ff": 1024, "num_layers": 3, "num_heads": 8, "vocab_size": 8000}


@NEED_LINUX
@pytest.mark.parametrize("name", ["minilm", "llama", "vit", "t5"])
def test_predictions_are_within_a_tenth_of_real_peaks(name: str, request: pytest.FixtureRequest) -> None:
    if name == "minilm":
        plan = Blueprint.saved(str(request.getfixturevalue("minilm_path")))
    elif name == "llama":
        plan = llama()
    elif name == "vit":
        plan = blueprint("vit", **VIT)
    else:
        plan = blueprint("t5", "T5ForConditionalGeneration", **T5)
    found = measure(anatomy(plan, Settings(batch=8, length=128, train=True)), plan)
    deviations = {what: found.deviation(what) for what in ("load", "inference", "training")}
    assert all(one is not None and abs(one) < 0.1 for one in deviations.values()), (deviations, found.measured)


@NEED_LINUX
def test_lora_with_checkpointing_is_predicted_too() -> None:
    plan = llama().with_plan(LORA)
    settings = Settings(batch=8, length=128, train=True, gradient_checkpointing=True, optimizer="sgd-momentum")
    found = measure(anatomy(plan, settings), plan)
    deviation = found.deviation("training")
    assert deviation is not None
    assert abs(deviation) < 0.1, found.measured


def test_what_torch_has_no_optimizer_for_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "is_possible", lambda: True)
    monkeypatch.setattr(measured, "_run", lambda *given: {"load": 10, "inference": 20})
    plan = llama(num_hidden_layers=1, vocab_size=100)
    found = measure(anatomy(plan, Settings(length=8, train=True, optimizer="adamw-8bit")), plan)
    assert found.measured is not None
    assert (found.measured.training, found.measured.note) == (None, "torch has no adamw-8bit")
    assert found.deviation("training") is None
    assert "training not measured: torch has no adamw-8bit" in page(found)


def test_a_system_that_does_not_tell_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "is_possible", lambda: False)
    plan = llama(num_hidden_layers=1, vocab_size=100)
    with pytest.raises(MeasureError, match="only Linux tells the peak memory of a run"):
        measure(anatomy(plan, Settings(length=8)), plan)


@NEED_LINUX
def test_a_run_that_fails_is_an_error() -> None:
    plan = llama(num_hidden_layers=1, vocab_size=100)
    found = anatomy(plan, Settings(length=8))
    broken = replace(plan, plan=Plan([Split("nowhere", into=("a", "b"))]))
    with pytest.raises(MeasureError, match=r"the run of config:llama has failed: .*"):
        measure(found, broken)


# ---------------------------------------------------------------- runs that are pretended


def test_flops_are_those_of_the_matrices_and_of_attention() -> None:
    found = anatomy(llama(), Settings(batch=2, length=32))
    layers, width, length = LLAMA["num_hidden_layers"], LLAMA["hidden_size"], 32
    in_matrices = found.tree.parameters - LLAMA["vocab_size"] * width - (2 * layers + 1) * width
    assert found.flops == 2 * in_matrices + layers * 4 * length * width


def test_gradient_checkpointing_keeps_less_and_computes_the_same() -> None:
    plain, less = (
        anatomy(llama(), Settings(batch=4, length=64, train=True, gradient_checkpointing=wanted))
        for wanted in (False, True)
    )
    kept = [known(one.training).activations.bytes for one in (plain, less)]
    assert kept[1] is not None
    assert kept[0] is not None
    assert kept[1] < kept[0] / 2
    assert plain.flops == less.flops


def test_peaks_grow_with_the_batch_and_states_do_not() -> None:
    small, large = (known(anatomy(llama(), Settings(batch=n, length=64, train=True)).training) for n in (1, 4))
    assert small.states == large.states == pytest.approx(4 * small.weights, rel=0.001)
    assert small.activations.bytes is not None
    assert large.activations.bytes == pytest.approx(4 * small.activations.bytes, rel=0.02)


def test_a_run_that_cannot_be_pretended_is_a_reason_not_a_guess() -> None:
    values = {"num_hidden_layers": 1, "vocab_size": 100, "hidden_size": 64, "intermediate_size": 64}
    values |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    made = hf_seam.model_config("mixtral", values)
    made._experts_implementation = "eager"  # which experts run depends on the values of the router
    found = anatomy(Blueprint.of("mixtral", made, "MixtralForCausalLM"), Settings(length=16, train=True))
    assert found.inference.tensors.bytes is None
    assert found.inference.total.bytes is None
    assert found.inference.tensors.reason.startswith("what the model computes depends on the values of tensors")
    assert found.inference.total.reason == found.inference.tensors.reason
    assert found.tree.flops is None
    assert found.flops is None
    assert found.inference.cache.bytes == 16 * 2 * 2 * 16 * 4
    step = known(found.training)
    assert (step.optimizer, step.total.bytes) == (2 * step.gradients, None)
    assert found.inference.tensors.reason in page(found)


def test_a_text_longer_than_the_model_takes_is_a_reason() -> None:
    found = anatomy(blueprint("bert", num_hidden_layers=1), Settings(length=600))
    assert "600" in found.inference.tensors.reason
    assert found.tree.parameters


def test_no_cache_where_none_is_wanted_or_kept() -> None:
    with_cache, without = (anatomy(llama(), Settings(length=64, cache=kind)) for kind in ("dynamic", "none"))  # type: ignore[arg-type]
    assert with_cache.inference.cache.bytes == 4 * 64 * 4 * 2 * 32 * 4
    assert without.inference.cache.bytes == 0
    assert anatomy(blueprint("bert", num_hidden_layers=1)).inference.cache.bytes == 0


def test_a_static_cache_is_refused_behind_an_encoder() -> None:
    with pytest.raises(MeasureError, match="a static cache is for decoders alone"):
        anatomy(blueprint("t5", **T5), Settings(cache="static"))


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 50)), max_size=20))
def test_the_meter_counts_what_lives(steps: list[tuple[bool, int]]) -> None:
    living: list[torch.Tensor] = []
    now = peak = 0
    with Meter([]) as meter:
        for is_new, size in steps:
            if is_new or not living:
                living.append(torch.empty(size, dtype=torch.uint8))
                now += size
                peak = max(peak, now)
                living[-1].view(-1)  # a view is no new memory
            else:
                now -= living.pop(size % len(living)).numel()
        assert (meter.now, meter.peak) == (now, peak)
        living.clear()
        assert meter.now == 0


# ---------------------------------------------------------------- the tree


def added(part: Part, figure: str) -> int:
    """A figure of the leaves and of what modules hold besides, added up along the tree."""
    children = sum(child.count * getattr(child, figure) for child in part.children)
    own = getattr(part, figure) - children
    assert own >= 0
    return own + sum(child.count * added(child, figure) for child in part.children)


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "t5", "vit", "qwen3_moe"])
def test_the_tree_adds_up_to_the_model(model_type: str) -> None:
    entry = ENTRIES.get(model_type)
    made = Blueprint.of(model_type, tiny_config(model_type), entry.architecture if entry else None, "bfloat16")
    found, model = anatomy(made, Settings(batch=2, length=16, train=True)), tiny_model(model_type)
    assert found.tree.parameters == added(found.tree, "parameters") == sum(one.numel() for one in model.parameters())
    assert found.tree.bytes == added(found.tree, "bytes")


def test_parameters_that_are_tied_count_once() -> None:
    values = {"n_layer": 1, "n_embd": 32, "n_head": 4, "vocab_size": 99, "n_positions": 64}
    found = tree(blueprint("gpt2", "GPT2LMHeadModel", **values).on_meta())
    head = next(part for part in found.children if part.names == ("lm_head",))
    assert (head.parameters, found.parameters) == (0, tree(blueprint("gpt2", **values).on_meta()).parameters)


def test_layers_that_are_alike_are_one_part_and_others_are_not() -> None:
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 4)])
    assert [part.names for part in tree(model).children] == [("0", "1", "3"), ("2",)]


# ---------------------------------------------------------------- plans


def test_only_what_is_trained_has_gradients() -> None:
    settings = Settings(batch=2, length=32, train=True)
    found = Change(anatomy(llama(), settings), anatomy(llama().with_plan(LORA), settings))
    rank, wide, narrow = 8, LLAMA["hidden_size"], LLAMA["hidden_size"] // 2
    trained = LLAMA["num_hidden_layers"] * rank * ((wide + wide) + (wide + narrow))
    after = known(found.after.training)
    assert found.after.tree.trainable == trained
    assert (after.gradients, after.optimizer) == (4 * trained, 8 * trained)
    saved = found.saving("training")
    assert saved is not None
    assert 0 < saved < 1
    assert found.to_dict()["saving"]["training"] == saved


@pytest.mark.parametrize("plan", [LORA, Plan([Cast("layers.*.mlp", dtype="bfloat16")])])
def test_an_edited_skeleton_is_as_large_as_the_edited_model(plan: Plan) -> None:
    made = blueprint("llama", **LLAMA)
    real = made.real()
    apply_(real, plan, hashes=False)
    found = tree(made.with_plan(plan).on_meta())
    assert found.parameters == sum(one.numel() for one in real.parameters())
    assert found.trainable == sum(one.numel() for one in real.parameters() if one.requires_grad)
    assert found.bytes == sum(one.nbytes for one in (*real.parameters(), *real.buffers()))


def test_a_plan_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(NoMatchError):
        anatomy(llama().with_plan(Plan([Split("nowhere", into=("a", "b"))])))


def test_a_folder_that_a_plan_has_edited_already(tmp_path: Path) -> None:
    values = {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 99, "n_positions": 64}
    source = save_model(tmp_path / "model", "gpt2", values)
    model = rewire.load(source, Plan([Lora(target="h.*.attn.c_attn", r=2)]))
    rewire.save(model, tmp_path / "edited")
    made = Blueprint.saved(str(tmp_path / "edited"))
    assert tree(made.on_meta()).trainable == 2 * 2 * (32 + 96)
    with pytest.raises(MeasureError, match="has edited already; name the original"):
        made.with_plan(LORA)


@pytest.mark.parametrize(("before", "after", "share"), [(200, 50, 0.75), (100, 100, 0.0), (100, 150, -0.5)])
def test_a_saving_is_what_is_not_needed_any_more(before: int, after: int, share: float) -> None:
    assert saving(before, after) == share


# ---------------------------------------------------------------- the page


@given(st.lists(st.floats(1, 1e4), min_size=1, max_size=30))
def test_areas_of_the_map_are_in_proportion_and_inside(sizes: list[float]) -> None:
    sizes.sort(reverse=True)
    boxes = squarify(sizes, Box(0, 0, WIDTH, HEIGHT))
    assert len(boxes) == len(sizes)
    for size, box in zip(sizes, boxes, strict=True):
        assert box.area == pytest.approx(size / sum(sizes) * WIDTH * HEIGHT, rel=1e-6)
        assert min(box.x, box.y) >= 0
        assert box.x + box.width <= WIDTH * (1 + 1e-6)
        assert box.y + box.height <= HEIGHT * (1 + 1e-6)


def test_the_page_needs_nothing_else_and_shows_every_larger_module() -> None:
    found = anatomy(llama(), Settings(length=16, train=True))
    text = page(found)
    assert "http" not in text
    assert "prefers-color-scheme: dark" in text
    for path in ("model.embed_tokens", "model.layers.0.mlp.gate_proj", "model.layers.3.self_attn.q_proj", "lm_head"):
        assert f'data-text="{path} (' in text
    assert "1,024,000 parameters · 4.10 MB" in text


def test_names_on_the_page_are_text() -> None:
    found = replace(anatomy(llama(num_hidden_layers=1), Settings(length=8)), name="<script>alert(1)</script>")
    assert "<script>alert" not in page(found)


# ---------------------------------------------------------------- the command


def arguments(**values: Any) -> list[str]:
    return [*config("llama", {**LLAMA, **values}), "--architecture", "LlamaForCausalLM"]


def test_the_command_prints_the_tree_and_the_memory() -> None:
    found = run_rewire("anatomy", *arguments(), "--train", "--length", 16, "--batch", 2)
    assert found.code == 0, found.err
    for text in ("0…3 4 × LlamaDecoderLayer", "memory at batch 2, length 16", "training: peak", "optimizer, adamw"):
        assert text in found.out
    assert "grouped (4 of 8 heads)" in found.out


def test_the_command_gives_json_and_a_page_side_by_side(tmp_path: Path) -> None:
    plan = tmp_path / "lora.yaml"
    LORA.write(plan)
    given = (*arguments(), "--plan", plan, "--train", "--length", 16, "--html", tmp_path / "a.html", "--json")
    found = run_rewire("anatomy", *given)
    assert found.code == 0, found.err
    assert found.json["before"]["parameters"] < found.json["after"]["parameters"]
    assert found.json["saving"]["training"] > 0
    text = (tmp_path / "a.html").read_text("utf-8")
    assert text.count("<svg") == 2
    assert "after the plan" in text


def test_depth_limits_the_tree() -> None:
    found = run_rewire("anatomy", *arguments(), "--length", 8, "--depth", 1)
    assert "lm_head" in found.out
    assert "embed_tokens" not in found.out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["config:llama", "--architecture", "LlamaForNothing"], "has no class of this name"),
        (["config:lama"], "unknown model type 'lama'"),
        (["./nowhere"], "does not exist"),
        (["config:t5", "--cache", "static"], "a static cache is for decoders alone"),
    ],
)
def test_bad_input_is_named(given: list[str], message: str) -> None:
    found = run_rewire("anatomy", *given)
    assert found.code != 0
    assert message in found.err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch": 0}, "batch is 0; it must be at least 1"),
        ({"length": -1}, "length is -1"),
        ({"cache": "big"}, "unknown cache 'big'; known are dynamic, static, none"),
        ({"optimizer": "lion"}, "unknown optimizer 'lion'"),
    ],
)
def test_settings_that_mean_nothing(given: dict[str, Any], message: str) -> None:
    with pytest.raises(MeasureError, match=message):
        Settings(**given)


def test_a_configuration_that_no_model_can_be_made_of() -> None:
    with pytest.raises(CheckpointError, match="no model can be made of the configuration of config:bert"):
        anatomy(blueprint("bert", hidden_size=100, num_attention_heads=12))


def test_json_holds_everything(tmp_path: Path) -> None:
    found: Anatomy = anatomy(llama(num_hidden_layers=1), Settings(length=8, train=True))
    data = found.to_dict()
    assert data["rewire_anatomy"] == 1
    assert data["training"]["total"]["bytes"] == known(found.training).total.bytes
    assert data["tree"]["children"][0]["names"] == ["model"]
    assert found.to_json().startswith("{")
