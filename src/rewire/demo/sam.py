"""SAM at full size: split while loading, proven, adapted, trained, saved; and the published recipes beside it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import SamConfig, SamModel

import rewire
from rewire import hf_seam
from rewire.demo import figures, recipes, training
from rewire.demo.checkpoints import compare
from rewire.demo.figures import QKV, QV, Published
from rewire.demo.screen import Screen
from rewire.demo.training import Sam
from rewire.plan import Replace, SplitTensor
from rewire.proof import Proof, cases_for
from rewire.proof.strong import draw_strong
from rewire.tensor_rules import Rule

OWN_ATTENTION = Replace(
    "vision_encoder.layers.*.attn",
    with_="rewire.demo.attention:SplitSamAttention",
    tensors=(SplitTensor("qkv.*", ("q.*", "k.*", "v.*")),),
)


@dataclass(frozen=True)
class Setting:
    """Which models a demonstration uses.

    Attributes:
        config: makes the configuration of the model.
        twin: makes the configuration of its twin: the same layers and widths, but small images, for what would
            take minutes with large ones.
        published: the guide's figures for this model.
    """

    config: Callable[[], Any]
    twin: Callable[[], Any]
    published: Mapping[tuple[str, ...], Published]


def _small_images() -> SamConfig:
    side = 256
    prompts = {"image_size": side, "image_embedding_size": side // 16}
    return SamConfig(vision_config={"image_size": side}, prompt_encoder_config=prompts)


FULL_SIZE = Setting(SamConfig, _small_images, figures.PUBLISHED)


@dataclass(frozen=True)
class Checkpoints:
    """Folders with the untouched model and its twin, in the original layout."""

    model: Path
    twin: Path


def demonstrate(screen: Screen, folder: Path, setting: Setting = FULL_SIZE) -> bool:
    """Runs all steps; whether every claim made on the way holds."""
    start = time.perf_counter()
    screen.title("SAM, full size: separate q, k, v, and LoRA on some of them")
    with hf_seam.quiet(), torch.random.fork_rng():
        torch.manual_seed(0)
        places = save_untouched(screen, folder, setting)
        split_and_prove(screen, places)
        show_figures(screen, places.model, setting)
        train_and_save(screen, places.model, folder)
        show_recipes(screen, places)
        replace_and_prove(screen, places.twin)
    return screen.verdict("SAM", time.perf_counter() - start)


# ---------------------------------------------------------------- the untouched model


def save_untouched(screen: Screen, folder: Path, setting: Setting) -> Checkpoints:
    """Draws strong weights and saves the model and its twin."""
    places = Checkpoints(folder / "untouched", folder / "twin")
    with screen.step("An untouched model on disk, in the original layout"):
        _save_strong(SamModel(setting.config()), places.model)
        twin: Sam = SamModel(setting.twin())
        weak = _embedding_size(twin)
        _save_strong(twin, places.twin)
        screen.say(
            f"Every weight was drawn strong (seed 0): with SAM's own initialisation the image embeddings are about "
            f"{weak:.0e}, where any comparison passes; now they are about {_embedding_size(twin):.1f}."
        )
        side = twin.config.vision_config.image_size
        screen.note(f"a twin with {side} × {side} images serves where full-size ones would take minutes")
    return places


def _save_strong(model: Sam, folder: Path) -> None:
    draw_strong(model, gain=1.0)
    model.save_pretrained(folder)


def _embedding_size(model: Sam) -> float:
    """Standard deviation of the image embeddings of noise."""
    image = training.random_example(model.config).image
    return float(model.eval().get_image_embeddings(image).std())


# ---------------------------------------------------------------- split and proof


def split_and_prove(screen: Screen, places: Checkpoints) -> None:
    """The split model, proven at full size and, gradients included, on the twin."""
    with screen.step("Split qkv in every vision layer, while the weights are loaded"):
        screen.plan(QKV)
        before: Sam = SamModel.from_pretrained(places.model)
        after = rewire.load(places.model, QKV)
        receipt = rewire.receipt(after)
        screen.show(receipt)
        layers = len(before.vision_encoder.layers)
        screen.claim(f"{layers} of {layers} layers changed", receipt.count("changed") == layers)
    with screen.step("Proof against the untouched model, full-size image"):
        proof = _prove(screen, before, after, gradients=False)
        screen.claim("the proof passes", proof.passed)
    del before, after
    with screen.step("The same proof with the gradients of every parameter, on the twin"):
        twin = rewire.load(places.twin, QKV)
        proof = _prove(screen, SamModel.from_pretrained(places.twin), twin)
        screen.claim("the proof passes, gradients included", proof.passed)


def _prove(screen: Screen, before: Sam, after: Sam, *, rules: Rule | None = None, gradients: bool = True) -> Proof:
    """A proof on one input, shown."""
    inputs = cases_for(before, seeds=(0,))[:1]
    promise = None if rules is None else "exact"
    with screen.progress("proving") as tell:
        proof = rewire.prove(
            before, after, rules=rules, promise=promise, inputs=inputs, gradients=gradients, progress=tell
        )
    screen.proof(proof)
    return proof


# ---------------------------------------------------------------- LoRA: the published figures


def show_figures(screen: Screen, checkpoint: Path, setting: Setting) -> None:
    """Trainable parameters, plain and with DoRA, beside the published ones."""
    with screen.step("LoRA r=16, alpha=32, dropout=0.1: trainable parameters"):
        measured = figures.measure(checkpoint)
        screen.show(figures.table(measured, setting.published))
        vision = setting.config().vision_config
        right = all(
            one.counts.trainable
            == figures.expected_trainable(one.parts, one.dora, vision.num_hidden_layers, vision.hidden_size)
            for one in measured
        )
        screen.claim("every count is layers × projections × (2 · rank · width, + width with DoRA)", right)
        for one in measured:
            if one.parts in setting.published:
                _compare(screen, one, setting.published[one.parts])
        if setting.published:
            _explain_total(screen, measured, setting)


def _compare(screen: Screen, one: figures.Measured, line: Published) -> None:
    """One line on how a measured figure relates to the published one."""
    parts = ", ".join(one.parts)
    trainable = one.counts.trainable
    if one.dora:
        equal = trainable == line.trainable and one.share == line.share
        screen.claim(f"{parts}: DoRA reproduces the guide's {line.trainable:,} and {line.share}", equal)
        return
    modules, missing = trainable // 24_576, line.trainable - trainable
    screen.claim(
        f"{parts}: plain LoRA trains {trainable:,}, two matrices 16 × 768 in each of {modules} projections; "
        f"the guide's {line.trainable:,} has {missing // modules} more in each, DoRA's magnitudes",
        missing == 768 * modules,
    )


def _explain_total(screen: Screen, measured: list[figures.Measured], setting: Setting) -> None:
    with torch.device("meta"):
        became = figures.positional_values(SamModel(setting.config()))
    surplus = {one.counts.parameters - setting.published[one.parts].parameters for one in measured if one.dora}
    screen.claim(
        f"the totals are {became} higher than printed: shared_image_embedding.positional_embedding (2 × {became // 2}) "
        "was a buffer and is a parameter in this version of Transformers",
        surplus == {became},
    )


# ---------------------------------------------------------------- train, save, reload


def train_and_save(screen: Screen, checkpoint: Path, folder: Path) -> None:
    """A few steps with LoRA on q and v; saved in both layouts; brought back."""
    model: Sam = rewire.load(checkpoint, figures.adapted(QV))
    example = training.random_example(model.config)
    fresh = training.adapter_tensors(model)
    with screen.step(f"Train {training.STEPS} steps on random boxes and masks"):
        with screen.progress("training") as tell:
            losses = training.train(model, example, tell)
        screen.claim(f"the loss falls: {' → '.join(f'{loss:.4f}' for loss in losses)}", losses[-1] < losses[0])
        moved = sum(not torch.equal(now, fresh[name]) for name, now in training.adapter_tensors(model).items())
        screen.claim(f"{moved} of {len(fresh)} adapter tensors moved", moved == len(fresh))
    with screen.step("Save in the original layout, adapters in PEFT's format; reload"):
        rewire.save(model, folder / "trained")
        found = compare(checkpoint, folder / "trained")
        text = f"nothing else moved: {found.same} of {found.shared} tensors on disk are bit-equal"
        screen.claim(text, found.all_same)
        _show_adapter(screen, folder / "trained" / "adapter" / "default")
        _compare_reloaded(screen, model, folder / "trained", example)
    with screen.step("Save as it is now (edited layout); reload without naming the plan"):
        rewire.save(model, folder / "edited", layout="edited")
        again, now = rewire.load(folder / "edited").state_dict(), model.state_dict()
        equal = again.keys() == now.keys() and all(torch.equal(again[name], now[name]) for name in now)
        screen.claim(f"all {len(now)} tensors are bit-equal", equal)


def _show_adapter(screen: Screen, folder: Path) -> None:
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(str(folder))
    targets = sorted(config.target_modules)
    screen.claim(
        f"peft reads the adapter: {config.peft_type.value}, r={config.r}, on {', '.join(targets)}",
        targets == ["q", "v"],
    )


def _compare_reloaded(screen: Screen, model: Sam, folder: Path, example: training.Example) -> None:
    with screen.progress("comparing outputs"), torch.no_grad():
        wanted, found = (training.predict(one.eval(), example) for one in (model, rewire.load(folder)))
    difference = float((wanted - found).abs().max())
    screen.claim(
        f"the reloaded model gives the same masks, bit for bit (largest difference {difference:g})", difference == 0
    )


# ---------------------------------------------------------------- the published recipes


def show_recipes(screen: Screen, places: Checkpoints) -> None:
    """Both published recipes at full size, and what a proof says of them on the twin."""
    with screen.step("Published recipe A: assign the subclass, then load"):
        made = recipes.subclass_before_loading(places.model)
        unchanged = made.attention == "SamVisionSdpaAttention" and made.hook_calls == 0
        screen.claim(
            f"nothing changed: the attention is still {made.attention}, the hook ran {made.hook_calls} times, "
            f"{made.right} of {made.wanted} q, k, v tensors exist; messages: {_listed(made.messages)}",
            unchanged and made.right == 0 and not made.messages,
        )
        _catch(screen, recipes.subclass_before_loading, places.twin)
    with screen.step("Published recipe B: load, then put fresh instances into the layers"):
        made = recipes.swap_after_loading(places.model)
        screen.claim(
            f"the class is in place, its weights are random: {made.right} of {made.wanted} q, k, v tensors are the "
            f"checkpoint's; messages: {_listed(made.messages)}",
            made.right == 0 and not made.messages,
        )
        _catch(screen, recipes.swap_after_loading, places.twin)


def _listed(messages: tuple[str, ...]) -> str:
    return "; ".join(messages) or "none"


def _catch(screen: Screen, recipe: Callable[[Path], recipes.Outcome], twin: Path) -> None:
    """The proof fails on what the recipe makes. What it should have made is said by the rules of the plan below."""
    rules: Rule = rewire.receipt(rewire.load(twin, OWN_ATTENTION, allow_code=True)).rules
    untouched = SamModel.from_pretrained(twin)
    proof = _prove(screen, untouched, recipe(twin).model, rules=rules, gradients=False)
    screen.claim("rewire.prove catches it", not proof.passed)


def replace_and_prove(screen: Screen, twin: Path) -> None:
    """The user's own class by a `Replace` plan: the same idea, with the weights in it."""
    with screen.step("The same class by a Replace plan, which moves the weights along"):
        screen.plan(OWN_ATTENTION)
        model: Sam = rewire.load(twin, OWN_ATTENTION, allow_code=True)
        proof = _prove(screen, SamModel.from_pretrained(twin), model)
        name = type(model.vision_encoder.layers[0].attn).__name__
        screen.claim(f"{name} is in place and the proof passes, gradients included", proof.passed)
