"""Modular files outside any package: a folder whose generated files load as a model's own code, without Rewire."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from cli_runner import rewire
from rewire.source import build
from source_tree import needs_ruff

pytestmark = needs_ruff

TWONORM = r'''
    """A Llama that normalises queries and keys, with one more norm behind the MLP."""

    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.llama.modeling_llama import (
        LlamaDecoderLayer,
        LlamaForCausalLM,
        LlamaModel,
        LlamaPreTrainedModel,
        LlamaRMSNorm,
    )
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention


    class TwonormConfig(LlamaConfig):
        r"""
        scale_after (`float`, *optional*, defaults to 0.5):
            How much of the MLP's normalised output is added.
        """

        scale_after: float = 0.5


    class TwonormRMSNorm(LlamaRMSNorm):
        pass


    class TwonormAttention(Qwen3Attention):
        def __init__(self, config: TwonormConfig, layer_idx: int):
            super().__init__(config, layer_idx)
            self.layer_type = None
            self.sliding_window = None


    class TwonormDecoderLayer(LlamaDecoderLayer):
        def __init__(self, config: TwonormConfig, layer_idx: int):
            super().__init__(config, layer_idx)
            self.after = TwonormRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.scale_after = config.scale_after

        def forward(self, hidden_states, **kwargs):
            residual = hidden_states
            hidden_states = self.input_layernorm(hidden_states)
            hidden_states, _ = self.self_attn(hidden_states=hidden_states, **kwargs)
            hidden_states = residual + hidden_states
            residual = hidden_states
            hidden_states = self.mlp(self.post_attention_layernorm(hidden_states))
            return residual + self.scale_after * self.after(hidden_states)


    class TwonormPreTrainedModel(LlamaPreTrainedModel):
        pass


    class TwonormModel(LlamaModel):
        pass


    class TwonormForCausalLM(LlamaForCausalLM):
        pass


    __all__ = ["TwonormConfig", "TwonormPreTrainedModel", "TwonormModel", "TwonormForCausalLM"]
'''

TRAIN = """
    import sys
    import torch
    from safetensors.torch import save_file
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    code, out = sys.argv[1:]
    Config = get_class_from_dynamic_module("configuration_twonorm.TwonormConfig", code)
    Model = get_class_from_dynamic_module("modeling_twonorm.TwonormForCausalLM", code)
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    model = Model(Config(vocab_size=99, num_key_value_heads=2, scale_after=0.25, **sizes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = torch.arange(24).reshape(2, 12)
    losses = []
    for _ in range(5):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0], losses
    Config.register_for_auto_class()
    Model.register_for_auto_class("AutoModelForCausalLM")
    model.eval().save_pretrained(out)
    save_file({"logits": model(input_ids=tokens).logits.detach()}, out + "/logits.safetensors")
"""

LOAD = """
    import sys
    sys.modules["rewire"] = None  # whoever imports it now fails
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = sys.argv[1]
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__name__ == "TwonormForCausalLM"
    assert model.config.scale_after == 0.25
    assert {"after", "self_attn"} <= dict(model.model.layers[1].named_children()).keys()
    logits = model(input_ids=torch.arange(24).reshape(2, 12)).logits
    assert torch.equal(logits, load_file(folder + "/logits.safetensors")["logits"])
    print("the same")
"""


@pytest.fixture
def twonorm(tmp_path: Path) -> Path:
    """A folder with one modular file."""
    folder = tmp_path / "twonorm"
    folder.mkdir()
    (folder / "modular_twonorm.py").write_text(dedent(TWONORM).lstrip())
    return folder


def run(script: str, cache: Path, *args: object) -> str:
    """A script in a process of its own, from a folder without Rewire."""
    quiet = {"HF_MODULES_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", dedent(script), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | quiet, cwd=cache)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_new_architecture_trains_saves_and_loads_without_rewire(twonorm: Path, tmp_path: Path) -> None:
    assert rewire("modular", "build", twonorm, "--cache", tmp_path / "cache").code == 0
    text = (twonorm / "modeling_twonorm.py").read_text()
    assert "rewire" not in text
    assert "\nfrom .configuration_twonorm import TwonormConfig\n" in text
    assert "from .." not in text
    (tmp_path / "modules").mkdir()
    run(TRAIN, tmp_path / "modules", twonorm, tmp_path / "saved")
    saved = tmp_path / "saved"
    assert {"configuration_twonorm.py", "modeling_twonorm.py"} <= {path.name for path in saved.iterdir()}
    assert json.loads((saved / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_twonorm.TwonormConfig",
        "AutoModelForCausalLM": "modeling_twonorm.TwonormForCausalLM",
    }
    for path in twonorm.iterdir():
        path.unlink()  # what was saved needs nothing of this
    (tmp_path / "others").mkdir()
    assert run(LOAD, tmp_path / "others", saved) == "the same\n"


def test_generations_outside_a_package(twonorm: Path) -> None:
    """A model that inherits from a neighbour whose generated files do not exist."""
    path = twonorm / "modular_threenorm.py"
    path.write_text(
        dedent(
            """\
            from .modeling_twonorm import TwonormDecoderLayer, TwonormModel


            class ThreenormDecoderLayer(TwonormDecoderLayer):
                def __init__(self, config, layer_idx: int):
                    super().__init__(config, layer_idx)
                    self.scale_after = 3 * config.scale_after


            class ThreenormModel(TwonormModel):
                pass


            __all__ = ["ThreenormModel"]
            """
        )
    )
    texts = build(path)
    assert list(texts) == ["modeling_threenorm.py"]
    text = texts["modeling_threenorm.py"]
    assert "self.after = ThreenormRMSNorm(config.hidden_size, eps=config.rms_norm_eps)" in text
    assert "self.scale_after = 3 * config.scale_after" in text
    assert "wonorm" not in text
    assert sorted(one.name for one in twonorm.iterdir()) == ["modular_threenorm.py", "modular_twonorm.py"]
