"""Folders: what is loaded and saved, and that nothing is lost when it goes wrong."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, LlamaForCausalLM

import rewire
from rewire import artefact, hf_seam
from rewire.errors import CheckpointError, OutputError, PlanError, RefusedError, RevertError
from rewire.modules import joined
from rewire.plan import Cast, Join, Lora, Plan, Replace, Split
from tiny import ids, output, same, snapshot, tiny

QKV = ("q_proj", "k_proj", "v_proj")
JOIN = Join("**.self_attn", parts=QKV)
SPLIT = Split("layers.*.self_attn.qkv_proj")


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A folder with a tiny untouched Llama and a tokenizer's file beside it."""
    tiny("llama", head=True).save_pretrained(tmp_path / "llama")
    (tmp_path / "llama" / "tokenizer.json").write_text("{}")
    return tmp_path / "llama"


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def rewrite(folder: Path, change: Any) -> None:
    """Changes the tensors of a checkpoint behind everybody's back."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_sharded_checkpoints_and_other_dtypes(llama: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(llama)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    loaded = rewire.load(tmp_path / "shards", JOIN, dtype=torch.bfloat16)
    assert isinstance(loaded, LlamaForCausalLM)
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.bfloat16}
    rewire.revert_(loaded)
    assert same(snapshot(loaded), snapshot(model.to(torch.bfloat16)))


def test_device_map_and_keywords_work_as_ever(llama: Path) -> None:
    loaded = rewire.load(llama, JOIN, device_map="cpu", attn_implementation="eager", low_cpu_mem_usage=True)
    assert loaded.config._attn_implementation == "eager"
    assert not getattr(loaded, "is_quantized", False)
    assert not hasattr(loaded, "hf_quantizer")
    assert not hasattr(loaded.config, "quantization_config")


@pytest.mark.parametrize(
    ("model_type", "target", "parts"),
    [
        ("clip_text_model", "**.self_attn", QKV),
        ("siglip_vision_model", "**.self_attn", QKV),
        ("t5", "**.SelfAttention", ("q", "k", "v")),
        ("t5", "**.EncDecAttention", ("k", "v")),
    ],
)
@pytest.mark.parametrize("layout", ["original", "edited"])
def test_models_whose_attention_initialises_its_own_projections(
    model_type: str, target: str, parts: tuple[str, ...], layout: str, tmp_path: Path
) -> None:
    """These write random numbers into `self.q_proj.weight` after loading, unless the tensor is marked as loaded."""
    model = tiny(model_type)
    rewire.apply_(model, Join(target, parts=parts))
    expected = snapshot(model)
    rewire.save(model, tmp_path / "out", layout)
    assert same(snapshot(rewire.load(tmp_path / "out")), expected)


def test_a_tensor_written_to_after_loading_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny("clip_text_model").save_pretrained(tmp_path)
    monkeypatch.setattr(joined, "_rows_of", lambda tensor, start, stop, company: tensor[start:stop])  # no mark
    with pytest.raises(CheckpointError, match=r"qkv_proj\.weight was given new values after it was loaded"):
        rewire.load(tmp_path, Join("**.self_attn", parts=QKV))


def test_weights_offloaded_to_disk(llama: Path, tmp_path: Path) -> None:
    device_map = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "lm_head"), "cpu")
    device_map |= {"model.layers.1": "disk", "model.rotary_emb": "cpu"}
    loaded = rewire.load(llama, JOIN, device_map=device_map, offload_folder=str(tmp_path / "offloaded"))
    plain = LlamaForCausalLM.from_pretrained(llama)
    torch.testing.assert_close(output(loaded, input_ids=ids()), output(plain, input_ids=ids()))
    with pytest.raises(RevertError, match="offloaded"):
        rewire.revert_(loaded)
    with pytest.raises(OutputError, match="offloaded"):
        rewire.save(loaded, tmp_path / "out")


def test_a_base_model_checkpoint_fits_a_larger_model_and_the_other_way_round(llama: Path, tmp_path: Path) -> None:
    whole = LlamaForCausalLM.from_pretrained(llama)
    whole.model.save_pretrained(tmp_path / "base")
    body = rewire.load(llama, Join("layers.*.self_attn", parts=QKV), model_class=AutoModel, allow=("lm_head.*",))
    torch.testing.assert_close(output(body, input_ids=ids()), output(whole.model, input_ids=ids()))
    plan = Join("model.layers.*.self_attn", parts=QKV)
    with pytest.raises(CheckpointError, match=r"1 missing: lm_head\.weight.*allow="):
        rewire.load(tmp_path / "base", plan, model_class=LlamaForCausalLM)
    headed = rewire.load(tmp_path / "base", plan, model_class=LlamaForCausalLM, allow=("lm_head.*",))
    rewire.revert_(headed)
    assert same(snapshot(headed.model), snapshot(whole.model))


def test_nothing_is_registered_after_loading(llama: Path) -> None:
    before = (dict(hf_seam.AUTO_QUANTIZER_MAPPING), dict(hf_seam.AUTO_QUANTIZATION_CONFIG_MAPPING))
    rewire.load(llama, JOIN)
    with pytest.raises(RefusedError):
        rewire.load(llama, Join("**.self_attn", parts=("q_proj", "nothing")))
    assert (dict(hf_seam.AUTO_QUANTIZER_MAPPING), dict(hf_seam.AUTO_QUANTIZATION_CONFIG_MAPPING)) == before


@pytest.mark.parametrize("edited_tensor", [True, False])
def test_a_missing_tensor_is_an_error(llama: Path, edited_tensor: bool) -> None:
    name = "model.layers.0.self_attn.k_proj.weight" if edited_tensor else "model.norm.weight"
    rewrite(llama, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=name.replace("k_proj", ".*") if edited_tensor else name):
        rewire.load(llama, JOIN)


def test_a_superfluous_tensor_is_an_error(llama: Path) -> None:
    rewrite(llama, lambda tensors: tensors.update({"model.extra.weight": torch.zeros(2)}))
    with pytest.raises(CheckpointError, match=r"model\.extra\.weight"):
        rewire.load(llama, JOIN)
    rewire.load(llama, JOIN, allow=("model.extra.*",))


def test_a_tensor_of_another_shape_is_an_error(llama: Path) -> None:
    name = "model.layers.1.self_attn.v_proj.weight"
    rewrite(llama, lambda tensors: tensors.update({name: torch.zeros(8, 32)}))
    with pytest.raises((CheckpointError, RuntimeError), match=r"v_proj|qkv_proj"):
        rewire.load(llama, JOIN)


def test_pickled_weights_are_not_read(llama: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    (llama / "model.safetensors").unlink()
    torch.save(tensors, llama / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pickled weights can run code.*save_pretrained"):
        rewire.load(llama, JOIN)


def test_quantised_checkpoints_are_refused(llama: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (llama / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="quantised"):
        rewire.load(llama, JOIN)


def test_a_damaged_record_is_an_error(llama: Path, tmp_path: Path) -> None:
    rewire.save(rewire.load(llama, JOIN), tmp_path / "out")
    (tmp_path / "out" / "rewire.json").write_text('{"rewire": 1, "layout": "original"')
    with pytest.raises(CheckpointError, match="damaged"):
        rewire.load(tmp_path / "out")


def test_an_edited_folder_is_not_edited_by_another_plan(llama: Path, tmp_path: Path) -> None:
    rewire.save(rewire.load(llama, JOIN), tmp_path / "out", "edited")
    with pytest.raises(CheckpointError, match="another plan"):
        rewire.load(tmp_path / "out", Join("**.mlp", parts=("gate_proj", "up_proj")))


def test_an_edited_folder_loads_in_a_fresh_process(llama: Path, tmp_path: Path) -> None:
    model = rewire.load(llama, JOIN)
    rewire.save(model, tmp_path / "out", "edited")
    torch.save({"ids": ids(), "logits": output(model, input_ids=ids())}, tmp_path / "expected.pt")
    script = (
        "import torch, rewire, sys\n"
        "model = rewire.load(sys.argv[1]); want = torch.load(sys.argv[2], weights_only=True)\n"
        "with torch.no_grad(): same = torch.equal(model(want['ids']).logits, want['logits'])\n"
        "sys.exit(0 if same else 1)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "out", tmp_path / "expected.pt"], check=False)
    assert done.returncode == 0


def test_no_output_where_something_is(llama: Path, tmp_path: Path) -> None:
    model = rewire.load(llama, JOIN)
    before = files(llama)
    with pytest.raises(OutputError, match="not empty"):
        rewire.save(model, llama)
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is a file"):
        rewire.save(model, tmp_path / "file", overwrite=True)
    assert files(llama) == before
    (tmp_path / "empty").mkdir()
    rewire.save(model, tmp_path / "empty")


def test_overwriting_keeps_the_files_of_others(llama: Path) -> None:
    model = rewire.load(llama, JOIN)
    LlamaForCausalLM.from_pretrained(llama).save_pretrained(llama, max_shard_size="20KB")
    (llama / "model.safetensors").unlink(missing_ok=True)
    rewire.save(model, llama, overwrite=True)
    names = set(files(llama))
    assert "tokenizer.json" in names
    assert {name for name in names if name.endswith(".safetensors")} == {"model.safetensors"}
    assert not any(name.endswith(".index.json") for name in names)
    assert [path.name for path in llama.parent.iterdir() if "rewire-" in path.name] == []


def test_side_files_are_copied_on_request(llama: Path, tmp_path: Path) -> None:
    rewire.save(rewire.load(llama, JOIN), tmp_path / "out", side_files_from=llama)
    assert set(files(tmp_path / "out")) == set(files(llama)) | {"rewire.json"}


def test_permissions_follow_the_umask(llama: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        rewire.save(rewire.load(llama, JOIN), tmp_path / "out")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out" / "model.safetensors").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "no space"), KeyboardInterrupt(), MemoryError()])
def test_what_was_there_stays_when_writing_fails(
    llama: Path, tmp_path: Path, failure: BaseException, overwrite: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = rewire.load(llama, JOIN)
    if overwrite:
        rewire.save(model, tmp_path / "out", "edited")
    before = files(tmp_path)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise failure

    for step in ("write_pretrained",):
        monkeypatch.setattr(hf_seam, step, fail)
        with pytest.raises((OutputError, KeyboardInterrupt, MemoryError)):
            rewire.save(model, tmp_path / "out", overwrite=overwrite)
        assert files(tmp_path) == before
        assert sorted(path.name for path in tmp_path.iterdir()) == (["llama", "out"] if overwrite else ["llama"])


def test_a_disk_that_is_really_full(llama: Path, tmp_path: Path) -> None:
    """In a process that may not write files of more than 20 kB: the error is the kernel's, in mid-write."""
    rewire.save(rewire.load(llama, JOIN), tmp_path / "out", "edited")
    before = files(tmp_path)
    script = (
        "import resource, signal, sys, errno, rewire\n"
        "from rewire.plan import Join\n"
        "model = rewire.load(sys.argv[1], Join('**.self_attn', parts=('q_proj','k_proj','v_proj')))\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "try: rewire.save(model, sys.argv[2], overwrite=True)\n"
        "except BaseException as error: print(type(error).__name__, error); sys.exit(7)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, llama, tmp_path / "out"], check=False, capture_output=True, text=True
    )
    assert done.returncode == 7, done.stderr
    assert files(tmp_path) == before


def test_too_little_space_is_seen_before_writing(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = rewire.load(llama, JOIN)
    monkeypatch.setattr(artefact.shutil, "disk_usage", lambda folder: type("usage", (), {"free": 10}))
    with pytest.raises(OutputError, match="10 bytes free"):
        rewire.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_killed_while_saving(llama: Path, tmp_path: Path) -> None:
    """kill -9 in mid-write: the old folder is whole, and the leftover is not taken for a model."""
    rewire.save(rewire.load(llama, JOIN), tmp_path / "out", "edited")
    before = files(tmp_path / "out")
    script = (
        "import os, signal, sys, rewire\n"
        "from rewire import artefact\n"
        "from rewire.plan import Join\n"
        "model = rewire.load(sys.argv[1], Join('**.self_attn', parts=('q_proj','k_proj','v_proj')))\n"
        "artefact.settle = lambda folder: os.kill(os.getpid(), signal.SIGKILL)\n"
        "rewire.save(model, sys.argv[2], overwrite=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, llama, tmp_path / "out"], check=False, capture_output=True)
    assert done.returncode == -9
    assert files(tmp_path / "out") == before
    rewire.load(tmp_path / "out")


def test_adapters_merged_into_the_weights(llama: Path, tmp_path: Path) -> None:
    plan = Plan([JOIN, Lora("qkv_proj", r=4, use_dora=True), Lora("down_proj", r=2, adapter="second")])
    model = rewire.load(llama, plan)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    before, tensors = output(model, input_ids=ids()), snapshot(model)
    rewire.save(model, tmp_path / "merged", merge_adapters=True)
    assert same(snapshot(model), tensors)
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(output(plain, input_ids=ids()), before, rtol=1e-4, atol=1e-4)
    rewire.save(model, tmp_path / "beside")
    assert sorted(path.name for path in (tmp_path / "beside" / "adapter").iterdir()) == ["default", "second"]
    again = rewire.load(tmp_path / "beside")
    assert torch.equal(output(again, input_ids=ids()), before)


def test_an_adapter_folder_is_peft_s(tmp_path: Path) -> None:
    from peft import PeftModel

    model = tiny("phi3")
    model.save_pretrained(tmp_path / "base")
    rewire.apply_(model, Plan([Split(SPLIT.target, into=("q", "k", "v")), Lora(("q", "v"), r=2)]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    rewire.save(model, tmp_path / "out", "edited")
    base = rewire.load(tmp_path / "base", Split(SPLIT.target, into=("q", "k", "v")))
    theirs = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter" / "default")
    assert torch.equal(output(theirs, input_ids=ids()), output(model, input_ids=ids()))


def test_a_class_without_a_path_cannot_be_saved(tmp_path: Path) -> None:
    class Local(torch.nn.Linear):
        @classmethod
        def from_module(cls, old: torch.nn.Linear) -> Local:
            return cls(old.in_features, old.out_features, bias=old.bias is not None)

    model = tiny("phi3")
    receipt = rewire.apply_(model, Replace("layers.*.self_attn.o_proj", with_=Local))
    assert receipt.plan is None
    with pytest.raises(PlanError, match="cannot be imported by a path"):
        rewire.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_cast_model_is_saved_as_it_is(llama: Path, tmp_path: Path) -> None:
    model = rewire.load(llama, Plan([Cast("**", dtype="bfloat16"), JOIN]))
    rewire.save(model, tmp_path / "out")
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    assert LlamaForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_receipts_have_hashes_and_survive_the_disk(llama: Path) -> None:
    model = rewire.load(llama, JOIN)
    receipt = rewire.receipt(model)
    facts = [fact for change in receipt.tensors for fact in (*change.before, *change.after)]
    assert len(facts) == 2 * (3 + 1)
    assert all(fact.hash for fact in facts)
    again = rewire.Receipt.from_json(receipt.to_json())
    assert again == receipt
    live = LlamaForCausalLM.from_pretrained(llama)
    assert rewire.apply_(live, JOIN).tensors == receipt.tensors


def test_the_example_folder_of_a_real_model(minilm_path: Path, tmp_path: Path) -> None:
    plan = Join("encoder.layer.*.attention.self", parts=("query", "key", "value"), name="qkv")
    model = rewire.load(minilm_path, plan)
    plain = AutoModel.from_pretrained(minilm_path)
    torch.testing.assert_close(output(model, input_ids=ids()), output(plain, input_ids=ids()), rtol=1e-4, atol=1e-5)
    rewire.save(model, tmp_path / "out")
    assert same(snapshot(AutoModel.from_pretrained(tmp_path / "out")), snapshot(plain))


def test_an_adapter_that_takes_a_part_of_the_weights(llama: Path, tmp_path: Path) -> None:
    """PiSSA moves the leading part of a weight into the adapter: saved, loaded and taken off again."""
    model = rewire.load(llama, Lora("q_proj", r=4, init_lora_weights="pissa"))
    plain = LlamaForCausalLM.from_pretrained(llama)
    torch.testing.assert_close(output(model, input_ids=ids()), output(plain, input_ids=ids()), rtol=1e-3, atol=1e-3)
    before = output(model, input_ids=ids())
    for layout in ("original", "edited"):
        rewire.save(model, tmp_path / layout, layout)
        assert torch.equal(output(rewire.load(tmp_path / layout), input_ids=ids()), before)
    rewire.revert_(model)
    assert same(snapshot(model), snapshot(plain))


def test_merged_adapters_are_not_put_on_again(llama: Path, tmp_path: Path) -> None:
    model = rewire.load(llama, Plan([JOIN, Lora("qkv_proj", r=4, init_lora_weights=False)]))
    before = output(model, input_ids=ids())
    rewire.save(model, tmp_path / "out", merge_adapters=True)
    again = rewire.load(tmp_path / "out")
    assert not hasattr(again, "peft_config")
    assert [edit["join"]["name"] for edit in rewire.receipt(again).plan["edits"] if "name" in edit["join"]] == []
    torch.testing.assert_close(output(again, input_ids=ids()), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["original", "edited"])
def test_a_model_that_was_given_to_peft_by_hand(llama: Path, layout: str, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = rewire.load(llama, JOIN)
    expected = snapshot(model)
    get_peft_model(model, LoraConfig(target_modules=["qkv_proj"], r=2))
    rewire.save(model, tmp_path / "out", layout)
    assert same(snapshot(rewire.load(tmp_path / "out")), expected)
    assert (tmp_path / "out" / "adapter" / "default" / "adapter_config.json").is_file()


def test_an_adapter_has_the_mode_of_its_model(llama: Path) -> None:
    model = rewire.load(llama, Lora("q_proj", r=4, lora_dropout=0.5, init_lora_weights=False))
    assert torch.equal(output(model, input_ids=ids()), output(model, input_ids=ids()))
    assert not any(module.training for module in model.modules())
