"""Benchmarks: suites on small models, statistics, memory, and what happens when something is wrong."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cli_runner import BERT, GPT2, JOIN, save_model, write_plan
from cli_runner import config as config_words
from cli_runner import rewire as run
from rewire.cli.models import Source
from rewire.errors import MeasureError
from rewire.measure.bench import Bench, Settings, find_suites, run_bench, suite_names
from rewire.measure.bench.machine import instruction_sets, machine_facts, revision
from rewire.measure.bench.memory import Peaks, _Polled
from rewire.measure.bench.records import AFTER, BEFORE, Figure, Measurement
from rewire.measure.bench.sampler import Sampler
from rewire.measure.bench.statistics import paired_ratio, unpaired_ratio
from rewire.measure.bench.suites import Suite
from rewire.measure.bench.suites import base as suites_base
from rewire.measure.bench.suites.inputs import lengths_for
from rewire.measure.bench.timing import Clock, interleave
from rewire.plan import Cast, Join, Plan, Split
from rewire.proof.compare import flatten

QUICK = Settings(tokens=6, prompt=7, repeats=3, seconds=0.0, warm_ups=1, backend="eager", batch=(1, 2))
SMALL_GPT2 = {**GPT2, "bos_token_id": 0, "eos_token_id": 0}
SPLIT_HEADED = Split("transformer.h.*.attn.c_attn", into=("q", "k", "v"))


def bench(model_type: str, values: dict[str, Any], *edits: Any, task: str | None = None, **how: Any) -> Bench:
    source = Source(f"config:{model_type}", values, task=task)
    openers: dict[str, Callable[[], nn.Module]] = {"before": lambda: source.open(Plan([]))}
    if edits:
        openers["after"] = lambda: source.open(Plan(edits))
    return Bench(openers, Settings(**{**vars(QUICK), **how}))


class Notes:
    """A recorder that keeps all records, as JSON would."""

    def __init__(self) -> None:
        self.records: list[Any] = []

    def measured(self, measurement: Any) -> None:
        self.records.append(json.loads(json.dumps(measurement, allow_nan=False)))


def names(found: Sequence[Measurement]) -> list[str]:
    return [one.case for one in found]


# ---------------------------------------------------------------- suites


def test_all_suites_of_a_decoder() -> None:
    notes = Notes()
    found = run_bench(
        bench("gpt2", SMALL_GPT2, SPLIT_HEADED, task="CAUSAL_LM", batch=(2,)),
        find_suites(["all"]),
        is_all=True,
        recorder=notes,
    )
    assert found.failures == []
    assert names(found.measurements) == [
        *("load", "first forward", "second forward"),
        *("first token", "token", "generate, dynamic cache", "generate, static cache"),
        *("compile (and its first token)", "token, compiled"),
        *("forward", "backward", "optimizer", "step"),
    ]
    for one in found.measurements:
        assert set(one.sides) == {BEFORE, AFTER}
        for figure in one.sides.values():
            assert len(figure.samples) == (1 if one.case.startswith("compile") else 3)
            assert all(sample > 0 for sample in figure.samples)
    checked = [(one["suite"], one["what"], one["promise"]) for one in notes.records if one["kind"] == "checked"]
    assert checked == [
        ("load", "outputs", "exact"),
        ("decode", "outputs", "exact"),
        ("decode", "tokens", "exact"),
        ("train", "outputs", "exact"),
    ]
    assert [(one["suite"], one["case"]) for one in notes.records if one["kind"] == "omitted"] == [("encode", "")]
    timed = [Measurement.from_dict(one) for one in notes.records if one["kind"] == "timed"]
    assert timed == found.measurements  # records come as things are measured, and lose nothing
    by_case = {one.case: one for one in timed}
    assert by_case["token"].labels == {"batch": 2, "prompt": 7, "tokens": 6}
    token, whole = by_case["token"], by_case["generate, dynamic cache"]
    assert token.rate(BEFORE) == pytest.approx(2 / token.sides[BEFORE].spread.median)
    assert whole.rate(BEFORE) == pytest.approx(12 / whole.sides[BEFORE].spread.median)


def test_encoders_are_measured_by_batch_and_padding(tmp_path: Path) -> None:
    found = run_bench(
        bench("bert", BERT, Join("encoder.layer.*.attention.self", parts=("query", "key", "value"), name="qkv")),
        find_suites(["encode"]),
    )
    assert [(one.labels["batch"], one.labels["padding"]) for one in found.measurements] == [
        (1, 0.0),
        (2, 0.0),
        (2, 0.5),
    ]
    assert [one.work for one in found.measurements] == [6, 12, 7]  # padding is no work: 6 real tokens, and 1
    assert {one.unit for one in found.measurements} == {"real tokens"}


def test_images_are_counted() -> None:
    values = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    found = run_bench(bench("vit", {**values, "image_size": 32}), find_suites(["encode", "load"]))
    assert [(one.case, one.work, one.unit) for one in found.measurements[:2]] == [
        ("forward", 1, "inputs"),
        ("forward", 2, "inputs"),
    ]
    assert set(found.measurements[0].sides) == {BEFORE}
    assert found.measurements[0].ratio is None
    assert found.failures == []


def test_training_leaves_the_weights_alone() -> None:
    made = bench("bert", BERT)
    before = {name: tensor.clone() for name, tensor in made.model().state_dict().items()}
    assert run_bench(made, find_suites(["train"])).failures == []
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.model().state_dict().items())
    assert not made.model().training


def test_threads_are_as_before_afterwards() -> None:
    threads = torch.get_num_threads()
    seen = []

    def look(bench: Bench) -> str | None:
        seen.append(torch.get_num_threads())
        return "only looking"

    spy = Suite("spy", "", look, lambda bench: (), lambda bench: ())
    run_bench(bench("bert", BERT, threads=threads + 3), [spy])
    assert (seen, torch.get_num_threads()) == ([threads + 3], threads)


# ---------------------------------------------------------------- nothing wrong is timed


def spoiled(
    change: Callable[[nn.Module], None], *, task: str | None = None, values: dict[str, Any] | None = None
) -> Bench:
    """GPT-2 and a split GPT-2 with something changed in it."""
    source = Source("config:gpt2", SMALL_GPT2, task=task)

    def after() -> nn.Module:
        model = source.open(Plan([Split("**.attn.c_attn", into=("q", "k", "v"))]))
        with torch.no_grad():
            change(model)
        return model

    return Bench({"before": lambda: source.open(Plan([])), "after": after}, QUICK)


def shift_query(model: nn.Module) -> None:
    model.get_submodule("transformer.h.1.attn.c_attn.q").weight.mul_(1.5)  # type: ignore[operator]


@pytest.mark.parametrize("name", ["load", "decode", "train"])
def test_models_that_differ_are_not_timed(name: str) -> None:
    notes = Notes()
    found = run_bench(spoiled(shift_query, task="CAUSAL_LM"), find_suites([name]), recorder=notes)
    assert found.measurements == []
    assert len(found.failures) == 1
    assert "the outputs of the two models differ by" in found.failures[0].error
    assert "first in transformer.h.1.attn.c_attn" in found.failures[0].error
    assert [one["kind"] for one in notes.records] == ["failed"]


def break_embedding(model: nn.Module) -> None:
    model.get_submodule("transformer.wte").weight[:] = math.nan  # type: ignore[index]


def test_logits_that_are_not_finite_are_an_error() -> None:
    source = Source("config:gpt2", SMALL_GPT2, task="CAUSAL_LM")

    def broken() -> nn.Module:
        model = source.open(Plan([]))
        with torch.no_grad():
            break_embedding(model)
        return model

    alone = run_bench(Bench({"before": broken}, QUICK), find_suites(["decode"]))
    assert "the logits of the model before the plan are not finite" in alone.failures[0].error
    after = run_bench(Bench({"before": lambda: source.open(Plan([])), "after": broken}, QUICK), find_suites(["decode"]))
    assert "the logits of the model after the plan are not finite" in after.failures[0].error
    assert alone.measurements == after.measurements == []


def test_a_lossy_plan_is_reported_not_judged() -> None:
    notes = Notes()
    cast = Cast("transformer.h.*.mlp.c_fc", dtype="bfloat16")
    made = bench("gpt2", SMALL_GPT2, cast, task="CAUSAL_LM", batch=(1,))
    found = run_bench(made, find_suites(["load"]), recorder=notes)
    if not found.failures:  # not every mixture of types runs
        assert notes.records[0]["promise"] == "lossy"
        assert notes.records[0]["limit"] is None


def test_one_suite_that_fails_does_not_hide_the_others() -> None:
    def fail(bench: Bench) -> Sequence[Any]:
        raise ZeroDivisionError("a bug")

    broken = Suite("broken", "", suites_base.fits_all, lambda bench: (), fail)
    notes = Notes()
    found = run_bench(bench("bert", BERT), [broken, *find_suites(["load"])], recorder=notes)
    assert [str(one) for one in found.failures] == ["broken: ZeroDivisionError: a bug"]
    assert "in fail" in found.failures[0].details
    assert names(found.measurements) == ["load", "first forward", "second forward"]
    assert notes.records[0] == {"kind": "failed", "suite": "broken", "error": "ZeroDivisionError: a bug"}


@pytest.mark.parametrize(
    ("name", "how", "said"),
    [
        ("decode", {"prompt": 60, "tokens": 32}, "92 tokens are more than GPT2LMHeadModel takes"),
        ("decode", {"backend": "nonsense"}, "torch.compile has no backend 'nonsense'; there are"),
        ("train", {"tokens": 500}, "500 tokens are more than GPT2LMHeadModel takes"),
        ("encode", {}, "is a decoder; decode measures those"),
    ],
)
def test_what_cannot_be_measured(name: str, how: dict[str, Any], said: str) -> None:
    found = run_bench(bench("gpt2", SMALL_GPT2, task="CAUSAL_LM", **how), find_suites([name]))
    assert said in found.failures[0].error


def test_an_encoder_does_not_decode() -> None:
    found = run_bench(bench("bert", BERT), find_suites(["decode"]))
    assert "BertModel generates no text" in found.failures[0].error


@pytest.mark.parametrize("device", ["cuda", "cuda:9", "nonsense", "meta", "mps"])
def test_devices_that_are_not_there(device: str) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(MeasureError, match=f"--device {device}: "):
        bench("bert", BERT, device=device)


# ---------------------------------------------------------------- the registry


def test_suites_are_found_by_name() -> None:
    assert suite_names() == ("load", "decode", "encode", "train")
    assert [suite.name for suite in find_suites(["train", "all", "train"])] == ["train", "load", "decode", "encode"]
    with pytest.raises(MeasureError, match="there is no suite 'trian'; there are load, decode, encode, train, and all"):
        find_suites(["trian"])


MINE = Suite("mine", "of another package", suites_base.fits_all, lambda bench: (), lambda bench: ())


def test_another_package_adds_a_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    group = "rewire.bench_suites"
    points = [
        EntryPoint("mine", "test_bench_run:MINE", group),
        EntryPoint("wrong", "test_bench_run:QUICK", group),
        EntryPoint("gone", "no_such_module:X", group),
    ]
    monkeypatch.setattr("rewire.measure.bench.suites.entry_points", lambda group: points)
    assert suite_names() == ("load", "decode", "encode", "train", "mine", "wrong", "gone")
    assert find_suites(["mine"])[0].about == MINE.about
    with pytest.raises(MeasureError, match="the suite wrong is a Settings, not"):
        find_suites(["wrong"])
    with pytest.raises(MeasureError, match=r"the suite gone .* cannot be loaded"):
        find_suites(["gone"])


# ---------------------------------------------------------------- statistics

times = st.lists(st.floats(1e-6, 1e3), min_size=3, max_size=30)


@given(samples=times, factor=st.floats(0.1, 10))
def test_a_side_that_is_always_as_much_slower_has_no_interval_to_speak_of(samples: list[float], factor: float) -> None:
    found = paired_ratio([one * factor for one in samples], samples)
    assert found.value == pytest.approx(factor)
    assert (found.low, found.high) == (pytest.approx(factor), pytest.approx(factor))


@given(over=times, under=times)
def test_the_ratio_is_that_of_the_medians_and_turns_around(over: list[float], under: list[float]) -> None:
    there, back = unpaired_ratio(over, under), unpaired_ratio(under, over)
    assert there.value == pytest.approx(statistics.median(over) / statistics.median(under))
    assert there.value * back.value == pytest.approx(1)
    assert there.low is not None
    assert there.high is not None
    assert there.low <= there.high


def test_the_interval_holds_the_truth_nineteen_times_in_twenty() -> None:
    generator = torch.Generator().manual_seed(0)
    hits, rounds = 0, 300
    for _ in range(rounds):
        drawn = torch.randn(2, 41, generator=generator).mul(0.1).exp().double()
        found = unpaired_ratio((1.3 * drawn[0]).tolist(), drawn[1].tolist())
        hits += (found.low or 0) <= 1.3 <= (found.high or 0)
    assert 0.91 <= hits / rounds <= 0.995


def test_few_samples_tell_no_interval() -> None:
    assert paired_ratio([2.0], [1.0]).low is None


def test_signs_and_units() -> None:
    before, after = Figure((2.0, 2.0, 2.0), 1000), Figure((1.0, 1.0, 1.0), 750)
    one = Measurement("encode", "forward", {BEFORE: before, AFTER: after}, {"batch": 4}, "tokens", 100.0)
    data = one.to_dict()
    assert data["ratio"]["value"] == 2.0  # twice as fast
    assert data["memory_saving"] == 0.25  # a quarter less
    assert (data[BEFORE]["rate"], data[AFTER]["rate"]) == (50.0, 100.0)
    assert Measurement("s", "c", {BEFORE: after, AFTER: before}).memory_saving == pytest.approx(-1 / 3)
    assert Measurement.from_dict(data) == one


@given(batch=st.integers(4, 64), longest=st.integers(8, 512), share=st.floats(0, 0.7))
def test_batches_have_about_the_padding_asked_for(batch: int, longest: int, share: float) -> None:
    found = lengths_for(batch, longest, share)
    assert len(found) == batch
    assert found[0] == longest
    assert min(found) >= 1
    assert 1 - sum(found) / (batch * longest) == pytest.approx(share, abs=0.06 + 1 / longest)


# ---------------------------------------------------------------- clocks and memory


def test_rounds_alternate_and_warm_ups_do_not_count() -> None:
    order = []

    def trial(side: str) -> Callable[[Any], None]:
        def run(watch: Any) -> None:
            order.append(side)
            with watch.phase("all"):
                time.sleep(0.002 if side == "b" else 0.001)

        return run

    found = interleave({one: trial(one) for one in "ab"}, "cpu", repeats=4, seconds=0.0, warm_ups=2)
    assert "".join(order) == "abab" + "abbaabba"
    assert [len(found[side]["all"]) for side in "ab"] == [4, 4]
    assert min(found["b"]["all"]) > 0.002 > 0.001 < min(found["a"]["all"])


def test_the_clock_counts_phases_only() -> None:
    clock = Clock("cpu")
    with clock.phase("short"):
        pass
    time.sleep(0.02)
    with clock.phase("long"):
        time.sleep(0.02)
    assert clock.seconds["short"][0] < 0.01 < clock.seconds["long"][0]


MEGABYTE = 2**20


@pytest.mark.parametrize("meter", ["own", "polled"])
def test_peaks(meter: str) -> None:
    """What a phase takes and gives back counts in it, and what it keeps in the next too."""
    model = nn.Linear(1024, 1024)  # 4 MiB
    peaks = Peaks("cpu")
    if meter == "polled":
        peaks.meter = _Polled()
    with peaks.phase("nothing", model):
        time.sleep(0.01)
    with peaks.phase("passing", model):
        torch.ones(64 * MEGABYTE // 4).add_(1)
        time.sleep(0.01)
    with peaks.phase("keeping", model):
        kept = torch.ones(32 * MEGABYTE // 4)
        time.sleep(0.01)
    with peaks.phase("later", model):
        time.sleep(0.01)
    found = {name: value / MEGABYTE for name, value in peaks.bytes.items()}
    expected = {"nothing": 4, "passing": 68, "keeping": 36, "later": 36}
    assert found == pytest.approx(expected, abs=3)
    del kept


def test_training_memory_holds_gradients_and_optimizer() -> None:
    """AdamW needs four times the weights: the weights, their gradients, and two moments."""
    values = {**BERT, "hidden_size": 256, "intermediate_size": 2048, "vocab_size": 20000}
    made = bench("bert", values, batch=(1,), warm_ups=0, repeats=1)
    weights = sum(one.nbytes for one in made.model().parameters())
    found = run_bench(made, find_suites(["train"]))
    step = next(one for one in found.measurements if one.case == "step")
    assert step.sides[BEFORE].peak_bytes == pytest.approx(4 * weights, rel=0.35)


# ---------------------------------------------------------------- the sampler and the machine


def test_the_sampler_sees_work_and_memory() -> None:
    found: list[Any] = []
    with Sampler(found.extend, interval=0.02, flush=0.05):
        big = torch.ones(64 * MEGABYTE // 4)
        end = time.perf_counter() + 0.4
        while time.perf_counter() < end:
            big.add_(1)
    assert len(found) >= 5
    assert [one.time for one in found] == sorted(one.time for one in found)
    assert max(one.cpu for one in found) > 10
    assert max(one.memory for one in found) > 64 * MEGABYTE
    if not torch.cuda.is_available():
        assert {one.gpu for one in found} == {None}


def test_a_sampler_that_cannot_write_says_so() -> None:
    def full(samples: Any) -> None:
        raise MeasureError("the disk is full")

    with pytest.raises(MeasureError, match="the disk is full"), Sampler(full, interval=0.01):
        time.sleep(0.05)


class Nvml:
    """NVIDIA's library as far as it is used, with one GPU."""

    class NVMLError(Exception):
        pass

    shut = 0

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetCount(self) -> int:
        return 1

    def nvmlDeviceGetHandleByIndex(self, number: int) -> int:
        return number

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:
        return type("Rates", (), {"gpu": 37})

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        return type("Memory", (), {"used": 5 * 2**30})

    def nvmlShutdown(self) -> None:
        Nvml.shut += 1


def test_a_gpu_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pynvml", Nvml())
    found: list[Any] = []
    with Sampler(found.extend, interval=0.01):
        time.sleep(0.05)
    assert {(one.gpu, one.gpu_memory) for one in found} == {(37.0, 5 * 2**30)}
    assert Nvml.shut == 1


def test_machine_facts() -> None:
    facts = machine_facts()
    assert {"processor", "instruction sets", "cores", "threads", "memory", "gpu", "torch", "transformers"} <= set(facts)
    assert all(isinstance(value, str) and value for value in facts.values())
    assert facts["instruction sets"] == (", ".join(instruction_sets()) or "unknown")


def test_the_revision_of_a_repository(tmp_path: Path) -> None:
    import subprocess

    def git(*words: str) -> None:
        identity = ["-c", "user.name=A", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *words], check=True, capture_output=True)

    assert revision(tmp_path).commit is None
    git("init", "-b", "work")
    (tmp_path / "a.py").write_text("1")
    git("add", "a.py")
    git("commit", "-m", "Faster: «twice»\n\nbody")
    found = revision(tmp_path)
    assert (found.branch, found.message) == ("work", "Faster: «twice»")
    assert len(found.commit or "") == 40
    (tmp_path / "a.py").write_text("2")
    assert revision(tmp_path).commit == f"{found.commit}-changed"
    git("checkout", "--detach")
    assert revision(tmp_path).branch is None


# ---------------------------------------------------------------- the command


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REWIRE_BENCH_DB", str(tmp_path / "bench.db"))
    return tmp_path / "bench.db"


EFFORT = ["--repeats", 3, "--seconds", 0, "--warm-ups", 0, "--tokens", 8, "--prompt", 8]


def bert(*words: object) -> Any:
    return run("bench", *config_words("bert", BERT), *EFFORT, "--batch", 2, *words)


def test_a_run_is_shown_kept_listed_compared_and_exported(database: Path, tmp_path: Path) -> None:
    plan = write_plan(tmp_path, JOIN)
    first = bert("--plan", plan, "--suite", "encode")
    assert first.code == 0, first.err
    assert "encode" in first.out
    assert "forward" in first.out
    words = [*EFFORT, "--batch", 2, "--plan", plan, "--suite", "encode"]
    second = run("bench", "run", "--model", *config_words("bert", BERT), *words, "--json")
    assert second.code == 0, second.err
    assert (second.json["id"], second.json["status"], second.json["plan"]["rewire"]) == (2, "done", 1)
    assert [run["id"] for run in run("bench", "list", "--json").json] == [1, 2]
    assert "config:bert" in run("bench", "list").out
    shown = run("bench", "show", "last", "--json").json
    assert shown["measurements"] == second.json["measurements"]
    assert shown["devices"]
    compared = run("bench", "compare", "1", "last")
    assert compared.code == 0
    assert "encode · forward · batch 2 · padding 50%" in compared.out
    lines = run("bench", "export", "--csv").out.splitlines()
    assert lines[0].startswith("run,created_at,status,branch,commit")
    assert len(lines) == 1 + 2 * 2 * 2  # runs, sides, cases
    run("bench", "export", "2", "--json", "--out", tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text())[0]["id"] == 2


def test_a_suite_that_fails_is_told_and_kept(database: Path) -> None:
    done = bert("--suite", "decode", "--suite", "load")
    assert done.code == 1
    assert "failed: decode: BertModel generates no text" in done.err
    assert "second forward" in done.out
    assert run("bench", "list", "--json").json[0]["status"] == "failed"
    assert "is failed and no measurement to compare with" in run("bench", "compare", "1", "1").err


def test_a_model_that_cannot_be_loaded_leaves_a_failed_run(database: Path, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "bert", BERT)
    (folder / "model.safetensors").write_bytes(b"rubbish")
    done = run("bench", folder, "--suite", "load")
    assert done.code == 1
    assert "failed: load: " in done.err
    assert run("bench", "list", "--json").json[0]["status"] == "failed"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["config:bert", "--suite", "nonsense"], "there is no suite 'nonsense'; there are load, decode"),
        (["config:bert", "--device", "cuda:77"], "--device cuda:77: "),
        (["--suite", "load"], "name one model"),
        (["config:bert", "--model", "config:bert"], "name one model"),
        (["/nowhere/at/all"], "the folder /nowhere/at/all does not exist"),
        (["show", "7"], "there are no results"),
        (["compare", "1", "2"], "there are no results"),
        (["gate", "a", "b", "--max-slowdown", "much"], "'much' is no share such as 5% or 0.05"),
        (["export"], "give one of --csv and --json"),
        (["list", "--db", "mysql://h/x"], "results are kept in SQLite"),
        (["list", "--db", "postgresql://x@127.0.0.1:1/x"], "no PostgreSQL server answers"),
        (["report", "--html", "x.txt"], "must end in .html"),
    ],
)
def test_wrong_usage(database: Path, words: list[str], said: str) -> None:
    done = run("bench", *words)
    assert done.code == 2
    assert said in " ".join(done.err.split())
    assert not database.exists()  # nothing is recorded


def test_interrupted_runs_are_failed(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rewire.measure.bench.run.measure", interrupt)
    assert bert("--suite", "load").code == 130
    (kept,) = run("bench", "list", "--json").json
    assert (kept["status"], kept["error"]) == ("failed", "KeyboardInterrupt")


def test_flatten_is_what_losses_are_made_of() -> None:
    """The mean square of the main output is the loss of models without a head: it must reach the weights."""
    model = bench("bert", BERT).model()
    outputs = flatten(model(input_ids=torch.ones(1, 4, dtype=torch.long)))
    assert next(iter(outputs)) == "last_hidden_state"
    assert outputs["last_hidden_state"].requires_grad
