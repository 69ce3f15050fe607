"""Plans, headers and indexes at random, all together: a right result or a clean error, and nothing else."""

from __future__ import annotations

import json
import os
import tempfile
from math import prod
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from convert_kit import INDEX
from rewire.errors import RewireError
from rewire.plan import Plan
from rewire.stream import convert

PLAIN = ["a", "b", "c.weight", "c.bias", "p", "q", "d.weight", "e", "ü\n", "../x", ""]
QUANTISED = [
    "c.weight_scale", "c.weight_scale_inv", "c.qweight", "c.qzeros", "c.scales", "c.g_idx", "p_blocks", "p_scales",
    "c.input_scale",
]  # fmt: skip
NAMES = st.sampled_from([*PLAIN, *QUANTISED, "__metadata__", "kept:a"])
WIDTHS = {"U8": 1, "BF16": 2, "F32": 4, "F8_E4M3": 1, "I64": 8, "F4": 0.5, "F6_E2M3": 0.75}
TORCH = {"BF16": "bfloat16", "F32": "float32"}
LENGTHS = st.sampled_from([0, 1, 2, 4, 4, 6, 8, 12])
WRONG = st.integers(-1, 9) | st.sampled_from([2**31, 2**63, 2**64, 1.5, "3", None, True, [], [0], ["a"], {}, "x"])

Infos = dict[str, tuple[str, list[int]]]


def seldom(draw: st.DrawFn, one_in: int = 12) -> bool:
    return draw(st.integers(1, one_in)) == one_in


@st.composite
def files_and_tensors(draw: st.DrawFn) -> tuple[list[bytes], list[list[str]], Infos]:
    """Files that are right more often than not, the names in each, and types and shapes."""
    dtypes = draw(st.sampled_from([["BF16"], ["F32", "BF16"], ["U8", "F32"], list(WIDTHS)]))
    known = [*PLAIN, *QUANTISED] if draw(st.booleans()) else PLAIN
    names = draw(st.lists(st.sampled_from(known), min_size=1, max_size=8, unique=True))
    shape = draw(st.lists(LENGTHS, max_size=3))
    infos: Infos = {}
    for name in names:
        infos[name] = draw(st.sampled_from(dtypes)), draw(st.just(shape) | st.lists(LENGTHS, max_size=3))
    count = draw(st.integers(1, 3))
    groups = [names[number::count] for number in range(count)]
    if seldom(draw):
        groups[-1].append(draw(NAMES))
    return [draw(raw_file(group, infos)) for group in groups], groups, infos


@st.composite
def raw_file(draw: st.DrawFn, names: list[str], infos: Infos) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}} if draw(st.booleans()) else {}
    at = 0
    for name in names:
        dtype, shape = infos.get(name, ("U8", [2]))
        stop = at + int(WIDTHS[dtype] * prod(shape))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, stop]}
        at = stop
    if seldom(draw, 20):
        header[draw(NAMES)] = draw(st.sampled_from([None, [], {}, {"dtype": "F32"}, {"data_offsets": [0, 4]}]))
    text = json.dumps(header, separators=(",", ":")).encode()
    # No NaN: casting may change which of them it is, there and back too, as torch's own casts do.
    values = bytes(byte & 0x3F for byte in Random(draw(st.integers(0, 999))).randbytes(at))
    raw = len(text).to_bytes(8, "little") + text + values
    if seldom(draw, 20):
        place = draw(st.integers(0, max(0, len(raw) - 1)))
        raw = raw[:place] + draw(st.binary(max_size=4)) + raw[place + draw(st.integers(0, 4)) :]
    return raw


@st.composite
def rules(draw: st.DrawFn, infos: Infos) -> list[dict[str, Any]]:
    """Steps that fit the tensors more often than not."""
    current = {name: (dtype, list(shape)) for name, (dtype, shape) in infos.items()}
    found: list[dict[str, Any]] = []
    for number in range(draw(st.integers(0, 4))):
        step, gone, new = draw(fitting_step(current, number))
        if seldom(draw):
            step[draw(st.sampled_from(sorted(step)))] = draw(WRONG)
        found.append(step)
        for name in gone:
            current.pop(name, None)
        current |= new
    return found


@st.composite
def fitting_step(draw: st.DrawFn, current: Infos, number: int) -> tuple[dict[str, Any], list[str], Infos]:
    """A step, the names that it takes, and the tensors that it gives."""
    name = draw(st.sampled_from(sorted(current)) if current else st.just("a"))
    dtype, shape = current.get(name, ("U8", [4]))
    target = name if draw(st.booleans()) else draw(st.sampled_from([f"n{number}", f"n{number}.weight"]))
    same = {"source": name, "target": target}
    dim = draw(st.integers(0, max(0, len(shape) - 1)))
    rows = shape[dim] if shape else 0
    match draw(st.sampled_from(["split", "split", "join", "stack", "unstack", "rename", "transpose", "permute",
                                "keep_rows", "cast", "drop", "restore"])):  # fmt: skip
        case "split":
            groups = draw(st.sampled_from([1, 1, 2]))
            first = draw(st.integers(1, max(1, rows // groups - 1))) * groups
            parts, sizes = [f"s{number}.weight", f"t{number}.weight"], [first, rows - first]
            new = {
                part: (dtype, [*shape[:dim], size, *shape[dim + 1 :]]) for part, size in zip(parts, sizes, strict=True)
            }
            step = {"step": "split", "whole": name, "parts": parts, "sizes": sizes, "groups": groups, "dim": dim}
            return step, [name], new
        case "join" | "stack" as kind:
            parts = [other for other in sorted(current) if current[other] == (dtype, shape)][:3] or [name]
            step = {"step": kind, "whole": target, "parts": parts}
            if kind == "join":
                step |= {"sizes": [rows] * len(parts), "dim": dim}
                return step, parts, {target: (dtype, [*shape[:dim], rows * len(parts), *shape[dim + 1 :]])}
            return step, parts, {target: (dtype, [len(parts), *shape])}
        case "unstack":
            parts = [f"u{number}.{index}.weight" for index in range(shape[0] if shape else 1)] or ["a"]
            return {"step": "unstack", "whole": name, "parts": parts}, [name], dict.fromkeys(parts, (dtype, shape[1:]))
        case "transpose":
            return {"step": "transpose", **same}, [name], {target: (dtype, [*shape[:-2], *shape[-1:], *shape[-2:-1]])}
        case "permute":
            grid = [2, rows // 2] if rows % 2 == 0 else [rows]
            order = draw(st.permutations(range(len(grid))))
            return (
                {"step": "permute", **same, "grid": grid, "order": order, "dim": dim},
                [name],
                {target: (dtype, shape)},
            )
        case "keep_rows":
            kept = draw(st.lists(st.integers(0, max(0, rows - 1)), max_size=4, unique=True))
            step = {"step": "keep_rows", **same, "rows": kept, "total": rows, "dim": dim}
            return step, [name], {target: (dtype, [*shape[:dim], len(kept), *shape[dim + 1 :]])}
        case "cast":
            code = draw(st.sampled_from(["BF16", "F32", "U8"]))
            from_dtype = TORCH.get(dtype, "bfloat16")
            step = {"step": "cast", **same, "dtype": TORCH.get(code, "uint8"), "from_dtype": from_dtype}
            return step, [name], {target: (code, shape)}
        case "drop":
            return {"step": "drop", "source": name}, [name], {}
        case "restore":
            return {"step": "restore", "target": name}, [], {}
        case _:
            return {"step": "rename", **same}, [name], {target: (dtype, shape)}


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    files, groups, infos = draw(files_and_tensors())
    names = [f"model-{n + 1:05}-of-{len(files):05}.safetensors" for n in range(len(files))]
    weight_map = {tensor: name for name, tensors in zip(names, groups, strict=True) for tensor in tensors}
    if seldom(draw, 20):
        weight_map[draw(NAMES)] = draw(st.sampled_from([*names, "../../etc/passwd", "/etc/passwd", "x", ""]))
    index, config = json.dumps({"weight_map": weight_map}), "{}"
    if seldom(draw, 20):
        index = draw(st.sampled_from(["{}", "", None]))
    if seldom(draw, 20):
        config = draw(st.sampled_from(["[]", "{", '{"quantization_config": {"ignore": ["c"]}}', None]))
    return {
        "files": dict(zip(names, files, strict=True)),
        "index": index,
        "config": config,
        "steps": draw(rules(infos)),
        "values": draw(st.sampled_from([{}, {"a": 1}])),
        "options": draw(st.sampled_from([{}, {"max_shard_size": 20}, {"repair_index": True}, {"jobs": 2}])),
    }


def try_case(case: dict[str, Any]) -> bool:
    """Whether the case is one that can be converted; anything but a result that is right or a clean error fails."""
    with tempfile.TemporaryDirectory() as folder:
        source, out, back = (Path(folder) / name for name in ("source", "out", "back"))
        source.mkdir()
        for name, raw in case["files"].items():
            (source / name).write_bytes(raw)
        for name, text in ((INDEX, case["index"]), ("config.json", case["config"])):
            if text is not None:
                (source / name).write_text(text)
        try:
            plan = Plan.from_dict(
                {"rewire": 1, "edits": [], "resolved": {"steps": case["steps"], "config": case["values"]}}
            )
            done = convert(source, out, plan, verify=True, **case["options"])
        except RewireError:
            assert sorted(os.listdir(folder)) == ["source"]
            return False
        contents = tensor_bytes(out)
        assert sum(map(len, contents.values())) == done.bytes[1]
        reason = refusal(out, back, case["options"])
        if reason:  # one value may be that of one row, or of all of them
            was_cast = any("cast" in step["step"] for step in case["steps"])
            assert done.losses or was_cast or "scale" in reason or "two ways" in reason
            return True
        assert tensor_bytes(back) == tensor_bytes(source)
        return True


def refusal(out: Path, back: Path, options: dict[str, Any]) -> str:
    """Why a result cannot be brought back; nothing if it was."""
    try:
        convert(out, back, revert=True, **options)
    except RewireError as error:
        return str(error)
    return ""


def tensor_bytes(folder: Path) -> dict[str, bytes]:
    """What the files hold; the real library must accept them."""
    found: dict[str, bytes] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "np") as opened:
            names = set(opened.keys())
        raw = path.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:start])
        header.pop("__metadata__", None)
        assert set(header) == names
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            found[name] = raw[start + first : start + last]
    return found


_SETTINGS = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=150, **_SETTINGS)  # type: ignore[arg-type]
@given(cases())
def test_random_cases_end_well_or_with_a_clean_error(case: dict[str, Any]) -> None:
    event("converted" if try_case(case) else "refused")


@pytest.mark.sweep
@settings(max_examples=20_000, **_SETTINGS)  # type: ignore[arg-type]
@given(cases())
def test_20_000_random_cases_end_well_or_with_a_clean_error(case: dict[str, Any]) -> None:
    try_case(case)
