"""What packed encoders are measured against, each at its best settings."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Batch = Mapping[str, Tensor]
Call = Callable[[Batch], Tensor]
"""A batch in, hidden states `[sequences, length, hidden]` out."""

SORTED = 8


@dataclass(frozen=True)
class Rival:
    """A way of encoding: its name, what to call, and how far its hidden states may lie from eager's."""

    name: str
    call: Call
    limit: float


def by_length(call: Call) -> Call:
    """The same, with the batch sorted by length and cut into eights, and put back in order."""

    def sorted_call(batch: Batch) -> Tensor:
        mask = batch["attention_mask"]
        if len(mask) <= SORTED:
            return call(batch)
        order = mask.sum(1).argsort(descending=True)
        first: Tensor | None = None
        for numbers in order.split(SORTED):
            width = int(mask[numbers].sum(1).max())
            found = call({name: tensor[numbers, :width] for name, tensor in batch.items()})
            if first is None:
                first = torch.zeros(*mask.shape, found.shape[-1])
            first[numbers, :width] = found
        assert first is not None
        return first

    return sorted_call


def transformers_call(model: nn.Module) -> Call:
    @torch.inference_mode()
    def call(batch: Batch) -> Tensor:
        return model(**batch).last_hidden_state

    return call


def with_attention(model: Any, name: str) -> Any:
    """A copy of the model that attends by another function of Transformers."""
    other = copy.deepcopy(model)
    other.set_attn_implementation(name)
    return other.eval()


def nested(model: Any) -> Call:
    """torch's own fused encoder layers on nested tensors, with the weights of a BERT."""
    config = model.config
    layer = nn.TransformerEncoderLayer(
        config.hidden_size,
        config.num_attention_heads,
        config.intermediate_size,
        activation="gelu",
        layer_norm_eps=config.layer_norm_eps,
        batch_first=True,
    )
    encoder = nn.TransformerEncoder(layer, config.num_hidden_layers, enable_nested_tensor=True).eval()
    for new, old in zip(encoder.layers, model.encoder.layer, strict=True):
        _fill(new, old)

    @torch.inference_mode()
    def call(batch: Batch) -> Tensor:
        hidden = model.embeddings(input_ids=batch["input_ids"])
        found = encoder(hidden, src_key_padding_mask=batch["attention_mask"] == 0)
        width = hidden.shape[1]
        return nn.functional.pad(found, (0, 0, 0, width - found.shape[1]))

    return call


@torch.no_grad()
def _fill(new: Any, old: Any) -> None:
    attention = old.attention.self
    for leaf in ("weight", "bias"):
        parts = [getattr(getattr(attention, part), leaf) for part in ("query", "key", "value")]
        getattr(new.self_attn, f"in_proj_{leaf}").copy_(torch.cat(parts))
        for target, source in (
            (new.self_attn.out_proj, old.attention.output.dense),
            (new.linear1, old.intermediate.dense),
            (new.linear2, old.output.dense),
            (new.norm1, old.attention.output.LayerNorm),
            (new.norm2, old.output.LayerNorm),
        ):
            getattr(target, leaf).copy_(getattr(source, leaf))


def compiled(model: Any) -> Call:
    """`torch.compile` with lengths and batch sizes left open."""
    return transformers_call(torch.compile(model, dynamic=True))


class _Hidden(nn.Module):
    """The model with its hidden states alone as output."""

    def __init__(self, model: Any, names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.names = tuple(names)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model(**dict(zip(self.names, inputs, strict=True))).last_hidden_state


def onnx_fused(model: Any, example: Batch, threads: int) -> Call:
    """ONNX Runtime on the graph that its own optimiser fuses attention, norms and gelu in."""
    import onnxruntime
    from onnxruntime.transformers import optimizer
    from onnxruntime.transformers.fusion_options import FusionOptions

    eager = with_attention(model, "eager")
    folder = Path(tempfile.mkdtemp())
    _export(_Hidden(eager, list(example)).eval(), example, folder / "plain.onnx")
    kind = "vit" if "pixel_values" in example else "bert"
    fused = optimizer.optimize_model(
        str(folder / "plain.onnx"),
        model_type=kind,
        num_heads=model.config.num_attention_heads,
        hidden_size=model.config.hidden_size,
        optimization_options=FusionOptions(kind),
        opt_level=1,
    )
    statistics = fused.get_fused_operator_statistics()
    if not statistics.get("Attention") and not statistics.get("MultiHeadAttention"):
        raise RuntimeError(f"ONNX Runtime's optimiser fused no attention: {statistics}")
    fused.save_model_to_file(str(folder / "fused.onnx"))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(folder / "fused.onnx"), options, providers=["CPUExecutionProvider"])
    wanted = {one.name for one in session.get_inputs()}

    def call(batch: Batch) -> Tensor:
        given = {name: tensor.numpy() for name, tensor in batch.items() if name in wanted}
        return torch.from_numpy(session.run(None, given)[0])

    return call


def _export(module: nn.Module, example: Batch, path: Path) -> None:
    open_axes = {0: "batch"} if "pixel_values" in example else {0: "batch", 1: "length"}
    torch.onnx.export(
        module,
        tuple(example.values()),
        str(path),
        input_names=list(example),
        output_names=["hidden"],
        dynamic_axes=dict.fromkeys((*example, "hidden"), open_axes),
        opset_version=17,
        dynamo=False,  # the fusions look for the graph that this exporter makes
    )


def openvino(model: Any, example: Batch, threads: int, precision: str | None) -> Call:
    """OpenVINO, in float32 or as it chooses by itself (bfloat16 where the processor has it)."""
    import openvino as ov

    sdpa = with_attention(model, "sdpa")
    # Batch and length are open.
    converted = ov.convert_model(_Hidden(sdpa, list(example)).eval(), example_input=tuple(example.values()))
    for port, name in zip(converted.inputs, example, strict=True):
        port.get_tensor().set_names({name})
    settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    if precision is not None:
        settings["INFERENCE_PRECISION_HINT"] = precision
    request = ov.Core().compile_model(converted, "CPU", settings).create_infer_request()

    def call(batch: Batch) -> Tensor:
        found = request.infer([np.ascontiguousarray(tensor.numpy()) for tensor in batch.values()], share_inputs=True)
        return torch.from_numpy(np.array(next(iter(found.values()))))

    return call
