"""What the parts of a projection are called: from the name of a layer to the role it plays."""

from __future__ import annotations

import re

QKV, KV, GATE_UP, UP_GATE = ("q", "k", "v"), ("k", "v"), ("gate", "up"), ("up", "gate")

_WORDS = {
    "q": "q", "query": "q", "queries": "q",
    "k": "k", "key": "k", "keys": "k",
    "v": "v", "value": "v", "values": "v",
    "gate": "gate", "up": "up",
}  # fmt: skip


def role_of(name: str) -> str | None:
    """The role that a name speaks of, if exactly one.

    >>> [role_of(name) for name in ("k_proj", "Wq", "to_v", "value", "kv", "up_gate")]
    ['k', 'q', 'v', 'v', None, None]
    """
    words = re.split(r"_", re.sub(r"^[wW](?=[qkv]$)", "", name).lower())
    found = {_WORDS[word] for word in words if word in _WORDS}
    return found.pop() if len(found) == 1 else None


def pattern_of(name: str) -> tuple[str, str]:
    """A name without its role, and the role.

    >>> pattern_of("q_proj"), pattern_of("Wk"), pattern_of("projection_value"), pattern_of("dense")
    (('*_proj', 'q'), ('W*', 'k'), ('projection_*', 'v'), ('dense', ''))
    """
    if re.fullmatch(r"[wW][qkv]", name):
        return f"{name[0]}*", name[1]
    role = role_of(name)
    if role is None:
        return name, ""
    return "_".join("*" if word.lower() in _WORDS else word for word in name.split("_")), role
