"""The kernels of packed encoders: the compiled ones beside torch, and each way of a linear layer beside F.linear."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
import sys
import types
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from rewire.modules.packed import linear, measured, native
from rewire.modules.packed.attention import attention, attention_path, torch_attention
from rewire.modules.packed.linear import prepare

KERNELS = native.library()
needs_kernels = pytest.mark.skipif(KERNELS is None, reason=f"compiled kernels: {native.absence()}")
ISAS = range(len(KERNELS.isas)) if KERNELS else range(0)
BOUNDS = {torch.float32: 4e-6, torch.bfloat16: 2e-2}
WIDTHS = (1, 2, 3, 7, 8, 15, 16, 17, 24, 31, 32, 33, 40, 48, 63, 64, 72, 80, 96, 100, 128, 160, 255, 256)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "rewire" / "fastest.json"


def starts_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)])


def strong(tokens: int, heads: int, kv_heads: int, width: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """q, k and v as slices of one joined projection; scores at a scale of 1/sqrt(width) have a deviation of 3."""
    generator = torch.Generator().manual_seed(seed)
    joined = torch.randn(tokens, heads + 2 * kv_heads, width, generator=generator) * 3**0.5
    return list(joined.to(dtype).split([heads, kv_heads, kv_heads], dim=1))


def expected_attention(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """The formula, in float64."""
    share = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(share, 1), v.double().repeat_interleave(share, 1)
    out = torch.zeros_like(q)
    for start, stop in pairwise(starts.tolist()):
        if stop > start:
            scores = torch.einsum("qhw,khw->hqk", q[start:stop], k[start:stop]) * scale
            if bias is not None:
                scores += bias[:, : stop - start, : stop - start].double()
            out[start:stop] = torch.einsum("hqk,khw->qhw", scores.softmax(-1), v[start:stop])
    return out


def largest(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).abs().max()) if one.numel() else 0.0


def assert_attends(inputs: list[Tensor], lengths: list[int], bias: Tensor | None = None, **options: int) -> None:
    assert KERNELS is not None
    q, k, v = inputs
    starts, scale = starts_of(lengths), q.shape[-1] ** -0.5
    expected = expected_attention(q, k, v, starts, scale, bias)
    got = KERNELS.attention(q, k, v, starts, scale, bias, **options)
    assert got.shape == q.shape
    assert got.dtype == q.dtype
    bound = BOUNDS[q.dtype] * max(1.0, float(expected.abs().max()) if expected.numel() else 0.0)
    assert largest(got, expected) <= bound
    assert largest(torch_attention(q, k, v, starts, scale, bias, 0.0), expected) <= bound


# ---------------------------------------------------------------- attention, the compiled kernel


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("width", WIDTHS)
def test_attention_is_right_for_every_width(width: int, isa: int, dtype: torch.dtype) -> None:
    lengths = [1, 33, 5, 150]
    assert_attends(strong(sum(lengths), 3, 3, width, dtype), lengths, isa=isa, threads=1)


@needs_kernels
@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 70), max_size=8),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    width=st.integers(1, 80),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    isa=st.sampled_from(ISAS or [0]),
    threads=st.integers(1, 2),
    biased=st.sampled_from(["no", "rows", "columns", "one head"]),
)
def test_attention_is_right_for_any_lengths(
    lengths: list[int],
    kv_heads: int,
    group: int,
    width: int,
    dtype: torch.dtype,
    isa: int,
    threads: int,
    biased: str,
) -> None:
    heads, longest = kv_heads * group, max([1, *lengths])
    bias = torch.randn(heads, longest, longest, generator=torch.Generator().manual_seed(1)) * 2
    shaped = {"no": None, "rows": bias, "columns": bias.transpose(1, 2), "one head": bias[:1].expand(heads, -1, -1)}
    inputs = strong(sum(lengths), heads, kv_heads, width, dtype)
    assert_attends(inputs, lengths, shaped[biased], isa=isa, threads=threads)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("isa", ISAS)
def test_one_long_sequence_among_many_short_ones(isa: int, dtype: torch.dtype) -> None:
    lengths = [1] * 20 + [0, 700, 0] + [2, 3] * 10
    assert_attends(strong(sum(lengths), 2, 1, 32, dtype), lengths, isa=isa, threads=2)


@needs_kernels
@pytest.mark.parametrize("isa", ISAS)
def test_scores_of_any_size_neither_overflow_nor_vanish(isa: int) -> None:
    q, k, v = strong(40, 2, 2, 16, torch.float32)
    assert_attends([q * 300, k * 300, v], [40], isa=isa, threads=1)


@needs_kernels
@pytest.mark.parametrize("isa", ISAS)
def test_infinite_biases_hide_keys(isa: int) -> None:
    q, k, v = strong(50, 2, 2, 16, torch.float32)
    far = (torch.arange(50)[:, None] - torch.arange(50)[None, :]).abs() > 2
    bias = torch.zeros(2, 50, 50).masked_fill(far, float("-inf"))
    assert_attends([q, k, v], [50], bias, isa=isa, threads=1)


@needs_kernels
@pytest.mark.parametrize("isa", ISAS)
def test_a_nan_stays_in_its_sequence_and_head(isa: int) -> None:
    assert KERNELS is not None
    q, k, v = (tensor.contiguous() for tensor in strong(30, 2, 2, 16, torch.float32))
    k[4, 1, 3] = float("nan")
    got = KERNELS.attention(q, k, v, starts_of([10, 20]), 0.25, isa=isa)
    assert got[:10, 1].isnan().all()
    assert not got[:10, 0].isnan().any()
    assert not got[10:].isnan().any()


@needs_kernels
def test_strides_of_any_kind_are_read_in_place() -> None:
    base = torch.randn(2, 30, 3, 2, 24)
    q, k, v = base[1].permute(1, 0, 2, 3).contiguous().unbind(0)
    by_head = [tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in (q, k, v)]
    assert_attends(by_head, [13, 17])
    assert_attends([tensor[::2] for tensor in (q, k, v)], [7, 8])
    odd = [torch.randn(15, 2, 9)[:, :, :8].bfloat16() for _ in range(3)]
    assert_attends([torch.cat([one, one[..., :1]], -1)[..., :8] for one in odd], [15])


@needs_kernels
@pytest.mark.parametrize("starts", [[0, 5], [1, 6], [0, 4, 3, 6], [0, 7], [0, -1, 6]])
def test_starts_that_would_read_elsewhere_are_refused(starts: list[int]) -> None:
    q, k, v = strong(6, 1, 1, 8, torch.float32)
    with pytest.raises(ValueError, match="starts must rise from 0"):
        attention(q, k, v, torch.tensor(starts), scale=1.0)
    with pytest.raises(ValueError, match="starts must rise from 0"):
        torch_attention(q, k, v, torch.tensor(starts), 1.0, None, 0.0)


@needs_kernels
@pytest.mark.skipif(sys.platform != "linux", reason="counts the threads in /proc")
def test_the_threads_are_those_of_torch() -> None:
    assert KERNELS is not None
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.randn(2000, 2000).sum(0)  # wakes torch's own threads
        threads = len(list(Path("/proc/self/task").iterdir()))
        inputs = strong(480, 4, 4, 32, torch.float32)
        KERNELS.attention(*inputs, starts_of([60] * 8), 0.2)  # type: ignore[misc]
        assert len(list(Path("/proc/self/task").iterdir())) == threads
    finally:
        torch.set_num_threads(before)


@needs_kernels
def test_threads_change_nothing() -> None:
    lengths = [60] * 8
    inputs = strong(480, 4, 4, 32, torch.float32)
    one, two = (KERNELS.attention(*inputs, starts_of(lengths), 0.2, threads=count) for count in (1, 2))  # type: ignore[union-attr]
    assert torch.equal(one, two)


# ---------------------------------------------------------------- attention, every way there


def test_no_kernels_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = strong(60, 4, 2, 16, torch.float32)
    bias = torch.randn(1, 40, 40)
    before = attention(q, k, v, starts_of([20, 40]), scale=0.25, bias=bias)
    monkeypatch.setattr(native, "library", lambda: None)
    assert attention_path(torch.float32, 16) == "torch"
    assert largest(attention(q, k, v, starts_of([20, 40]).int(), scale=0.25, bias=bias), before) <= 4e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_types_without_a_kernel_run_on_torch(dtype: torch.dtype) -> None:
    assert attention_path(dtype, 16) == "torch"
    q, k, v = strong(20, 2, 2, 16, dtype)
    expected = expected_attention(q, k, v, starts_of([20]), 0.25, None)
    assert largest(attention(q, k, v, starts_of([20]), scale=0.25), expected) <= 1e-2


def test_a_width_that_is_not_adjacent_runs_on_torch() -> None:
    q, k, v = (torch.randn(12, 2, 16).transpose(1, 2).contiguous().transpose(1, 2) for _ in range(3))
    expected = expected_attention(q, k, v, starts_of([12]), 0.25, None)
    assert largest(attention(q, k, v, starts_of([12]), scale=0.25), expected) <= 4e-6


def test_no_tokens_at_all() -> None:
    empty = torch.zeros(0, 2, 8)
    for starts in ([0], [0, 0], [0, 0, 0]):
        assert attention(empty, empty, empty, torch.tensor(starts), scale=1.0).shape == (0, 2, 8)


def test_a_bias_that_is_too_small_is_named() -> None:
    q, k, v = strong(6, 1, 1, 8, torch.float32)
    with pytest.raises(ValueError, match=r"a bias of shape \(1, 4, 4\) for sequences of up to 6 tokens"):
        attention(q, k, v, starts_of([6]), scale=1.0, bias=torch.zeros(1, 4, 4), longest=6)


def double_inputs() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    shapes = ((9, 4, 3), (9, 2, 3), (9, 2, 3), (1, 5, 5))
    return tuple(torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes)


def test_gradients_of_every_order() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return attention(q, k, v, starts_of([4, 0, 5]), scale=0.4, bias=bias, longest=5)

    assert torch.autograd.gradcheck(run, double_inputs())
    assert torch.autograd.gradgradcheck(run, double_inputs())


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_of_the_operator(dropout: float) -> None:
    seed = torch.tensor(7) if dropout else None

    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        out: Tensor = torch.ops.rewire.packed_attention(q, k, v, starts_of([4, 0, 5]), bias, 0.4, dropout, seed)
        return out

    assert torch.autograd.gradcheck(run, double_inputs())


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    q, k = torch.zeros(2, 400, 1, 4)
    v = torch.ones(400, 1, 4)
    for out in (
        attention(q, k, v, starts_of([400]), scale=1.0, dropout=0.5),
        torch.ops.rewire.packed_attention(q, k, v, starts_of([400]), None, 1.0, 0.5, torch.tensor(1)),
    ):
        assert float(out.std()) > 0.02
        assert abs(float(out.mean()) - 1.0) < 0.02


def test_forward_mode_and_function_transforms_give_derivatives() -> None:
    q, k, v = strong(12, 2, 2, 8, torch.float32)
    starts = starts_of([5, 7])

    def total(q: Tensor) -> Tensor:
        return attention(q, k, v, starts, scale=0.3).square().sum()

    asked = q.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(total(asked), asked)
    assert largest(torch.func.grad(total)(q), wanted) <= 1e-4
    assert wanted.abs().max() > 1e-2


def test_the_operator_keeps_its_promises() -> None:
    q, k, v = strong(9, 2, 1, 8, torch.float32)
    torch.library.opcheck(torch.ops.rewire.packed_attention.default, (q, k, v, starts_of([9]), None, 0.3, 0.0, None))


def test_meta_tensors_give_the_shape() -> None:
    q, k, v = (tensor.to("meta") for tensor in strong(9, 2, 1, 8, torch.float32))
    got = attention(q, k, v, starts_of([9]).to("meta"), scale=1.0)
    assert got.is_meta
    assert got.shape == (9, 2, 8)


def test_a_compiled_model_gives_the_same_values_and_gradients() -> None:
    starts = starts_of([5, 4])

    def model(x: Tensor) -> Tensor:
        q, k, v = (x * 1.5).unbind(1)
        return attention(q, k, v, starts, scale=0.3).square()

    x = torch.randn(9, 3, 2, 8)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert largest(compiled(x), model(x)) <= 1e-5
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for run, one in zip((model, compiled), inputs, strict=True):
        run(one).sum().backward()
    assert largest(inputs[0].grad, inputs[1].grad) <= 1e-4  # type: ignore[arg-type]


# ---------------------------------------------------------------- trusting the library


def test_a_missing_library_is_told() -> None:
    assert native._outcome(Path("nowhere") / "librewire.so") == (
        None,
        "not built (no C++ compiler when Rewire was installed)",
    )


def test_a_file_that_is_no_library_is_told(tmp_path: Path) -> None:
    path = tmp_path / "librewire.so"
    path.write_text("no library")
    found, reason = native._outcome(path)
    assert found is None
    assert reason.startswith("cannot be used:")


@needs_kernels
def test_a_library_of_other_sources_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "ABI", native.ABI + 1)
    path = Path(shutil.copy(native.default_path(), tmp_path))
    assert "install Rewire again" in native._outcome(path)[1]


@needs_kernels
def test_a_library_that_computes_wrongly_is_not_trusted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = native.Library.attention
    monkeypatch.setattr(native.Library, "attention", lambda *args, **options: right(*args, **options) * 1.01)
    found, reason = native._outcome(Path(shutil.copy(native.default_path(), tmp_path)))
    assert found is None
    assert reason.startswith("differs from torch by")


# ---------------------------------------------------------------- linear layers


WAYS = [linear._Linear, linear._OneDnn, linear._Native, linear._Int8Native, linear._Int8Torch]


def layer(outputs: int, inputs: int, biased: bool = True) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(outputs * 1000 + inputs)
    weight = torch.randn(outputs, inputs, generator=generator) * inputs**-0.5
    return weight, torch.randn(outputs, generator=generator) if biased else None


def expected_linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, residual: Tensor) -> Tensor:
    out = functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    return (out if activation is None else linear.ACTIVATIONS[activation](out)) + residual.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", [None, *linear.ACTIVATIONS])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_every_way_gives_what_the_formula_gives(
    way: type[linear.Prepared], activation: str | None, dtype: torch.dtype
) -> None:
    for outputs, inputs, rows, biased in (
        (33, 20, 1, True),
        (1, 1, 3, False),
        (64, 97, 29, True),
        (130, 64, 50, False),
    ):
        weight, bias = layer(outputs, inputs, biased)
        made = way.make(linear._Request(weight, bias, activation, dtype))  # type: ignore[attr-defined]
        if made is None:
            pytest.skip(f"{way.__name__} is not to be had here")
        x, residual = torch.randn(rows, inputs).to(dtype), torch.randn(rows, outputs).to(dtype)
        got = made(x, residual=residual)
        expected = expected_linear(x, weight, bias, activation, residual)
        assert got.dtype == dtype
        share = 4e-2 if made.how.startswith("int8") else {torch.float32: 1e-6, torch.bfloat16: 1.5e-2}[dtype]
        assert largest(got, expected) <= share * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_the_type_of_the_result_can_be_asked_for(way: type[linear.Prepared], kind: torch.dtype) -> None:
    weight, bias = layer(40, 24)
    for activation in (None, "gelu"):
        made = way.make(linear._Request(weight, bias, activation, kind))  # type: ignore[attr-defined]
        if made is None:
            pytest.skip(f"{way.__name__} is not to be had here")
        x, residual = torch.randn(9, 24), torch.randn(9, 40)
        expected = expected_linear(x, weight, bias, activation, residual)
        for before, added, asked, wanted in (
            (torch.float32, torch.float32, None, torch.float32),
            (torch.bfloat16, torch.float32, None, torch.float32),
            (torch.float32, torch.bfloat16, None, torch.bfloat16),
            (torch.float32, torch.float32, torch.bfloat16, torch.bfloat16),
            (torch.bfloat16, torch.bfloat16, torch.float32, torch.float32),
        ):
            got = made(x.to(before), residual=residual.to(added), dtype=asked)
            assert got.dtype == wanted
            assert largest(got, expected) <= 4e-2 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_rows_of_any_stride_and_more_dimensions(way: type[linear.Prepared]) -> None:
    weight, bias = layer(24, 16)
    made = way.make(linear._Request(weight, bias, "relu", torch.float32))  # type: ignore[attr-defined]
    if made is None:
        pytest.skip(f"{way.__name__} is not to be had here")
    x, residual = torch.randn(2, 5, 40)[..., 3:19], torch.randn(2, 24, 5).transpose(1, 2)
    plain = made(x.reshape(10, 16).contiguous(), residual=residual.reshape(10, 24))
    assert largest(made(x, residual=residual), plain.view(2, 5, 24)) <= 1e-6
    assert made(torch.zeros(0, 16)).shape == (0, 24)


@pytest.mark.parametrize("way", WAYS[:3], ids=lambda way: way.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dense_weight_comes_back_bit_by_bit(way: type[linear.Prepared], dtype: torch.dtype) -> None:
    for outputs, inputs in ((33, 21), (64, 64), (1, 2)):
        weight = layer(outputs, inputs)[0].to(dtype)
        made = way.make(linear._Request(weight, None, None, dtype))  # type: ignore[attr-defined]
        if made is None:
            pytest.skip(f"{way.__name__} is not to be had here")
        assert torch.equal(made.to_dense(), weight)
        assert made.to_dense().dtype == dtype
        assert weight.nbytes <= made.nbytes <= 4096 * 8 + weight.nbytes * 2


def test_a_rounded_weight_is_not_given_back() -> None:
    weight, bias = layer(8, 8)
    for options in ({"dtype": torch.bfloat16}, {"int8": True}):
        with pytest.raises(RuntimeError, match="rounded when it was prepared"):
            prepare(weight, bias, **options).to_dense()  # type: ignore[arg-type]


def test_a_prepared_weight_refuses_to_lose_gradients() -> None:
    weight, bias = layer(8, 8)
    with pytest.raises(RuntimeError, match="gives no gradients"):
        prepare(weight, bias)(torch.zeros(1, 8, requires_grad=True))


def test_wrong_shapes_are_named() -> None:
    weight, bias = layer(8, 6)
    made = linear._Native.make(linear._Request(weight, bias, None, torch.float32))
    if made is None:
        pytest.skip("no compiled kernels")
    with pytest.raises(ValueError, match=r"6 inputs expected, x has the shape \(2, 7\)"):
        made(torch.zeros(2, 7))
    with pytest.raises(ValueError, match=r"a residual of shape \(1, 8\) for 2 rows of 8"):
        made(torch.zeros(2, 6), residual=torch.zeros(1, 8))
    with pytest.raises(ValueError, match="unknown activation 'elu'"):
        prepare(weight, bias, activation="elu")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_on_every_instruction_set(isa: int, kind: torch.dtype, dtype: torch.dtype) -> None:
    assert KERNELS is not None
    if kind == torch.bfloat16 and not KERNELS.is_fast(kind, isa):
        pytest.skip("no product of bfloat16 without instructions for it")
    for outputs, inputs, rows, threads in ((70, 37, 1, 1), (33, 64, 200, 2), (96, 5, 13, 1)):
        weight, bias = layer(outputs, inputs)
        x, residual = torch.randn(rows, inputs).to(dtype), torch.randn(rows, outputs).to(dtype)
        packed = KERNELS.pack(weight, kind, isa=isa)
        got = KERNELS.product(x, packed, bias, "gelu", residual, threads=threads)
        expected = expected_linear(x, weight, bias, "gelu", residual)
        bound = 4e-2 if kind == torch.int8 else 1.5e-2 if torch.bfloat16 in (kind, dtype) else 1e-6
        assert largest(got, expected) <= bound * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("isa", ISAS)
def test_int8_is_exact_where_no_rounding_is_needed(isa: int) -> None:
    assert KERNELS is not None
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (40, 50), generator=generator).float()
    weight[:, 0] = 127
    x = torch.randint(-100, 156, (9, 50), generator=generator).float()
    x[:, 0], x[:, 1] = -100, 155
    got = KERNELS.product(x, KERNELS.pack(weight, torch.int8, isa=isa))
    assert largest(got, x.double() @ weight.double().T) <= 1.0  # of sums up to a million


def test_activations_far_out_are_exact_or_nothing() -> None:
    x = torch.tensor([[-1e4, -90.0, -20.0, -6.0, 6.0, 20.0, 90.0, 1e4]]).T
    for activation in linear.ACTIVATIONS:
        for dtype, bound in ((torch.float32, 2e-7), (torch.bfloat16, 1e-2)):
            made = linear._Native.make(linear._Request(torch.ones(1, 1), None, activation, dtype))
            if made is None:
                pytest.skip("no compiled kernels")
            expected = linear.ACTIVATIONS[activation](x.double())
            assert float(((made(x.to(dtype)).double() - expected) / (expected.abs() + 1)).abs().max()) <= bound


@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}, {"int8": True}])
@pytest.mark.parametrize("way", [linear._OneDnn, linear._Native, linear._Int8Native, linear._Int8Torch])
def test_compiled_layers(way: type[linear.Prepared], options: dict[str, object]) -> None:
    weight, bias = layer(24, 16)
    made = way.make(linear._Request(weight, bias, "gelu", torch.float32))  # type: ignore[attr-defined]
    if made is None:
        pytest.skip(f"{way.__name__} is not to be had here")
    torch.compiler.reset()
    x = torch.randn(5, 16)
    with torch.no_grad():
        compiled = torch.compile(lambda x: made(x * 1.5, residual=x[:, :1].expand(-1, 24)), fullgraph=True)
        assert largest(compiled(x), made(x * 1.5, residual=x[:, :1].expand(-1, 24))) <= 2e-6


# ---------------------------------------------------------------- choosing a way


def slow() -> None:
    sum(range(20000))


def quick() -> None:
    pass


def test_the_fastest_way_is_measured_once_and_remembered(cache: Path) -> None:
    assert measured.fastest("a case", {"slow": slow, "quick": quick}) == "quick"
    (key,) = json.loads(cache.read_text())
    assert key.startswith("a case | quick slow | ")
    assert measured.fastest("a case", {"slow": quick, "quick": slow}) == "quick"  # from memory
    measured._remembered.cache_clear()
    assert measured.fastest("a case", {"slow": quick, "quick": slow}) == "quick"  # from the file


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"a": 1}', "\x00\xff"])
def test_a_damaged_file_is_passed_over_and_replaced(cache: Path, content: str) -> None:
    cache.parent.mkdir()
    cache.write_text(content, "latin-1")
    assert measured.fastest("a case", {"slow": slow, "quick": quick}) == "quick"
    assert list(json.loads(cache.read_text()).values()) == ["quick"]


def test_an_answer_that_is_no_way_is_measured_again(cache: Path) -> None:
    assert measured.fastest("a case", {"slow": slow, "quick": quick}) == "quick"
    cache.write_text(cache.read_text().replace('"quick"', '"unheard of"'))
    measured._remembered.cache_clear()
    assert measured.fastest("a case", {"slow": slow, "quick": quick}) == "quick"


def test_a_folder_that_cannot_be_written_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert measured.fastest("a case", {"slow": slow, "quick": quick}) == "quick"


def test_a_way_must_be_clearly_faster_to_be_preferred(cache: Path) -> None:
    assert measured.fastest("a case", {"first": slow, "second": slow}) in {"first", "second"}
    assert measured.fastest("another", {"first": quick, "second": slow}) == "first"


def test_prepare_remembers_by_class_of_shape(cache: Path) -> None:
    weight, bias = layer(40, 24)
    how = prepare(weight, bias).how
    assert how in {"linear", "onednn", f"native {KERNELS.isas[0]}" if KERNELS else "linear"}
    if KERNELS or torch.backends.mkldnn.is_available():
        assert any(key.startswith("linear 2^5 to 2^6 None float32") for key in json.loads(cache.read_text()))


def test_a_way_that_computes_wrongly_is_never_chosen(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, bias = layer(40, 24)
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(linear, "multiply_onednn", lambda x, *_: torch.zeros(x.shape[0], 40))
    assert prepare(weight, bias).how == "linear"


def test_a_torch_without_the_private_operators_is_no_error(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object) -> Tensor:
        raise AttributeError("no operator of that name")

    weight, bias = layer(40, 24)
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(linear, "multiply_onednn", gone)
    assert prepare(weight, bias).how == "linear"
    assert prepare(weight, bias, int8=True).how == "int8 torch"


def test_int8_keeps_the_direction_of_strong_outputs() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = layer(384, 1536)
    x = torch.randn(64, 1536, generator=generator) * (1 + 3 * torch.rand(1536, generator=generator))
    got = prepare(weight, bias, int8=True)(x)
    expected = functional.linear(x, weight, bias)
    assert functional.cosine_similarity(got, expected).min() >= 0.9995


def test_copies_of_prepared_layers_are_plain_data() -> None:
    weight, bias = layer(8, 8)
    made = linear._Linear.make(linear._Request(weight, bias, None, torch.float32))
    assert [field.name for field in dataclasses.fields(made)][:2] == ["how", "outputs"]
    assert made.weight.data_ptr() == weight.data_ptr()  # no second copy where none is needed


# ---------------------------------------------------------------- building


@pytest.fixture
def build_hook(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """hatch_build.py with a stand-in for hatchling, which is there only while something is built."""
    interface = types.ModuleType("hatchling.builders.hooks.plugin.interface")
    interface.BuildHookInterface = object  # type: ignore[attr-defined]
    for name in ("hatchling", "hatchling.builders", "hatchling.builders.hooks", "hatchling.builders.hooks.plugin"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    spec = importlib.util.spec_from_file_location("hatch_build", Path(__file__).parents[1] / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Told:
    """What a hook says to the person who installs."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def display_warning(self, text: str) -> None:
        self.warnings.append(text)


def install(hook: types.ModuleType, root: Path, version: str = "standard") -> tuple[dict[str, object], list[str]]:
    made = hook.NativeBuildHook()
    made.target_name, made.root, made.app = "wheel", str(root), Told()
    build_data: dict[str, object] = {"force_include": {}}
    made.initialize(version, build_data)
    return build_data, made.app.warnings


@pytest.mark.parametrize("compiler", ["", "/bin/false", "no-such-compiler"])
def test_no_compiler_never_fails_an_installation(
    build_hook: types.ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compiler: str
) -> None:
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("PATH", str(tmp_path))
    old = tmp_path / build_hook.SOURCES / build_hook.LIBRARY
    old.parent.mkdir(parents=True)
    old.write_text("of other sources")
    build_data, warnings = install(build_hook, tmp_path)
    assert build_data == {"force_include": {}}
    assert len(warnings) == 1
    assert warnings[0].startswith("Rewire without its compiled kernels: ")
    assert not old.exists()
    monkeypatch.setenv("REWIRE_NATIVE", "1")
    with pytest.raises(SystemExit, match="could not be built"):
        install(build_hook, tmp_path)


@pytest.mark.sweep
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_the_library_is_built_and_works(build_hook: types.ModuleType, tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    shutil.copytree(root / build_hook.SOURCES, tmp_path / build_hook.SOURCES)
    build_data, warnings = install(build_hook, tmp_path)
    assert not warnings
    assert str(build_data["tag"]).startswith("py3-none-")
    found, reason = native._outcome(tmp_path / build_hook.SOURCES / build_hook.LIBRARY)
    assert found is not None, reason
    assert found.isas[-1] == "portable"
