"""Which layers of a model a small one keeps: the first of every kind.

Configurations tell kinds of layers in five ways: a list with one value for each layer, a list of the layers that are
special, the number of the first or last layers that are, a period, and overrides for single layers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from rewire.zoo.stages import stage_count
from rewire.zoo.values import LAYERS, Config, is_int, is_list, numbers

Overrides = dict[int, dict[str, Any]]
"""Values that single layers have in place of the configuration's, by the number of the layer."""

_LAYERS = re.compile(
    r"(n|num)_(\w+_)?(layers?|blocks)(_per_stack)?|(\w+_)?(en|de)coder_layers|(\w+_)?depth|layers|[lxr]_layers"
    r"|num_hidden_groups|inner_group_num|(conf|encoder|decoder)_num_hidden_layers|num_self_attends_per_block"
)
_NOT_LAYERS = re.compile(
    r"num_(feat_extract|adapter|conv|dense|kv_shared|sparse_encoder|sparse_decoder|first_\w+|last_\w+)_layers"
    r"|num_(res|random|mem)_blocks|iou_head_depth|max_depth"
)
_MAIN = ("num_hidden_layers", "n_layers", "n_layer", "num_layers", "depth")
_SPECIAL_LAYERS = re.compile(
    r"hybrid_layer_ids|attn_layer_indices|mlp_only_layers|moe_layers|cross_attention_layers|ple_layer_ids"
    r"|rope_scaling_layers|kv_source_layers|fullatt_block_indexes|deepstack_visual_indexes|global_attn_indexes"
    r"|window_block_ind(ices|exes)|intermediate_(hidden_state|layers)_indices|extract_layers|look_(ahead|backward)_layers"
)
_FIRST = re.compile(r"first_k_dense_replace|num_dense_layers|moe_layer_start_index|num_first_\w+_layers")
_LAST = re.compile(r"num_kv_shared_layers|num_last_\w+_layers")
_PLACE = re.compile(r"insert_layer_id|merge_index")
_PERIOD = re.compile(r"(attn|expert)_layer_period|(\w+_)?sparse_step|full_attention_interval|interleave_moe_layer_step")
_OFFSET = re.compile(r"(attn|expert)_layer_offset")


def few_layers(config: Config, overrides: Overrides) -> Overrides:
    """Makes `config` have two layers, or as many as it takes to have one of every kind, in place.

    Gives the overrides of the layers that stay.
    """
    stages = stage_count(config)
    counts = {name: value for name, value in numbers(config).items() if _is_count(name, value) and value != stages}
    main = next((counts[name] for name in _MAIN if name in counts), max(counts.values(), default=0))
    kept = overrides
    for count in dict.fromkeys(counts.values()):
        names = [name for name, value in counts.items() if value == count]
        rows = _telling(_columns(config, count, overrides if count == main else {}, count == main), count)
        _keep(config, rows, count, count == main)
        for name in names:
            setattr(config, name, len(rows))
        if count == main:
            kept = {place: overrides[row] for place, row in enumerate(rows) if row in overrides}
    _short_periods(config)
    return kept


def _is_count(name: str, value: int) -> bool:
    return _LAYERS.fullmatch(name) is not None and _NOT_LAYERS.fullmatch(name) is None and value > LAYERS


def _per_layer(config: Config, count: int) -> dict[str, Any]:
    """The lists that have one value for each layer."""
    return {
        name: value
        for name, value in vars(config).items()
        if is_list(value) and len(value) == count and not _SPECIAL_LAYERS.fullmatch(name)
    }


def _special(config: Config, count: int) -> dict[str, Any]:
    """The lists of numbers of layers."""
    return {
        name: value
        for name, value in vars(config).items()
        if _SPECIAL_LAYERS.fullmatch(name) and is_list(value) and all(is_int(one) and 0 <= one < count for one in value)
    }


def _places(config: Config, count: int) -> dict[str, int]:
    """The numbers of single layers that are special."""
    return {name: value for name, value in numbers(config).items() if _PLACE.fullmatch(name) and value < count}


def _first(config: Config) -> dict[str, int]:
    return {name: value for name, value in numbers(config).items() if _FIRST.fullmatch(name)}


def _last(config: Config) -> dict[str, int]:
    return {name: value for name, value in numbers(config).items() if _LAST.fullmatch(name)}


def _outputs(config: Config, count: int) -> list[int]:
    """The layers whose outputs a backbone gives."""
    if len(getattr(config, "stage_names", None) or ()) != count + 1:
        return []
    return [index - 1 for index in vars(config).get("_out_indices") or () if index > 0]


def _columns(config: Config, count: int, overrides: Overrides, is_main: bool) -> list[list[str]]:
    """For each way of telling layers apart, the kind of every layer."""
    lists = [value for value in _per_layer(config, count).values() if not _is_counting(value)]
    columns = [list(map(str, value)) for value in lists]
    if is_main:
        layers = range(count)
        columns += [[str(row in value) for row in layers] for value in _special(config, count).values()]
        columns += [[str(row == value) for row in layers] for value in _places(config, count).values()]
        columns += [[str(row if row in _outputs(config, count) else None) for row in layers]]
        columns += [[str(row < value) for row in layers] for value in _first(config).values()]
        # What the last layers share with earlier ones they share within a kind, so that every kind is needed twice.
        kinds = getattr(config, "layer_types", None) or [""] * count
        columns += [[f"{kinds[row]} {row >= count - value}" for row in layers] for value in _last(config).values()]
        columns += [[str(overrides.get(row)) for row in layers]]
    return columns


def _telling(columns: list[list[str]], count: int) -> list[int]:
    """The first rows that show every value of every column; at least two."""
    chosen: list[int] = []
    for column in columns:
        for kind in dict.fromkeys(column):
            rows = [row for row in range(count) if column[row] == kind]
            if len(rows) < count and not set(rows) & set(chosen):
                chosen.append(rows[0])
    others = (row for row in range(count) if row not in chosen)
    while len(chosen) < LAYERS:
        chosen.append(next(others))
    return sorted(chosen)


def _is_counting(column: Any) -> bool:
    """Numbers that differ from layer to layer are no kinds."""
    return all(isinstance(value, int | float) for value in column) and len(set(column)) > LAYERS + 1


def _keep(config: Config, rows: list[int], count: int, is_main: bool) -> None:
    """Cuts everything that speaks of single layers down to the chosen ones."""
    for name, value in _per_layer(config, count).items():
        setattr(config, name, type(value)(value[row] for row in rows))
    if not is_main:
        return
    _keep_outputs(config, rows, count)
    for name, value in _special(config, count).items():
        setattr(config, name, type(value)(place for place, row in enumerate(rows) if row in value))
    for name, value in _places(config, count).items():
        setattr(config, name, rows.index(value))
    for name, value in _first(config).items():
        setattr(config, name, sum(row < value for row in rows))
    for name, value in _last(config).items():
        setattr(config, name, sum(row >= count - value for row in rows))


def _keep_outputs(config: Config, rows: list[int], count: int) -> None:
    outputs = _outputs(config, count)
    if outputs:
        config.stage_names = config.stage_names[: len(rows) + 1]
        config.out_indices = [place + 1 for place, row in enumerate(rows) if row in outputs]


def _short_periods(config: Config) -> None:
    """Every other layer is the special one."""
    for name, value in numbers(config).items():
        if _PERIOD.fullmatch(name) and value > LAYERS:
            setattr(config, name, LAYERS)
        elif _OFFSET.fullmatch(name):
            setattr(config, name, 1)


# ---------------------------------------------------------------- single layers


def take_overrides(config: Config) -> Overrides:
    """The overrides of a configuration, which has none afterwards."""
    if not getattr(config, "is_heterogeneous", False):
        return {}
    found: Mapping[str, dict[str, Any]] = config.to_dict()["per_layer_config"]
    config.per_layer_config = None
    return {int(row): dict(values) for row, values in found.items()}


def as_configs(config: Config, overrides: Overrides) -> dict[int, Config]:
    """A configuration for each layer that has overrides, with all values of `config` as well."""
    own = dict(vars(config))
    return {row: SimpleNamespace(**{**own, **values}) for row, values in overrides.items()}


def put_overrides(config: Config, overrides: Overrides, layers: Mapping[int, Config]) -> None:
    """Gives `config` the overrides back, with the values that they have in `layers`."""
    if overrides:
        config.per_layer_config = {
            row: {name: getattr(layers[row], name, value) for name, value in values.items()}
            for row, values in overrides.items()
        }
