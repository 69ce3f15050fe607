"""Model names and file types: `llama4_text` and `Llama4Text`, `LlamaConfig` and `configuration`.

The library's table of config classes decides how a model's name is capitalised. It is read from the source of the
auto package, never by importing it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from rewire.source.rules import NEWEST, Rules

SUFFIXES: Mapping[str, str] = {
    "Config": "configuration",
    "Tokenizer": "tokenization",
    "Processor": "processing",
    "ProcessorKwargs": "processing",
    "VideosKwargs": "processing",
    "ImagesKwargs": "processing",
    "TextKwargs": "processing",
    "ImageProcessor": "image_processing",
    "ImageProcessorKwargs": "image_processing",
    "ImageProcessorPil": "image_processing_pil",
    "ImageProcessorFast": "image_processing_fast",
    "FastImageProcessorKwargs": "image_processing_fast",
    "VideoProcessor": "video_processing",
    "VideoProcessorInitKwargs": "video_processing",
    "VideoProcessorKwargs": "video_processing",
    "FeatureExtractor": "feature_extraction",
}
"""What a class name ends with, and the type of the file it belongs to. Anything else is `modeling`."""

FILE_TYPES = (
    "modeling",
    "configuration",
    "tokenization",
    "processing",
    "image_processing_pil",
    "image_processing",
    "video_processing",
    "feature_extraction",
)

_BY_LENGTH = sorted(SUFFIXES, key=len, reverse=True)


def file_type(name: str, cased_model: str, rules: Rules = NEWEST) -> str:
    """The type of the file that a class goes to.

    >>> file_type("LlamaConfig", "Llama"), file_type("GlmImageProcessor", "GlmImage"), file_type("LlamaMLP", "Llama")
    ('configuration', 'processing', 'modeling')
    """
    rest = name.replace(cased_model, "")
    known = (one for one in _BY_LENGTH if rules.video_kwargs or one != "VideoProcessorKwargs")
    return next((SUFFIXES[suffix] for suffix in known if rest.endswith(suffix)), "modeling")


FAST = "image_processing_fast"
"""A type of releases before 5.4, whose modules end with `_fast`."""


def type_of_module(module: str) -> str | None:
    """The file type that a module's name tells.

    >>> (
    ...     type_of_module("image_processing_pil_detr"),
    ...     type_of_module("image_processing_detr_fast"),
    ...     type_of_module("utils"),
    ... )
    ('image_processing_pil', 'image_processing_fast', None)
    """
    if module.startswith("image_processing_") and module.endswith("_fast"):
        return FAST
    return next((kind for kind in FILE_TYPES if module.startswith(kind)), None)


def module_name(kind: str, model: str) -> str:
    """The module of a model's file of some type.

    >>> module_name("modeling", "detr"), module_name("image_processing_fast", "detr")
    ('modeling_detr', 'image_processing_detr_fast')
    """
    return f"image_processing_{model}_fast" if kind == FAST else f"{kind}_{model}"


def model_of_module(module: str) -> str:
    """The model that a module of some file type belongs to.

    >>> model_of_module("image_processing_pil_detr"), model_of_module("image_processing_detr_fast")
    ('detr', 'detr')
    """
    kind = type_of_module(module)
    return module[len("image_processing_") : -len("_fast")] if kind == FAST else module.removeprefix(f"{kind}_")


def common_suffix(first: str, second: str) -> str:
    """What both names end with; nothing if that is one of them entirely.

    >>> common_suffix("GemmaMLP", "LlamaMLP"), common_suffix("MLP", "LlamaMLP")
    ('maMLP', '')
    """
    length = 0
    while length < min(len(first), len(second)) and first[-1 - length] == second[-1 - length]:
        length += 1
    return "" if length in (len(first), len(second)) else first[len(first) - length :]


class Names:
    """The table of one library: model type to config class.

    >>> names = Names({"llama4_text": "Llama4TextConfig"})
    >>> names.cased("llama4_text"), names.cased("my_new_model")
    ('Llama4Text', 'MyNewModel')
    >>> names.lower("Llama4Text"), names.lower("MyNewMLP")
    ('llama4_text', 'my_new_m_l_p')
    """

    def __init__(self, configs: Mapping[str, str]) -> None:
        self._cased = {model: config.replace("Config", "") for model, config in configs.items()}
        self._lower = {config: model for model, config in configs.items()}

    def cased(self, lower: str) -> str:
        """The name as classes carry it."""
        known = self._cased.get(lower) or self._cased.get(lower.replace("_", "-"))
        return known or "".join(part.title() for part in lower.split("_"))

    def lower(self, cased: str) -> str:
        """The name as files carry it."""
        known = self._lower.get(f"{cased}Config")
        return known or "_".join(part.lower() for part in re.findall(r"[A-Z][^A-Z]*|^[^A-Z]+", cased))


@cache
def names_of(package: Path) -> Names:
    """The table of the library installed at `package`; empty where there is none."""
    auto = package / "models" / "auto"
    configs: dict[str, str] = {}
    for file in ("auto_mappings.py", "configuration_auto.py"):
        if (auto / file).is_file():
            for entries in _mappings(ast.parse((auto / file).read_text("utf-8"))):
                configs = entries | configs if "gpt-sw3" in entries and configs else configs | entries
    return Names(configs)


def _mappings(tree: ast.Module) -> Iterator[dict[str, str]]:
    """Entries that module-level statements give to `CONFIG_MAPPING_NAMES`, in order."""
    for node in tree.body:
        match node:
            case ast.Assign(targets=[target]) | ast.Expr(value=ast.Call(func=target)):
                if "CONFIG_MAPPING_NAMES" in _names(target):
                    yield dict(_pairs(node))


def _names(node: ast.AST) -> set[str]:
    return {one.id for one in ast.walk(node) if isinstance(one, ast.Name)}


def _pairs(node: ast.AST) -> Iterator[tuple[str, str]]:
    for one in ast.walk(node):
        match one:
            case ast.Dict(keys=keys, values=values):
                yield from (pair for pair in map(_pair, keys, values) if pair)
            case ast.Tuple(elts=[first, second]) if pair := _pair(first, second):
                yield pair


def _pair(key: ast.expr | None, value: ast.expr) -> tuple[str, str] | None:
    match key, value:
        case ast.Constant(value=str(model)), ast.Constant(value=str(config)):
            return model, config
    return None
