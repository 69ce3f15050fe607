"""Inputs for any model, made from the model object alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from rewire.errors import ProofError
from rewire.proof import fields, fields_audio, fields_multimodal, fields_regions, fields_text, fields_vision
from rewire.proof.cases import Case, Padding
from rewire.proof.execution import forward_parameters
from rewire.proof.facts import Facts, lookup
from rewire.proof.fields import Maker, Shape, text
from rewire.proof.placeholders import MODALITIES, VIDEO, Run, arguments, mixed, runs, together
from rewire.proof.sound import takes_samples

MAKERS: dict[str, Maker] = {
    **fields.MAKERS,
    **fields_text.MAKERS,
    **fields_audio.MAKERS,
    **fields_vision.MAKERS,
    **fields_multimodal.MAKERS,
    **fields_regions.MAKERS,
}
"""What makes each argument, the parts of the table put together."""

TEXT: tuple[tuple[int, int, Padding], ...] = (
    (1, 33, "none"),
    (3, 17, "right"),
    (3, 17, "left"),
    (3, 17, "hole"),
    (3, 7, "none"),
)
"""Batch, length and padding of the texts tried with each seed, the most telling first."""

SIZED: tuple[int, ...] = (1, 3)
"""Batches of inputs whose size the model sets."""

BUDGET = 1.6e12
"""Multiplications and additions that one round over all cases may cost; at 1e11 a second, 16 s."""

FEWEST = 2
"""Cases that are tried whatever they cost."""

CHOICES = 2
"""Answers to choose from, where a model chooses."""

SEQUENCES = frozenset({"input_ids", "decoder_input_ids"})
PREFIX = frozenset({"image_embeds_position_mask"})
"""Arguments of models that put images at the beginning of every text."""
ROBOT = frozenset({"action_embeds"})
"""Arguments of models that act on what they see, and do nothing without it."""

AROUND = 7
"""Ordinary tokens in a text with images, videos or sounds."""


def cases_for(model: nn.Module, seeds: Sequence[int] = (0, 1)) -> tuple[Case, ...]:
    """Inputs for `model`: lengths, batches, padding patterns and seeds, within a budget of arithmetic.

    Texts get random ordinary tokens of several lengths, padded in several ways; images have the model's full
    size; SAM-like models get points and boxes; decoders after an encoder get tokens of their own. Large
    models get fewer cases (at least two), in the order of what they can show.

    Raises `ProofError` when forward takes nothing known; `inputs=` of `prove` is the way then.

    >>> cases_for(nn.Linear(2, 2))
    Traceback (most recent call last):
    rewire.errors.ProofError: no input can be made for Linear: its forward takes input, and known are ...
    """
    facts = Facts.of(model)
    names = wanted_names(facts)
    if not names:
        raise ProofError(
            f"no input can be made for {type(model).__name__}: its forward takes "
            f"{', '.join(sorted(facts.accepts))}, and known are {', '.join(MAKERS)}; "
            "pass inputs=[{...}] with keyword arguments for its forward"
        )
    return tuple(_affordable(facts, (build_case(facts, shape, names) for shape in shapes_for(facts, names, seeds))))


def wanted_names(facts: Facts) -> tuple[str, ...]:
    """The arguments to fill: those forward takes and a maker exists for."""
    names = tuple(name for name in MAKERS if name in facts.accepts)
    if "pixel_values" in names and VIDEO not in mixed(facts):
        names = tuple(name for name in names if name not in VIDEO.content)
    has_content = any(not name.endswith(("attention_mask", "token_type_ids")) for name in names)
    if "input_ids" in names and facts.vocab_size == 0:
        raise ProofError(
            f"{type(facts.model).__name__} takes input_ids, but neither its config nor its embedding tells a "
            "vocabulary size; pass inputs=[{'input_ids': ...}]"
        )
    return names if has_content else ()


def shapes_for(facts: Facts, names: Sequence[str], seeds: Sequence[int]) -> Iterator[Shape]:
    """The shapes to try, in the order of what they can show for their cost."""
    if not SEQUENCES & set(names):
        yield from (Shape(batch, 1, "none", seed) for batch in SIZED for seed in seeds)
        if {"input_values", "attention_mask"} <= set(names) and takes_samples(facts):
            yield Shape(SIZED[-1], 1, "right", seeds[0] if seeds else 0)
        return
    can_pad = "input_ids" in names and "attention_mask" in names
    limit = facts.max_length
    least = int(lookup(facts.config, "latent_query_num") or 0) + 1 if PREFIX & facts.accepts else 1
    mixtures, needs_them = mixtures_for(facts), needs_placeholders(facts)
    for seed in seeds:
        for mixture in mixtures:
            length = sum(run.count for run in mixture) + AROUND
            yield from (Shape(batch, length, "none", seed, mixture) for batch in ((1, 2) if needs_them else (1,)))
        if needs_them:
            continue
        shapes = [Shape(batch, max(min(length, limit), least), padding, seed) for batch, length, padding in TEXT]
        yield from dict.fromkeys(shape for shape in shapes if can_pad or shape.padding == "none")
        if facts.continues:
            yield Shape(2, min(11, limit), "none", seed, more=2)


def mixtures_for(facts: Facts) -> list[tuple[Run, ...]]:
    """The placeholders of the texts that hold images, videos or sounds; one text for all where that can be."""
    made = [runs(facts, group, lambda name: _one(facts, name)) for group in together(facts, mixed(facts))]
    return [one for one in made if one]


def _one(facts: Facts, name: str) -> Any:
    """The argument `name` for one image, video or sound; None where none can be made."""
    return MAKERS[name](facts, Shape(1, 1)) if name in MAKERS else None


def needs_placeholders(facts: Facts) -> bool:
    """Whether a text alone is no input: forward cannot do without what enters through placeholders."""
    required = {name for name, one in forward_parameters(facts.model).items() if one.default is one.empty}
    return any(one.content & required for one in mixed(facts)) or bool(ROBOT & required)


def build_case(facts: Facts, shape: Shape, names: Sequence[str]) -> Case:
    """The case of one shape."""
    kinds = {run.kind for run in shape.placeholders}
    left_out = {name for one in mixed(facts) if one.kind not in kinds for name in arguments(facts, one)}
    made = {name: MAKERS[name](facts, shape) for name in names if name not in left_out}
    kwargs = {name: value for name, value in made.items() if value is not None}
    if not kwargs:
        raise ProofError(
            f"the config of {type(facts.model).__name__} does not tell the size of {', '.join(names)}; "
            "pass inputs=[{...}] with keyword arguments for its forward"
        )
    if type(facts.model).__name__.endswith("MultipleChoice"):
        kwargs = {name: value.unsqueeze(1).repeat(1, CHOICES, 1) for name, value in kwargs.items()}
    has_positions = "input_ids" in kwargs and kwargs["input_ids"].ndim == 2
    mask = shape.mask if has_positions else None
    if not shape.more:
        return Case(_title(shape, names), kwargs, mask, shape.seed)
    more = {"input_ids": text(facts, shape, shape.batch, shape.more, "more")}
    return Case(_title(shape, names), {"input_ids": kwargs["input_ids"]}, None, shape.seed, more)


def _title(shape: Shape, names: Sequence[str]) -> str:
    """As `len 17, batch 3, right padding, seed 1`."""
    parts = [f"len {shape.length}"] if SEQUENCES & set(names) else []
    parts += [f"batch {shape.batch}"]
    parts += [f"{shape.padding} padding"] if shape.padding != "none" else []
    kinds = {run.kind for run in shape.placeholders}
    parts += [f"with {one.name}" for one in MODALITIES if one.kind in kinds]
    parts += [f"then {shape.more} from the cache"] if shape.more else []
    return ", ".join([*parts, f"seed {shape.seed}"])


def cost(facts: Facts, case: Case) -> float:
    """Multiplications and additions of one forward: two per parameter and position, roughly."""
    positions = max((_positions(facts, name, value) for name, value in case.kwargs.items()), default=1)
    return 2.0 * facts.parameters * positions


def _positions(facts: Facts, name: str, value: Tensor) -> int:
    if name in ("pixel_values", "hidden_states"):
        return value.numel() // (facts.channels * facts.patch_size**2)
    if name == "pixel_values_videos":
        return value.numel() // (facts.channels * facts.patch_size**2)
    if name == "input_features":
        return value.numel() // min(value.shape[1:])
    if name == "input_values":
        return max(1, value.numel() // 320)
    return value.numel() if name in SEQUENCES else 1


def _affordable(facts: Facts, cases: Iterator[Case]) -> Iterator[Case]:
    spent = 0.0
    for index, case in enumerate(cases):
        spent += cost(facts, case)
        if index >= FEWEST and spent > BUDGET:
            return
        yield case
