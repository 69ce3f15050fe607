"""Checkpoints on disk: the only code that opens or writes files of safetensors. Needs nothing but Python.

```
open_checkpoint(folder) ─→ Checkpoint (shards, tensors, config) ─→ Sources (handles to read from)
partition(entries) ─→ header_bytes(entries of one shard) … index_bytes(weight_map)
```
"""

from __future__ import annotations

from rewire.checkpoint.dtypes import DTYPES, code_of, tensor_bytes, torch_name
from rewire.checkpoint.folder import check_format, open_checkpoint
from rewire.checkpoint.index import INDEX, SINGLE, index_bytes, shard_name
from rewire.checkpoint.reading import pread_exact
from rewire.checkpoint.records import Checkpoint, Shard, TensorInfo
from rewire.checkpoint.sources import Sources
from rewire.checkpoint.writing import (
    MAX_SHARD_SIZE,
    Entry,
    aligned_order,
    entry_bytes,
    header_bytes,
    parse_size,
    partition,
)

__all__ = [
    "DTYPES",
    "INDEX",
    "MAX_SHARD_SIZE",
    "SINGLE",
    "Checkpoint",
    "Entry",
    "Shard",
    "Sources",
    "TensorInfo",
    "aligned_order",
    "check_format",
    "code_of",
    "entry_bytes",
    "header_bytes",
    "index_bytes",
    "open_checkpoint",
    "parse_size",
    "partition",
    "pread_exact",
    "shard_name",
    "tensor_bytes",
    "torch_name",
]
