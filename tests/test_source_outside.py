"""Modular files outside Transformers: single folders, other packages, several levels, the documentation's cases."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from rewire.source import Conversion, build, build_many, convert
from source_tree import RUFF, needs_ruff

pytestmark = needs_ruff


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dedent(text).lstrip("\n"), "utf-8")
    return path


def classes(text: str) -> dict[str, ast.ClassDef]:
    return {node.name: node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)}


def methods(text: str, name: str) -> list[str]:
    return [node.name for node in classes(text)[name].body if isinstance(node, ast.FunctionDef)]


# ---------------------------------------------------------------- one folder

BASE = """
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.llama.modeling_llama import (
        LlamaAttention, LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel, LlamaRMSNorm
    )

    class WideConfig(LlamaConfig):
        model_type = "wide"
        extra: float = 1.0

    class WideRMSNorm(LlamaRMSNorm):
        pass

    class WideAttention(LlamaAttention):
        def __init__(self, config: WideConfig, layer_idx: int):
            super().__init__(config, layer_idx)
            self.out_norm = WideRMSNorm(config.hidden_size)

    class WidePreTrainedModel(LlamaPreTrainedModel):
        pass

    class WideModel(LlamaModel):
        pass

    class WideForCausalLM(LlamaForCausalLM):
        pass

    __all__ = ["WideConfig", "WideForCausalLM", "WideModel", "WidePreTrainedModel"]
    """


def test_a_folder_gets_files_with_absolute_imports(tmp_path: Path) -> None:
    texts = build(write(tmp_path, "modular_wide.py", BASE), ruff=RUFF)
    text = texts["modeling_wide.py"]
    assert "from transformers.activations import ACT2FN\n" in text
    assert "from .configuration_wide import WideConfig\n" in text
    assert "from .." not in text
    assert "modular_wide.py" in text.splitlines()[1]
    named = (
        "RMSNorm",
        "Attention",
        "MLP",
        "DecoderLayer",
        "PreTrainedModel",
        "RotaryEmbedding",
        "Model",
        "ForCausalLM",
    )
    assert classes(text).keys() == {f"Wide{name}" for name in named}


def test_a_second_level_is_built_without_files_in_between(tmp_path: Path) -> None:
    write(tmp_path, "modular_wide.py", BASE)
    modular = """
        from .configuration_wide import WideConfig
        from .modeling_wide import WideAttention, WideForCausalLM

        class DeepConfig(WideConfig):
            model_type = "deep"

        class DeepAttention(WideAttention):
            def __init__(self, config: DeepConfig, layer_idx: int):
                super().__init__(config, layer_idx)
                del self.out_norm

        class DeepForCausalLM(WideForCausalLM):
            pass
        """
    texts = build(write(tmp_path, "modular_deep.py", modular), ruff=RUFF)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["modular_deep.py", "modular_wide.py"]
    assert "out_norm" not in texts["modeling_deep.py"]
    assert "from transformers.activations import ACT2FN\n" in texts["modeling_deep.py"]
    assert "Wide" not in texts["modeling_deep.py"] + texts["configuration_deep.py"]


def test_a_package_that_follows_the_convention(tmp_path: Path) -> None:
    for folder in ("mine", "mine/models", "mine/models/wide", "mine/models/deep"):
        write(tmp_path, f"{folder}/__init__.py", "")
    write(tmp_path, "mine/models/wide/modular_wide.py", BASE)
    modular = "from ..wide.modeling_wide import WideModel\n\n\nclass DeepModel(WideModel):\n    pass\n"
    path = write(tmp_path, "mine/models/deep/modular_deep.py", modular)
    (built,) = build_many([path], parents="memory", ruff=RUFF).values()
    assert not built.errors
    text = built.texts["modeling_deep.py"]
    assert "generated from src/mine/models/deep/modular_deep.py." in text
    assert "DeepAttention" in classes(text)


def test_nothing_is_imported(tmp_path: Path) -> None:
    path = write(tmp_path, "modular_wide.py", BASE)
    loaded = "print('torch' in sys.modules, 'transformers' in sys.modules)"
    code = f"import sys; from rewire.source import convert; convert({str(path)!r}); {loaded}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.parametrize("parents", ["disk", "memory"])
def test_building_twice_gives_the_same(tmp_path: Path, parents: str) -> None:
    path = write(tmp_path, "modular_wide.py", BASE)
    runs = [build(path, parents="memory" if parents == "memory" else "disk", ruff=RUFF) for _ in range(2)]
    assert runs[0] == runs[1]


def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    paths = [write(tmp_path / name, "modular_wide.py", BASE) for name in ("a", "b", "c")]
    seen: list[tuple[int, int]] = []
    one = build_many(paths, ruff=RUFF)
    two = build_many(paths, ruff=RUFF, jobs=2, progress=lambda done, total: seen.append((done, total)))
    assert {path: built.texts for path, built in one.items()} == {path: built.texts for path, built in two.items()}
    assert seen == [(1, 3), (2, 3), (3, 3)]


# ---------------------------------------------------------------- where it came from


def origins(conversion: Conversion, label: str) -> list[tuple[str, int]]:
    fragments = (one for file in conversion.files for each in file.definitions for one in each.fragments)
    return [(one.origin.path.name, one.origin.line) for one in fragments if one.label == label and one.text.strip()]


def test_every_fragment_knows_where_it_came_from(tmp_path: Path) -> None:
    conversion = convert(write(tmp_path, "modular_wide.py", BASE))
    found = origins(conversion, "WideAttention.__init__")
    line = next(number for number, line in enumerate(dedent(BASE).lstrip().splitlines(), 1) if "out_norm" in line)
    assert ("modular_wide.py", line) in found
    assert {name for name, _ in found} == {"modular_wide.py", "modeling_llama.py"}
    assert [path.path.name for path in conversion.parents] == ["configuration_llama.py", "modeling_llama.py"]


# ---------------------------------------------------------------- the documentation's cases


def test_a_roberta_is_a_bert_with_other_embeddings(tmp_path: Path) -> None:
    modular = """
        from torch import nn
        from transformers.models.bert.configuration_bert import BertConfig
        from transformers.models.bert.modeling_bert import BertEmbeddings, BertModel

        class RobustConfig(BertConfig):
            model_type = "robust"

        class RobustEmbeddings(BertEmbeddings):
            def __init__(self, config):
                super().__init__(config)
                self.padding_idx = config.pad_token_id
                self.position_embeddings = nn.Embedding(
                    config.max_position_embeddings, config.hidden_size, padding_idx=config.pad_token_id
                )

        class RobustModel(BertModel):
            def __init__(self, config, add_pooling_layer=True):
                super().__init__(config, add_pooling_layer)
                self.embeddings = RobustEmbeddings(config)
        """
    text = build(write(tmp_path, "modular_robust.py", modular), ruff=RUFF)["modeling_robust.py"]
    assert {"RobustEmbeddings", "RobustSelfAttention", "RobustLayer", "RobustModel"} <= classes(text).keys()
    assert "padding_idx=config.pad_token_id\n        )" in text
    assert "Bert" not in text


def test_a_method_is_removed_and_an_attribute_is_deleted(tmp_path: Path) -> None:
    modular = """
        from torch import nn
        from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRotaryEmbedding

        class LeanMLP(LlamaMLP):
            def __init__(self, config):
                super().__init__(config)
                del self.gate_proj
                self.up_proj = nn.Linear(self.hidden_size, self.intermediate_size, bias=False)

            def forward(self, x):
                return self.down_proj(self.act_fn(self.up_proj(x)))

        class LeanRotaryEmbedding(LlamaRotaryEmbedding):

            def forward(self, x, position_ids):
                raise AttributeError("not needed")
        """
    text = build(write(tmp_path, "modular_lean.py", modular), ruff=RUFF)["modeling_lean.py"]
    assert "gate_proj" not in text
    assert "self.up_proj = nn.Linear(self.hidden_size, self.intermediate_size, bias=False)" in text
    assert "forward" not in methods(text, "LeanRotaryEmbedding")


def test_functions_that_new_functions_use_come_along(tmp_path: Path) -> None:
    modular = """
        import math
        from transformers.models.llama.modeling_llama import LlamaAttention

        def third(x):
            return math.sqrt(x)

        def second(x):
            return third(x)

        def first(x):
            return second(x)

        class NewAttention(LlamaAttention):
            def forward(self, x):
                return first(x)
        """
    text = build(write(tmp_path, "modular_new.py", modular), ruff=RUFF)["modeling_new.py"]
    assert all(f"\ndef {name}(x):\n" in text for name in ("first", "second", "third"))
    assert "import math\n" in text


def test_a_parent_called_by_name_is_not_taken_over(tmp_path: Path) -> None:
    modular = """
        from torch import nn
        from transformers.models.llama.modeling_llama import LlamaMLP

        class OwnMLP(LlamaMLP):
            def __init__(self, config):
                nn.Module.__init__(self)
                self.up_proj = nn.Linear(config.hidden_size, 8)
        """
    text = build(write(tmp_path, "modular_own.py", modular), ruff=RUFF)["modeling_own.py"]
    assert "        super().__init__()\n        self.up_proj = nn.Linear(config.hidden_size, 8)\n" in text


def test_a_vision_tower_takes_a_name_of_its_own(tmp_path: Path) -> None:
    modular = """
        from transformers.models.llama.modeling_llama import LlamaMLP
        from transformers.models.vit.modeling_vit import ViTLayer

        class SeerMLP(LlamaMLP):
            pass

        class SeerVisionLayer(ViTLayer):
            pass
        """
    text = convert(write(tmp_path, "modular_seer.py", modular)).texts["modeling_seer.py"]
    assert {"SeerMLP", "SeerVisionMLP", "SeerVisionAttention", "SeerVisionLayer"} == classes(text).keys()
    assert "self.mlp = SeerVisionMLP(config)" in text
