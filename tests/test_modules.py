"""The modules that edits put into a model: same numbers as before, however they are called."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rewire.modules import (
    JoinedPart,
    JoinedProjection,
    RenamedModule,
    SplitLayer,
    SplitMultiheadAttention,
    SplitProjection,
)
from rewire.modules.joined import join_parts, joined_layer
from rewire.modules.rows import together, with_rows

IN = 8


class Attention(nn.Module):
    """Three projections that may be given different inputs."""

    def __init__(self, sizes: Sequence[int] = (8, 4, 4), biased: Sequence[bool] = (True, True, True)) -> None:
        super().__init__()
        self.q, self.k, self.v = (
            nn.Linear(IN, size, bias=has_bias) for size, has_bias in zip(sizes, biased, strict=True)
        )

    def forward(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        y = x if y is None else y
        return self.q(x), self.k(y), self.v(y)


def joined(plain: Attention) -> Attention:
    """The same with one joined weight, put together by hand."""
    model = copy.deepcopy(plain)
    parts = {name: model.get_submodule(name) for name in "qkv"}
    biased = [part.bias is not None for part in parts.values()]
    whole = JoinedProjection(IN, tuple(parts), [part.out_features for part in parts.values()], biased)
    with torch.no_grad():
        whole.weight.copy_(torch.cat([part.weight for part in parts.values()]))
        if any(biased):
            whole.bias.copy_(torch.cat([part.bias for part in parts.values() if part.bias is not None]))
    for name, part in join_parts(model, "qkv", whole).items():
        setattr(model, name, part)
    model.qkv = whole
    return model


def pair(**kwargs: object) -> tuple[Attention, Attention]:
    torch.manual_seed(0)
    plain = Attention(**kwargs)  # type: ignore[arg-type]
    return plain, joined(plain)


def close(first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("biased", [(True, True, True), (False, False, False), (True, False, True)])
@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_join_gives_the_same_with_one_input_and_with_two(
    biased: tuple[bool, ...], context: Callable[[], torch.no_grad]
) -> None:
    plain, one = pair(biased=biased)
    with context():
        x, y = torch.randn(2, 3, IN), torch.randn(2, 5, IN)
        for inputs in ((x,), (x, y), (x,), (y, x), (y,)):
            close(one(*inputs), plain(*inputs))


def test_join_multiplies_once_for_one_input() -> None:
    _, one = pair()
    calls: list[object] = []
    one.qkv.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        one(torch.randn(2, 3, IN))
    assert len(calls) == 1


def test_join_learns_which_parts_share_their_input() -> None:
    plain, one = pair()
    x, y = torch.randn(2, 3, IN), torch.randn(2, 5, IN)
    rows: list[int] = []
    one.qkv.register_forward_hook(lambda module, args, result: rows.append(result.shape[-1]))
    with torch.no_grad():
        close(one(x, y), plain(x, y))
        rows.clear()
        close(one(x, y), plain(x, y))
    assert rows == [8, 8]  # the query alone, then key and value together


@given(st.lists(st.tuples(st.sampled_from("qkv"), st.sampled_from("xy")), max_size=12))
def test_join_is_right_for_any_order_of_calls(calls: list[tuple[str, str]]) -> None:
    plain, one = pair()
    inputs = {"x": torch.randn(3, IN), "y": torch.randn(3, IN)}
    with torch.no_grad():
        for part, which in calls:
            close([getattr(one, part)(inputs[which])], [getattr(plain, part)(inputs[which])])


def test_join_notices_that_the_input_was_changed_in_place() -> None:
    plain, one = pair()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            x = torch.randn(3, IN)
            close([one.q(x)], [plain.q(x)])
            x.mul_(2)
            close([one.k(x)], [plain.k(x)])


def test_join_notices_that_the_weights_were_changed() -> None:
    plain, one = pair()
    x = torch.randn(3, IN)
    with torch.no_grad():
        one.q(x)
        one.qkv.weight.mul_(2)
        close([one.k(x)], [nn.functional.linear(x, plain.k.weight * 2, plain.k.bias)])


def test_join_does_not_mix_modes() -> None:
    _, one = pair()
    x = torch.randn(3, IN)
    with torch.no_grad():
        one.q(x)
    assert one.k(x).requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert one.v(x).dtype == torch.bfloat16


def test_join_gives_the_same_gradients() -> None:
    plain, one = pair(biased=(True, False, True))
    x = torch.randn(2, 3, IN)
    for model in (plain, one):
        sum((part * (n + 1)).square().sum() for n, part in enumerate(model(x))).backward()  # type: ignore[union-attr]
    want = torch.cat([plain.q.weight.grad, plain.k.weight.grad, plain.v.weight.grad])  # type: ignore[list-item]
    torch.testing.assert_close(one.qkv.weight.grad, want)
    torch.testing.assert_close(one.qkv.bias.grad, torch.cat([plain.q.bias.grad, plain.v.bias.grad]))  # type: ignore[list-item]


@pytest.mark.parametrize("reentrant", [True, False])
def test_join_under_gradient_checkpointing(reentrant: bool) -> None:
    plain, one = pair()
    x = torch.randn(2, 3, IN, requires_grad=True)
    grads = []
    for model in (plain, one):
        (grad,) = torch.autograd.grad(sum(part.square().sum() for part in checkpoint(model, x, use_reentrant=False)), x)
        grads.append(grad)
    torch.testing.assert_close(*grads)
    if reentrant:
        sum(part.square().sum() for part in checkpoint(one, x, use_reentrant=True)).backward()
        torch.testing.assert_close(x.grad, grads[0])


def test_join_keeps_nothing_alive() -> None:
    _, one = pair()
    x = torch.randn(3, IN)
    with torch.no_grad():
        one.q(x)  # key and value are waiting now
    waiting = weakref.ref(one.q.company.scratch.pending.outputs[1])
    del x
    gc.collect()
    assert waiting() is None
    assert one.q.company.scratch.pending is None


def test_parts_that_are_never_called_are_not_computed_again() -> None:
    _, one = pair()
    rows: list[int] = []
    one.qkv.register_forward_hook(lambda module, args, result: rows.append(result.shape[-1]))
    for _ in range(3):  # as when keys and values come from a cache
        one.q(torch.randn(3, IN))
    assert rows == [16, 8, 8]
    assert one.q.company.scratch.pending is None


def test_join_serves_several_threads() -> None:
    plain, one = pair()
    failures: list[str] = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _ in range(50):
                x = torch.randn(3, IN, generator=generator)
                if not all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one(x), plain(x), strict=True)):
                    failures.append("differs")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    [thread.start() for thread in threads]  # type: ignore[func-returns-value]
    [thread.join() for thread in threads]  # type: ignore[func-returns-value]
    assert not failures


def test_join_survives_copying_and_pickling() -> None:
    plain, one = pair(biased=(True, False, True))
    x = torch.randn(3, IN)
    one.q(x)  # with outputs waiting
    for twin in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        close(twin(x), plain(x))
        assert twin.k.parent is twin
        twin.qkv.weight.data.zero_()
    close(one(x), plain(x))


def test_join_compiles_without_a_wrong_result() -> None:
    plain, one = pair()
    compiled = torch.compile(one, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for length in (2, 5, 9):
            x, y = torch.randn(2, length, IN), torch.randn(2, length + 1, IN)
            close(compiled(x), plain(x))
            close(compiled(x, y), plain(x, y))


def test_join_does_not_compile_again_for_every_length() -> None:
    _, one = pair()
    compiled = torch.compile(one, dynamic=True, backend="aot_eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for length in (3, 5, 9, 17):
            compiled(torch.randn(2, length, IN))


def test_join_honours_what_is_put_around_the_joined_projection() -> None:
    plain, one = pair()

    class Doubled(nn.Module):
        def __init__(self, base_layer: nn.Module) -> None:
            super().__init__()
            self.base_layer = base_layer

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.base_layer(x)

    one.qkv = Doubled(one.qkv)
    x = torch.randn(3, IN)
    close(one(x), [2 * part for part in plain(x)])


def test_a_joined_part_shows_its_weight_and_bias() -> None:
    plain, one = pair(biased=(True, False, True))
    for name in "qkv":
        part, linear = one.get_submodule(name), plain.get_submodule(name)
        assert isinstance(part, JoinedPart)
        assert torch.equal(part.weight, linear.weight)
        assert (part.bias is None) == (linear.bias is None)
        assert part.bias is None or torch.equal(part.bias, linear.bias)
        assert (part.in_features, part.out_features) == (linear.in_features, linear.out_features)
    assert list(one.state_dict()) == ["qkv.weight", "qkv.bias"]


def fused_weight(split: SplitProjection) -> nn.Linear:
    """The fused linear that a split projection stands for."""
    linear = nn.Linear(split.in_features, split.out_features, bias=split.bias is not None)
    with torch.no_grad():
        linear.weight.copy_(split.weight)
        if split.bias is not None:
            linear.bias.copy_(split.bias)
    return linear


@given(
    st.integers(1, 4),
    st.lists(st.integers(1, 5), min_size=2, max_size=4),
    st.booleans(),
    st.sampled_from([(3,), (2, 3), (2, 3, 2), ()]),
    st.booleans(),
)
def test_split_equals_the_fused_linear(
    groups: int, per_group: list[int], bias: bool, batch: tuple[int, ...], grad: bool
) -> None:
    names = [f"p{n}" for n in range(len(per_group))]
    split = SplitProjection(IN, names, [groups * size for size in per_group], groups, bias)
    fused = fused_weight(split)
    x = torch.randn(*batch, IN)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(split(x), fused(x), rtol=1e-5, atol=1e-6)


def test_split_gives_the_fused_rows_bit_for_bit_on_realistic_sizes() -> None:
    torch.manual_seed(0)
    split = SplitProjection(96, ("q", "k", "v"), (96, 96, 96))
    fused = fused_weight(split)
    x = torch.randn(2, 50, 96)
    with torch.no_grad():
        assert torch.equal(split(x), fused(x))


def test_split_calls_its_parts_when_somebody_listens() -> None:
    split = SplitProjection(IN, ("q", "k"), (4, 4))
    seen: list[str] = []
    split.q.register_forward_hook(lambda *_: seen.append("q"))
    with torch.no_grad():
        split(torch.randn(3, IN))
    assert seen == ["q"]
    split.k.forward = lambda x: torch.zeros(*x.shape[:-1], 4)  # what accelerate and others do to a module
    with torch.no_grad():
        assert not split(torch.randn(3, IN))[..., 4:].any()


def test_split_works_with_autocast_compile_and_frozen_parts() -> None:
    split = SplitProjection(IN, ("q", "k"), (4, 4))
    split.k.requires_grad_(False)
    x = torch.randn(3, IN)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert split(x).dtype == torch.bfloat16
    split(x).sum().backward()
    assert split.q.weight.grad is not None
    assert split.k.weight.grad is None
    compiled = torch.compile(split, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), split(x))


def test_a_renamed_module_is_whatever_has_the_new_name_now() -> None:
    parent = nn.Module()
    parent.new = nn.Linear(2, 3)
    parent.__dict__["old"] = RenamedModule(parent, "new")
    x = torch.randn(1, 2)
    assert torch.equal(parent.old(x), parent.new(x))
    assert parent.old.weight is parent.new.weight
    parent.new = nn.Linear(2, 5)
    assert parent.old.out_features == 5
    twin = pickle.loads(pickle.dumps(copy.deepcopy(parent)))
    assert twin.old.weight is twin.new.weight
    assert list(twin.state_dict()) == ["new.weight", "new.bias"]


# ---------------------------------------------------------------- layers that are no nn.Linear


class Bank(nn.Module):
    """A matrix for each place, or for the places that are asked for (as Moshi's)."""

    def __init__(self, n_in: int, n_out: int, places: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(places, n_out, n_in))

    def forward(self, x: Tensor, places: Tensor | None = None) -> Tensor:
        weight = self.weight if places is None else self.weight[places]
        return torch.einsum("noi,bni->bno", weight, x)


class Heads(nn.Module):
    """Three layers of one kind, called alike."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return self.q(*args), self.k(*args), self.v(*args)


def heads_joined(plain: Heads, **how: int) -> Heads:
    """The same with one joined layer."""
    model = copy.deepcopy(plain)
    dim, groups = how.get("row_dim", 0), how.get("groups", 1)
    parts = [model.get_submodule(name) for name in "qkv"]
    sizes = [part.weight.shape[dim] for part in parts]
    whole, company = joined_layer(parts[0], tuple("qkv"), sizes, **how)
    for leaf, tensor in parts[0].named_parameters():
        rows = together([part.get_parameter(leaf).detach() for part in parts], groups, dim)
        setattr(whole, leaf, nn.Parameter(rows))
        assert tensor.requires_grad
    for name, stand_in in join_parts(model, "qkv", whole, company).items():
        setattr(model, name, stand_in)
    model.qkv = whole
    return model


KINDS: dict[str, tuple[Callable[[], Heads], tuple[int, ...], dict[str, int]]] = {
    "convolutions": (
        lambda: Heads(q=nn.Conv1d(IN, 8, 1), k=nn.Conv1d(IN, 4, 1), v=nn.Conv1d(IN, 4, 1)),
        (2, IN, 5),
        {"axis": -2},
    ),
    "convolutions of images": (
        lambda: Heads(**{name: nn.Conv2d(IN, 4, 1, bias=False) for name in "qkv"}),
        (2, IN, 3, 5),
        {"axis": -3},
    ),
    "grouped convolutions": (
        lambda: Heads(**{name: nn.Conv1d(IN, 8, 1, groups=4) for name in "qkv"}),
        (2, IN, 5),
        {"axis": -2, "groups": 4},
    ),
    "banks": (lambda: Heads(q=Bank(IN, 8, 3), k=Bank(IN, 4, 3), v=Bank(IN, 4, 3)), (2, 3, IN), {"row_dim": 1}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_other_kinds_are_joined(kind: str) -> None:
    make, shape, how = KINDS[kind]
    torch.manual_seed(0)
    plain = make()
    one = heads_joined(plain, **how)
    x, y = torch.randn(shape), torch.randn(shape)
    calls: list[int] = []
    one.qkv.register_forward_hook(lambda *_: calls.append(1))
    for context in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        with context():
            close(one(x), plain(x))
            close([one.q(x), one.k(y), one.v(y)], [plain.q(x), plain.k(y), plain.v(y)])
    assert len(calls) > 0
    for name in "qkv":
        assert torch.equal(one.get_submodule(name).weight, plain.get_submodule(name).weight)  # type: ignore[arg-type]
    sum(part.square().sum() for part in one(x)).backward()
    sum(part.square().sum() for part in plain(x)).backward()
    rows = [plain.get_submodule(name).weight.grad for name in "qkv"]
    torch.testing.assert_close(one.qkv.weight.grad, together(rows, how.get("groups", 1), how.get("row_dim", 0)))


def test_one_product_serves_all_parts_only_where_everything_given_is_the_same() -> None:
    plain = Heads(**{name: Bank(IN, 4, 6) for name in "qkv"})
    one = heads_joined(plain, row_dim=1)
    x, first, last = torch.randn(2, 3, IN), torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5])
    calls: list[int] = []
    one.qkv.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        close(one(x, first), plain(x, first))
        assert len(calls) == 1
        close([one.q(x, first), one.k(x, last)], [plain.q(x, first), plain.k(x, last)])
        kept = first.clone()
        given = one.q(x, kept)
        kept.copy_(last)
        close([given, one.k(x, kept)], [plain.q(x, first), plain.k(x, last)])


def test_a_split_layer_is_called_as_the_fused_one_was() -> None:
    torch.manual_seed(0)
    bank = Bank(IN, 6, 3)
    gate, up = with_rows(bank, 2, 1), with_rows(bank, 4, 1)
    gate.weight, up.weight = (nn.Parameter(part.detach()) for part in bank.weight.split([2, 4], dim=1))
    split = SplitLayer({"gate": gate, "up": up}, row_dim=1)
    x = torch.randn(2, 3, IN)
    close([split(x), split(x[:, 1:2], torch.tensor([2]))], [bank(x), bank(x[:, 1:2], torch.tensor([2]))])
    assert torch.equal(split.weight, bank.weight)
    assert split.bias is None


def test_a_layer_with_fewer_rows_shares_nothing_with_the_first() -> None:
    conv = nn.Conv2d(4, 6, 1).eval()
    conv.register_forward_hook(lambda *_: None)
    fewer = with_rows(conv, 2)
    assert repr(fewer) == "Conv2d(4, 2, kernel_size=(1, 1), stride=(1, 1))"
    assert (len(fewer._forward_hooks), fewer.training, fewer.weight.is_meta) == (0, False, True)
    assert (conv.out_channels, conv.weight.shape[0]) == (6, 6)


# ---------------------------------------------------------------- nn.MultiheadAttention


def multihead(**settings: Any) -> tuple[nn.MultiheadAttention, SplitMultiheadAttention]:
    """An attention of torch and the same with parts."""
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(16, 4, **settings)
    for parameter in plain.parameters():
        nn.init.normal_(parameter)
    split = SplitMultiheadAttention(plain, tuple("qkv"))
    for index, name in enumerate("qkv"):
        part = split.get_submodule(name)
        part.weight = nn.Parameter(plain.in_proj_weight.detach().chunk(3)[index].clone())
        if plain.in_proj_bias is not None:
            part.bias = nn.Parameter(plain.in_proj_bias.detach().chunk(3)[index].clone())
    return plain, split


MASKS = ("none", "bool", "float", "bool for each head", "float for each head")


def attention_mask(kind: str, batch: int, queries: int, keys: int) -> Tensor | None:
    if kind == "none":
        return None
    shape = (batch * 4, queries, keys) if kind.endswith("head") else (queries, keys)
    if kind.startswith("float"):
        return torch.randn(shape)
    hidden = torch.rand(shape) > 0.6
    hidden[..., 0] = False  # a row that sees nothing has no answer
    return hidden


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_first": True},
        {"batch_first": False, "dropout": 0.4},
        {"batch_first": True, "bias": False, "add_zero_attn": True},
        {"batch_first": False, "add_bias_kv": True},
        {"batch_first": True, "add_bias_kv": True, "add_zero_attn": True, "dropout": 0.4},
    ],
)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("padding", ["none", "bool", "float"])
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_an_attention_in_parts_is_that_of_torch(settings: dict[str, Any], mask: str, padding: str) -> None:
    plain, split = multihead(**settings)
    for training, batch, keys, need_weights in product((False, True), (0, 3), (5, 7), (True, False)):
        shape = (batch, -1) if settings["batch_first"] else (-1, batch)
        q, k, v = (torch.randn([length if n < 0 else n for n in shape if n] + [16]) for length in (5, keys, keys))
        if keys == 5:
            k = v = q  # what torch has a fast path for
        masks: dict[str, Any] = {"attn_mask": attention_mask(mask, batch or 1, 5, keys)}
        if padding != "none":
            hidden = attention_mask(padding, 1, batch or 1, keys)
            masks["key_padding_mask"] = hidden if batch or hidden is None else hidden[0]
        results = []
        for attention in (plain, split):
            torch.manual_seed(1)
            with torch.no_grad():
                results.append(attention.train(training)(q, k, v, need_weights=need_weights, **masks))
        (out, weights), (want, want_weights) = results[1], results[0]
        torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
        assert (weights is None) == (want_weights is None)
        torch.testing.assert_close(weights, want_weights, rtol=1e-4, atol=1e-5)


def test_an_attention_in_parts_takes_hints_and_keeps_heads_apart() -> None:
    plain, split = multihead(batch_first=True)
    x, causal = torch.randn(2, 5, 16), torch.ones(5, 5, dtype=torch.bool).triu(1)
    for settings in (
        {"attn_mask": causal, "is_causal": True, "need_weights": False},
        {"attn_mask": causal, "is_causal": True, "average_attn_weights": False},
    ):
        torch.testing.assert_close(split(x, x, x, **settings), plain(x, x, x, **settings), rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="give attn_mask too"):
        split(x, x, x, is_causal=True)
    with pytest.raises(TypeError, match=r"booleans or floats, not torch\.int64"):
        split(x, x, x, attn_mask=causal.long())


def test_adapters_on_the_parts_of_an_attention_act_everywhere() -> None:
    plain, split = multihead(batch_first=True)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    layer.self_attn = split.eval()  # whose fast path reads the fused weight
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        before = layer(x)
        split.q.register_forward_hook(lambda module, args, out: out + 1)
        assert not torch.allclose(layer(x), before)
    assert torch.equal(split.in_proj_weight, plain.in_proj_weight)
    assert torch.equal(split.in_proj_bias, plain.in_proj_bias)
