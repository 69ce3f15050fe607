"""Runs the command line inside the test process, and makes small models for it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, PreTrainedModel
from typer.testing import CliRunner

from rewire.cli import app

BERT = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 99,
    "max_position_embeddings": 64,
}
GPT2 = {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 99, "n_positions": 64}

JOIN = "join: {target: encoder.layer.*.attention.self, parts: [query, key, value], name: qkv}"
SPLIT = "split: {target: h.*.attn.c_attn, into: [q, k, v]}"


@dataclass(frozen=True)
class Result:
    """What a command ended with and printed."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """What was printed for programs; fails if anything else was."""
        return json.loads(self.out)


def rewire(*args: object) -> Result:
    """Runs `rewire args…`."""
    found = CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": "200", "TERM": "dumb"})
    return Result(found.exit_code, found.stdout, found.stderr)


def config(model_type: str, values: dict[str, Any]) -> list[str]:
    """`config:TYPE` with its `--set` options."""
    return [f"config:{model_type}", *(part for key in values for part in ("--set", f"{key}={values[key]}"))]


def save_model(folder: Path, model_type: str, values: dict[str, Any], seed: int = 0) -> Path:
    """A small model as Transformers writes it."""
    small(model_type, values, seed).save_pretrained(folder)
    return folder


def small(model_type: str, values: dict[str, Any], seed: int = 0) -> PreTrainedModel:
    """A small model with random weights."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModel.from_config(AutoConfig.for_model(model_type, **values)).eval()
    return model


def write_plan(folder: Path, *edits: str, name: str = "plan.yaml") -> Path:
    """A plan file with these edits, one line each."""
    path = folder / name
    path.write_text("\n".join(["rewire: 1", "edits:", *(f"- {edit}" for edit in edits)]) + "\n", "utf-8")
    return path
