"""What is generated behaves: it compiles, the formatter leaves it alone, and its models are those of the package."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from rewire.source import build, tidy
from rewire.source.modules import installed
from rewire.zoo import example_inputs, tiny_model
from source_tree import RUFF, needs_ruff

LIBRARY = installed("transformers")
assert LIBRARY is not None
MODELS = LIBRARY.root / "models"

TYPES = (
    "gemma", "gemma2", "cohere", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "olmo2", "phi3", "glm",
    "starcoder2", "granite", "deepseek_v3", "modernbert", "ernie", "deit", "sew", "hubert", "unispeech",
)  # fmt: skip

pytestmark = needs_ruff


def generated(model_type: str) -> dict[str, str]:
    return build(MODELS / model_type / f"modular_{model_type}.py", ruff=RUFF)


def loaded(name: str, text: str, path: Path) -> ModuleType:
    """A module of the text, standing beside the package's own."""
    package = f"transformers.models.{path.parent.name}"
    module = module_from_spec(ModuleSpec(f"{package}.{name}", None, origin=str(path)))
    module.__package__, module.__file__ = package, str(path)
    sys.modules[module.__name__] = module
    exec(compile(text, str(path), "exec"), vars(module))  # noqa: S102 - what our own converter wrote
    return module


@pytest.mark.parametrize("model_type", TYPES)
def test_the_generated_classes_behave_as_the_packages_own(model_type: str) -> None:
    texts = generated(model_type)
    name = f"modeling_{model_type}"
    model: Any = tiny_model(model_type)
    # Under another name, so that the package's own module stays.
    module = loaded(f"{name}_built", texts[f"{name}.py"], MODELS / model_type / f"{name}.py")
    try:
        twin = getattr(module, type(model).__name__)(model.config).eval()
        assert type(twin) is not type(model)
        assert list(twin.state_dict()) == list(model.state_dict())
        twin.load_state_dict(model.state_dict())
        inputs = dict(example_inputs(model_type, model).kwargs)
        with torch.no_grad():
            first, second = model(**inputs)[0], twin(**inputs)[0]
        assert torch.equal(first, second)
    finally:
        del sys.modules[module.__name__]


@pytest.mark.parametrize("model_type", TYPES[:8])
def test_generated_files_compile_and_are_formatted(model_type: str) -> None:
    texts = generated(model_type)
    for name, text in texts.items():
        compile(text, name, "exec")
    assert tidy(texts, RUFF or "") == texts
