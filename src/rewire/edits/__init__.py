"""The edits, one file each. `HANDLERS` is the whole registry: type of the record to its handler."""

from __future__ import annotations

from collections.abc import Mapping

from rewire import plan
from rewire.edits import cast, flags, join, lora, pack, rename, replace, split, stack, unstack
from rewire.edits.base import Handler, Match, Refusal, Scene

HANDLERS: Mapping[type, Handler] = {
    plan.Split: split.decide,
    plan.Join: join.decide,
    plan.Unstack: unstack.decide,
    plan.Stack: stack.decide,
    plan.Replace: replace.decide,
    plan.Lora: lora.decide,
    plan.Freeze: flags.decide,
    plan.Unfreeze: flags.decide,
    plan.Cast: cast.decide,
    plan.Rename: rename.decide,
    plan.Pack: pack.decide,
}

__all__ = ["HANDLERS", "Handler", "Match", "Refusal", "Scene"]
