"""How many parameters LoRA trains in SAM: what the guide prints, and what is measured here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.table import Table
from torch import nn

import rewire
from rewire.plan import Lora, Plan, Split
from rewire.receipts import Counts

QKV = Split("vision_encoder.layers.*.attn.qkv", into=("q", "k", "v"))
RANK = 16
QV, QKV_PARTS = ("q", "v"), ("q", "k", "v")


@dataclass(frozen=True)
class Published:
    """A line of the guide: trainable parameters and all parameters."""

    trainable: int
    parameters: int

    @property
    def share(self) -> str:
        """In per cent, as the guide prints it."""
        return percent(self.trainable, self.parameters)


PUBLISHED: Mapping[tuple[str, ...], Published] = MappingProxyType(
    {QV: Published(608_256, 94_343_728), QKV_PARTS: Published(912_384, 94_647_856)}
)
"""For SAM ViT-base, by the projections that are adapted."""


@dataclass(frozen=True)
class Measured:
    """One plan, loaded: its counts, and how many parameters the model had before."""

    parts: tuple[str, ...]
    dora: bool
    counts: Counts
    base: int

    @property
    def share(self) -> str:
        """Trainable parameters in per cent."""
        return percent(self.counts.trainable, self.counts.parameters)


def percent(part: int, whole: int) -> str:
    """Four decimals, like peft.

    >>> percent(608_256, 94_343_728)
    '0.6447 %'
    """
    return f"{100 * part / whole:.4f} %"


def adapted(parts: tuple[str, ...], *, dora: bool = False) -> Plan:
    """The guide's plan: split q, k and v, then LoRA on some of them."""
    options: dict[str, Any] = {"use_dora": True} if dora else {}
    return Plan([QKV, Lora(target=parts, r=RANK, lora_alpha=32, lora_dropout=0.1, **options)])


def measure(checkpoint: Path) -> list[Measured]:
    """Loads the checkpoint with each of the four plans and reads the receipts."""
    return [_measure(checkpoint, parts, dora) for parts in (QV, QKV_PARTS) for dora in (False, True)]


def _measure(checkpoint: Path, parts: tuple[str, ...], dora: bool) -> Measured:
    receipt = rewire.receipt(rewire.load(checkpoint, adapted(parts, dora=dora)))
    return Measured(parts, dora, receipt.after, receipt.before.parameters)


def expected_trainable(parts: tuple[str, ...], dora: bool, layers: int, width: int) -> int:
    """Two matrices `rank × width` for each adapted projection; with DoRA a vector of `width` magnitudes more.

    >>> expected_trainable(QV, False, layers=12, width=768), expected_trainable(QKV_PARTS, True, 12, 768)
    (589824, 912384)
    """
    return layers * len(parts) * (2 * RANK * width + dora * width)


def positional_values(model: nn.Module) -> int:
    """How many values the positional embedding has that became a parameter in Transformers 5."""
    return model.get_parameter("shared_image_embedding.positional_embedding").numel()


def table(measured: list[Measured], published: Mapping[tuple[str, ...], Published]) -> Table:
    """The measured figures, each next to the published one."""
    rows = Table("LoRA on", "option", "trainable", "of all", "share", "the guide prints", box=None, pad_edge=False)
    for one in measured:
        option = "use_dora=True" if one.dora else "plain"
        counts = f"{one.counts.trainable:,}", f"{one.counts.parameters:,}", one.share
        rows.add_row(", ".join(one.parts), option, *counts, _printed(published.get(one.parts)))
    return rows


def _printed(line: Published | None) -> str:
    return f"{line.trainable:,} of {line.parameters:,} = {line.share}" if line else "–"
