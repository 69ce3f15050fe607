"""`Pack` on every model type: what the layers give, gradients, masks, and the way back. A run prints the table."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

import rewire
from packing import Both, both, compare_layers, padding_masks, token_ids
from rewire import hf_seam
from rewire.proof import Case, cases_for
from rewire.zoo import Unavailable, example_inputs, tiny_model
from rewire.zoo.table import ENTRIES

BOUND = 5e-6
"""Largest difference of outputs at real positions, relative to their scale, float32 with strong random weights."""

BOUNDS = {"mt5": 5e-5, "fsmt": 1e-5, "umt5": 1e-5, "mobilebert": 5e-5}
"""Types whose numbers amplify rounding."""

GRADIENTS = 1e-4
"""Largest difference of a parameter's gradient, relative to its largest; for MobileBERT three times as much."""

SAMPLE = ("albert", "clip", "fsmt", "hubert", "mpnet", "roformer", "t5", "vilt", "wav2vec2", "whisper", "yolos")

FORMER = (
    "albert", "bart", "bert", "bert-generation", "camembert", "clip", "data2vec-text", "deit", "distilbert", "electra",
    "ernie", "fsmt", "hubert", "layoutlm", "m2m_100", "marian", "markuplm", "mbart", "prophetnet", "rembert", "roberta",
    "roc_bert", "roformer", "splinter", "tapas", "vilt", "vit", "vit_mae", "vit_msn", "wav2vec2", "xlm-roberta",
    "yolos",
)  # fmt: skip
"""What Optimum's BetterTransformer converted."""

FURTHER = (
    "audio-spectrogram-transformer", "beit", "blip-2", "clip_vision_model", "dinov2", "esm", "eurobert", "modernbert",
    "mpnet", "mt5", "nomic_bert", "siglip", "t5", "umt5", "whisper", "xlm-roberta-xl",
)  # fmt: skip

UNTRIED = {
    "clap": "its audio tower wants features that cases_for does not make",
    "sam3_video": "its input is a session",
}

READS_MASKS = frozenset({"input_ids", "attention_mask"})
OTHER_INPUTS = frozenset({"pixel_values", "input_values", "input_features", "bbox", "pixel_values_videos"})


@pytest.mark.parametrize("kind", SAMPLE)
def test_a_sample_of_types(kind: str) -> None:
    assert check(kind).packed


@pytest.mark.sweep
@pytest.mark.parametrize("kind", [*FORMER, *FURTHER])
def test_every_type_of_the_old_fast_path_and_more(kind: str) -> None:
    found = check(kind)
    print(f"\n{found}")
    assert found.packed


@pytest.mark.sweep
def test_every_other_type_where_a_stack_is_found() -> None:
    rows, wrong = [], []
    for kind in hf_seam.auto_model_types():
        if kind in UNTRIED or not _is_available(kind):
            continue
        try:
            rows.append(check(kind))
        except AssertionError as error:
            wrong.append(f"{kind}: {error}")
    print("\n" + "\n".join(str(row) for row in rows if row.packed or row.refused))
    assert not wrong, "\n".join(wrong)
    assert sum(row.packed for row in rows) > 150


def _is_available(kind: str) -> bool:
    try:
        tiny_model(kind)
    except Unavailable:
        return False
    return True


class Row:
    """One line of the table."""

    def __init__(self, kind: str, pair: Both) -> None:
        decisions = pair.receipt.decisions if pair.receipt is not None else ()
        self.kind, self.refused = kind, pair.refused
        self.how = [one.detail.partition("; attention")[0] for one in decisions if one.outcome == "changed"]
        self.layers = self.gradients = self.masks = 0.0

    @property
    def packed(self) -> bool:
        """Whether any stack was packed."""
        return bool(self.how)

    def __str__(self) -> str:
        figures = f"layers {self.layers:.0e} gradients {self.gradients:.0e} masks {self.masks:.0e}"
        return f"{self.kind:32} {figures}  {'; '.join([*self.how, *map(str, self.refused.items())])}"


def check(kind: str) -> Row:
    """Packs what can be packed of a type, and asserts that nothing changes by it."""
    pair = both(kind)
    row, bound = Row(kind, pair), BOUNDS.get(kind, BOUND)
    if not row.packed:
        return row
    for case in _cases(kind, pair.before):
        found = compare_layers(pair, dict(case.kwargs), case.mask)
        if found is not None:
            row.layers, row.gradients = max(row.layers, found[0]), max(row.gradients, found[1])
    row.masks = max((pair.difference(keep, **inputs) for keep, inputs in _masked(kind, pair.before)), default=0.0)
    _take_back(pair)
    assert row.layers < bound, row
    assert row.gradients < GRADIENTS * (3 if kind == "mobilebert" else 1), row
    assert kind == "mobilebert" or row.masks < bound, row  # strong weights make it chaotic: 1e-11 in float64
    return row


def _cases(kind: str, model: Any) -> Iterable[Case]:
    entry = ENTRIES.get(kind)
    return [example_inputs(kind, model)] if entry is not None and entry.inputs else cases_for(model, (0,))


def _masked(kind: str, model: Any) -> Iterable[tuple[Tensor, dict[str, Tensor]]]:
    """Every way of padding, for models that read text alone."""
    names = inspect.signature(model.forward).parameters
    entry = ENTRIES.get(kind)
    if not set(names) >= READS_MASKS or OTHER_INPUTS & set(names) or (entry is not None and entry.inputs):
        return
    ids = token_ids(model)
    more = {"decoder_input_ids": ids[:, :5]} if "decoder_input_ids" in names else {}
    for _, keep in padding_masks():
        yield keep, {"input_ids": ids, "attention_mask": keep.long(), **more}


def _take_back(pair: Both) -> None:
    rewire.revert_(pair.after)
    state = pair.alike.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in pair.after.state_dict().items())
    classes = {path: type(module) for path, module in pair.alike.named_modules()}
    assert {path: type(module) for path, module in pair.after.named_modules()} == classes
    assert not any("forward" in vars(module) for module in pair.after.modules())
