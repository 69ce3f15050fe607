"""Models left as they were, weights, sensitivity, strong weights, diverging modules."""

from __future__ import annotations

import copy
import hashlib
import random
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from rewire.errors import ProofError
from rewire.proof import Case, cases_for, prove
from rewire.proof.checks import gradient_cases, weight_checks
from rewire.proof.divergence import SAMPLE, compare_recordings, recorded
from rewire.proof.execution import forward
from rewire.proof.gradients import compare_gradients
from rewire.proof.guard import replaced, untouched
from rewire.proof.pair import Pair, compare_case
from rewire.proof.strength import insensitive, measure_reactions
from rewire.proof.strong import strong_pair
from rewire.proof.tolerances import Tolerances
from rewire.proof.weights import check_forward, check_round_trip, same_bits, state_of, touched
from rewire.tensor_rules import Drop, Rename, SplitRows, Step
from test_proof_models import MODELS, build, sam_config

# ---------------------------------------------------------------- left as they were


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that a proof might disturb."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {
        "bytes": {name: hash_of(tensor) for name, tensor in state_of(model).items()},
        "storages": {name: one.data_ptr() for name, one in parameters.items()},
        "objects": {name: id(one) for name, one in parameters.items()},
        "flags": {name: one.requires_grad for name, one in parameters.items()},
        "gradients": {
            name: None if one.grad is None else (id(one.grad), hash_of(one.grad)) for name, one in parameters.items()
        },
        "training": {path: module.training for path, module in model.named_modules()},
        "hooks": {path: dict(module._forward_hooks) for path, module in model.named_modules()},
        "attributes": {path: sorted(vars(module)) for path, module in model.named_modules()},
        "config": model.config.to_dict() if hasattr(model, "config") else None,
    }


def hash_of(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def disturbed(model: nn.Module) -> nn.Module:
    """In training mode, partly frozen, with a gradient."""
    model.train()
    parameters = list(model.parameters())
    for parameter in parameters[::2]:
        parameter.requires_grad_(False)
    parameters[1].grad = torch.ones_like(parameters[1])
    return model


def random_states() -> tuple[Any, Any, Any]:
    return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())


@pytest.mark.parametrize("name", ["bert", "llama", "sam", "wav2vec2", "vit-mae"])
def test_models_and_random_numbers_are_left_as_they_were(name: str) -> None:
    before, after = disturbed(build(name)), disturbed(build(name))
    with torch.no_grad():
        next(after.parameters()).add_(0.01)  # so that float64 and everything else is needed
    states = fingerprint(before), fingerprint(after)
    numbers = random_states()
    prove(before, after)
    assert (fingerprint(before), fingerprint(after)) == states
    assert random_states() == numbers


def test_models_are_left_as_they_were_with_strong_weights() -> None:
    before, after = disturbed(build("sam")), disturbed(build("sam"))
    states = fingerprint(before), fingerprint(after)
    proof = prove(before, after)
    assert any(check.name.startswith("strong weights") for check in proof.checks)
    assert (fingerprint(before), fingerprint(after)) == states


def test_models_are_left_as_they_were_after_an_exception() -> None:
    before, after = disturbed(build("bert")), disturbed(build("bert"))
    states = fingerprint(before), fingerprint(after)

    def stop(text: str, done: int, total: int) -> None:
        if text == "sensitivity":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prove(before, after, progress=stop)
    assert (fingerprint(before), fingerprint(after)) == states


def test_attributes_set_inside_disappear() -> None:
    layer = nn.Linear(2, 2)
    with untouched(layer):
        layer.cached = 3  # type: ignore[assignment]
        layer.register_forward_hook(lambda *_: None)
        layer.in_features = 5
    assert not hasattr(layer, "cached")
    assert not layer._forward_hooks
    assert layer.in_features == 2


def test_replaced_values_return_bit_for_bit() -> None:
    parameter = nn.Parameter(torch.tensor([-0.0, float("nan"), 1.0]))
    before, address = hash_of(parameter), parameter.data_ptr()
    with replaced({"p": (parameter, torch.ones(3))}):
        assert parameter.sum() == 3
    assert (hash_of(parameter), parameter.data_ptr()) == (before, address)


# ---------------------------------------------------------------- arguments


def test_one_object_twice_is_an_error() -> None:
    model = build("bert")
    with pytest.raises(ProofError, match="same object"):
        prove(model, model)


def test_inputs_that_do_not_fit_are_an_error_that_says_what_was_tried() -> None:
    before = build("bert")
    with pytest.raises(ProofError, match=r"no input runs on the untouched BertModel(.|\n)*input 0: ValueError"):
        prove(before, copy.deepcopy(before), inputs={"nonsense": torch.ones(1)})


def test_inputs_of_the_caller_are_used_and_unfit_ones_named() -> None:
    before = build("bert")
    good = {"input_ids": torch.ones(2, 5, dtype=torch.long)}
    bad = {"input_ids": torch.full((1, 2), 10**6)}
    proof = prove(before, copy.deepcopy(before), inputs=[good, bad])
    assert proof.passed
    assert proof.cases == ("input 0",)
    assert proof.skipped[0].startswith("input 1: IndexError")


def test_progress_is_told() -> None:
    told: list[tuple[str, int, int]] = []
    before = build("bert")
    prove(before, copy.deepcopy(before), progress=lambda *news: told.append(news))
    assert [done for _, done, _ in told] == list(range(len(told)))
    assert told[0][0] == "weights"
    assert all(done < total for _, done, total in told)
    assert any("right padding" in text for text, _, _ in told)


def test_models_without_rules_compare_by_name_and_report_what_is_missing() -> None:
    before = build("bert")
    after = copy.deepcopy(before)
    after.get_submodule("pooler").extra = nn.Linear(2, 2)  # type: ignore[assignment]
    del before.pooler.dense.bias  # type: ignore[union-attr]
    before.pooler.dense.bias = None  # type: ignore[union-attr]
    with torch.no_grad():
        after.pooler.dense.bias.zero_()  # type: ignore[union-attr]
    proof = prove(before, after)
    weights = next(check for check in proof.checks if check.name == "weights")
    assert weights.passed
    assert "3 additional: pooler.dense.bias" in weights.detail


# ---------------------------------------------------------------- weights


class One(nn.Module):
    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(3, 3))

    def forward(self) -> Tensor:
        return torch.zeros(1)


def test_bits_not_values_are_compared() -> None:
    nan = torch.tensor([float("nan")])
    assert same_bits(nan, nan.clone())
    assert not same_bits(torch.zeros(1), torch.zeros(1, dtype=torch.float64))
    assert not same_bits(torch.zeros(1), torch.zeros(1, 1))
    assert same_bits(torch.zeros(0), torch.zeros(0))
    assert same_bits(torch.tensor(1.5), torch.tensor(1.5))


def test_both_directions_name_what_differs() -> None:
    before, after = One("a"), One("b")
    rules: tuple[Step, ...] = (Rename("a.weight", "b.weight"), Rename("a.bias", "b.bias"))
    with torch.no_grad():
        after.b.bias.copy_(before.a.bias)  # type: ignore[union-attr,operator,arg-type]
    there, back = check_forward(before, after, rules), check_round_trip(before, after, rules)
    assert (there.differing, back.differing) == (("b.weight",), ("a.weight",))
    assert there.compared == 2
    assert not there.is_exact


def test_missing_and_additional_tensors_are_named() -> None:
    report = check_forward(One("a", "b"), One("a", "c"), ())
    assert report.missing == ("b.weight", "b.bias")
    assert report.extra == ("c.weight", "c.bias")


def test_what_the_rules_put_aside_comes_back_from_the_untouched_model() -> None:
    before = One("a", "b")
    after = copy.deepcopy(before)
    after.b = None  # type: ignore[assignment]
    rules = (Drop("b.weight"), Drop("b.bias"))
    assert check_forward(before, after, rules).is_exact
    assert check_round_trip(before, after, rules).is_exact


def test_rules_given_by_the_caller_demand_every_tensor() -> None:
    before, after = One("a", "b"), One("a")
    pair = Pair(before, after, (), Tolerances("exact", torch.float32))
    with torch.no_grad():
        after.load_state_dict({name: value for name, value in before.state_dict().items() if name[0] == "a"})
    assert weight_checks(pair, by_name=True, round_trip=True)[0].passed
    assert not weight_checks(pair, by_name=False, round_trip=True)[0].passed


def test_the_last_names_are_the_touched_ones() -> None:
    rules = (SplitRows("w", ("a", "b"), (1, 1)), Rename("a", "c"))
    assert touched(rules) == ("b", "c")


# ---------------------------------------------------------------- sensitivity


def kinds(name: str, part: str) -> dict[str, Any]:
    model = build(name)
    names = [one for one, _ in model.named_parameters() if part in one]
    reactions = measure_reactions(model, names, cases_for(model)[0], enough=1e-4)
    return {one.kind: one for one in reactions}


def test_outputs_react_to_weights_that_matter() -> None:
    found = kinds("bert", "value.weight")
    assert len(found["value.weight"].names) == 2
    assert found["value.weight"].movement > 1e-4


def test_zero_biases_show_nothing_and_key_biases_never_do() -> None:
    found = kinds("bert", "attention.self")
    assert found["value.bias"].movement == 0
    assert not found["value.bias"].is_idle
    assert found["key.bias"].is_idle
    weak = [one.kind for one in insensitive(tuple(found.values()), 1e-4)]
    assert "value.bias" in weak
    assert "key.bias" not in weak


def test_sam_as_initialised_shows_nothing() -> None:
    config = sam_config()
    config.vision_config.initializer_range = 1e-10
    model = build(lambda: tf.SamModel(config))
    names = [one for one, _ in model.named_parameters() if "qkv.weight" in one]
    (found,) = measure_reactions(model, names, cases_for(model)[0], enough=1e-4)
    assert found.movement < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_strong_weights_make_every_type_react(name: str) -> None:
    """Every tensor with two dimensions or more that has any influence on these inputs has a visible one."""
    model = build(name)
    with untouched(model):
        case = next(case for case in cases_for(model) if not case.is_padded)
        pair = Pair(model, copy.deepcopy(model), (), Tolerances("exact", torch.float32))
        strong = strong_pair(pair, case)
        assert compare_case(strong, case).largest == 0
        names = [
            one for one, tensor in model.named_parameters() if "attn" in one or "attention" in one if tensor.ndim > 1
        ]
        reactions = measure_reactions(strong.after, names, case, enough=1e-4)
    silent = {one.kind for one in insensitive(reactions, 1e-4)} - NOT_REACHED.get(name, set())
    assert not silent


NOT_REACHED: dict[str, set[str]] = {
    "longformer": {"query_global.weight", "key_global.weight", "value_global.weight"},  # no global tokens
}
"""Tensors of attentions that the forward of a type does not use."""


def test_strong_attention_is_far_from_uniform() -> None:
    model = build("bert")
    case = cases_for(model)[0]
    pair = Pair(model, copy.deepcopy(model), (), Tolerances("exact", torch.float32))
    strong = strong_pair(pair, case)
    for module in strong.before.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = "eager"  # type: ignore[union-attr]
    attention = strong.before(**case.kwargs, output_attentions=True).attentions[0]
    assert attention.max(-1).values.mean() > 3 / 33


def test_strong_weights_leave_the_models_alone_and_keep_ties() -> None:
    model = build("gpt2")
    before = fingerprint(model)["bytes"]
    pair = Pair(model, copy.deepcopy(model), (), Tolerances("exact", torch.float32))
    strong = strong_pair(pair, cases_for(model)[0]).after
    assert strong.lm_head.weight is strong.transformer.wte.weight  # type: ignore[union-attr]
    assert fingerprint(model)["bytes"] == before


def test_strong_weights_need_rules_that_reach_every_tensor() -> None:
    pair = Pair(One("a"), One("b"), (), Tolerances("exact", torch.float32))
    with pytest.raises(ProofError, match=r"a\.weight.*pass rules="):
        strong_pair(pair, Case("any", {}))


# ---------------------------------------------------------------- diverging modules


def test_modules_are_recorded_in_the_order_they_finish() -> None:
    model = build("bert")
    with untouched(model), recorded(model) as seen:
        forward(model, cases_for(model)[0])
    paths = list(seen.calls)
    assert paths[-1] == ""
    assert paths.index("encoder.layer.0.attention.self.query") < paths.index("encoder.layer.0.attention")
    assert paths.index("encoder.layer.0") < paths.index("encoder.layer.1.attention.self.query")
    assert not any(module._forward_hooks for module in model.modules())


def test_modules_called_several_times_are_compared_call_by_call() -> None:
    model = build("albert")
    case = cases_for(model)[0]
    with recorded(model) as seen:
        forward(model, case)
    shared = [path for path, calls in seen.calls.items() if len(calls) == 2]
    assert any("albert_layers" in path for path in shared)
    found = compare_recordings(seen, seen)
    assert set(found) == set(seen.calls)
    assert set(found.values()) == {0.0}


def test_outputs_written_over_later_do_not_hide_a_difference() -> None:
    class InPlace(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.first = nn.Linear(2, 2)
            self.factor = factor
            self.scale = Times(factor)

        def forward(self, x: Tensor) -> Tensor:
            return self.scale(self.first(x)).mul_(0).add_(self.factor)  # type: ignore[no-any-return]

    class Times(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor

        def forward(self, x: Tensor) -> Tensor:
            return x * self.factor

    before, after = InPlace(1.0), InPlace(2.0)
    after.load_state_dict(before.state_dict())
    proof = prove(before, after, inputs={"x": torch.ones(1, 2)})
    assert proof.first_divergence is not None
    assert proof.first_divergence.path == "scale"


def test_large_outputs_are_sampled() -> None:
    layer = nn.Identity()
    with recorded(layer) as seen:
        layer(torch.arange(3.0 * SAMPLE))
    (call,) = seen.calls[""]
    assert call["output"].values.numel() <= SAMPLE
    assert call["output"].scale == 3 * SAMPLE - 1


def test_module_differences_are_reported_for_all_inputs() -> None:
    before = build("bert")
    after = copy.deepcopy(before)
    with torch.no_grad():
        after.get_submodule("encoder.layer.1.output.dense").bias[0] += 1.0  # type: ignore[operator,union-attr]
    proof = prove(before, after, gradients=False)
    differences = {one.path: one.difference for one in proof.module_differences}
    assert differences["encoder.layer.0"] == 0
    assert differences["encoder.layer.1.output.dense"] > 0.1
    assert [one.order for one in proof.module_differences] == list(range(len(differences)))
    assert proof.first_divergence is not None
    assert proof.first_divergence.path == "encoder.layer.1.output.dense"


# ---------------------------------------------------------------- gradients


def pair_of(name: str) -> Pair:
    before = build(name)
    return Pair(before, copy.deepcopy(before), (), Tolerances("exact", torch.float32))


def test_parameters_without_gradient_are_counted() -> None:
    pair = pair_of("bert-mlm")
    for model in (pair.before, pair.after):
        model.idle = nn.Linear(2, 2)  # type: ignore[assignment]
    report = compare_gradients(pair, cases_for(pair.before)[0])
    assert report.unused == 2
    assert report.largest == 0


def test_gradients_are_compared_with_and_without_padding_but_not_with_left() -> None:
    pair = pair_of("bert")
    first, second = gradient_cases(pair, cases_for(pair.before))
    assert not first.is_padded
    assert second.is_padded
    assert second.mask is not None
    assert second.mask[:, 0].all()


def test_half_precision_gradients_run() -> None:
    before = build("bert").to(torch.bfloat16)
    proof = prove(before, copy.deepcopy(before))
    assert proof.passed, proof.summary()


def test_a_replaced_forward_cannot_be_copied_and_the_proof_says_so() -> None:
    before = build("bert")
    after = copy.deepcopy(before)
    layer = after.get_submodule("encoder.layer.0.output.dense")
    inner = layer.forward

    def patched(hidden: Tensor) -> Tensor:
        result: Tensor = inner(hidden)
        return result

    layer.forward = patched  # type: ignore[method-assign]
    rules = [
        Rename(name, name) for name in ("encoder.layer.0.output.dense.weight", "encoder.layer.0.output.dense.bias")
    ]
    proof = prove(before, after, rules=rules)
    assert not proof.passed
    assert [check.name for check in proof.failures] == ["sensitivity"]
    assert "encoder.layer.0.output.dense was replaced by a function" in proof.failures[0].detail


def test_models_that_cannot_be_copied_are_compared_as_they_are() -> None:
    class Locked(nn.Linear):
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("no copies")

    before, after = (nn.Sequential(Locked(4, 4)) for _ in range(2))
    after.load_state_dict(before.state_dict())
    assert prove(before, after, inputs={"input": torch.randn(2, 4)}).passed
    before, after = before.to(torch.bfloat16), after.to(torch.bfloat16)
    proof = prove(before, after, inputs={"input": torch.randn(2, 4)})
    assert "no copies" in next(check.detail for check in proof.checks if check.name == "float32")
