"""The state of an optimizer follows its parameters: the next step is that of the unedited run."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import rewire
from cli_runner import rewire as command
from rewire import hf_seam
from rewire.adapters import carry_optimizer
from rewire.errors import CheckpointError, OutputError, RefusedError
from rewire.plan import Edit, Join, Plan, Rename, Split, Unstack
from rewire.tensor_rules import Rule, run, visible
from tiny import ids, tiny

JOIN = Join("**.self_attn", parts=("q_proj", "k_proj", "v_proj"))
SPLIT = Split("@attention", into=("q", "k", "v"))


class Sentences(Dataset[dict[str, Tensor]]):
    """Other token sequences every time."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = ids(1, 8, seed=index + 1)[0]
        return {"input_ids": row, "labels": row}


def trainer(model: nn.Module, folder: Path, steps: int, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        save_steps=3,
        learning_rate=1e-2,
        weight_decay=0.1,
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
        **{"lr_scheduler_type": "constant", **options},
    )
    return Trainer(model=model, args=arguments, train_dataset=Sentences())


def checkpoint(model: nn.Module, folder: Path, **options: Any) -> Path:
    """A run of three steps, stopped; `model` is left as it was."""
    trainer(copy.deepcopy(model), folder, 3, **options).train()
    return folder / "checkpoint-3"


def after_rule(rule: Rule, model: nn.Module) -> dict[str, Tensor]:
    return visible(run(rule, dict(model.state_dict()), torch))


CASES: dict[str, tuple[str, Edit, dict[str, Any]]] = {
    # Gradients of the keys' bias are zero but for rounding (a softmax does not see it), and Adam divides by their size:
    # with its own epsilon it would turn that noise into whole steps.
    "split, AdamW": ("gpt2", SPLIT, {"adam_epsilon": 1e-4}),
    "rows per head, AdamW with a schedule": (
        "gpt_neox", SPLIT, {"adam_epsilon": 1e-4, "lr_scheduler_type": "linear", "warmup_steps": 2},
    ),
    "join, AdamW": ("llama", JOIN, {}),
    "join, SGD without momentum": ("llama", JOIN, {"optim": "sgd"}),
    "join, SGD with momentum": ("llama", JOIN, {"optim": "sgd", "optim_args": "momentum=0.9"}),
    "join, RMSprop": ("llama", JOIN, {"optim": "rmsprop"}),
    "rename, Adafactor": ("llama", Rename("**.o_proj", to="out"), {"optim": "adafactor"}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_trainer_goes_on_with_the_edited_model(name: str, tmp_path: Path) -> None:
    model_type, edit, options = CASES[name]
    base, plan = tiny(model_type, head=True), Plan([edit])
    stopped = checkpoint(base, tmp_path / "run", **options)
    report = carry_optimizer(stopped, tmp_path / "carried", plan)
    assert report.exact

    unedited, model = copy.deepcopy(base), copy.deepcopy(base)
    trainer(unedited, tmp_path / "x", 4, **options).train(resume_from_checkpoint=str(stopped))
    rule = rewire.apply_(model, plan).rules
    untrained = snapshot_of(model)
    trainer(model, tmp_path / "y", 4, **options).train(resume_from_checkpoint=str(tmp_path / "carried"))
    expected, found = after_rule(rule, unedited), model.state_dict()
    assert set(found) == set(expected)
    for key, tensor in expected.items():
        # float32: gradients of the parts are summed in another order than those of the whole.
        torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-6)
    assert any(not torch.allclose(found[key], tensor, atol=1e-3) for key, tensor in untrained.items())


def snapshot_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def step(model: nn.Module, state: dict[str, Any], gradients: dict[str, Tensor]) -> None:
    """One step as `Trainer` would make it, with the given gradients."""
    decayed = hf_seam.decayed_parameters(model)
    named = list(model.named_parameters())
    groups = [[p for n, p in named if n in decayed], [p for n, p in named if n not in decayed]]
    optimizer = torch.optim.AdamW([{"params": group} for group in groups])
    optimizer.load_state_dict(state)
    for name, parameter in named:
        parameter.grad = gradients[name].clone(memory_format=torch.contiguous_format)
    optimizer.step()


@pytest.mark.parametrize(("model_type", "edit"), [("gpt2", SPLIT), ("llama", JOIN), ("mixtral", Unstack("@experts"))])
def test_the_next_step_is_the_same_bits(model_type: str, edit: Edit, tmp_path: Path) -> None:
    """With the same gradients; those that a run computes differ by rounding."""
    base, plan = tiny(model_type, head=True), Plan([edit])
    stopped = checkpoint(base, tmp_path / "run")
    carry_optimizer(stopped, tmp_path / "carried", plan)
    generator = torch.Generator().manual_seed(0)
    gradients = {name: torch.randn(p.shape, generator=generator) for name, p in base.named_parameters()}
    model = copy.deepcopy(base)
    rule = rewire.apply_(model, plan).rules
    step(base, state_of(stopped), gradients)
    step(model, state_of(tmp_path / "carried"), visible(run(rule, gradients, torch)))
    expected = after_rule(rule, base)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def state_of(path: Path) -> dict[str, Any]:
    file = path / "optimizer.pt" if path.is_dir() else path
    found: dict[str, Any] = torch.load(file, weights_only=True)
    return found


def equal(first: Any, second: Any) -> bool:
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    return torch.equal(first, second) if isinstance(first, Tensor) else bool(first == second)


def test_the_way_back_and_the_other_files(tmp_path: Path) -> None:
    base, plan = tiny("gpt2", head=True), Plan([SPLIT])
    stopped = checkpoint(base, tmp_path / "run")
    carried = carry_optimizer(stopped, tmp_path / "carried", plan)
    back = carry_optimizer(tmp_path / "carried", tmp_path / "back", plan, revert=True)
    assert equal(state_of(stopped), state_of(tmp_path / "back"))
    assert (carried.before, carried.after) == (back.after, back.before)
    assert len(carried.after) == len(carried.before) + 2 * 2 * 2
    for file in stopped.iterdir():
        if file.name != "optimizer.pt":
            assert (tmp_path / "carried" / file.name).read_bytes() == file.read_bytes()


def test_a_file_alone(tmp_path: Path) -> None:
    base, plan = tiny("llama", head=True), Plan([JOIN])
    stopped = checkpoint(base, tmp_path / "run")
    carry_optimizer(stopped / "optimizer.pt", tmp_path / "new" / "o.pt", plan, base)
    carry_optimizer(stopped, tmp_path / "carried", plan)
    assert equal(state_of(tmp_path / "new" / "o.pt"), state_of(tmp_path / "carried"))
    with pytest.raises(OutputError, match="exists"):
        carry_optimizer(stopped / "optimizer.pt", tmp_path / "new" / "o.pt", plan, base)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["o.pt"]


def test_parameters_that_were_not_trained(tmp_path: Path) -> None:
    base, plan = tiny("llama", head=True), Plan([JOIN])
    for name, parameter in base.named_parameters():
        parameter.requires_grad_("embed" not in name)
    stopped = checkpoint(base, tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"groups of 15 and 5 parameters, but Trainer makes groups of 16 and 5"):
        carry_optimizer(stopped, tmp_path / "a", plan)
    carry_optimizer(stopped, tmp_path / "a", plan, frozen=["*embed*"])
    carry_optimizer(stopped, tmp_path / "b", plan, base)
    assert equal(state_of(tmp_path / "a"), state_of(tmp_path / "b"))


def test_parts_of_which_some_were_not_trained(tmp_path: Path) -> None:
    base = tiny("llama", head=True)
    for name, parameter in base.named_parameters():
        parameter.requires_grad_("k_proj" not in name)
    stopped = checkpoint(base, tmp_path / "run")
    with pytest.raises(RefusedError, match=r"optimizer state.*nothing of model\.layers\.0\.self_attn\.k_proj\.weight"):
        carry_optimizer(stopped, tmp_path / "a", Plan([JOIN]), frozen=["**.k_proj.weight"])
    assert not (tmp_path / "a").exists()


def saved(state: dict[str, Any], folder: Path) -> Path:
    folder.mkdir()
    torch.save(state, folder / "optimizer.pt")
    return folder


def test_steps_that_depend_on_a_whole_parameter(tmp_path: Path) -> None:
    base = tiny("gpt2", head=True)
    stopped = checkpoint(base, tmp_path / "run", optim="adafactor")
    with pytest.raises(RefusedError, match=r"c_attn.*Adafactor scales every step by the size of the whole parameter"):
        carry_optimizer(stopped, tmp_path / "a", Plan([SPLIT]), base)


def changed(state: dict[str, Any], number: int, **entries: Any) -> dict[str, Any]:
    return {**state, "state": {**state["state"], number: {**state["state"][number], **entries}}}


def number_of(model: nn.Module, name: str) -> int:
    decayed = hf_seam.decayed_parameters(model)
    return [n for n, _ in model.named_parameters() if n in decayed].index(name)


def test_states_that_cannot_be_carried(tmp_path: Path) -> None:
    base = tiny("llama", head=True)
    state = state_of(checkpoint(base, tmp_path / "run"))
    q = number_of(base, "model.layers.0.self_attn.q_proj.weight")
    shape = state["state"][q]["exp_avg"].shape
    cases: Iterable[tuple[dict[str, Any], type[Exception], str]] = (
        (changed(state, q, state1=torch.zeros(7)), RefusedError, r"state1 of model\.layers\.0\.self_attn\.q_proj"),
        (changed(state, q, step=torch.tensor(9.0)), RefusedError, "with different step: 9, 3, 3"),
        (changed(state, q, exp_avg=torch.zeros(3)), CheckpointError, rf"exp_avg of parameter {q} has shape \[3\]"),
        ({"other": 1}, CheckpointError, "no state of an optimizer"),
    )
    assert tuple(shape) == (32, 32)
    for index, (broken, error, message) in enumerate(cases):
        with pytest.raises(error, match=message):
            carry_optimizer(saved(broken, tmp_path / str(index)), tmp_path / "out", Plan([JOIN]), base)
        assert not (tmp_path / "out").exists()


class Trap:
    """Code that a pickle would run."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (print, ("run",))


def test_no_code_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved({"state": Trap(), "param_groups": []}, tmp_path / "a")
    with pytest.raises(CheckpointError, match="without running code"):
        carry_optimizer(folder, tmp_path / "b", Plan([JOIN]), tiny("llama"))
    assert "run" not in capsys.readouterr().out


def test_checkpoints_of_other_kinds(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"has no optimizer\.pt; states in shards"):
        carry_optimizer(tmp_path / "empty", tmp_path / "b", Plan([JOIN]), tiny("llama"))
    folder = saved({"state": {}, "param_groups": []}, tmp_path / "lora")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(RefusedError, match="of a run that trains an adapter"):
        carry_optimizer(folder, tmp_path / "b", Plan([JOIN]), tiny("llama"))


def test_names_in_the_state_are_followed(tmp_path: Path) -> None:
    """Optimizers given named parameters write the names down; then these count, not the order."""
    base = tiny("llama", head=True)
    optimizer = torch.optim.AdamW(reversed(list(base.named_parameters())))
    for parameter in base.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    carry_optimizer(saved(optimizer.state_dict(), tmp_path / "a"), tmp_path / "b", Plan([JOIN]), base)
    model = copy.deepcopy(base)
    rewire.apply_(model, JOIN)
    (group,) = state_of(tmp_path / "b")["param_groups"]
    assert group["param_names"] == [name for name, _ in model.named_parameters()]
    assert group["params"] == list(range(len(group["param_names"])))


def test_the_command(tmp_path: Path) -> None:
    stopped = checkpoint(tiny("llama", head=True), tmp_path / "run")
    (tmp_path / "plan.yaml").write_text(Plan([JOIN]).to_yaml())
    done = command("adapters", stopped, tmp_path / "b", "--optimizer", "--plan", tmp_path / "plan.yaml", "--json")
    assert (done.code, done.err) == (0, "")
    assert done.json["what"] == "optimizer"
    assert (tmp_path / "b" / "optimizer.pt").is_file()
    again = command("adapters", stopped, tmp_path / "c", "--optimizer")
    assert (again.code, (tmp_path / "c").exists()) == (2, False)
