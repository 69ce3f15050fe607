"""The numeric probe finds layouts that we made up, says when it cannot, and agrees with the table of families."""

from __future__ import annotations

import importlib
import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from rewire import families
from rewire.families import FusedProjection, Refusal, fused_projection, fused_projections
from rewire.linears import linear_facts
from rewire.probe import Probed, probe_rows
from rewire.zoo import Unavailable, tiny_model

QKV = ("q", "k", "v")

# ---------------------------------------------------------------- a model with any layout


@dataclass
class ToyConfig:
    """Everything about the toy. The probe reads it by attribute, as it reads any configuration."""

    hidden_size: int = 64
    num_attention_heads: int = 4
    num_key_value_heads: int = 4
    head_dim: int = 16
    intermediate_size: int = 96
    num_hidden_layers: int = 3
    vocab_size: int = 500
    layout: str = "stacked"
    order: tuple[str, ...] = QKV
    shuffled: bool = False
    causal: bool = True
    flavour: str = ""


def row_labels(layout: str, order: tuple[str, ...], heads: int, kv_heads: int, head_dim: int) -> list[str]:
    """The role of every row, written out the slow way."""
    rows = {"q": heads * head_dim}
    counts = {role: rows.get(role, kv_heads * head_dim) for role in order}
    if layout == "interleaved":
        return list(order) * counts[order[0]]
    groups = {"stacked": 1, "per_head": heads, "grouped": kv_heads}[layout]
    one_group = [role for role in order for _ in range(counts[role] // groups)]
    return one_group * groups


class ToyAttention(nn.Module):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.config = config
        labels = row_labels(
            config.layout, config.order, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        )
        if config.shuffled:
            mixed = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1), device="cpu")
            labels = [labels[row] for row in mixed.tolist()]
        self.rows = {role: [row for row, label in enumerate(labels) if label == role] for role in config.order}
        width = config.num_attention_heads * config.head_dim
        self.fused = nn.Linear(config.hidden_size, len(labels))
        self.query = nn.Linear(config.hidden_size, width)
        self.out = nn.Linear(width, config.hidden_size)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        config, fused = self.config, self.fused(x)
        part = {role: fused[..., rows].unflatten(-1, (-1, config.head_dim)).transpose(1, 2)
                for role, rows in self.rows.items()}  # fmt: skip
        q = part.get("q", self.query(x).unflatten(-1, (-1, config.head_dim)).transpose(1, 2))
        if config.flavour == "linear attention":
            y = q @ (part["k"].transpose(-1, -2) @ part["v"])
        else:
            y = F.scaled_dot_product_attention(q, part["k"], part["v"], is_causal=config.causal, enable_gqa=True)
        y = y.transpose(1, 2).flatten(2)
        if config.flavour == "norm after":
            y = self.norm(y)
        if config.flavour == "relu after":
            y = y.relu()
        return self.out(y)


class ToyGatedQuery(nn.Module):
    """Queries and gates in one linear, keys and values beside it."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.config = config
        width = config.num_attention_heads * config.head_dim
        self.fused = nn.Linear(config.hidden_size, 2 * width)
        self.kv = nn.Linear(config.hidden_size, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        q, gate, k, v = (
            part.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)
            for part in (*self.fused(x).chunk(2, -1), *self.kv(x).chunk(2, -1))
        )
        y = F.scaled_dot_product_attention(q, k, v)
        return (y * gate).transpose(1, 2).flatten(2)  # linear in the gate: looks like an up


ACTIVATIONS: dict[str, Any] = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu, "sigmoid": torch.sigmoid}


class ToyMLP(nn.Module):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.config = config
        self.fused = nn.Linear(config.hidden_size, 2 * config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)
        self.plain = nn.Linear(2 * config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.fused(x)
        if self.config.flavour == "plain":
            return self.plain(F.gelu(wide))
        halves = (wide[..., ::2], wide[..., 1::2]) if self.config.layout == "interleaved" else wide.chunk(2, -1)
        part = dict(zip(self.config.order, halves, strict=True))
        act = ACTIVATIONS.get(self.config.flavour, lambda gate: gate)
        return self.down(act(part["gate"]) * part["up"])


class Toy(nn.Module):
    """As much of a pretrained model as the probe asks for."""

    main_input_name = "input_ids"
    kinds: ClassVar[dict[str, type[nn.Module]]] = {"mlp": ToyMLP, "gated query": ToyGatedQuery}
    built = 0

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        type(self).built += 1
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        kind = ToyMLP if "up" in config.order else self.kinds.get(config.flavour, ToyAttention)
        self.layers = nn.ModuleList(kind(config) for _ in range(config.num_hidden_layers))

    def forward(self, input_ids: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer(x)
        return x


def toy(**values: Any) -> Toy:
    with torch.device("meta"):
        return Toy(ToyConfig(**values))


def probe(model: nn.Module, path: str = "layers.1.fused") -> Probed | str:
    facts = linear_facts(model.get_submodule(path))
    assert not isinstance(facts, str)
    return probe_rows(model, path, path.rpartition(".")[0], facts.out_features)


def labels_of(found: Probed | FusedProjection) -> list[str]:
    per_group = [(role, size // found.groups) for role, size in zip(found.roles, found.sizes, strict=True)]
    return [role for role, size in per_group for _ in range(size)] * found.groups


# ---------------------------------------------------------------- what it finds


@settings(max_examples=20)
@given(
    kv_heads=st.integers(1, 3),
    ratio=st.integers(1, 3),
    head_dim=st.sampled_from([4, 8, 24]),
    layout=st.sampled_from(["stacked", "per_head", "grouped", "interleaved"]),
    order=st.sampled_from(list(itertools.permutations(QKV))),
    causal=st.booleans(),
)
def test_any_layout_in_any_order(
    kv_heads: int, ratio: int, head_dim: int, layout: str, order: tuple[str, ...], causal: bool
) -> None:
    if layout in ("per_head", "interleaved"):
        ratio = 1
    heads = kv_heads * ratio
    model = toy(
        hidden_size=heads * head_dim, num_attention_heads=heads, num_key_value_heads=kv_heads,
        head_dim=head_dim, layout=layout, order=order, causal=causal,
    )  # fmt: skip
    found = probe(model)
    assert isinstance(found, Probed), found
    assert labels_of(found) == row_labels(layout, order, heads, kv_heads, head_dim)


@pytest.mark.parametrize("layout", ["stacked", "per_head", "interleaved"])
@pytest.mark.parametrize("order", [("k", "v"), ("v", "k")])
def test_keys_and_values_beside_a_query_of_its_own(layout: str, order: tuple[str, ...]) -> None:
    found = probe(toy(layout=layout, order=order))
    assert isinstance(found, Probed), found
    assert labels_of(found) == row_labels(layout, order, 4, 4, 16)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", ["stacked", "interleaved"])
@pytest.mark.parametrize("order", [("gate", "up"), ("up", "gate")])
def test_gate_and_up(activation: str, layout: str, order: tuple[str, str]) -> None:
    found = probe(toy(order=order, layout=layout, flavour=activation))
    groups = 96 if layout == "interleaved" else 1
    assert found == Probed(order, (96, 96), groups)


def test_families_asks_the_probe_about_classes_it_does_not_know() -> None:
    model = toy(num_key_value_heads=2, layout="grouped", order=("k", "q", "v"))
    found = fused_projection(model, "layers.2.fused")
    assert isinstance(found, FusedProjection)
    assert (found.layout, found.roles, found.sizes, found.groups) == ("grouped", ("k", "q", "v"), (32, 64, 32), 2)
    assert found.evidence[0] == "ToyAttention.fused: rows per group (numeric probe)"
    assert fused_projection(model, "layers.2.fused", into=QKV) == fused_projection(
        model, "layers.2.fused", into=("k", "q", "v")
    )
    assert isinstance(fused_projection(model, "layers.2.fused", groups=4), Refusal)
    by_words = {"stacked": 1, "per_head": 4, "interleaved": 64}
    for layout, groups in by_words.items():
        same = fused_projection(toy(layout=layout), "layers.0.fused")
        assert isinstance(same, FusedProjection)
        assert (same.layout, same.groups) == (layout, groups)


# ---------------------------------------------------------------- what it does not know

UNCLEAR = {
    "shuffled rows": ({"shuffled": True}, "no pattern of groups"),
    "norm after": ({"flavour": "norm after"}, "nothing but"),
    "relu after": ({"flavour": "relu after"}, "nothing but"),
    "linear attention": ({"flavour": "linear attention", "causal": False}, "nothing but"),
    "gated query": ({"flavour": "gated query"}, "beside others that do not"),
    "plain mlp": ({"flavour": "plain", "order": ("gate", "up")}, "no half of its rows enters the output linearly"),
    "product of two": ({"flavour": "none", "order": ("gate", "up")}, "no half of its rows"),
}


@pytest.mark.parametrize("case", UNCLEAR)
def test_it_says_so_when_it_cannot_tell(case: str) -> None:
    values, words = UNCLEAR[case]
    found = probe(toy(**values))
    assert isinstance(found, str)
    assert words in found
    refusal = fused_projection(toy(**values), "layers.0.fused")
    assert isinstance(refusal, Refusal)
    assert words in refusal.reason
    assert "state layout: stacked | per_head" in refusal.reason


class NeedsMore(Toy):
    def __init__(self, config: ToyConfig, more: int) -> None:
        super().__init__(config)


class Breaks(Toy):
    def forward(self, input_ids: Tensor, mask: Tensor | None = None) -> Tensor:
        raise KeyError("broken")


class WantsMore(Toy):
    def forward(self, input_ids: Tensor, mystery: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(input_ids)


class SkipsIt(Toy):
    def forward(self, input_ids: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.embed(input_ids)


class Huge(Toy):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.rest = nn.Linear(7_000, 7_000)


class Stubborn(ToyConfig):
    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError("not to be copied")


def make(kind: Any, *more: Any, config: ToyConfig | None = None) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = kind(config or ToyConfig(), *more)
        return model


def without_config() -> nn.Module:
    model = toy()
    for owner in (model, *model.layers):
        del owner.config
    return model


IMPOSSIBLE: dict[str, tuple[Any, str]] = {
    "constructor": (lambda: make(NeedsMore, 1), "TypeError"),
    "forward": (lambda: make(Breaks), "KeyError"),
    "inputs": (lambda: make(WantsMore), "it wants mystery"),
    "not called": (lambda: make(SkipsIt), "called the fused linear 0 times"),
    "configuration": (lambda: make(Toy, config=Stubborn()), "not to be copied"),
    "size": (lambda: make(Huge), "a copy with few layers still has 49,"),
    "no configuration": (without_config, "no model with a configuration"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_it_never_raises(case: str) -> None:
    build, words = IMPOSSIBLE[case]
    found = probe(build())
    assert isinstance(found, str)
    assert found.startswith("probe could not run: ")
    assert words in found


def test_it_gives_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewire.probe.MAX_SECONDS", -1.0)
    assert probe(toy(hidden_size=72)) == "probe: it takes more than -1 s"


# ---------------------------------------------------------------- what it leaves alone


def test_nothing_of_the_model_or_the_session_changes() -> None:
    torch.manual_seed(3)
    model = Toy(ToyConfig(hidden_size=80))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config, state = repr(model.config), torch.get_rng_state()
    with torch.no_grad():
        assert isinstance(probe(model), Probed)
    assert torch.equal(state, torch.get_rng_state())
    assert repr(model.config) == config
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_equal_places_are_looked_at_once() -> None:
    model = toy(hidden_size=88)
    Toy.built = 0
    first = probe(model, "layers.0.fused")
    built = Toy.built
    assert built > 0
    assert probe(model, "layers.2.fused") == first
    assert probe(toy(hidden_size=88), "layers.1.fused") == first
    assert Toy.built == built + 1  # the toy itself
    assert probe(toy(hidden_size=88, order=("v", "k", "q"))) != first


# ---------------------------------------------------------------- the table against the probe

GPT2 = {"n_embd": 32, "n_layer": 1, "n_head": 4}
FALCON = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 4, "v_head_dim": 12,
    "num_key_value_heads": 4, "first_k_dense_replace": 2, "n_routed_experts": 4, "moe_intermediate_size": 16,
}  # fmt: skip
DBRX_ATTENTION = {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10_000.0}
DBRX_MLP = {"ffn_hidden_size": 32, "moe_num_experts": 2, "moe_top_k": 1}
AGREE: list[tuple[str, dict[str, Any]]] = [  # all the others: see the sweep below
    ("gpt2", {}),
    ("gpt_neox", {}),
    ("bloom", {}),
    ("falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    ("falcon", {**FALCON, "multi_query": True}),
    ("falcon", {**FALCON, "multi_query": False}),
    ("gpt_bigcode", {**GPT2, "multi_query": True}),
    ("gpt_bigcode", {**GPT2, "multi_query": False}),
    ("codegen", {}),
    ("mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2}),
    ("phi3", {**SMALL}),
    ("phi3", {**SMALL, "num_key_value_heads": 2}),
    ("dbrx", {"d_model": 32, "n_heads": 4, "n_layers": 2, "attn_config": DBRX_ATTENTION, "ffn_config": DBRX_MLP}),
    ("persimmon", {**SMALL}),
    ("jetmoe", {**SMALL, "num_key_value_heads": 2, "kv_channels": 8}),
    ("deberta", {}),
    ("modernbert", {}),
    ("bark", {}),
    ("sam_vision_model", {}),
    ("vitdet", {}),
    ("blip", {}),
    ("qwen2_vl", {}),
    ("exaone4_5_vision", {}),
    ("moshi", {}),
    ("minimax_m3_vl_text", {}),
    ("deepseek_v3", {**SMALL, **LATENT}),
]


def places(model: nn.Module) -> dict[tuple[type, str], FusedProjection]:
    """The first fused linear of every kind that the table knows."""
    found: dict[tuple[type, str], FusedProjection] = {}
    for one in fused_projections(model):
        if isinstance(one, FusedProjection) and is_linear(model, one.path):
            leaf, around = families._surroundings(model, one.path)
            found.setdefault((type(around[0]), leaf), one)
    return found


def is_linear(model: nn.Module, path: str) -> bool:
    facts = linear_facts(model.get_submodule(path))
    return not isinstance(facts, str) and facts.form == "linear"


def probed(model: nn.Module, known: FusedProjection, leaf: str) -> Probed | str:
    owner = known.path.removesuffix(f".{leaf}")
    return probe_rows(model, known.path, owner, sum(known.sizes))


@pytest.mark.parametrize("case", AGREE, ids=lambda case: case[0])
def test_the_probe_confirms_the_table(case: tuple[str, dict[str, Any]]) -> None:
    model_type, values = case
    with torch.device("meta"):
        model = AutoModel.from_config(CONFIG_MAPPING[model_type](**values))
    known = places(model)
    assert known
    for (_, leaf), projection in known.items():
        expected = Probed(projection.roles, projection.sizes, projection.groups)
        assert probed(model, projection, leaf) == expected


def alone(kind: str, module: str, **values: Any) -> nn.Module:
    """An attention whose model cannot be shrunk, or that hides its values behind an activation."""
    home = importlib.import_module(f"transformers.models.{module}")
    made: nn.Module = getattr(home, kind)(**values).double()
    made.eval()  # which gives nothing back for a Levit
    generator = torch.Generator().manual_seed(1)
    for parameter in made.parameters():  # some start at zero, and hide everything
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return made


HEADS = {"num_attention_heads": 2, "attention_ratio": 2, "key_dim": 4}
ALONE: dict[str, tuple[Any, str, tuple[tuple[int, ...], ...]]] = {
    "levit": (
        lambda: alone("LevitAttention", "levit.modeling_levit", hidden_sizes=8, resolution=2, **HEADS),
        "queries_keys_values.linear",
        ((1, 4, 8),),
    ),
    "levit between stages": (
        lambda: alone(
            "LevitAttentionSubsample", "levit.modeling_levit", input_dim=8, output_dim=8, stride=2,
            resolution_in=4, resolution_out=2, **HEADS,
        ),
        "keys_values.linear",
        ((1, 16, 8),),
    ),
    "esmfold": (
        lambda: alone("EsmFoldSelfAttention", "esm.modeling_esmfold", embed_dim=8, num_heads=2, head_width=4),
        "proj",
        ((1, 4, 8),),
    ),
    "evolla": (
        lambda: alone("EvollaSequenceCompressorAttention", "evolla.modeling_evolla", dim=8, dim_head=4, heads=2),
        "to_kv",
        ((1, 4, 8), (1, 3, 8), (1, 7)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ALONE)
@torch.no_grad()
def test_equal_values_make_queries_and_keys_irrelevant(case: str) -> None:
    build, leaf, shapes = ALONE[case]
    owner = build()
    found = fused_projection(owner, leaf)
    assert isinstance(found, FusedProjection)
    rows = labels_of(found)
    given: list[Tensor] = []
    seen: list[Tensor] = []
    owner.get_submodule(leaf).register_forward_hook(lambda _, __, out: given[0] if given else seen.append(out))
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    inputs[2:] = [torch.ones_like(mask) for mask in inputs[2:]]

    def answer(numbers: Tensor) -> Tensor:
        given[:] = [numbers]
        out = owner(*inputs)
        return out if isinstance(out, Tensor) else next(iter(out))

    owner(*inputs)
    first, second = (torch.randn(seen[0].shape, generator=generator, dtype=torch.float64) for _ in range(2))
    value = torch.tensor([row == "v" for row in rows])
    level = first.flatten(0, -2).mean(0).expand_as(first)  # the same at every position
    both = [torch.where(value, level, numbers) for numbers in (first, second)]
    assert torch.allclose(answer(both[0]), answer(both[1]), rtol=1e-9)
    assert not torch.allclose(answer(first), answer(torch.where(value, first, second)))
    for role in {"q", "k"} & set(rows):  # and no other role has that property
        other = torch.tensor([row == role for row in rows])
        mixed = [torch.where(other, level, numbers) for numbers in (first, second)]
        assert not torch.allclose(answer(mixed[0]), answer(mixed[1]))


@pytest.mark.sweep
@pytest.mark.parametrize("model_type", MODEL_MAPPING_NAMES)
def test_the_probe_never_contradicts_the_table(model_type: str) -> None:
    try:
        with torch.device("meta"):
            model: nn.Module = AutoModel.from_config(CONFIG_MAPPING[model_type]())
    except Exception:  # the default configuration is no whole one; that of the zoo is
        try:
            model = tiny_model(model_type)
        except Unavailable as error:
            pytest.skip(str(error))
    for (_, leaf), projection in places(model).items():
        seen = probed(model, projection, leaf)
        assert isinstance(seen, str) or seen == Probed(projection.roles, projection.sizes, projection.groups)


def test_layers_that_differ_are_not_mistaken_for_each_other() -> None:
    """Dots' sliding layers have keys wider than values, its other layers do not."""
    model = tiny_model("dots3_note_text")
    known = [found for found in families.fused_projections(model) if isinstance(found, FusedProjection)]
    assert {found.sizes for found in known} == {(64, 64), (96, 64)}
    for found in known:
        answer = probed(model, found, "kv_b_proj")
        assert answer == "probe: k and v differ in size: (96, 64)" or labels_of(answer) == labels_of(found)  # type: ignore[arg-type]
