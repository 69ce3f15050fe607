"""`rewire.convert`: what comes out, and that it is the same by every way."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from convert_kit import (
    SPLIT,
    assert_same,
    expected,
    files_of,
    model_tensors,
    plan_of,
    read_tensors,
    write_checkpoint,
)
from rewire.errors import (
    CheckpointError,
    OutputError,
    PlanError,
    ResolveError,
    RevertError,
    RewireError,
    RuleError,
)
from rewire.plan import Plan
from rewire.stream import convert

STEPS = {
    "split": [SPLIT],
    "stack": [{"step": "stack", "whole": "h.qkv", "parts": ["h.{0..3}.qkv.weight"]}],
    "join": [{"step": "join", "whole": "two", "parts": ["h.1.qkv.weight", "h.0.qkv.weight"], "sizes": [16, 16]}],
    "rename": [{"step": "rename", "source": "h.{0}.norm.weight", "target": "n.{0}", "each": ["0..3"]}],
    "transpose": [{"step": "transpose", "source": "table", "target": "table"}],
    "permute": [{"step": "permute", "source": "table", "target": "t", "grid": [5, 2], "order": [1, 0]}],
    "widen": [{"step": "cast", "source": "table", "target": "t", "dtype": "float32", "from_dtype": "bfloat16"}],
    "unstack": [{"step": "unstack", "whole": "table", "parts": ["row.{0..9}"]}],
    "columns": [{"step": "split", "whole": "table", "parts": ["a", "b"], "sizes": [4, 2], "dim": 1}],
    "chain": [SPLIT, {"step": "join", "whole": "h.0.vk", "parts": ["h.0.kv.weight", "h.0.q.weight"], "sizes": [4, 12]}],
    "nothing": [],
}
LOSSY = {
    "half": {"step": "cast", "source": "table", "target": "table", "dtype": "float16", "from_dtype": "bfloat16"},
    "drop": {"step": "drop", "source": "table"},
    "keep_rows": {"step": "keep_rows", "source": "table", "target": "table", "rows": [7, 0, 2], "total": 10},
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source", model_tensors(), shards=3)


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("options", [{}, {"jobs": 3}, {"max_shard_size": 300}, {"checksums": False}], ids=str)
def test_the_result_is_that_of_the_rule_and_the_way_back_is_exact(
    source: Path, tmp_path: Path, steps: list[dict[str, object]], options: dict[str, object]
) -> None:
    plan = plan_of(*steps, config={"heads": 8, "new": {"a": 1}})
    done = convert(source, tmp_path / "edited", plan, **options)  # type: ignore[arg-type]
    assert_same(read_tensors(tmp_path / "edited"), expected(model_tensors(), plan))
    assert done.state == "done"
    assert json.loads((tmp_path / "edited/config.json").read_text()) == {
        "model_type": "toy", "heads": 8, "new": {"a": 1},
    }  # fmt: skip
    convert(tmp_path / "edited", tmp_path / "back", revert=True, **options)  # type: ignore[arg-type]
    assert_same(read_tensors(tmp_path / "back"), model_tensors())
    assert (tmp_path / "back/config.json").read_text().strip() == (source / "config.json").read_text().strip()
    assert not (tmp_path / "back/rewire.json").exists()
    assert sorted(os.listdir(tmp_path)) == ["back", "edited", "source"]


@pytest.mark.parametrize("step", LOSSY.values(), ids=LOSSY)
def test_what_is_lost_is_said_and_cannot_be_brought_back(source: Path, tmp_path: Path, step: dict[str, object]) -> None:
    plan = plan_of(step)
    done = convert(source, tmp_path / "edited", plan)
    assert done.losses
    assert_same(read_tensors(tmp_path / "edited"), expected(model_tensors(), plan))
    with pytest.raises(RevertError, match="lost something"):
        convert(tmp_path / "edited", tmp_path / "back", revert=True)
    assert not (tmp_path / "back").exists()


def test_the_sharding_is_that_of_the_source(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "edited", plan_of(SPLIT))
    before = {name: sorted(_names(source / name)) for name in _shards(source)}
    after = {name: sorted(_names(tmp_path / "edited" / name)) for name in _shards(tmp_path / "edited")}
    for name, names in before.items():
        split = [new for old in names for new in _split_names(old)]
        assert after[name] == sorted(split)


def _shards(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


def _names(file: Path) -> list[str]:
    with safe_open(file, "pt") as opened:
        return list(opened.keys())


def _split_names(name: str) -> list[str]:
    return [name.replace("qkv", "q"), name.replace("qkv", "kv")] if "qkv" in name else [name]


def test_files_are_as_transformers_writes_them(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "edited", plan_of(SPLIT), max_shard_size=400)
    index = json.loads((tmp_path / "edited/model.safetensors.index.json").read_text())
    tensors = read_tensors(tmp_path / "edited")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    names = _shards(tmp_path / "edited")
    assert names == [f"model-{number:05}-of-{len(names):05}.safetensors" for number in range(1, len(names) + 1)]
    for name in names:
        with safe_open(tmp_path / "edited" / name, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            sizes = [opened.get_tensor(key).nbytes for key in opened.keys()]  # noqa: SIM118
        assert sum(sizes) <= 400 or len(sizes) == 1


def test_every_tensor_is_aligned(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", model_tensors())
    cast = {"step": "cast", "source": "table", "target": "table", "dtype": "float32", "from_dtype": "bfloat16"}
    convert(source, tmp_path / "edited", plan_of(cast))
    raw = (tmp_path / "edited/model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    widths = {"F32": 4, "BF16": 2, "I64": 8}
    assert all((8 + length + v["data_offsets"][0]) % widths[v["dtype"]] == 0 for k, v in header.items() if k[0] != "_")


def test_metadata_is_kept_and_the_format_added(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", model_tensors(), metadata={"who": "me"})
    convert(source, tmp_path / "edited", plan_of(SPLIT))
    with safe_open(tmp_path / "edited/model.safetensors", "pt") as opened:
        assert opened.metadata() == {"who": "me", "format": "pt"}


def test_what_lies_beside_is_carried_along(source: Path, tmp_path: Path) -> None:
    (source / "modeling_toy.py").write_text("x = 1\n")
    (source / "chat_template.jinja").write_text("{{ a }}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates/tool.jinja").write_text("b")
    (source / "onnx").mkdir()
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin", "model.fp16.safetensors"):
        (source / name).write_bytes(b"x")
    done = convert(source, tmp_path / "edited", plan_of(SPLIT))
    for name in ("modeling_toy.py", "chat_template.jinja", "tokenizer.json", "generation_config.json", "config.json"):
        assert (tmp_path / "edited" / name).read_bytes() == (source / name).read_bytes()
    assert (tmp_path / "edited/additional_chat_templates/tool.jinja").read_text() == "b"
    left = ["model.fp16.safetensors", "onnx/", "optimizer.pt", "pytorch_model.bin", "rng_state.pth", "scheduler.pt"]
    assert list(done.left) == left
    assert not any((tmp_path / "edited" / name).exists() for name in left)


def test_the_umask_rules_over_permissions(source: Path, tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        convert(source, tmp_path / "edited", plan_of(SPLIT))
    finally:
        os.umask(old)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "edited").iterdir()}
    assert modes == {0o640}
    assert stat.S_IMODE((tmp_path / "edited").stat().st_mode) == 0o750


def test_a_dry_run_tells_every_fate_and_writes_nothing(source: Path, tmp_path: Path) -> None:
    done = convert(source, tmp_path / "edited", plan_of(SPLIT), dry_run=True)
    assert done.state == "planned"
    assert sorted(os.listdir(tmp_path)) == ["source"]
    fates = {fate.name: fate for fate in done.fates()}
    wanted = expected(model_tensors(), plan_of(SPLIT))
    assert sorted(fates) == sorted(wanted)
    for name, tensor in wanted.items():
        assert (fates[name].shape, fates[name].bytes) == (tuple(tensor.shape), tensor.nbytes)
    assert fates["h.0.q.weight"].sources == ("h.0.qkv.weight",)
    assert fates["table"].is_copy
    assert done.needed_bytes == sum(size for size in _sizes_of_result(source, tmp_path))


def _sizes_of_result(source: Path, tmp_path: Path) -> list[int]:
    convert(source, tmp_path / "edited", plan_of(SPLIT))
    return [path.stat().st_size for path in (tmp_path / "edited").glob("*.safetensors")]


def test_a_manifest_that_sha256sum_accepts(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "edited", plan_of(SPLIT), manifest=tmp_path / "SUMS")
    lines = dict(reversed(line.split("  ")) for line in (tmp_path / "SUMS").read_text().splitlines())
    files = files_of(tmp_path / "edited")
    assert lines == {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    checked = subprocess.run(
        ["sha256sum", "--check", "--quiet", tmp_path / "SUMS"], cwd=tmp_path / "edited", check=True
    )
    assert checked.returncode == 0
    for place in (tmp_path / "other/SUMS", source / "SUMS", tmp_path):
        with pytest.raises(OutputError, match="name a file beside it"):
            convert(source, tmp_path / "other", plan_of(SPLIT), manifest=place)


def test_progress_counts_all_bytes(source: Path, tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    convert(source, tmp_path / "edited", plan_of(SPLIT), jobs=2, progress=lambda *call: calls.append(call))
    assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls)
    assert calls[-1][1] <= calls[-1][2] == sum(p.stat().st_size for p in (tmp_path / "edited").glob("*.safetensors"))


def test_a_checkpoint_without_tensors(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", {})
    convert(source, tmp_path / "edited", plan_of(config={"a": 1}))
    assert read_tensors(tmp_path / "edited") == {}


def test_reading_steps_pass_over_renamed_tensors_that_are_not_there(source: Path, tmp_path: Path) -> None:
    reading = [
        {"step": "rename", "source": "lm_head.weight", "target": "table"},
        {"step": "rename", "source": "scalar", "target": "model.scalar"},
    ]
    convert(source, tmp_path / "edited", plan_of(reading=reading))
    assert {"table", "model.scalar"} <= set(read_tensors(tmp_path / "edited"))
    convert(tmp_path / "edited", tmp_path / "back", revert=True)
    assert_same(read_tensors(tmp_path / "back"), model_tensors())


def test_float4_moves_as_bytes(tmp_path: Path) -> None:
    """Two elements to a byte; the real library cannot write such a file from a tensor of its own."""
    data = os.urandom(8 * 6 // 2)
    header = json.dumps({"w": {"dtype": "F4", "shape": [8, 6], "data_offsets": [0, len(data)]}}).encode()
    (tmp_path / "source").mkdir()
    (tmp_path / "source/model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    (tmp_path / "source/config.json").write_text("{}")
    rows = {"step": "split", "whole": "w", "parts": ["a", "b"], "sizes": [6, 2]}
    convert(tmp_path / "source", tmp_path / "edited", plan_of(rows))
    raw = (tmp_path / "edited/model.safetensors").read_bytes()
    assert raw[8 + int.from_bytes(raw[:8], "little") :] == data
    columns = {"step": "split", "whole": "w", "parts": ["a", "b"], "sizes": [5, 1], "dim": 1}
    with pytest.raises(RewireError, match="within a byte"):
        convert(tmp_path / "source", tmp_path / "other", plan_of(columns))


# ---------------------------------------------------------------- refusals


def test_refused_plans(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "edited"
    with pytest.raises(PlanError, match="no plan"):
        convert(source, out)
    with pytest.raises(PlanError, match="nothing to do"):
        convert(source, out, Plan([]))
    with pytest.raises(ResolveError, match=r"takes 2 tensors that .* does not hold: a, b"):
        convert(source, out, plan_of({"step": "stack", "whole": "c", "parts": ["a", "b"]}))
    with pytest.raises(ResolveError, match="unstack empty: it names no parts"):
        convert(source, out, plan_of({"step": "unstack", "whole": "empty", "parts": []}))
    with pytest.raises(ResolveError, match="keeps nothing aside"):
        convert(source, out, plan_of({"step": "restore", "target": "a"}))
    with pytest.raises(RuleError, match=r"h\.0\.qkv\.weight"):
        convert(source, out, plan_of({**SPLIT, "sizes": [10, 4]}))
    with pytest.raises(RewireError, match="table"):
        convert(source, out, plan_of({"step": "rename", "source": "scalar", "target": "table"}))
    with pytest.raises(RewireError, match="__metadata__"):
        convert(source, out, plan_of({"step": "rename", "source": "scalar", "target": "__metadata__"}))
    assert os.listdir(tmp_path) == ["source"]


def test_refused_options(source: Path, tmp_path: Path) -> None:
    out, plan = tmp_path / "edited", plan_of(SPLIT)
    for options in (
        {"resume": True, "restart": True},
        {"restart": True, "shards": "1/2"},
        {"finish": True, "shards": "1/2"},
        {"finish": True, "restart": True},
        {"jobs": 0},
        {"verify": True, "checksums": False},
        {"shards": "0/3"},
        {"shards": "4/3"},
        {"shards": "x"},
        {"max_shard_size": "big"},
        {"max_shard_size": 0},
        {"finish": True},
    ):
        with pytest.raises(OutputError):
            convert(source, out, plan, **options)  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == ["source"]


def test_refused_destinations(source: Path, tmp_path: Path) -> None:
    plan = plan_of(SPLIT)
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/a").touch()
    (source / "sub").mkdir()
    (tmp_path / "sub").symlink_to(source / "sub")
    for place, reason in {
        source: "is the source",
        tmp_path / "link": "is the source",
        tmp_path / "link/new": "lies within it",
        source / "sub": "lies within it",
        tmp_path / "sub/new/deep": "lies within it",
        tmp_path: "lies within",
        tmp_path / "file": "is a file",
        tmp_path / "dangling": "a link to nothing",
        tmp_path / "full": "is not empty",
        Path("/"): "root",
    }.items():
        with pytest.raises(OutputError, match=reason):
            convert(source, place, plan)
    with pytest.raises(CheckpointError, match="no folder"):
        convert(tmp_path / "nothing", tmp_path / "x", plan)
    assert sorted(os.listdir(source / "sub")) == []


def test_an_empty_folder_and_missing_parents_are_fine(source: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    convert(source, tmp_path / "empty", plan_of(SPLIT))
    convert(source, tmp_path / "a/b/c", plan_of(SPLIT))
    assert files_of(tmp_path / "empty") == files_of(tmp_path / "a/b/c")


def test_refused_sources(source: Path, tmp_path: Path) -> None:
    plan = plan_of(SPLIT)
    convert(source, tmp_path / "edited", plan)
    with pytest.raises(CheckpointError, match="edited already"):
        convert(tmp_path / "edited", tmp_path / "twice", plan)
    with pytest.raises(RevertError, match="no record"):
        convert(source, tmp_path / "back", revert=True)
    with pytest.raises(RevertError, match="another plan"):
        convert(tmp_path / "edited", tmp_path / "back", Plan.from_yaml(_OTHER), revert=True)
    write_checkpoint(tmp_path / "aside", {"kept:a": torch.ones(1)})
    with pytest.raises(CheckpointError, match="kept:a"):
        convert(tmp_path / "aside", tmp_path / "x", plan_of(config={"a": 1}))
    (source / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="adapter"):
        convert(source, tmp_path / "x", plan)
    (source / "adapter_config.json").rename(source / "adapter")
    with pytest.raises(CheckpointError, match="adapter"):
        convert(source, tmp_path / "x", plan)
    (source / "adapter").unlink()
    (source / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        convert(source, tmp_path / "x", plan_of(SPLIT, config={"a": 1}))


_OTHER = "rewire: 1\nedits:\n- cast: {target: a, dtype: float16}\n"


def test_all_faults_of_a_checkpoint_are_told_at_once(source: Path, tmp_path: Path) -> None:
    first, second = sorted(source.glob("*.safetensors"))[:2]
    first.write_bytes(first.read_bytes()[:-1])
    second.unlink()
    with pytest.raises(CheckpointError) as caught:
        convert(source, tmp_path / "edited", plan_of(SPLIT))
    assert first.name in str(caught.value)
    assert second.name in str(caught.value)


def test_a_stale_file_beside_an_index_is_refused(source: Path, tmp_path: Path) -> None:
    save_file({"table": torch.ones(1)}, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        convert(source, tmp_path / "edited", plan_of(SPLIT))


def test_repair_index(source: Path, tmp_path: Path) -> None:
    (source / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError):
        convert(source, tmp_path / "edited", plan_of(SPLIT))
    convert(source, tmp_path / "edited", plan_of(SPLIT), repair_index=True)
    assert_same(read_tensors(tmp_path / "edited"), expected(model_tensors(), plan_of(SPLIT)))


def test_links_that_lead_elsewhere_are_followed_on_request(source: Path, tmp_path: Path) -> None:
    (tmp_path / "linked").mkdir()
    for path in source.iterdir():
        (tmp_path / "linked" / path.name).symlink_to(path)
    with pytest.raises(CheckpointError, match="outside the folder"):
        convert(tmp_path / "linked", tmp_path / "edited", plan_of(SPLIT))
    convert(tmp_path / "linked", tmp_path / "edited", plan_of(SPLIT), follow_links=True)
    convert(source, tmp_path / "other", plan_of(SPLIT))
    assert files_of(tmp_path / "edited") == files_of(tmp_path / "other")


@pytest.mark.parametrize(
    "said", [[], {"convert": []}, {"convert": {"passed_over": 3}}, {"convert": {"config_before": []}}]
)
def test_a_record_that_was_tampered_with_is_no_traceback(source: Path, tmp_path: Path, said: object) -> None:
    convert(source, tmp_path / "edited", plan_of(SPLIT, config={"heads": 8}))
    record = json.loads((tmp_path / "edited/rewire.json").read_text())
    (tmp_path / "edited/rewire.json").write_text(json.dumps({**record, "receipt": said}))
    try:
        convert(tmp_path / "edited", tmp_path / "back", revert=True)
    except CheckpointError as error:
        assert "is damaged" in str(error)  # noqa: PT017 - either way is right
    with pytest.raises(OutputError, match="something else"):
        convert(source, tmp_path / "edited", plan_of(SPLIT, config={"heads": 8}), resume=True)
