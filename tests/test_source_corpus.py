"""Transformers' own modular files give, byte for byte, the files in the installed package.

The sample has every surprising case that is known, the ten largest files, and every seventh of the rest; `make sweep`
builds all, from the files on disk and from nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Literal

import pytest

from rewire.source import Built, Workspace, build_many, modular_files, workspace
from rewire.source.build import collector_paused
from rewire.source.errors import Report
from rewire.source.files import SourceFile
from rewire.source.modules import installed
from rewire.source.parents import Modular
from rewire.source.view import View
from source_tree import RUFF, needs_ruff

SURPRISING = {
    "a word that begins like the model is renamed": "sam2",
    "f-string text is not renamed": "altclip clipseg",
    "capitals": "aimv2",
    "a name through another model's config": "nemotron3_5_transcribe tipsv2 videoprism",
    "several names in one file": "x_clip dots3_note deepseek_ocr2",
    "type after the model's name is taken off": "glm_image sam2_video sam3_tracker_video",
    "two modular files in one folder": "data2vec_audio data2vec_text",
    "no parent": "pp_ocrv5_server_det",
    "raising methods that stay": "deepseek_vl pp_doclayout_v2 moonshine pocket_tts_audio_tokenizer",
    "attribute and property of one name": "deimv2",
    "del of an annotated assignment": "mistral_large4",
    "a longer base": "embedding_gemma2",
    "module-level __getattr__": "colmodernvbert aria",
    "an attribute written twice": "sam3_lite_text",
    "functions nobody calls": "rf_detr unlimited_ocr",
    "an import removed by the formatter": "mask2former",
    "indexed assignment": "doge",
    "classes on one line": "glmasr pe_audio voxtral_realtime",
    "setters": "hrm_text smolvlm",
    "names that are never renamed": "falcon_mamba jamba bamba zamba2 falcon_h1 minimax",
    "assignments carried to another method": "vivit",
    "a class defined twice": "got_ocr2",
    "a comment on the def line": "segformer",
    "an import only another parent has": "musicflamingo prompt_depth_anything",
    "torch under a guard": "moss_transcribe_diarize neucodec conditional_detr nemotron_asr_streaming",
    "an imported function used by another parent's class": "evolla qwen2_5_omni qwen3_vl_moe",
    "a function over the parent's of that name": "granite_docling nanochat ernie4_5",
}
LARGEST = "qwen2_5_omni qwen3_omni_moe sam2_video gemma3n gemma4 glm5_next esmfold2 sapiens2 rt_detr molmo2"
FOR_EXAMPLE = "gemma"

LIBRARY = installed("transformers")
assert LIBRARY is not None
ALL = list(modular_files(LIBRARY.root / "models"))
BANNER = "automatically generated from src/transformers/models/"


def name_of(path: Path) -> str:
    return path.stem.removeprefix("modular_")


def sample() -> list[Path]:
    chosen = {FOR_EXAMPLE, *LARGEST.split(), *(name for names in SURPRISING.values() for name in names.split())}
    assert chosen <= set(map(name_of, ALL))
    rest = [path for path in ALL if name_of(path) not in chosen]
    return sorted(
        [*(path for path in ALL if name_of(path) in chosen), *rest[:: max(1, len(rest) // (80 - len(chosen)))]]
    )


@cache
def standing() -> dict[Path, dict[str, str]]:
    """The generated files in the package, by modular file."""
    found: dict[Path, dict[str, str]] = {path: {} for path in ALL}
    for file in sorted(path for folder in {path.parent for path in ALL} for path in folder.glob("*.py")):
        text = file.read_text("utf-8")
        source = text[:600].partition(BANNER)[2].partition(".py")[0]
        if source and not file.name.startswith("modular_"):
            found[file.parent.parent / f"{source}.py"][file.name] = text
    return found


def different(built: dict[Path, Built]) -> list[str]:
    """Generated files that are not what the package has, or of which there is one too many or too few."""
    return [
        f"{path.parent.name}/{name}"
        for path, one in built.items()
        for name in sorted(one.texts.keys() | standing()[path].keys())
        if one.texts.get(name) != standing()[path].get(name)
    ]


@needs_ruff
def test_sample_is_byte_identical() -> None:
    chosen = sample()
    assert len(chosen) >= 80
    assert different(build_many(chosen, ruff=RUFF)) == []


@needs_ruff
@pytest.mark.sweep
@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("parents", ["disk", "memory"])
def test_all_are_byte_identical(parents: Literal["disk", "memory"], jobs: int) -> None:
    built = build_many(ALL, parents=parents, ruff=RUFF, jobs=jobs)
    assert different(built) == []
    assert sum(len(one.texts) for one in built.values()) == sum(map(len, standing().values()))
    if LIBRARY and "5.23.0" in (LIBRARY.root / "__init__.py").read_text("utf-8"):
        assert sum(len(one.texts) for one in built.values()) == 667


# ---------------------------------------------------------------- the names that classes of parents take


def test_names_of_parents() -> None:
    """Every parent file whose classes take another name than the model's own, in the files of the sample."""
    lines = (Path(__file__).parent / "data" / "modular_names.tsv").read_text("utf-8").splitlines()[1:]
    expected = {tuple(line.split("\t")) for line in lines}
    names = {name_of(path) for path in sample()}
    found = {(name, parent, prefix) for name, parent, prefix in prefixes(sample()) if prefix != name}
    assert found == {one for one in expected if one[0] in names}


def prefixes(paths: list[Path]) -> Iterator[tuple[str, str, str]]:
    shop: Workspace = workspace()
    with collector_paused():
        for path in paths:
            view = View(SourceFile(path, path.read_text("utf-8")))
            modular = Modular(view, name_of(path), LIBRARY, shop.names_for(path), shop.parent, Report())
            for parent in modular.parents.values():
                yield modular.name, parent.module.path.stem, parent.prefix
