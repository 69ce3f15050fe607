"""Encoder layers on packed tokens: what `Pack` puts around a model's own modules. Imports torch alone."""

from rewire.modules.packed.attend import AttentionFacts, KnownAttention, RegistryAttention, looks_up
from rewire.modules.packed.layer import LayerForward
from rewire.modules.packed.padding import Packing, Unpackable, packing_of, read_mask
from rewire.modules.packed.recipe import LayerFacts, Options, Recipe, fused_activation
from rewire.modules.packed.run import PackedStack, StackFacts
from rewire.modules.packed.stack import OwnerForward, unwrap, wrap

__all__ = [
    "AttentionFacts",
    "KnownAttention",
    "LayerFacts",
    "LayerForward",
    "Options",
    "OwnerForward",
    "PackedStack",
    "Packing",
    "Recipe",
    "RegistryAttention",
    "StackFacts",
    "Unpackable",
    "fused_activation",
    "looks_up",
    "packing_of",
    "read_mask",
    "unwrap",
    "wrap",
]
