"""The plan language: what to change in a model, as plain data.

A plan is an ordered list of edits, and an edit is one frozen record. YAML, JSON and Python say the same:

>>> plan = Plan([Split("vision_encoder.layers.*.attn.qkv", into=("q", "k", "v")), Lora(("q", "v"), r=16)])
>>> plan == Plan.from_yaml('''
... rewire: 1
... edits:
...   - split: {target: vision_encoder.layers.*.attn.qkv, into: [q, k, v]}
...   - lora: {target: [q, v], r: 16}
... ''')
True

Reading a plan never imports or runs what it names, and imports neither torch nor transformers.
`rewire.targets` describes the targets.
"""

from rewire.plan.data import FrozenMapping
from rewire.plan.edits import (
    EDITS,
    PROMISES,
    Cast,
    Edit,
    Freeze,
    Join,
    Lora,
    Pack,
    Promise,
    Rename,
    Replace,
    Split,
    Stack,
    Unfreeze,
    Unstack,
)
from rewire.plan.fields import Dtype, Layout, TensorLayout, import_path_of
from rewire.plan.plan import VERSION, Plan, check, json_schema
from rewire.plan.record import Record
from rewire.plan.resolved import Resolved
from rewire.plan.rules import (
    TENSOR_RULES,
    CastTensor,
    DropTensor,
    JoinTensor,
    RenameTensor,
    SplitTensor,
    TensorRule,
    TransposeTensor,
)

__all__ = [
    "Plan",
    "check",
    "json_schema",
    "Edit",
    "Split",
    "Join",
    "Unstack",
    "Stack",
    "Replace",
    "Lora",
    "Freeze",
    "Unfreeze",
    "Cast",
    "Rename",
    "Pack",
    "Resolved",
    "TensorRule",
    "SplitTensor",
    "JoinTensor",
    "RenameTensor",
    "TransposeTensor",
    "DropTensor",
    "CastTensor",
    "EDITS",
    "TENSOR_RULES",
    "PROMISES",
    "VERSION",
    "Promise",
    "Layout",
    "TensorLayout",
    "Dtype",
    "Record",
    "FrozenMapping",
    "import_path_of",
]
