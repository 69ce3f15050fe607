"""An edited model is still a Transformers model: Trainer, pipeline, generate, checkpointing, recorded outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, pipeline

import rewire
from rewire.plan import Freeze, Join, Lora, Plan, Split
from tiny import VOCABULARY, ids, output, same, snapshot, tiny

SPLIT_LORA = Plan([Split("**.c_attn", into=("q", "k", "v")), Lora(("q", "v"), r=4, lora_alpha=16)])
JOIN = Join("**.self_attn", parts=("q_proj", "k_proj", "v_proj"))


class Sentences(Dataset[dict[str, torch.Tensor]]):
    """The same few token sequences again and again, so that a model can learn them."""

    def __init__(self) -> None:
        self.rows = ids(4, 12)

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.rows[index % 4]
        return {"input_ids": row, "labels": row}


def train(model: Any, folder: Path, **options: Any) -> list[float]:
    """Some steps with `Trainer`; returns the losses."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=12,
        learning_rate=2e-2,
        logging_steps=1,
        save_strategy=options.pop("save_strategy", "no"),
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
        **options,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Sentences())
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer_moves_the_adapters_alone(tmp_path: Path) -> None:
    model = tiny("gpt2", head=True)
    original = snapshot(model)
    rewire.apply_(model, SPLIT_LORA)
    before = snapshot(model)
    losses = train(model, tmp_path)
    assert losses[-1] < 0.9 * losses[0]
    moved = {name for name, tensor in snapshot(model).items() if not torch.equal(tensor, before[name])}
    assert moved
    assert all(".lora_" in name and name.split(".")[-4] in {"q", "v"} for name in moved)
    rewire.revert_(model)
    assert same(snapshot(model), original)


def test_trainer_moves_the_chosen_parts_alone(tmp_path: Path) -> None:
    model = tiny("gpt2", head=True)
    from rewire.plan import Unfreeze

    rewire.apply_(model, Plan([Split("**.c_attn", into=("q", "k", "v")), Freeze("**"), Unfreeze("**.c_attn.v")]))
    before = snapshot(model)
    losses = train(model, tmp_path)
    assert losses[-1] < losses[0]
    moved = {name for name, tensor in snapshot(model).items() if not torch.equal(tensor, before[name])}
    assert {name.split(".")[-2] for name in moved} == {"v"}
    rewire.revert_(model)


def test_a_joined_model_trains_as_the_untouched_one(tmp_path: Path) -> None:
    losses = []
    for edited in (False, True):
        model = tiny("llama", head=True)
        if edited:
            rewire.apply_(model, JOIN)
        losses.append(train(model, tmp_path))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_checkpoints_of_trainer_hold_the_original_names(tmp_path: Path) -> None:
    model = tiny("llama", head=True)
    names = list(snapshot(model))
    rewire.apply_(model, JOIN)
    train(model, tmp_path, save_strategy="steps", save_steps=12)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-12")
    assert list(snapshot(plain)) == names
    torch.testing.assert_close(output(plain, input_ids=ids()), output(model, input_ids=ids()))


def test_trainer_resumes_an_edited_model(tmp_path: Path) -> None:
    model = tiny("llama", head=True)
    rewire.apply_(model, JOIN)
    train(model, tmp_path, save_strategy="steps", save_steps=12)
    trained = snapshot(model)
    fresh = tiny("llama", head=True, seed=5)
    rewire.apply_(fresh, JOIN)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=12,
        per_device_train_batch_size=4,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model=fresh, args=arguments, train_dataset=Sentences())
    trainer.train(resume_from_checkpoint=True)
    assert same(snapshot(fresh), trained)


def test_a_state_dict_of_the_untouched_model_fits_the_edited_one() -> None:
    for model_type, plan in (
        ("llama", JOIN),
        ("gpt_neox", Split("**.query_key_value")),
        ("gpt2", SPLIT_LORA),
    ):
        untouched = snapshot(tiny(model_type, head=True, seed=3))
        model = tiny(model_type, head=True)
        rewire.apply_(model, plan)
        result = model.load_state_dict(untouched, strict=plan is not SPLIT_LORA)
        assert not result.unexpected_keys
        own = snapshot(model)
        model.load_state_dict(own)
        assert same(snapshot(model), own)
        rewire.revert_(model)
        assert same(snapshot(model), untouched)
        assert not model._load_state_dict_pre_hooks


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    results = []
    for edited in (False, True):
        model = tiny("llama", head=True)
        if edited:
            rewire.apply_(model, JOIN)
        model.train()
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        model(input_ids=ids(), labels=ids(), use_cache=False).loss.backward()
        if edited:
            rewire.revert_(model)  # gradients follow their tensors
        results.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, rtol=1e-3, atol=1e-5)


def test_generate_gives_the_same_tokens() -> None:
    for model, plan in (
        (tiny("gpt2", head=True), Split("**.c_attn", into=("q", "k", "v"))),
        (tiny("llama", head=True), JOIN),
        (tiny("falcon", head=True), Split("**.query_key_value")),
    ):
        arguments = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        before = model.generate(ids(), **arguments)
        rewire.apply_(model, plan)
        assert torch.equal(model.generate(ids(), **arguments), before)


def test_attentions_and_hidden_states_are_recorded() -> None:
    model = tiny("bert", attn_implementation="eager")
    arguments = {"output_attentions": True, "output_hidden_states": True}
    with torch.no_grad():
        before = model(ids(), **arguments)
        rewire.apply_(model, Join("encoder.layer.*.attention.self", parts=("query", "key", "value")))
        after = model(ids(), **arguments)
    assert len(after.attentions) == len(after.hidden_states) - 1 == 2
    for first, second in zip(
        (*before.attentions, *before.hidden_states), (*after.attentions, *after.hidden_states), strict=True
    ):
        torch.testing.assert_close(second, first, rtol=1e-4, atol=1e-5)


def test_torch_compile_gives_the_same() -> None:
    model = tiny("llama")
    rewire.apply_(model, JOIN)
    compiled = torch.compile(model, backend="aot_eager")
    for length in (4, 7):
        torch.testing.assert_close(output(compiled, input_ids=ids(2, length)), output(model, input_ids=ids(2, length)))


def test_pipeline_with_real_weights(minilm_path: Path) -> None:
    model = rewire.load(minilm_path, Join("encoder.layer.*.attention.self", parts=("query", "key", "value")))
    tokenizer = AutoTokenizer.from_pretrained(minilm_path)
    sentence = "The quick brown fox jumps over the lazy dog."
    edited = pipeline("feature-extraction", model=model, tokenizer=tokenizer)(sentence)
    untouched = pipeline("feature-extraction", model=str(minilm_path))(sentence)
    torch.testing.assert_close(torch.tensor(edited), torch.tensor(untouched), rtol=1e-4, atol=1e-5)


def test_vocabulary_is_what_the_sentences_need() -> None:
    assert ids(4, 12).max() < VOCABULARY
