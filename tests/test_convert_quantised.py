"""Quantised checkpoints: what goes with a weight moves with it, or the edit is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from convert_kit import assert_same, plan_of, read_tensors, write_checkpoint
from rewire.errors import RefusedError, RevertError, RewireError
from rewire.stream import convert

OUT, IN = 384, 256
HALVES = {"step": "split", "whole": "x.weight", "parts": ["a.weight", "b.weight"], "sizes": [256, 128]}
RENAME = {"step": "rename", "source": "x.weight", "target": "y.weight"}
GROUPS = {**HALVES, "groups": 64}


def number(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Every value once, as far as the type allows, so that a wrong one shows."""
    count = int(torch.tensor(shape).prod())
    return torch.arange(1, count + 1).reshape(shape).to(dtype)


def bytes_like(*shape: int, dtype: torch.dtype = torch.float8_e4m3fn) -> Tensor:
    random = torch.Generator().manual_seed(sum(shape))
    return torch.randint(0, 255, shape, generator=random, dtype=torch.uint8).view(dtype)


def fp8(scale: Tensor, name: str = "weight_scale") -> dict[str, Tensor]:
    return {"x.weight": bytes_like(OUT, IN), f"x.{name}": scale, "other": number(3)}


def gptq() -> dict[str, Tensor]:
    """4 bits, groups of 128: eight values to an int32, along the inputs."""
    return {
        "x.qweight": number(IN // 8, OUT, dtype=torch.int32),
        "x.qzeros": number(IN // 128, OUT // 8, dtype=torch.int32),
        "x.scales": number(IN // 128, OUT, dtype=torch.float16),
        "x.g_idx": number(IN, dtype=torch.int32) // 128,
    }


def awq() -> dict[str, Tensor]:
    """4 bits, groups of 128: eight values to an int32, along the outputs."""
    return {
        "x.qweight": number(IN, OUT // 8, dtype=torch.int32),
        "x.qzeros": number(IN // 128, OUT // 8, dtype=torch.int32),
        "x.scales": number(IN // 128, OUT, dtype=torch.float16),
    }


def mxfp4(experts: int = 2) -> dict[str, Tensor]:
    return {
        "x.experts_blocks": bytes_like(experts, OUT, IN // 32, 16, dtype=torch.uint8),
        "x.experts_scales": bytes_like(experts, OUT, IN // 32, dtype=torch.uint8),
    }


def there_and_back(
    folder: Path, tensors: Mapping[str, Tensor], *steps: Mapping[str, Any], config: Mapping[str, Any] | None = None
) -> dict[str, Tensor]:
    """What the steps make of a checkpoint; the way back has to lead to it again."""
    source = write_checkpoint(folder / "source", tensors, config=config)
    convert(source, folder / "edited", plan_of(*steps))
    convert(folder / "edited", folder / "back", revert=True)
    assert_same(read_tensors(folder / "back"), tensors)
    return read_tensors(folder / "edited")


def refused(folder: Path, tensors: Mapping[str, Tensor], step: Mapping[str, Any], reason: str, **options: Any) -> None:
    source = write_checkpoint(folder / "source", tensors, **options)
    with pytest.raises(RewireError, match=reason):
        convert(source, folder / "edited", plan_of(step))
    assert sorted(path.name for path in folder.iterdir()) == ["source"]


@pytest.mark.parametrize("shape", [(OUT,), (OUT, 1)])
def test_scales_of_rows_are_split_with_the_rows(tmp_path: Path, shape: tuple[int, ...]) -> None:
    scale = number(*shape)
    found = there_and_back(tmp_path, fp8(scale), HALVES)
    assert set(found) == {"a.weight", "b.weight", "a.weight_scale", "b.weight_scale", "other"}
    assert torch.equal(found["a.weight_scale"], scale[:256])
    assert torch.equal(found["b.weight_scale"], scale[256:])


def test_interleaved_rows_too(tmp_path: Path) -> None:
    scale = number(OUT)
    found = there_and_back(tmp_path, fp8(scale), GROUPS)
    assert torch.equal(found["a.weight_scale"], scale.reshape(64, 6)[:, :4].reshape(-1))
    assert torch.equal(found["b.weight_scale"], scale.reshape(64, 6)[:, 4:].reshape(-1))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_scale_serves_all_parts(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensors = fp8(torch.full(shape, 0.5)) | {"x.input_scale": torch.tensor(3.0)}
    found = there_and_back(tmp_path, tensors, HALVES)
    for part in ("a", "b"):
        assert torch.equal(found[f"{part}.weight_scale"], tensors["x.weight_scale"])
        assert torch.equal(found[f"{part}.input_scale"], tensors["x.input_scale"])


def test_joining_needs_equal_scales(tmp_path: Path) -> None:
    join = {"step": "join", "whole": "x.weight", "parts": ["a.weight", "b.weight"], "sizes": [4, 2]}
    tensors = {"a.weight": bytes_like(4, 8), "b.weight": bytes_like(2, 8)}
    alike = {"a.weight_scale": torch.tensor(2.0), "b.weight_scale": torch.tensor(2.0)}
    found = there_and_back(tmp_path / "alike", tensors | alike, join)
    assert set(found) == {"x.weight", "x.weight_scale"}
    (tmp_path / "other").mkdir()
    other = {"a.weight_scale": torch.tensor(2.0), "b.weight_scale": torch.tensor(3.0)}
    refused(tmp_path / "other", tensors | other, join, "different scale")
    (tmp_path / "half").mkdir()
    refused(tmp_path / "half", tensors | {"a.weight_scale": torch.tensor(2.0)}, join, "others are not")


def test_a_way_back_that_would_lead_elsewhere_is_refused(tmp_path: Path) -> None:
    """Two rows with equal scales become two weights of one row; whose scales may be read as one for all."""
    tensors = {"x.weight": bytes_like(2, 8), "x.weight_scale": torch.ones(2)}
    source = write_checkpoint(tmp_path / "source", tensors)
    convert(source, tmp_path / "edited", plan_of({**HALVES, "sizes": [1, 1]}))
    with pytest.raises(RevertError, match="in two ways"):
        convert(tmp_path / "edited", tmp_path / "back", revert=True)
    assert not (tmp_path / "back").exists()


def test_blocks_of_128_are_never_cut(tmp_path: Path) -> None:
    tensors = fp8(number(3, 2), "weight_scale_inv")
    found = there_and_back(tmp_path / "a", tensors, HALVES)
    assert torch.equal(found["a.weight_scale_inv"], tensors["x.weight_scale_inv"][:2])
    assert torch.equal(found["b.weight_scale_inv"], tensors["x.weight_scale_inv"][2:])
    (tmp_path / "b").mkdir()
    refused(tmp_path / "b", tensors, {**HALVES, "sizes": [192, 192]}, "192 rows would cut the groups of 128")
    (tmp_path / "c").mkdir()
    refused(tmp_path / "c", tensors, GROUPS, "cut the groups of 128")


def test_the_last_block_may_be_smaller(tmp_path: Path) -> None:
    config = {"quantization_config": {"weight_block_size": [128, 128]}}
    tensors = {"x.weight": bytes_like(576, 128), "x.weight_scale_inv": number(5, 1)}
    step = {**HALVES, "sizes": [512, 64]}
    found = there_and_back(tmp_path, tensors, step, config=config)
    assert found["a.weight_scale_inv"].shape == (4, 1)
    assert found["b.weight_scale_inv"].shape == (1, 1)


def test_blocks_turn_with_their_weight(tmp_path: Path) -> None:
    tensors = fp8(number(3, 2), "weight_scale_inv")
    found = there_and_back(tmp_path, tensors, {"step": "transpose", "source": "x.weight", "target": "x.weight"})
    assert torch.equal(found["x.weight_scale_inv"], tensors["x.weight_scale_inv"].T)


def test_scales_of_rows_cannot_turn(tmp_path: Path) -> None:
    refused(
        tmp_path, fp8(number(OUT)), {"step": "transpose", "source": "x.weight", "target": "x.weight"}, "rows become"
    )


def test_experts_are_stacked_and_unstacked_with_their_scales(tmp_path: Path) -> None:
    tensors = {f"e.{n}.w.weight": bytes_like(256, 128) for n in range(3)}
    tensors |= {f"e.{n}.w.weight_scale_inv": number(2, 1) + n for n in range(3)}
    stack = {"step": "stack", "whole": "e.w", "parts": ["e.{0..2}.w.weight"]}
    found = there_and_back(tmp_path, tensors, stack)
    assert set(found) == {"e.w", "e.w_scale_inv"}
    assert torch.equal(found["e.w_scale_inv"][2], tensors["e.2.w.weight_scale_inv"])


def test_a_whole_way_through_several_steps(tmp_path: Path) -> None:
    """Gate and up of stacked experts with scales for their columns are turned, cut apart and unstacked."""
    tensors = {"e.gate_up": bytes_like(2, 16, 12), "e.gate_up_scale": number(2, 1, 12)}
    steps = [
        {"step": "transpose", "source": "e.gate_up", "target": "e.gate_up"},
        {"step": "split", "whole": "e.gate_up", "parts": ["e.gate", "e.up"], "sizes": [6, 6], "groups": 6, "dim": 1},
        {"step": "unstack", "whole": "e.gate", "parts": ["e.{0..1}.gate.weight"]},
        {"step": "unstack", "whole": "e.up", "parts": ["e.{0..1}.up.weight"]},
    ]
    found = there_and_back(tmp_path, tensors, *steps)
    assert torch.equal(found["e.1.up.weight_scale"].flatten(), tensors["e.gate_up_scale"][1, 0, 1::2])


def test_rows_that_are_permuted_or_dropped(tmp_path: Path) -> None:
    scale = number(OUT)
    permute = {"step": "permute", "source": "x.weight", "target": "x.weight", "grid": [2, 192], "order": [1, 0]}
    found = there_and_back(tmp_path / "a", fp8(scale), permute)
    assert torch.equal(found["x.weight_scale"], scale.reshape(2, 192).T.reshape(-1))
    keep = {"step": "keep_rows", "source": "x.weight", "target": "x.weight", "rows": [5, 1], "total": OUT}
    convert(write_checkpoint(tmp_path / "source", fp8(scale)), tmp_path / "kept", plan_of(keep))
    assert torch.equal(read_tensors(tmp_path / "kept")["x.weight_scale"], scale[[5, 1]])
    (tmp_path / "b").mkdir()
    refused(tmp_path / "b", fp8(number(3, 2), "weight_scale_inv"), permute, "cut the blocks of 128")


def test_dropping_a_weight_drops_its_scales(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", fp8(number(OUT)))
    convert(source, tmp_path / "edited", plan_of({"step": "drop", "source": "x.weight"}))
    assert set(read_tensors(tmp_path / "edited")) == {"other"}


@pytest.mark.parametrize("tensors", [gptq(), awq()], ids=["gptq", "awq"])
def test_packed_integers_are_split_where_no_number_is_cut(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    found = there_and_back(tmp_path / "a", tensors, HALVES)
    assert torch.equal(found["b.scales"], tensors["x.scales"][:, 256:])
    assert torch.equal(found["b.qzeros"], tensors["x.qzeros"][:, 32:])
    columns = slice(256, None) if "x.g_idx" in tensors else slice(32, None)
    assert torch.equal(found["b.qweight"], tensors["x.qweight"][:, columns])
    assert ("b.g_idx" in found) == ("x.g_idx" in tensors)
    for number_, (step, reason) in enumerate(
        [
            ({**HALVES, "sizes": [252, 132]}, "cut the groups of 8"),
            ({**HALVES, "sizes": [256, 120]}, "without a dimension 0 of 376"),
            ({**HALVES, "sizes": [100, 156], "dim": 1}, "cut the groups of"),
            (
                {"step": "cast", "source": "x.weight", "target": "y", "dtype": "float16", "from_dtype": "float32"},
                "quan",
            ),
        ]
    ):
        (tmp_path / str(number_)).mkdir()
        refused(tmp_path / str(number_), tensors, step, reason)


def test_the_inputs_of_gptq_are_not_cut(tmp_path: Path) -> None:
    """Its g_idx numbers the groups; a part of it would begin with another number than 0."""
    refused(tmp_path, gptq(), {**HALVES, "sizes": [128, 128], "dim": 1}, "cut the groups of 256")


def test_mxfp4_experts(tmp_path: Path) -> None:
    tensors = mxfp4()
    steps = [
        {"step": "transpose", "source": "x.experts", "target": "x.experts"},
        {
            "step": "split", "whole": "x.experts", "parts": ["x.gate", "x.up"], "sizes": [192, 192], "groups": 192,
            "dim": 1,
        },
        {"step": "unstack", "whole": "x.gate", "parts": ["x.{0..1}.gate.weight"]},
        {"step": "unstack", "whole": "x.up", "parts": ["x.{0..1}.up.weight"]},
    ]  # fmt: skip
    found = there_and_back(tmp_path, tensors, *steps)
    assert torch.equal(found["x.1.up.weight_blocks"], tensors["x.experts_blocks"][1, 1::2])
    assert torch.equal(found["x.1.up.weight_scales"], tensors["x.experts_scales"][1, 1::2])


@pytest.mark.parametrize(
    "companions",
    [
        {
            "x.weight.absmax": number(6),
            "x.weight.quant_map": number(16),
            "x.weight.quant_state.bitsandbytes__nf4": number(9),
        },
        {"x.weight_scale": number(7)},
    ],
    ids=["bitsandbytes", "of unknown layout"],
)
def test_what_speaks_of_the_whole_weight_is_renamed_and_nothing_else(
    tmp_path: Path, companions: dict[str, Tensor]
) -> None:
    tensors = {"x.weight": bytes_like(OUT, IN, dtype=torch.uint8), **companions}
    found = there_and_back(tmp_path / "a", tensors, RENAME)
    assert set(found) == {name.replace("x.", "y.") for name in tensors}
    (tmp_path / "b").mkdir()
    refused(tmp_path / "b", tensors, HALVES, "speaks of the tensor as a whole")


def test_compressed_tensors_are_renamed_and_nothing_else(tmp_path: Path) -> None:
    tensors = {
        "x.weight_packed": number(OUT, IN // 8, dtype=torch.int32),
        "x.weight_scale": number(OUT, 2),
        "x.weight_shape": torch.tensor([OUT, IN]),
    }
    found = there_and_back(tmp_path / "a", tensors, RENAME)
    assert set(found) == {name.replace("x.", "y.") for name in tensors}
    (tmp_path / "b").mkdir()
    refused(tmp_path / "b", tensors, HALVES, "speaks of the tensor as a whole")


def test_names_that_only_look_like_companions(tmp_path: Path) -> None:
    """A module that is not quantised may have parameters called so."""
    tensors = {"x.weight": number(OUT, 4), "x.scales": number(3), "x.input_scale": number(2), "q": number(6, 2)}
    tensors |= {"q_scale": number(6)}
    split = {"step": "split", "whole": "q", "parts": ["k", "v"], "sizes": [3, 3]}
    found = there_and_back(tmp_path, tensors, HALVES, split)
    assert {"x.scales", "x.input_scale", "q_scale"} < set(found)


def test_steps_that_name_the_companions_themselves_are_followed(tmp_path: Path) -> None:
    scales = {"step": "split", "whole": "x.weight_scale", "parts": ["s", "t"], "sizes": [1, OUT - 1]}
    found = there_and_back(tmp_path, fp8(number(OUT)), HALVES, scales)
    assert set(found) == {"a.weight", "b.weight", "s", "t", "other"}


def test_a_bias_is_not_left_without_its_weight(tmp_path: Path) -> None:
    tensors = {"x.weight": number(OUT, 2), "x.bias": number(OUT)}
    refused(tmp_path, tensors, HALVES, r"x\.bias would stay")
    with pytest.raises(RefusedError):
        convert(tmp_path / "source", tmp_path / "edited", plan_of(RENAME))
    bias = {**HALVES, "whole": "x.bias", "parts": ["a.bias", "b.bias"]}
    convert(tmp_path / "source", tmp_path / "edited", plan_of(HALVES, bias))
    inside = {"step": "rename", "source": "x.weight", "target": "x.parametrizations.weight"}
    convert(tmp_path / "source", tmp_path / "inside", plan_of(inside))


def test_lists_of_modules_in_the_configuration_must_stay_true(tmp_path: Path) -> None:
    config = {"quantization_config": {"quant_method": "fp8", "modules_to_not_convert": ["x", "lm_head"]}}
    tensors = {"x.weight": number(OUT, 2)}
    refused(tmp_path, tensors, HALVES, "quantization_config names 'x'", config=config)
    right = {"quantization_config": {"modules_to_not_convert": ["a", "b", "lm_head"]}}
    convert(tmp_path / "source", tmp_path / "edited", plan_of(HALVES, config=right))
    assert json.loads((tmp_path / "edited/config.json").read_text())["quantization_config"] == {
        "quant_method": "fp8", "modules_to_not_convert": ["a", "b", "lm_head"],
    }  # fmt: skip
