"""How Transformers' loader turns the tensors of a checkpoint into those of a model, as a tensor rule; and back.

Which tensor goes where is asked of the loader's own transforms, which carry patterns; what is done to it is said in
the steps of `tensor_rules`, on names and shapes alone. An operation that is not known here is refused by name.

>>> from rewire import hf_seam
>>> config = hf_seam.model_config(
...     "mixtral",
...     {
...         "num_hidden_layers": 1,
...         "num_local_experts": 2,
...         "hidden_size": 8,
...         "intermediate_size": 4,
...         "num_attention_heads": 2,
...         "num_key_value_heads": 2,
...         "vocab_size": 5,
...     },
... )
>>> model = hf_seam.build(config, meta=True)
>>> [
...     step.kind
...     for step in reading_rule(
...         model,
...         {
...             "layers.0.block_sparse_moe.experts.0.w2.weight": (8, 4),
...             "layers.0.block_sparse_moe.experts.1.w2.weight": (8, 4),
...             "layers.0.block_sparse_moe.gate.weight": (2, 8),
...         },
...     )
... ]
['stack', 'rename']
"""

from rewire.hf_conversions.rules import reading_rule, stored_shapes, writing_rule

__all__ = ["reading_rule", "stored_shapes", "writing_rule"]
