"""Which tensors of a quantised checkpoint belong to a weight, and which rows of the weight each of them speaks of.

```
X.weight  X.weight_scale, X.weight_scale_inv, X.weight_zero_point, X.input_scale …   fp8, int8, compressed-tensors
X.weight  X.weight.absmax, X.weight.quant_state.…                                    bitsandbytes, 4 bits
X.weight  X.SCB, X.weight_format                                                     bitsandbytes, 8 bits
          X.qweight, X.qzeros, X.scales, X.g_idx                                     GPTQ, AWQ: no weight, it is packed
          X.weight_packed, X.weight_shape, X.weight_scale …                          compressed-tensors: packed
          P_blocks, P_scales                                                         MXFP4: the parameter P, packed
P         P_scale, P_scale_inv                                                       fp8 parameters without `.weight`
```
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from rewire.tensor_rules import Shape

Infos = Mapping[str, tuple[str, Shape]]
"""Type code and shape of tensors."""

WEIGHT = ".weight"

_ATTACHED = (
    "_scale", "_scale_inv", "_scale_2", "_zero_point", "_global_scale", "_g_idx", "_shape", "_packed", "_format",
    "_blocks", "_scales",
)  # fmt: skip
_OF_MODULE = (
    "qweight", "qzeros", "scales", "g_idx", "SCB", "input_scale", "input_zero_point", "input_global_scale",
    "output_scale", "output_zero_point",
)  # fmt: skip
_PROOFS = {"_scale", "_scale_inv", "_packed", "_blocks", "_zero_point", "qweight", "SCB", "_format"}
_NARROW = ("F8", "F4", "F6", "I8", "U8", "I4")
_GUESSED_BLOCK = 128
"""Rows of a block of `weight_scale_inv` where they do not follow from the shapes."""


@dataclass(frozen=True)
class Kind:
    """What a companion is: `tail` follows the name of the weight (`attached`) or of its module."""

    attached: bool
    tail: str

    def of(self, weight: str) -> str:
        """The name that such a companion of `weight` has.

        >>> Kind(True, "_scale").of("x.weight"), Kind(False, "qzeros").of("x.weight"), Kind(False, "qzeros").of("p")
        ('x.weight_scale', 'x.qzeros', 'p_qzeros')
        """
        if self.attached:
            return weight + self.tail
        module = weight.removesuffix(WEIGHT)
        return f"{weight}_{self.tail}" if module == weight else f"{module}.{self.tail}"


Axes = tuple[tuple[int, int] | None, ...]
"""For every dimension of the weight: the dimension of the companion that goes along with it, and for how many rows of
the weight one of its rows stands; None where one value serves all rows."""


@dataclass(frozen=True)
class Companion:
    """A tensor that goes with a weight. `axes` None: it speaks of the weight as a whole, which may only be renamed."""

    tensor: str
    shape: Shape
    axes: Axes | None


@dataclass(frozen=True)
class Weight:
    """A weight with its companions; `packed`: it is not there itself, one of them holds its values."""

    shape: Shape | None
    companions: Mapping[Kind, Companion]
    packed: bool


def find_weights(touched: Iterable[str], infos: Infos, block: Sequence[int] = ()) -> dict[str, Weight]:
    """The quantised weights among the names that a rule takes.

    `block`: rows and columns of a block, as the configuration of the checkpoint states them.
    """
    touched = set(touched)
    found: dict[str, dict[Kind, str]] = {}
    for name in infos:
        if name not in touched:
            for weight, kind in _readings(name, infos):
                if weight in touched:
                    found.setdefault(weight, {})[kind] = name
    return {
        weight: _weight(weight, kinds, infos, block) for weight, kinds in found.items() if _proven(weight, kinds, infos)
    }


def _readings(name: str, infos: Infos) -> Iterable[tuple[str, Kind]]:
    """The weight that `name` may be a companion of, and as what."""
    module, dot, leaf = name.rpartition(WEIGHT)
    if dot and leaf and (leaf in _ATTACHED or leaf[0] == "."):
        yield module + WEIGHT, Kind(True, leaf)
    parent, dot, leaf = name.rpartition(".")
    if dot and leaf in _OF_MODULE:
        yield parent + WEIGHT, Kind(False, leaf)
    for tail in _ATTACHED:
        weight = name.removesuffix(tail)
        if weight != name and not (tail[1:] in _OF_MODULE and f"{weight}_qweight" in infos):
            yield weight, Kind(True, tail)
    for tail in _OF_MODULE:
        weight = name.removesuffix(f"_{tail}")
        if weight != name and not (f"_{tail}" in _ATTACHED and f"{weight}_qweight" not in infos):
            yield weight, Kind(False, tail)


def _proven(weight: str, kinds: Mapping[Kind, str], infos: Infos) -> bool:
    """Names alone may mislead: a module may have a parameter called `scales` of its own."""
    tails = {kind.tail for kind in kinds}
    if weight.endswith(WEIGHT) and any(tail in _PROOFS or tail.startswith(".") for tail in tails):
        return True
    if weight not in infos:
        return bool(tails & {"qweight", "_packed", "_blocks"})
    return infos[weight][0].startswith(_NARROW)


def _weight(name: str, kinds: Mapping[Kind, str], infos: Infos, block: Sequence[int]) -> Weight:
    shapes = {kind.tail: infos[tensor][1] for kind, tensor in kinds.items()}
    packed = name not in infos
    logical = _packed_axes(name, shapes) if packed else None
    shape = infos[name][1] if not packed else (logical[0] if logical else None)
    companions = {}
    for kind, tensor in kinds.items():
        own = infos[tensor][1]
        if packed:
            axes = logical[1].get(kind.tail) if logical else None
        else:
            axes = _axes(kind.tail, own, infos[name][1], block)
        companions[kind] = Companion(tensor, own, axes)
    return Weight(shape, companions, packed)


def _axes(tail: str, own: Shape, weight: Shape, block: Sequence[int]) -> Axes | None:
    """How a companion goes along with a weight that is there itself."""
    if tail.startswith(".") or tail in ("_shape", "_packed", "_g_idx"):
        return None
    if tail == "_scale_inv" and len(own) == len(weight) > 1:
        return _blocks(own, weight, block)
    if prod(own) == 1:
        return (None,) * len(weight)
    if len(own) == len(weight):
        return _groups(own, weight)
    if own == weight[:-1] or (len(own) == 1 and own == weight[:1]):
        return (*((dim, 1) for dim in range(len(own))), *(None,) * (len(weight) - len(own)))
    return None


def _groups(own: Shape, weight: Shape) -> Axes | None:
    """A value for each row, or for each group of columns in a row; a dimension of one serves all."""
    if any(rows == 0 or whole % rows for rows, whole in zip(own, weight, strict=True)):
        return None
    pairs = enumerate(zip(own, weight, strict=True))
    return tuple(None if rows == 1 and whole != 1 else (dim, whole // rows) for dim, (rows, whole) in pairs)


def _blocks(own: Shape, weight: Shape, block: Sequence[int]) -> Axes | None:
    """A value for each block of rows and columns, of which the last may be smaller."""
    axes: list[tuple[int, int] | None] = [(dim, 1) for dim in range(len(own) - 2)]
    if own[:-2] != weight[:-2]:
        return None
    for place in (0, 1):
        dim = len(own) - 2 + place
        rows, whole = own[dim], weight[dim]
        stated = [block[place]] if len(block) == 2 else []
        exact = [whole // rows] if rows and whole % rows == 0 else []
        fitting = [size for size in (*stated, _GUESSED_BLOCK, *exact) if size > 0 and -(-whole // size) == rows]
        if not fitting:
            return None
        axes.append((dim, fitting[0]))
    return tuple(axes)


def _packed_axes(name: str, shapes: Mapping[str, Shape]) -> tuple[Shape, Mapping[str, Axes]] | None:
    """The shape of a packed weight, and how what holds it goes along with it; None where it may only be renamed."""
    if "_blocks" in shapes and "_scales" in shapes:
        return _mxfp4(name, shapes["_blocks"])
    if {"qweight", "qzeros", "scales"} <= set(shapes):
        return _gptq(shapes)
    return None


def _mxfp4(name: str, blocks: Shape) -> tuple[Shape, Mapping[str, Axes]] | None:
    """`[…, rows, blocks, 16]` bytes for `[…, rows, 32 · blocks]` values; a parameter has these two the other way."""
    if len(blocks) < 3 or blocks[-1] != 16:
        return None
    lead = len(blocks) - 3
    dims: list[tuple[int, tuple[int, int]]] = [(blocks[dim], (dim, 1)) for dim in range(lead)]
    matrix = [(blocks[-3], (lead, 1)), (blocks[-2] * 32, (lead + 1, 32))]
    dims += matrix if name.endswith(WEIGHT) else matrix[::-1]
    axes = tuple(axis for _, axis in dims)
    return tuple(size for size, _ in dims), {"_blocks": axes, "_scales": axes}


def _gptq(shapes: Mapping[str, Shape]) -> tuple[Shape, Mapping[str, Axes]] | None:
    """`scales` is `[groups, out]`. GPTQ packs `qweight` along in, AWQ along out; both pack `qzeros` along out."""
    if any(len(shapes[tail]) != 2 for tail in ("qweight", "qzeros", "scales")):
        return None
    (rows, columns), (groups, out), zeros = shapes["qweight"], shapes["scales"], shapes["qzeros"][1]
    if not (groups and zeros and out % zeros == 0):
        return None
    pack = out // zeros
    if columns == out:
        inner, weight = rows * pack, ((1, 1), (0, pack))
    elif columns == zeros:
        inner, weight = rows, ((1, pack), (0, 1))
    else:
        return None
    if inner % groups:
        return None
    along = (0, inner // groups)
    # g_idx numbers the groups by input: it serves all rows, and no step may go along the inputs.
    axes: dict[str, Axes] = {"qweight": weight, "qzeros": ((1, pack), along), "scales": ((1, 1), along)}
    return (out, inner), axes | {"g_idx": (None, (0, inner))}
