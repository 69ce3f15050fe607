"""A few training steps of an adapted SAM on random boxes and masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from rewire.receipts import Progress

Sam: TypeAlias = Any
"""A `SamModel`, edited or not; its annotations do not tell what its modules and configurations hold."""

STEPS = 3
BOXES = 4
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Example:
    """An image of noise `[1, 3, side, side]`, boxes `[1, boxes, 4]` in pixels, a mask `[1, boxes, m, m]` for each."""

    image: Tensor
    boxes: Tensor
    masks: Tensor


def random_example(config: Any, seed: int = 0) -> Example:
    """Random boxes, each with a random mask inside."""
    side, cells = config.vision_config.image_size, 4 * config.prompt_encoder_config.image_embedding_size
    draw = torch.Generator().manual_seed(seed)
    image = torch.randn(1, config.vision_config.num_channels, side, side, generator=draw)
    corners = torch.rand(1, BOXES, 2, 2, generator=draw).sort(dim=2).values
    grid = (torch.arange(cells) + 0.5) / cells
    (left, top), (right, bottom) = (corners[:, :, end].unbind(-1) for end in (0, 1))
    across = (grid > left[..., None]) & (grid < right[..., None])
    down = (grid > top[..., None]) & (grid < bottom[..., None])
    blobs = F.interpolate(torch.rand(1, BOXES, 8, 8, generator=draw), cells, mode="bilinear") > 0.4
    masks = down[..., :, None] & across[..., None, :] & blobs
    return Example(image, corners.flatten(2) * side, masks.float())


def train(model: Sam, example: Example, tell: Progress) -> list[float]:
    """The loss before each of a few steps of AdamW on whatever is trainable; layers are recomputed on the way
    back, so that full-size images fit into a few gigabytes.
    """
    model.train()
    _checkpoint_activations(model, "enable")
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    losses = []
    for step in range(STEPS):
        tell(f"step {step + 1}", step, STEPS)
        loss = F.binary_cross_entropy_with_logits(predict(model, example), example.masks)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    _checkpoint_activations(model, "disable")
    model.eval()
    return losses


def _checkpoint_activations(model: Sam, what: str) -> None:
    """By its new name where Transformers has it."""
    old = f"gradient_checkpointing_{what}"
    getattr(model, f"activation_checkpointing_{what}", getattr(model, old))()


def predict(model: Sam, example: Example) -> Tensor:
    """Mask logits `[1, boxes, m, m]`."""
    found = model(pixel_values=example.image, input_boxes=example.boxes, multimask_output=False)
    logits: Tensor = found.pred_masks
    return logits.squeeze(2)


def adapter_tensors(model: Sam) -> dict[str, Tensor]:
    """Copies of the adapters' tensors."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".lora_" in name}
