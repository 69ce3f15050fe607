"""Where a model keeps its projections: which rows of a fused linear are queries, which are keys, and so on.

Nothing here touches a value: classes, names, shapes and configuration decide, so models on `meta` and
models already edited in part are fine. What is known about the classes of Transformers stands in `FAMILIES`,
as data. For a class that is not in the table a numeric probe (see `probe`) looks at a tiny copy of the model;
if that does not settle the matter either, the answer is a `Refusal` that says what to state. Nothing is ever
guessed: a wrong row layout passes every check of keys and shapes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from rewire.family_rules import LAYOUTS, WORDS, NotFused, Rows, Sight, head_sizes
from rewire.family_table import LAST_NAMES, LEAVES, known_family
from rewire.linears import REWIRE_CLASSES, LinearFacts, Refusal, is_conv1d, linear_facts, quantiser
from rewire.roles import KV, QKV, role_of
from rewire.separate import SeparateProjections, separate_projections, separate_refusals

__all__ = [
    "FusedProjection",
    "Refusal",
    "SeparateProjections",
    "fused_projection",
    "fused_projections",
    "known_projection",
    "separate_projections",
    "separate_refusals",
]


@dataclass(frozen=True)
class FusedProjection:
    """What the fused linear at `path` holds.

    `roles`, `names` and `sizes` follow the order of the rows; `sizes` are rows over all groups, as the row
    steps of `tensor_rules` want them. `evidence` says, for people, how this is known; `owner` is the path of
    the attention or MLP that it belongs to.
    """

    path: str
    kind: str  # "attention" or "mlp"
    roles: tuple[str, ...]
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    groups: int
    layout: str
    evidence: tuple[str, ...] = ()
    owner: str = ""


def fused_projection(
    model: nn.Module,
    path: str,
    *,
    layout: str = "auto",
    into: Sequence[str] | None = None,
    sizes: Sequence[int] | None = None,
    groups: int | None = None,
) -> FusedProjection | Refusal:
    """What the fused linear at `path` holds.

    With `layout="auto"` this is looked up or measured, and what the caller states must agree with it; a
    stated layout is taken at its word, and what it leaves open comes from the configuration. `into` and
    `sizes` follow the order of the rows; names that say their role (`q`, `key_proj`, …) are put into the
    right order where that is known.

    >>> toy = nn.Sequential(nn.Linear(4, 12))
    >>> fused_projection(toy, "0", layout="stacked", into=("q", "k", "v")).sizes
    (4, 4, 4)
    >>> fused_projection(toy, "0", layout="stacked", into=("q", "k", "v"), sizes=(8, 4, 4)).reason
    'out_features 12 is not 8 + 4 + 4; state sizes and groups that fit'
    """
    sight = _look(model, path)
    if isinstance(sight, Refusal):
        return sight
    wish = _Wish(layout, tuple(into or ()), tuple(sizes or ()), groups)
    if len(set(wish.into)) < len(wish.into):
        result: FusedProjection | str = f"into names a part twice: {', '.join(wish.into)}"
    elif layout == "auto":
        result = _detected(model, sight, wish)
    elif layout in LAYOUTS:
        result = _stated(sight, wish)
    else:
        result = f"unknown layout {layout!r}; state one of {' | '.join(LAYOUTS)} | auto"
    return Refusal(path, result, _is_other(sight)) if isinstance(result, str) else result


def _is_other(sight: Sight) -> bool:
    """Whether what is there is known to be no projection that can be split."""
    family = known_family(sight.owner, sight.leaf)
    return family is not None and isinstance(family.rule, NotFused)


def known_projection(model: nn.Module, path: str) -> FusedProjection | None:
    """What the fused linear at `path` holds, where its family is known by name; nothing is tried out.

    >>> known_projection(nn.Sequential(nn.Linear(4, 12)), "0") is None
    True
    """
    sight = _look(model, path)
    if isinstance(sight, Refusal) or not _is_known(sight):
        return None
    found = _found_in_table(sight)
    return None if isinstance(found, str) else _projection(sight, found, _Wish("auto", (), (), None))


@dataclass(frozen=True)
class _Found:
    """Rows, and how they are known."""

    rows: Rows
    evidence: tuple[str, ...]

    def against(self, wish: _Wish) -> str | None:
        """What speaks against the caller's words."""
        rows = self.rows
        if wish.layout not in ("auto", rows.layout):
            return f"layout is {rows.layout}, not {wish.layout}"
        if wish.groups not in (None, rows.groups):
            return f"groups is {rows.groups}, not {wish.groups}"
        if wish.into and len(wish.into) != len(rows.roles):
            return f"the rows hold {', '.join(rows.roles)}, and into names {len(wish.into)} parts"
        if wish.sizes and _in_order(wish.sizes, wish, rows) != rows.sizes:
            return f"sizes are {list(rows.sizes)}, not {list(wish.sizes)}"
        return None


@dataclass(frozen=True)
class _Wish:
    """What the caller states; empty means open."""

    layout: str
    into: tuple[str, ...]
    sizes: tuple[int, ...]
    groups: int | None

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that the names speak of, or the names themselves."""
        return tuple(role_of(name) or name for name in self.into)


def _look(model: nn.Module, path: str) -> Sight | Refusal:
    """The linear at `path` and what is around it."""
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return Refusal(path, "the model has no module of this name")
    facts = linear_facts(module)
    if isinstance(facts, LinearFacts) and facts.groups > 1:
        facts = f"{type(module).__name__} of {facts.groups} groups: each reads a part of the input alone"
    if isinstance(facts, str):
        return Refusal(path, facts)
    leaf, around = _surroundings(model, path)
    return Sight(path, leaf, facts, around)


def _surroundings(model: nn.Module, path: str) -> tuple[str, tuple[nn.Module, ...]]:
    """The name of a linear within its owner, and the owner followed by its parents."""
    parts = path.split(".")
    # A few projections are wrapped once more (a linear and its batch norm): their name has two parts.
    wrapped = ".".join(parts[-2:])
    leaf = wrapped if wrapped in LEAVES else parts[-1]
    around = [model]
    for part in parts[: len(parts) - leaf.count(".") - 1]:
        around.append(around[-1].get_submodule(part))
    return leaf, tuple(reversed(around))


def _detected(model: nn.Module, sight: Sight, wish: _Wish) -> FusedProjection | str:
    """From the table, else by the probe. What the caller states must agree."""
    found = _found(model, sight)
    if isinstance(found, str):
        return found
    disagreement = found.against(wish)
    if disagreement:
        return f"{disagreement}; leave it out, or state the layout too if you mean it"
    return _projection(sight, found, wish)


def _found(model: nn.Module, sight: Sight) -> _Found | str:
    if _is_known(sight):
        return _found_in_table(sight)
    if sight.facts.form != "linear":
        return _ambiguous(sight, "this class is not known, and the probe tries linear layers alone")
    return _probed(model, sight)


def _is_known(sight: Sight) -> bool:
    return sight.facts.form == "multihead" or known_family(sight.owner, sight.leaf) is not None


def _probed(model: nn.Module, sight: Sight) -> _Found | str:
    """By trying, on a tiny copy of the model."""
    from rewire.probe import Probed, probe_rows  # costs nothing where the table knows the answer

    owner = sight.path.removesuffix(sight.leaf).removesuffix(".")
    seen = probe_rows(model, sight.path, owner, sight.rows)
    if not isinstance(seen, Probed):
        return _ambiguous(sight, f"this class is not known, and {seen}")
    layout = "per_head" if seen.groups == sight.heads else "grouped"
    if seen.groups == 1:
        layout = "stacked"
    elif set(seen.sizes) == {seen.groups}:
        layout = "interleaved"
    rows = Rows(seen.roles, seen.sizes, seen.groups, layout)
    return _Found(rows, (f"{sight.place}: {WORDS[layout]} (numeric probe)", _arithmetic(sight, rows)))


def _found_in_table(sight: Sight) -> _Found | str:
    if sight.facts.form == "multihead":
        return _multihead(sight)
    family = known_family(sight.owner, sight.leaf)
    if family is None:
        return _ambiguous(sight, "this class is not known")
    rows = family.rule(sight)
    problem = rows if isinstance(rows, str) else rows.problem(sight.rows)
    if problem is not None:
        return f"{sight.place}: {problem}; to split it all the same, state layout, into and sizes"
    assert not isinstance(rows, str)
    origin = f"{sight.place}: {WORDS[rows.layout]} (known family)"
    notes = (family.note,) if family.note else ()
    return _Found(rows, (origin, _arithmetic(sight, rows), *notes))


def _multihead(sight: Sight) -> _Found:
    """`nn.MultiheadAttention`, whose rows are no secret."""
    rows = Rows(QKV, (sight.facts.in_features,) * 3, 1, "stacked")
    origin = f"{sight.place}: {WORDS['stacked']} (in_proj_weight of nn.MultiheadAttention)"
    return _Found(rows, (origin, f"{' + '.join(map(str, rows.sizes))} = {sight.rows} rows"))


def _ambiguous(sight: Sight, why: str) -> str:
    return f"ambiguous layout of {sight.place}: {why}; state layout: {' | '.join(LAYOUTS)} in the plan"


def _arithmetic(sight: Sight, rows: Rows) -> str:
    total = f"{' + '.join(map(str, rows.sizes))} = {sight.rows} rows"
    by_heads = dict(zip(QKV, head_sizes(sight) or (), strict=False))
    if by_heads and all(by_heads.get(role) == size for role, size in zip(rows.roles, rows.sizes, strict=True)):
        few = f", {sight.kv_heads} for keys and values" if sight.kv_heads != sight.heads else ""
        return f"config: {sight.heads} head{'s' * (sight.heads != 1)} of {sight.head_dim}{few}; {total}"
    return f"{total} in {rows.groups} groups" if rows.groups > 1 else total


def _in_order(values: tuple[int, ...] | tuple[str, ...], wish: _Wish, rows: Rows) -> tuple[int | str, ...]:
    """`values`, stated along `into`, in the order of the rows, where the names tell their roles."""
    if sorted(wish.roles) != sorted(rows.roles) or len(values) != len(rows.roles):
        return tuple(values)
    return tuple(values[wish.roles.index(role)] for role in rows.roles)


def _projection(sight: Sight, found: _Found, wish: _Wish) -> FusedProjection:
    rows = found.rows
    names = tuple(map(str, _in_order(wish.into, wish, rows))) or _names(sight, rows.roles)
    kind = "mlp" if set(rows.roles) <= {"gate", "up"} else "attention"
    dealt = (rows.roles, names, rows.sizes, rows.groups, rows.layout)
    owner = sight.path if sight.facts.form == "multihead" else sight.path.removesuffix(sight.leaf).removesuffix(".")
    return FusedProjection(sight.path, kind, *dealt, found.evidence, owner)


def _names(sight: Sight, roles: tuple[str, ...]) -> tuple[str, ...]:
    """Names for the parts, by the habit of the model: `q_proj` where its linears are called so, else `q`."""
    siblings = (name for name, _ in sight.owner.named_children())
    suffix = "_proj" if any(name.endswith("_proj") for name in (sight.leaf, *siblings)) else ""
    return tuple(role + suffix for role in roles)


# ---------------------------------------------------------------- a layout that the caller states


def _stated(sight: Sight, wish: _Wish) -> FusedProjection | str:
    """As the caller states it; where the table says the same, it fills in what is left open."""
    known = _found_in_table(sight)
    if isinstance(known, _Found) and not known.against(wish):
        return _projection(sight, known, wish)
    rows = _stated_rows(sight, wish)
    if isinstance(rows, str):
        return rows
    # Rewire obeys, but says in the receipt that the table sees it otherwise.
    contrary = known.evidence[:1] if isinstance(known, _Found) else ()
    return _projection(sight, _Found(rows, ("stated by the plan", *contrary)), wish)


def _stated_rows(sight: Sight, wish: _Wish) -> Rows | str:
    roles = wish.roles or _default_roles(sight, wish)
    if not roles:
        return "state `into`: the names of the parts in the order of the rows"
    sizes = wish.sizes or _default_sizes(sight, wish.layout, roles)
    if isinstance(sizes, str):
        return f"{sizes}; state sizes"
    groups = wish.groups or _default_groups(sight, wish.layout, roles)
    if groups is None:
        return f"no head count near {sight.path}; state groups"
    rows = Rows(roles, sizes, groups, wish.layout)
    problem = rows.problem(sight.rows)
    return f"{problem}; state sizes and groups that fit" if problem else rows


def _default_roles(sight: Sight, wish: _Wish) -> tuple[str, ...]:
    """What a layout means by definition, for a linear whose name promises queries, keys and values."""
    count, leaf = len(wish.sizes), sight.leaf.lower()
    # Which of gate and up comes first, no layout and no name tells: there are models that lie.
    options = {
        QKV: re.search(r"qkv|query_key_value|c_attn", leaf),
        KV: re.search(r"kv|key_value", leaf),
    }
    return next((roles for roles, hit in options.items() if hit and count in (0, len(roles))), ())


def _default_sizes(sight: Sight, layout: str, roles: tuple[str, ...]) -> tuple[int, ...] | str:
    """Rows by the head counts where queries, keys and values are meant, else equal parts."""
    may_differ = sorted(roles) == sorted(QKV) and layout in ("stacked", "grouped")
    by_heads = head_sizes(sight) if may_differ else None
    if by_heads is not None and sum(by_heads) == sight.rows:
        return tuple(dict(zip(QKV, by_heads, strict=True))[role] for role in roles)
    if by_heads is not None and by_heads[0] != by_heads[1]:
        q, k, _ = by_heads
        heads = f"{sight.heads} heads of {sight.head_dim}, {sight.kv_heads} for keys and values"
        return f"out_features {sight.rows} is not {q} + 2·{k} ({heads})"
    size, rest = divmod(sight.rows, len(roles))
    return f"out_features {sight.rows} is not {len(roles)} equal parts" if rest else (size,) * len(roles)


def _default_groups(sight: Sight, layout: str, roles: tuple[str, ...]) -> int | None:
    alternating = sight.rows // len(roles)
    groups = {"stacked": 1, "per_head": sight.heads, "grouped": sight.kv_heads, "interleaved": alternating}
    return groups[layout]


# ---------------------------------------------------------------- going through a whole model

_FUSED_NAMES = re.compile(
    r"(^|_)[wW]?(qkv|kv)z?(_|$)|quer(y|ies)_keys?_values?|^keys?_values?$|^query_key$|gate_?up|^up_?gate"
    r"|^c_attn$|^att_proj$|^in_proj$|^Wi$|^w12$"
)


def fused_projections(model: nn.Module) -> tuple[FusedProjection | Refusal, ...]:
    """Every fused projection that the model holds, found by class and name, in the model's order.

    Candidates whose rows cannot be told apart, and those already adapted, quantised or edited, come as
    refusals with the reason.
    """
    candidates: dict[int, str] = {}
    for path, module in model.named_modules():
        if _may_be_fused(model, path, module):
            # Modules of their own may hold the same tensors: counted once, edited together.
            weight = module._parameters.get("weight")
            candidates.setdefault(id(module) if weight is None else id(weight), path)
    return tuple(fused_projection(model, path) for path in candidates.values())


def _may_be_fused(model: nn.Module, path: str, module: nn.Module) -> bool:
    if isinstance(module, nn.MultiheadAttention):
        return True
    leaf = path.rpartition(".")[2]
    sounds_fused = _FUSED_NAMES.search(leaf) is not None
    if not (sounds_fused or leaf in LAST_NAMES):
        return False
    if not (isinstance(module, nn.Linear) or is_conv1d(module) or isinstance(linear_facts(module), LinearFacts)):
        return sounds_fused and _replaced_linear(module)
    name, around = _surroundings(model, path)
    family = known_family(around[0], name)
    if family is None:
        return sounds_fused
    return not (isinstance(family.rule, NotFused) and not family.rule.reason)


def _replaced_linear(module: nn.Module) -> bool:
    """Whether a linear by another name stands here: adapted, quantised, edited."""
    names = {base.__name__ for base in type(module).__mro__}
    return bool(names & REWIRE_CLASSES) or hasattr(module, "base_layer") or quantiser(module) is not None
