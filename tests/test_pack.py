"""`Pack`: outputs and gradients of an encoder stay, in every habit of calling it, and it can all be taken back."""

from __future__ import annotations

import copy
import inspect
import pickle
import pydoc_data.topics
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    BartForConditionalGeneration,
    BertForMaskedLM,
    BertForSequenceClassification,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    pipeline,
)

import rewire
from packing import Both, both, compare_layers, mask_forms, padding_masks, token_ids
from rewire.encoders import encoder_stacks
from rewire.errors import NoMatchError, RefusedError, RevertError
from rewire.linears import Refusal
from rewire.modules.packed import LayerForward, OwnerForward, fused_activation
from rewire.modules.packed.weights import Derived
from rewire.plan import Freeze, Join, Lora, Pack, Plan, Replace
from rewire.zoo import tiny_config, tiny_model
from rewire.zoo.models import draw

NEAR = 5e-6
"""Largest difference of outputs relative to their scale, in float32 with strong weights."""

KINDS = (
    "albert", "bart", "bert", "distilbert", "electra", "fsmt", "mbart", "modernbert", "mpnet", "nomic_bert",
    "prophetnet", "rembert", "roberta", "roformer", "t5", "tapas", "xlm-roberta-xl",
)  # fmt: skip
"""Types that read text; all others are in `test_pack_types.py`."""


@pytest.fixture(scope="module")
def bert() -> Both:
    return both("bert")


@pytest.fixture
def ids(bert: Both) -> Tensor:
    return token_ids(bert.before)


def right() -> Tensor:
    return dict(padding_masks())["right"]


def decoder_inputs(model: Any, ids: Tensor) -> dict[str, Tensor]:
    takes = "decoder_input_ids" in inspect.signature(model.forward).parameters
    return {"decoder_input_ids": ids[:, :5]} if takes else {}


# ---------------------------------------------------------------- masks


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_padding_gives_the_numbers_of_eager_attention(kind: str) -> None:
    pair = both(kind)
    ids = token_ids(pair.before)
    more = decoder_inputs(pair.before, ids)
    for name, keep in padding_masks():
        assert pair.difference(keep, input_ids=ids, attention_mask=keep.long(), **more) < NEAR, name
    assert pair.difference(None, input_ids=ids, **more) < NEAR
    assert pair.ways & {"recipe", "own layer"}


@pytest.mark.parametrize(("name", "keep"), list(padding_masks()))
def test_a_mask_may_have_any_form(bert: Both, ids: Tensor, name: str, keep: Tensor) -> None:
    for form, mask in mask_forms(keep):
        bert.forget()
        # Eager attention adds a bool mask to the scores as ones and zeros; torch's own knows what it means.
        reference = bert.alike if form == "4-D bool" else bert.before
        with torch.no_grad():
            wanted = reference(ids, attention_mask=mask).last_hidden_state
            given = bert.after(ids, attention_mask=mask).last_hidden_state
        assert float((wanted - given)[keep].abs().max()) < 2e-5, form
        assert bert.ways == {"recipe"}, form


def test_a_mask_that_says_more_than_padding_runs_untouched(bert: Both, ids: Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(4, 1, 11, 11, generator=generator) < 0.6
    mask |= torch.eye(11, dtype=torch.bool)
    bert.forget()
    with torch.no_grad():
        wanted = bert.alike(ids, attention_mask=mask).last_hidden_state
        assert torch.equal(bert.after(ids, attention_mask=mask).last_hidden_state, wanted)
    assert bert.ways == {"untouched: the mask differs from query to query"}


def test_padded_positions_hold_zeros_or_on_request_what_the_original_gives(bert: Both, ids: Tensor) -> None:
    keep = right()
    with torch.no_grad():
        zeros = bert.after(ids, attention_mask=keep.long()).last_hidden_state
        assert zeros.shape == (4, 11, zeros.shape[-1])
        assert not zeros[~keep].any()
    original = both("bert", padding="original")
    assert original.difference(None, input_ids=ids, attention_mask=keep.long()) < NEAR
    assert original.difference(None, input_ids=ids) < NEAR
    assert "recipe" in original.ways


def test_one_long_row_beside_one_token_and_a_batch_of_one(bert: Both) -> None:
    ids = token_ids(bert.before, 2, 64)
    mask = torch.zeros(2, 64, dtype=torch.bool)
    mask[0], mask[1, 0] = True, True
    assert bert.difference(mask, input_ids=ids, attention_mask=mask.long()) < NEAR
    assert bert.difference(None, input_ids=ids[:1]) < NEAR
    assert bert.difference(None, input_ids=ids[:1, :1]) < NEAR


# ---------------------------------------------------------------- what the old fast path got wrong


def test_the_rotation_of_roformer_is_kept() -> None:
    pair = both("roformer")
    ids = token_ids(pair.before)
    keep = dict(padding_masks())["left"]
    assert pair.difference(keep, input_ids=ids, attention_mask=keep.long()) < NEAR
    sinusoids = pair.after.encoder.embed_positions.weight
    with torch.no_grad():
        before = pair.after(ids).last_hidden_state
        sinusoids.mul_(0.5)
        assert float((pair.after(ids).last_hidden_state - before).abs().max()) > 0.1


def test_the_text_mask_of_vilt_is_kept() -> None:
    pair = both("vilt")
    ids = token_ids(pair.before)
    keep = right()
    size = pair.before.config.image_size
    pixels = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "pixel_values": pixels, "attention_mask": keep.long()}
    found = compare_layers(pair, inputs)
    assert found is not None
    assert found[0] < NEAR
    assert found[1] < 1e-4
    with torch.no_grad():
        whole = pair.after(input_ids=ids, pixel_values=pixels).last_hidden_state
        padded = pair.after(**inputs).last_hidden_state
    assert float((whole - padded)[:, : ids.shape[1]][keep].abs().max()) > 0.1  # so that it matters


def test_fsmt_gives_batch_first_whatever_the_mask() -> None:
    pair = both("fsmt")
    ids = token_ids(pair.before)
    for mask in (None, right().long()):
        with torch.no_grad():
            shapes = [m.encoder(ids, attention_mask=mask).last_hidden_state.shape for m in (pair.before, pair.after)]
        assert shapes[0] == shapes[1] == (4, 11, pair.before.config.d_model)


@pytest.mark.parametrize("act", ["gelu", "gelu_new", "quick_gelu", "gelu_python_tanh", "relu", "silu", "tanh", "mish"])
def test_every_activation_is_computed_as_it_is(act: str) -> None:
    config = tiny_config("bert")
    config.hidden_act = act
    model = AutoModel.from_config(config).eval()
    draw(model)
    pair = both("bert", model)
    ids, keep = token_ids(model), right()
    assert pair.difference(keep, input_ids=ids, attention_mask=keep.long()) < 2e-6
    assert pair.ways == {"recipe"}


def test_quick_gelu_and_the_error_function_are_told_apart() -> None:
    from transformers.activations import ACT2FN

    names = {
        act: fused_activation(ACT2FN[act]) for act in ("gelu", "gelu_new", "quick_gelu", "gelu_fast", "relu", "tanh")
    }
    assert names == {
        "gelu": "gelu",
        "gelu_new": "gelu_tanh",
        "quick_gelu": "quick_gelu",
        "gelu_fast": "gelu_tanh",
        "relu": "relu",
        "tanh": None,
    }


@pytest.mark.parametrize("heads", [1, 3, 5])
def test_any_number_of_heads_and_epsilons_that_differ(heads: int) -> None:
    config = AutoConfig.for_model(
        "bert",
        hidden_size=heads * 8,
        num_attention_heads=heads,
        num_hidden_layers=2,
        intermediate_size=40,
        vocab_size=60,
    )
    model = AutoModel.from_config(config).eval()
    draw(model)
    for number, layer in enumerate(model.encoder.layer):
        layer.attention.output.LayerNorm.eps, layer.output.LayerNorm.eps = 1e-3, 0.1 * (number + 1)
    pair = both("bert", model)
    ids, keep = token_ids(model), right()
    assert pair.difference(keep, input_ids=ids, attention_mask=keep.long()) < NEAR
    assert pair.ways == {"recipe"}


# ---------------------------------------------------------------- habits of calling


def test_hidden_states_are_dense_and_of_every_layer(bert: Both, ids: Tensor) -> None:
    keep = right()
    inputs = {"input_ids": ids, "attention_mask": keep.long(), "output_hidden_states": True}
    assert bert.difference(keep, **inputs) < NEAR
    with torch.no_grad():
        states = bert.after(**inputs).hidden_states
    assert [state.shape for state in states] == [(4, 11, states[0].shape[-1])] * 3


def test_attention_weights_are_those_of_the_untouched_model(ids: Tensor) -> None:
    pair = both("bert")
    pair.after.set_attn_implementation("eager")
    inputs = {"input_ids": ids, "attention_mask": right().long(), "output_attentions": True}
    assert pair.difference(None, **inputs) == 0
    assert pair.ways == {"untouched: attention weights are asked for"}
    with torch.no_grad():
        assert len(pair.after(**inputs).attentions) == 2


def test_embeddings_positions_and_token_types(bert: Both, ids: Tensor) -> None:
    keep = right()
    embeds = bert.before.embeddings.word_embeddings(ids).detach()
    more = {"token_type_ids": torch.ones_like(ids), "position_ids": torch.arange(11).flip(0)[None]}
    assert bert.difference(keep, inputs_embeds=embeds, attention_mask=keep.long(), **more) < NEAR


def test_heads_and_pooler(ids: Tensor) -> None:
    keep = right()
    for head in (BertForMaskedLM, BertForSequenceClassification):
        model = head(tiny_config("bert")).eval()
        draw(model)
        pair = both("bert", model)
        assert pair.difference(keep, input_ids=ids, attention_mask=keep.long(), labels=None) < NEAR


def test_a_hook_on_a_layer_sees_dense_states_and_one_inside_the_untouched_layer(ids: Tensor) -> None:
    pair = both("bert")
    keep = right()
    shapes: list[Any] = []
    handle = pair.after.encoder.layer[0].register_forward_hook(lambda m, a, out: shapes.append(out.shape))
    assert pair.difference(keep, input_ids=ids, attention_mask=keep.long()) < NEAR
    handle.remove()
    inner = pair.after.encoder.layer[1].attention.self.query
    handle = inner.register_forward_hook(lambda m, a, out: shapes.append(out.shape))
    assert pair.difference(keep, input_ids=ids, attention_mask=keep.long()) < NEAR
    handle.remove()
    width = pair.before.config.hidden_size
    assert shapes == [(4, 11, width)] * 2
    assert "untouched: something listens inside the layer" in pair.ways


def test_copies_and_pickles_run_packed_on_weights_of_their_own(ids: Tensor) -> None:
    bert, keep = both("bert"), right().long()
    with torch.no_grad():
        wanted = bert.after(ids, attention_mask=keep).last_hidden_state
        for copied in (copy.deepcopy(bert.after), pickle.loads(pickle.dumps(bert.after))):
            forward = vars(copied.encoder)["forward"]
            assert forward.module is copied.encoder
            assert forward.stack is not bert.stacks[0]
            assert torch.equal(copied(ids, attention_mask=keep).last_hidden_state, wanted)
            copied.encoder.layer[0].output.dense.weight.mul_(2)
            assert not torch.equal(copied(ids, attention_mask=keep).last_hidden_state, wanted)
        assert torch.equal(bert.after(ids, attention_mask=keep).last_hidden_state, wanted)


def test_two_threads_call_one_model(bert: Both, ids: Tensor) -> None:
    found: list[float] = []

    def work(keep: Tensor) -> None:
        for _ in range(10):
            found.append(bert.difference(keep, input_ids=ids, attention_mask=keep.long()))

    threads = [threading.Thread(target=work, args=(keep,)) for _, keep in padding_masks()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 60
    assert max(found) < NEAR


def test_a_compiled_model_gives_the_same(bert: Both, ids: Tensor) -> None:
    keep = right()
    compiled = torch.compile(copy.deepcopy(bert.after), backend="eager", fullgraph=True)
    with torch.no_grad():
        wanted = bert.before(ids, attention_mask=keep.long()).last_hidden_state
        given = compiled(ids, attention_mask=keep.long()).last_hidden_state
    torch.testing.assert_close(given[keep], wanted[keep], atol=2e-5, rtol=0)


def test_autocast(bert: Both, ids: Tensor) -> None:
    keep = right()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert bert.difference(keep, input_ids=ids, attention_mask=keep.long()) < 5e-2


def test_the_signature_is_the_models_own() -> None:
    pair = both("vit")
    assert inspect.signature(pair.after.forward) == inspect.signature(pair.before.forward)


def test_pipeline(tmp_path: Path, minilm_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(minilm_path)
    untouched = AutoModel.from_pretrained(minilm_path)
    packed = AutoModel.from_pretrained(minilm_path)
    rewire.apply_(packed, Pack("@encoder"))
    texts = ["one", "a longer sentence than the first"]
    made = [
        pipeline("feature-extraction", model=model, tokenizer=tokenizer)(texts, batch_size=2, return_tensors=True)
        for model in (untouched, packed)
    ]
    for wanted, given in zip(*made, strict=True):
        real = (given != 0).any(-1)
        torch.testing.assert_close(given[real], wanted[real], atol=2e-5, rtol=0)


def test_sentence_transformers(minilm_path: Path) -> None:
    models = pytest.importorskip("sentence_transformers")
    texts = ["a short one", "Padding is left out before the first layer and put back after the last.", "x"]
    untouched = models.SentenceTransformer(str(minilm_path), device="cpu")
    wanted = untouched.encode(texts, convert_to_tensor=True)
    rewire.apply_(untouched[0].auto_model, Pack("@encoder"))
    given = untouched.encode(texts, convert_to_tensor=True)
    assert float((wanted - given).abs().max()) < 1e-6


@pytest.mark.parametrize(
    ("head", "kind"), [(BartForConditionalGeneration, "bart"), (T5ForConditionalGeneration, "t5")], ids=["bart", "t5"]
)
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_is_token_for_token_the_same(head: Any, kind: str, beams: int) -> None:
    model = head(tiny_config(kind)).eval()
    draw(model)
    pair = both(kind, model)
    ids, keep = token_ids(model), right()
    settings = {"max_new_tokens": 10, "do_sample": False, "num_beams": beams, "decoder_start_token_id": 2}
    made = [m.generate(ids, attention_mask=keep.long(), **settings) for m in (pair.before, pair.after)]
    assert torch.equal(*made)
    assert pair.ways & {"recipe", "own layer"}


# ---------------------------------------------------------------- training


def gradients(model: Any, ids: Tensor, keep: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    out = model(ids, attention_mask=keep.long()).last_hidden_state
    ((out * keep[..., None]) ** 2).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def without_dropout(model: Any) -> Any:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def largest(wanted: dict[str, Tensor], given: dict[str, Tensor]) -> float:
    assert wanted.keys() == given.keys()
    top = max(float(grad.abs().max()) for grad in wanted.values())
    return max(float((g - given[n]).abs().max()) / max(float(g.abs().max()), 1e-3 * top) for n, g in wanted.items())


@pytest.mark.parametrize("kind", ["bert", "distilbert", "roformer", "mpnet", "modernbert"])
@pytest.mark.parametrize("padding", ["right", "left"])
def test_gradients_of_padded_batches(kind: str, padding: str) -> None:
    pair = both(kind)
    ids, keep = token_ids(pair.before), dict(padding_masks())[padding]
    wanted, given = (gradients(without_dropout(m), ids, keep) for m in (pair.alike, pair.after))
    assert largest(wanted, given) < 1e-4
    assert pair.ways == {"own layer"}


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_computes_again_what_it_computed(reentrant: bool) -> None:
    pair = both("bert")
    ids, keep = token_ids(pair.before), right()
    wanted = gradients(without_dropout(pair.alike), ids, keep)
    pair.after.activation_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        pair.after.enable_input_require_grads()
    given = gradients(without_dropout(pair.after), ids, keep)
    assert largest(wanted, given) < 1e-4
    assert pair.ways == {"own layer"}


def test_dropout_drops_in_training_and_not_otherwise(ids: Tensor) -> None:
    pair = both("bert")
    keep = right().long()
    pair.after.train()
    first, second = (pair.after(ids, attention_mask=keep).last_hidden_state for _ in range(2))
    assert not torch.equal(first, second)
    pair.after.eval()
    with torch.no_grad():
        first, second = (pair.after(ids, attention_mask=keep).last_hidden_state for _ in range(2))
    assert torch.equal(first, second)


def test_a_training_step_is_seen_by_the_next_forward(ids: Tensor) -> None:
    pair = both("bert")
    keep = right()
    assert pair.difference(keep, input_ids=ids, attention_mask=keep.long()) < NEAR
    for model in (pair.before, pair.after):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        gradients(model, ids, keep)
        optimizer.step()
    assert pair.difference(keep, input_ids=ids, attention_mask=keep.long()) < 2e-3  # Adam amplifies rounding
    pair.after.load_state_dict(pair.before.state_dict())
    assert pair.difference(keep, input_ids=ids, attention_mask=keep.long()) < NEAR


def test_trainer_takes_the_same_steps(tmp_path: Path) -> None:
    def texts() -> list[dict[str, Any]]:
        generator = torch.Generator().manual_seed(5)
        lengths = torch.randint(3, 12, (16,), generator=generator).tolist()
        rows = [torch.randint(5, 60, (length,), generator=generator) for length in lengths]
        return [{"input_ids": row, "labels": int(row.sum()) % 2} for row in rows]

    def padded(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        ids = nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], batch_first=True)
        labels = torch.tensor([row["labels"] for row in rows])
        return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}

    weights = []
    for packed in (False, True):
        model = BertForSequenceClassification(tiny_config("bert"))
        draw(model)
        without_dropout(model)
        if packed:
            rewire.apply_(model, Pack("@encoder"))
        arguments = TrainingArguments(
            str(tmp_path), max_steps=3, per_device_train_batch_size=4, optim="sgd", learning_rate=0.01, report_to=[],
            save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True, seed=0,
        )  # fmt: skip
        Trainer(model=model, args=arguments, train_dataset=texts(), data_collator=padded).train()
        weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
    for name, wanted in weights[0].items():
        torch.testing.assert_close(weights[1][name], wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.sweep
def test_ten_thousand_batches_leave_nothing_behind() -> None:
    pair = both("bert")
    process, generator = psutil.Process(), torch.Generator().manual_seed(0)
    before = 0
    with torch.inference_mode():
        for number in range(10_000):
            rows, width = (int(torch.randint(1, high, (), generator=generator)) for high in (9, 40))
            lengths = torch.randint(1, width + 1, (rows,), generator=generator)
            mask = (torch.arange(width)[None] < lengths[:, None]).long()
            pair.after(torch.randint(5, 60, (rows, width), generator=generator), attention_mask=mask)
            if number == 1_000:
                before = process.memory_info().rss
    assert process.memory_info().rss - before < 32 * 2**20
    assert len(list(pair.stacks[0].weights)) == 2


# ---------------------------------------------------------------- prepared weights


def test_prepared_weights_follow_every_way_of_writing(ids: Tensor) -> None:
    pair = both("bert")
    keep = right()

    def check() -> None:
        assert pair.difference(keep, input_ids=ids, attention_mask=keep.long()) < NEAR

    check()
    for model in (pair.before, pair.after):
        with torch.no_grad():
            model.encoder.layer[0].attention.self.key.weight.mul_(1.5)
    check()
    for model in (pair.before, pair.after):
        model.encoder.layer[1].intermediate.dense.weight.data += 0.25  # which no version counter sees
    check()
    for model in (pair.before, pair.after):
        weight = model.encoder.layer[1].output.dense.weight
        model.encoder.layer[1].output.dense.weight = nn.Parameter(weight.detach() * 0.5)
    check()
    for model in (pair.before, pair.after):
        model.double()
    assert pair.difference(keep, input_ids=ids, attention_mask=keep.long()) < 1e-12
    assert pair.ways == {"recipe"}


def test_no_second_copy_on_request(ids: Tensor) -> None:
    pair = both("bert", prepare=False)
    keep = right()
    assert pair.difference(keep, input_ids=ids, attention_mask=keep.long()) < NEAR
    assert pair.ways == {"own layer"}
    assert pair.stacks[0].weights.nbytes == 0
    assert not list(pair.stacks[0].weights)


def test_derived_values_are_made_anew_when_a_tensor_changes() -> None:
    derived, weight = Derived(), torch.ones(64, 64)
    total = lambda: float(weight.sum())  # noqa: E731
    assert derived.get("sum", (weight, None), total) == 4096
    weight.data.add_(1)
    assert derived.get("sum", (weight, None), total) == 8192
    assert derived.get("sum", (weight, weight), total) == 8192
    with torch.inference_mode():
        other = torch.ones(64, 64)
    assert derived.get("other", (other,), lambda: 1) == derived.get("other", (other,), lambda: 2) == 1
    assert len(list(derived)) == 2
    del other
    derived.get("third", (weight,), total)
    assert len(list(derived)) == 2  # what was made of a tensor goes with it
    assert not list(copy.deepcopy(derived))
    assert not list(pickle.loads(pickle.dumps(derived)))


@pytest.mark.parametrize(("dtype", "cosine"), [("bfloat16", 0.9999), ("int8", 0.995)])
def test_shorter_products_on_real_weights(minilm_path: Path, dtype: Any, cosine: float) -> None:
    model = AutoModel.from_pretrained(minilm_path).eval()
    tokens = passages(minilm_path, 16)
    with torch.no_grad():
        wanted = pooled(model, tokens)
        receipt = rewire.apply_(model, Pack("@encoder", dtype=dtype))
        given = pooled(model, tokens)
    assert receipt.promise == "lossy"
    assert "cosine" in receipt.decisions[0].detail
    assert float(torch.cosine_similarity(wanted, given).min()) >= cosine


def test_int8_that_loses_too_much_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from rewire.edits import pack

    monkeypatch.setitem(pack.SMALLEST_COSINE, "int8", 1.1)
    model = tiny_model("bert")
    with pytest.raises(RefusedError, match=r"int8 products .* cosine of .* needed is 1.1; nothing was changed"):
        rewire.apply_(model, Pack("@encoder", dtype="int8"))
    assert not wrapped(model)


def passages(folder: Path, count: int) -> dict[str, Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [text for topic in pydoc_data.topics.topics.values() for text in topic.split("\n\n") if text.strip()]
    return dict(tokenizer(texts[:count], padding=True, truncation=True, max_length=200, return_tensors="pt"))


def pooled(model: Any, tokens: dict[str, Tensor]) -> Tensor:
    mask = tokens["attention_mask"][..., None]
    return (model(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1)


def test_real_weights_and_real_text(minilm_path: Path) -> None:
    model = AutoModel.from_pretrained(minilm_path, attn_implementation="eager").eval()
    packed = AutoModel.from_pretrained(minilm_path).eval()
    rewire.apply_(packed, Pack("@encoder"))
    tokens = passages(minilm_path, 48)
    keep = tokens["attention_mask"].bool()
    with torch.inference_mode():
        difference = (model(**tokens).last_hidden_state - packed(**tokens).last_hidden_state)[keep].abs().max()
    assert float(difference) <= 2e-5


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("settings", "bound"), [({}, 2e-5), ({"dtype": "bfloat16"}, None)], ids=["float32", "bfloat16"]
)
def test_two_thousand_real_passages(minilm_path: Path, settings: dict[str, Any], bound: float | None) -> None:
    model = AutoModel.from_pretrained(minilm_path, attn_implementation="eager").eval()
    packed = AutoModel.from_pretrained(minilm_path).eval()
    rewire.apply_(packed, Pack("@encoder", **settings))
    worst, cosine = 0.0, 1.0
    for tokens in batches(minilm_path, 2_000):
        keep = tokens["attention_mask"].bool()
        with torch.inference_mode():
            wanted, given = (m(**tokens).last_hidden_state for m in (model, packed))
        worst = max(worst, float((wanted - given)[keep].abs().max()))
        means = [(states * keep[..., None]).sum(1) for states in (wanted, given)]
        cosine = min(cosine, float(torch.cosine_similarity(*means).min()))
    print(f"\nlargest difference {worst:.1e}, smallest cosine {cosine:.6f}")
    assert cosine >= 0.9999
    assert bound is None or worst <= bound


def batches(folder: Path, count: int) -> Iterator[dict[str, Tensor]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [text for topic in pydoc_data.topics.topics.values() for text in topic.split("\n\n") if text.strip()]
    texts = (texts * (count // len(texts) + 1))[:count]
    for start in range(0, count, 32):
        chunk = texts[start : start + 32]
        yield dict(tokenizer(chunk, padding=True, truncation=True, max_length=200, return_tensors="pt"))


# ---------------------------------------------------------------- together with other edits


def wrapped(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if "forward" in vars(module)]


def test_it_is_taken_back_bit_for_bit(ids: Tensor) -> None:
    model = tiny_model("bert")
    classes = {path: type(module) for path, module in model.named_modules()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        wanted = model(ids).last_hidden_state
        receipt = rewire.apply_(model, Pack("@encoder"))
        assert wrapped(model)
        assert list(model.state_dict()) == list(before)
        rewire.revert_(model)
        assert torch.equal(model(ids).last_hidden_state, wanted)
    assert receipt.promise == "rounding"
    assert not wrapped(model)
    assert {path: type(module) for path, module in model.named_modules()} == classes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_saved_and_loaded(tmp_path: Path, ids: Tensor) -> None:
    model = tiny_model("bert")
    rewire.apply_(model, Pack("@encoder"))
    rewire.save(model, tmp_path / "saved")
    plain = AutoModel.from_pretrained(tmp_path / "saved").eval()
    again = rewire.load(tmp_path / "saved").eval()
    assert not wrapped(plain)
    assert wrapped(again) == wrapped(model)
    assert "recipe bert" in rewire.receipt(again).decisions[0].detail
    keep = right()
    with torch.no_grad():
        wanted = plain(ids, attention_mask=keep.long()).last_hidden_state
        given = again(ids, attention_mask=keep.long()).last_hidden_state
    torch.testing.assert_close(given[keep], wanted[keep], atol=2e-5, rtol=0)
    assert all(torch.equal(t, plain.state_dict()[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("pack_first", [True, False])
def test_with_joined_projections(pack_first: bool, ids: Tensor) -> None:
    join = Join("encoder.layer.*.attention.self", parts=("query", "key", "value"))
    model = tiny_model("bert")
    before = copy.deepcopy(model)
    rewire.apply_(model, Plan([Pack("@encoder"), join] if pack_first else [join, Pack("@encoder")]))
    keep = right()
    with torch.no_grad():
        wanted = before(ids, attention_mask=keep.long()).last_hidden_state
        given = model(ids, attention_mask=keep.long()).last_hidden_state
    torch.testing.assert_close(given[keep], wanted[keep], atol=2e-5, rtol=0)
    rewire.revert_(model)
    assert not wrapped(model)
    assert all(torch.equal(t, before.state_dict()[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("pack_first", [True, False])
def test_with_adapters_live_merged_and_taken_out(pack_first: bool, ids: Tensor) -> None:
    lora = Lora(("query", "value"), r=4)
    model = tiny_model("bert")
    before = copy.deepcopy(model)
    rewire.apply_(before, lora)
    rewire.apply_(model, Pack("@encoder") if pack_first else lora)
    keep = right()
    with torch.no_grad():
        model(ids, attention_mask=keep.long())  # prepares weights
    rewire.apply_(model, lora if pack_first else Pack("@encoder"))

    def check() -> None:
        with torch.no_grad():
            wanted = before(ids, attention_mask=keep.long()).last_hidden_state
            given = model(ids, attention_mask=keep.long()).last_hidden_state
        torch.testing.assert_close(given[keep], wanted[keep], atol=3e-5, rtol=0)

    for adapted in (before, model):
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    check()
    for step in ("merge", "unmerge", "merge"):
        for adapted in (before, model):
            for module in adapted.modules():
                if hasattr(module, "lora_A"):
                    getattr(module, step)()
        check()


def test_with_frozen_and_tied_weights(ids: Tensor) -> None:
    model = BertForMaskedLM(tiny_config("bert")).eval()
    draw(model)
    before = copy.deepcopy(model)
    rewire.apply_(model, Plan([Freeze("bert.encoder.layer.0"), Pack("@encoder")]))
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert not model.bert.encoder.layer[0].output.dense.weight.requires_grad
    keep = right()
    with torch.no_grad():
        wanted, given = (m(ids, attention_mask=keep.long()).logits for m in (before, model))
    torch.testing.assert_close(given[keep], wanted[keep], atol=3e-5, rtol=0)


class Halved(nn.Module):
    """Not what stood there."""

    def __init__(self, old: nn.Module) -> None:
        super().__init__()
        self.dense = nn.Linear(old.dense.in_features, old.dense.out_features)  # type: ignore[arg-type, union-attr]

    @classmethod
    def from_module(cls, module: nn.Module) -> Halved:
        return cls(module)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.dense(x)) * 0.5


def test_a_layer_with_a_part_of_somebody_elses_is_not_packed_by_what_its_class_does(ids: Tensor) -> None:
    edit = Replace("encoder.layer.*.intermediate", with_=Halved)
    model = tiny_model("bert")
    before = copy.deepcopy(model)
    rewire.apply_(before, edit, allow_code=True)
    with pytest.raises(RefusedError, match="intermediate is a Halved where the class builds BertIntermediate"):
        rewire.apply_(model, Plan([edit, Pack("@encoder")]), allow_code=True)
    rewire.apply_(model, Plan([Pack("@encoder"), edit]), allow_code=True)
    layer = vars(model.encoder.layer[0])["forward"]
    keep = right()
    with torch.no_grad():
        wanted, given = (m(ids, attention_mask=keep.long()).last_hidden_state for m in (before, model))
    torch.testing.assert_close(given[keep], wanted[keep], atol=2e-5, rtol=0)
    assert layer.stack.paths == {"untouched: intermediate is a Halved, which was not tried out": 2}


def test_a_layer_whose_attention_was_replaced_afterwards_runs_untouched(ids: Tensor) -> None:
    pair = both("bert")
    for model in (pair.before, pair.after):
        old = model.encoder.layer[1].attention.self
        new = copy.deepcopy(old)
        vars(new).pop("forward", None)
        model.encoder.layer[1].attention.self = new
    keep = right()
    pair.after.requires_grad_(requires_grad=True)
    assert pair.difference(keep, input_ids=ids, attention_mask=keep.long()) < NEAR


def test_a_layer_that_was_replaced_cannot_be_taken_back() -> None:
    model = tiny_model("bert")
    rewire.apply_(model, Pack("@encoder"))
    model.encoder.layer[0] = copy.deepcopy(model.encoder.layer[1])
    with pytest.raises(RevertError, match=r"encoder\.layer\.0 is another module"):
        rewire.revert_(model)


# ---------------------------------------------------------------- finding, and refusing by name

REFUSED = {
    ("deberta-v2", "encoder.layer"): "depend on the content of queries and keys at relative positions",
    ("glpn", "encoder.block.0"): r"attention.self.sr is a convolution over 8×8 positions.*needed is 1",
    ("gpt2", "h"): r"attn belongs to a decoder \(is_causal is True, needed is False\)",
    ("bart", "decoder.layers"): "encoder_attn attends to another sequence",
    ("funnel", "encoder.blocks.0"): r"FunnelRelMultiheadAttention\) has attention code of its own",
    ("glm4v", "visual.blocks"): r"runs on packed tokens by itself \(its forward takes cu_seqlens\)",
}


@pytest.mark.parametrize(("kind", "path"), REFUSED)
def test_what_cannot_be_exact_is_refused_by_name(kind: str, path: str) -> None:
    model = tiny_model(kind)
    with pytest.raises(RefusedError, match=REFUSED[kind, path]):
        rewire.apply_(model, Pack(path))
    assert not wrapped(model)


def test_quantised_pruned_packed_and_foreign_layers_are_refused() -> None:
    model = tiny_model("bert")
    rewire.apply_(model, Pack("@encoder"))
    with pytest.raises(RefusedError, match="is packed already"):
        rewire.apply_(model, Pack("encoder.layer"))
    model = tiny_model("bert")
    model.encoder.layer[1].attention.self.pruned_heads = {3}
    with pytest.raises(RefusedError, match=r"attention.self has pruned heads \[3\], needed are none"):
        rewire.apply_(model, Pack("encoder.layer"))
    model = tiny_model("bert")
    model.encoder.layer[0].output.forward = lambda *args: None  # type: ignore[method-assign]
    with pytest.raises(RefusedError, match="the forward of output was replaced on the instance"):
        rewire.apply_(model, Pack("encoder"))


def test_a_target_that_is_no_stack_says_where_one_is() -> None:
    with pytest.raises(RefusedError, match=r"is no stack of encoder layers.*encoder\.layer"):
        rewire.apply_(tiny_model("bert"), Pack("embeddings"))
    with pytest.raises(NoMatchError, match="@encoder"):
        rewire.apply_(nn.Sequential(nn.Linear(2, 2)), Pack("@encoder"))


def test_yolos_adds_tables_between_layers_so_each_layer_packs_for_itself() -> None:
    pair = both("yolos")
    assert pair.receipt is not None
    assert "packed layer by layer" in pair.receipt.decisions[0].detail
    size = pair.before.config.image_size
    pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    assert pair.difference(None, pixel_values=pixels) < NEAR
    assert pair.ways == {"recipe"}


def test_both_towers_of_clip_are_found_and_the_text_stays_causal() -> None:
    pair = both("clip")
    ids = token_ids(pair.before)
    size = pair.before.config.vision_config.image_size
    pixels = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    assert pair.difference(None, input_ids=ids, pixel_values=pixels) < NEAR
    keep = right()
    with torch.no_grad():
        states = [
            m.text_model(input_ids=ids, attention_mask=keep.long()).last_hidden_state for m in (pair.alike, pair.after)
        ]
    torch.testing.assert_close(states[1][keep], states[0][keep], atol=2e-5, rtol=0)
    assert len(pair.stacks) == 2


def test_a_text_tower_that_reads_padding_runs_untouched_where_there_is_any() -> None:
    pair = both("siglip")
    ids, keep = token_ids(pair.before), right()
    with torch.no_grad():
        pooled = [
            m.text_model(input_ids=ids, attention_mask=keep.long()).pooler_output for m in (pair.alike, pair.after)
        ]
    assert torch.equal(*pooled)
    assert "untouched: padded positions are to hold the original's values" in pair.ways


def test_a_q_former_runs_in_place_on_prepared_weights() -> None:
    model = tiny_model("blip-2").qformer
    pair = both("blip-2", model)
    width, seen = model.config.hidden_size, model.config.encoder_hidden_size
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "query_embeds": torch.randn(3, 7, width, generator=generator),
        "encoder_hidden_states": torch.randn(3, 5, seen, generator=generator),
        "query_length": 7,
    }
    assert pair.difference(None, **inputs) < NEAR
    assert pair.ways == {"in place"}
    assert list(pair.stacks[0].weights)


def test_stacks_of_a_model() -> None:
    found = encoder_stacks(tiny_model("bart"))
    assert [(one.path, isinstance(one, Refusal)) for one in found] == [
        ("encoder.layers", False),
        ("decoder.layers", True),
    ]
    (albert,) = encoder_stacks(tiny_model("albert"))
    assert not isinstance(albert, Refusal)
    assert (albert.path, albert.owner) == ("encoder.albert_layer_groups", "encoder")


def test_a_window_of_attention_is_kept() -> None:
    pair = both("modernbert")
    ids = token_ids(pair.before, 4, 40)
    assert pair.before.config.sliding_window < 10
    lengths = torch.tensor([40, 21, 3, 33])
    keep = torch.arange(40)[None] < lengths[:, None]
    for mask in (keep, keep.flip(1)):
        assert pair.difference(mask, input_ids=ids, attention_mask=mask.long()) < NEAR
    assert pair.ways == {"own layer"}
    holes = keep.clone()
    holes[0, 5] = False
    assert pair.difference(holes, input_ids=ids, attention_mask=holes.long()) < NEAR


def test_layers_that_are_skipped_do_no_harm(ids: Tensor) -> None:
    pair = both("bert")
    keep = right()
    for model in (pair.before, pair.after):
        del model.encoder.layer[1]
    assert pair.difference(keep, input_ids=ids, attention_mask=keep.long()) < NEAR
    assert pair.difference(keep, input_ids=ids, attention_mask=keep.long()) < NEAR


def test_the_receipt_says_how_it_runs() -> None:
    receipt = rewire.apply_(tiny_model("bert"), Pack("@encoder"))
    (decision,) = receipt.decisions
    assert decision.detail.startswith("2 × BertLayer packed: recipe bert; attention ")


def test_the_proof_looks_at_the_packed_forward() -> None:
    model = tiny_model("bert")
    before = copy.deepcopy(model)
    rewire.apply_(model, Pack("@encoder"))
    assert rewire.prove(before, model).passed
    layer = vars(model.encoder.layer[0])["forward"]
    assert isinstance(layer, LayerForward)
    assert isinstance(vars(model.encoder)["forward"], OwnerForward)
    layer._recipe = None
    layer.facts = None if layer.facts is None else layer.facts.__class__(**{**vars(layer.facts), "activation": "relu"})
    assert not rewire.prove(before, model).passed
