"""The demonstrations: MiniLM for real, SAM with a small model through the same functions, its figures at full size."""

from __future__ import annotations

import io
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import SamConfig, SamModel
from transformers.models.sam import modeling_sam

import rewire
from rewire.demo import FAILED, UNUSABLE, attention, figures, recipes, run, sam, training
from rewire.demo.checkpoints import compare
from rewire.demo.screen import Screen
from rewire.measure import texts
from rewire.measure.texts import real_sentences
from rewire.proof.strong import draw_strong

LAYERS, WIDTH = 3, 32


def small_config(side: int = 64) -> Any:
    patch = 8
    return SamConfig(
        vision_config={
            "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "mlp_dim": 64,
            "image_size": side, "patch_size": patch, "window_size": 3, "global_attn_indexes": [1],
            "output_channels": 16, "num_pos_feats": 8,
        },
        prompt_encoder_config={
            "hidden_size": 16, "image_size": side, "patch_size": patch, "image_embedding_size": side // patch,
            "mask_input_channels": 4,
        },
        mask_decoder_config={"hidden_size": 16, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16},
    )  # fmt: skip


SMALL = sam.Setting(small_config, lambda: small_config(32), {})


@pytest.fixture(scope="module")
def untouched() -> Any:
    model = SamModel(small_config())
    draw_strong(model, gain=1.0)
    return model.eval()


@pytest.fixture(scope="module")
def checkpoint(untouched: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sam") / "untouched"
    untouched.save_pretrained(folder)
    return folder


@pytest.fixture
def screen() -> Screen:
    return Screen(console=Console(file=io.StringIO(), width=200, highlight=False))


def shown(screen: Screen) -> str:
    stream = screen.console.file
    assert isinstance(stream, io.StringIO)
    return " ".join(stream.getvalue().split())


# ---------------------------------------------------------------- the whole demonstrations


def test_minilm(capsys: pytest.CaptureFixture[str], minilm_path: Path, tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    assert run("minilm", folder=tmp_path) == 0
    output = capsys.readouterr().out
    assert "✗" not in output
    assert "6 of 6 layers changed" in output
    assert output.splitlines()[-1].startswith("✓ MiniLM: all 7 claims hold")
    assert compare(minilm_path, tmp_path / "minilm").same == 103
    assert (tmp_path / "minilm" / "1_Pooling" / "config.json").is_file()


def test_sam_small(screen: Screen, tmp_path: Path) -> None:
    library_class, state = modeling_sam.SamVisionAttention, torch.random.get_rng_state()
    assert sam.demonstrate(screen, tmp_path, SMALL)
    assert modeling_sam.SamVisionAttention is library_class
    assert torch.equal(torch.random.get_rng_state(), state)
    output = shown(screen)
    assert "✓ SAM: all" in output
    assert "0 of 18 q, k, v tensors exist" in output  # recipe A
    assert "0 of 18 q, k, v tensors are the checkpoint's; messages: none" in output  # recipe B
    assert output.count("rewire.prove catches it") == 2
    assert output.count("proof FAILED") == 2


# ---------------------------------------------------------------- starting one


def test_unknown_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("bert") == UNUSABLE
    assert "sam, minilm, all" in capsys.readouterr().out


def test_missing_packages(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewire.demo.find_spec", lambda name: None)
    assert run("minilm") == UNUSABLE
    assert "pip install 'rewire[demo]'" in capsys.readouterr().out


def test_folder_in_use(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert run("sam", folder=tmp_path) == UNUSABLE
    assert "not an empty folder" in capsys.readouterr().out


@pytest.mark.parametrize(("good", "code"), [(True, 0), (False, FAILED)])
def test_exit_code(good: bool, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def pretend(screen: Screen, folder: Path) -> bool:
        screen.claim("so it is", good)
        return screen.verdict(folder.name, 0)

    monkeypatch.setattr(sam, "demonstrate", pretend)
    assert run("sam", quiet=True) == code


# ---------------------------------------------------------------- the published figures, at full size


@pytest.mark.parametrize("parts", [figures.QV, figures.QKV_PARTS])
@pytest.mark.parametrize("dora", [False, True])
def test_published_figures(parts: tuple[str, ...], dora: bool) -> None:
    model = SamModel(SamConfig())
    receipt = rewire.apply_(model, figures.adapted(parts, dora=dora), hashes=False)
    published = figures.PUBLISHED[parts]
    modules = 12 * len(parts)
    assert receipt.after.trainable == published.trainable - (0 if dora else 768 * modules)
    assert receipt.after.trainable == figures.expected_trainable(parts, dora, layers=12, width=768)
    if dora:
        assert receipt.after.parameters == published.parameters + figures.positional_values(model)
        assert figures.positional_values(model) == 256
        assert figures.percent(receipt.after.trainable, receipt.after.parameters) == published.share


def test_measured_counts_follow_the_formula(checkpoint: Path) -> None:
    measured = figures.measure(checkpoint)
    assert [(one.parts, one.dora) for one in measured] == [
        (figures.QV, False), (figures.QV, True), (figures.QKV_PARTS, False), (figures.QKV_PARTS, True),
    ]  # fmt: skip
    for one in measured:
        expected = figures.expected_trainable(one.parts, one.dora, LAYERS, WIDTH)
        assert (one.counts.trainable, one.counts.parameters) == (expected, one.base + expected)


# ---------------------------------------------------------------- the recipes and the attention


def test_recipe_a_changes_nothing(checkpoint: Path) -> None:
    made = recipes.subclass_before_loading(checkpoint)
    assert (made.attention, made.hook_calls) == ("SamVisionSdpaAttention", 0)
    assert (made.right, made.wanted, made.messages) == (0, 2 * 3 * LAYERS, ())


def test_messages_are_collected_and_logging_left_as_it_was() -> None:
    logger = logging.getLogger("transformers")
    before = logger.level, logger.handlers
    with recipes._messages() as messages:
        logger.warning("one")
        logger.info("not this")
        warnings.warn("two", stacklevel=1)
    assert messages == ["one", "two"]
    assert (logger.level, logger.handlers) == before


def test_recipe_a_is_undone_after_a_failure(tmp_path: Path) -> None:
    library_class = modeling_sam.SamVisionAttention
    with pytest.raises(OSError, match=str(tmp_path)):
        recipes.subclass_before_loading(tmp_path)
    assert modeling_sam.SamVisionAttention is library_class


def test_recipe_b_keeps_no_weight(checkpoint: Path) -> None:
    made = recipes.swap_after_loading(checkpoint)
    assert (made.attention, made.hook_calls, made.right) == ("GuideAttention", 0, 0)


def test_wanted_tensors_are_those_of_a_right_replacement(untouched: Any, checkpoint: Path) -> None:
    model = rewire.load(checkpoint, sam.OWN_ATTENTION, allow_code=True)
    have = model.state_dict()
    wanted = recipes.separate_tensors(untouched)
    assert len(wanted) == 2 * 3 * LAYERS
    assert all(torch.equal(have[name], tensor) for name, tensor in wanted.items())


def test_own_attention_computes_the_same(untouched: Any, checkpoint: Path) -> None:
    model = rewire.load(checkpoint, sam.OWN_ATTENTION, allow_code=True)
    assert rewire.prove(untouched, model, seeds=(0,)).passed


def test_own_attention_gives_weights_when_asked(untouched: Any) -> None:
    config = untouched.config.vision_config
    module = attention.SplitSamAttention(config, window_size=0)
    states = torch.randn(2, 8, 8, WIDTH)
    output, weights = module(states, output_attentions=True)
    assert output.shape == states.shape
    assert weights is not None
    assert weights.shape == (2 * 4, 64, 64)
    assert torch.allclose(weights.sum(-1), torch.ones(2 * 4, 64))
    assert module(states)[1] is None


def test_own_attention_drops_out_in_training_only(untouched: Any) -> None:
    module = attention.SplitSamAttention(untouched.config.vision_config, window_size=0)
    module.dropout = 0.5
    states = torch.randn(1, 8, 8, WIDTH)
    assert torch.equal(module.eval()(states)[0], module(states)[0])
    assert not torch.equal(module.train()(states)[0], module(states)[0])


def test_hook_splits_fused_tensors_of_its_own_module(untouched: Any) -> None:
    counted = recipes._fresh_class()
    config = untouched.config.vision_config
    pair = torch.nn.ModuleDict({"new": counted(config, 3), "old": modeling_sam.SamVisionAttention(config, 3)})
    fused = {f"{name}.{key}": tensor for name in pair for key, tensor in pair["old"].state_dict().items()}
    pair.load_state_dict(fused)  # strict: no key is left over or missing
    assert counted.hook_calls == 1
    assert torch.equal(pair["new"].k.weight, pair["old"].qkv.weight[WIDTH : 2 * WIDTH])


# ---------------------------------------------------------------- training


def test_random_example() -> None:
    example = training.random_example(small_config())
    assert example.image.shape == (1, 3, 64, 64)
    assert example.masks.shape == (1, training.BOXES, 32, 32)
    assert set(example.masks.unique().tolist()) == {0.0, 1.0}
    left, top, right, bottom = example.boxes[0].unbind(-1)
    assert bool((left < right).all())
    assert bool((top < bottom).all())
    cells = (torch.arange(32) + 0.5) * 2
    for index, mask in enumerate(example.masks[0]):
        columns = cells[mask.any(0)]
        assert bool(((columns > left[index]) & (columns < right[index])).all())


def test_training_moves_adapters_alone(checkpoint: Path) -> None:
    torch.manual_seed(0)
    model = rewire.load(checkpoint, figures.adapted(figures.QV))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    losses = training.train(model, training.random_example(model.config), lambda *_: None)
    assert losses[-1] < losses[0]
    assert not model.training
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if ".lora_" in name}


# ---------------------------------------------------------------- small parts


def test_compare_sees_a_difference(untouched: Any, checkpoint: Path, tmp_path: Path) -> None:
    assert compare(checkpoint, checkpoint).all_same
    tensors = untouched.state_dict()
    name = "vision_encoder.layers.0.attn.qkv.weight"
    untouched.save_pretrained(tmp_path / "other", state_dict={**tensors, name: tensors[name] + 1e-6})
    found = compare(checkpoint, tmp_path / "other")
    assert (found.shared - found.same, found.lone) == (1, ())
    assert not found.all_same


def test_sentences_are_prose() -> None:
    found = real_sentences(50)
    assert len(set(found)) == 50
    assert all(texts.SHORTEST <= len(one) <= texts.LONGEST and one[0].isupper() for one in found)


@pytest.fixture
def quiet_screen() -> Screen:
    return Screen(quiet=True, console=Console(file=io.StringIO(), width=100))


def test_quiet_shows_the_verdict_alone(quiet_screen: Screen) -> None:
    quiet_screen.title("A title")
    with quiet_screen.step("A step"):
        quiet_screen.claim("holds", True)
    assert quiet_screen.verdict("SAM", 1.0)
    assert shown(quiet_screen) == "✓ SAM: all 1 claims hold (1 s)"


def test_verdict_names_what_does_not_hold(screen: Screen) -> None:
    screen.title("A title")
    screen.claim("the earth is round", True)
    screen.claim("the earth is flat", False)
    assert not screen.verdict("Earth", 1.0)
    assert shown(screen).endswith("✗ Earth: 1 of 2 claims do not hold: the earth is flat (1 s)")


def test_no_claim_is_no_success(screen: Screen) -> None:
    screen.title("A title")
    assert not screen.verdict("Nothing", 1.0)


def test_progress_counts(screen: Screen) -> None:
    with screen.progress("working") as tell:
        tell("one", 0, 2)
        tell("two", 1, 2)
