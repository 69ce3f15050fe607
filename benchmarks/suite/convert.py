"""`rewire convert` on a checkpoint of 4 GB, against copying its files and against what people do without Rewire.

Every variant runs in a process of its own, whose start is part of its time. The baseline is `cp -r`, in every round
the faster of its two modes. `cp` leaves it to the system when bytes go to the disk, so the conversions that are
compared with it do too; the last case has both wait.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from suite.convert_models import EDITS, IN_ORDER, Edit, Size, read_checkpoint, write_checkpoint
from suite.results import Result, Verdict, results
from suite.timing import Effort, Samples, Spread, Variant, interleave

GROUP = "convert"
HERE = Path(__file__).parents[1]
COPY, CLONE, PLAIN = "cp -r, the faster of two modes", "cp -r", "cp -r --reflink=never"
BY_SHARD, BY_MODEL, MERGEKIT = "load_file, split, save_file", "from_pretrained, split, save_pretrained", "mergekit"
QUICK = Size(layers=2, shards=2)
CHECKSUMS = 1.4
RIVALS = {BY_SHARD: 5.0, BY_MODEL: 5.0, MERGEKIT: 1.0}
"""How many times as long as Rewire they are expected to take."""


def run(effort: Effort, size: Size | None = None) -> Iterator[Result]:
    size = size or (QUICK if effort.quick else Size())
    with tempfile.TemporaryDirectory(prefix="rewire-convert-") as folder:
        bench = Bench(Path(folder), size, rounds=2 if effort.quick else 3)
        yield from _edits(bench)
        yield from _on_disk(bench)
        yield from _rivals(bench)


@dataclass
class Usage:
    """What a process took at its most: CPU seconds, and bytes of memory where it says so."""

    seconds: float = 0
    memory: int = 0

    def add(self, seconds: float, output: str) -> None:
        """Takes in another run; Python programs print their peak last."""
        self.seconds = max(self.seconds, seconds)
        last = output.split()[-1:]
        self.memory = max(self.memory, int(last[0]) if last and last[0].isdecimal() else 0)

    def notes(self, size: Size) -> dict[str, str]:
        """For the table."""
        memory = {"peak memory": f"{self.memory / 1e6:.0f} MB"} if self.memory else {}
        return {"CPU": f"{self.seconds:.2f} s", **memory}


@dataclass
class Bench:
    """A checkpoint, one place for results (a second one would not fit beside it into the page cache), and usages."""

    folder: Path
    size: Size
    rounds: int
    usages: dict[str, Usage] = field(default_factory=dict)

    def __post_init__(self) -> None:
        write_checkpoint(self.source, self.size)
        self.before = read_checkpoint(self.source)

    @property
    def source(self) -> Path:
        return self.folder / "source"

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def title(self) -> str:
        return f"{self.size.bytes / 1e9:.1f} GB in {self.size.shards} files"

    def clear(self) -> None:
        """Takes the last result away, and lets the disk come to rest."""
        shutil.rmtree(self.out, ignore_errors=True)
        os.sync()

    def variant(self, name: str, *command: object) -> Variant:
        """A command to time; its words may be paths."""
        return Variant(name, lambda: self._run(name, [str(word) for word in command]), self.clear)

    def _run(self, name: str, command: Sequence[str]) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        before = os.times()
        done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True, check=False)
        after = os.times()
        if done.returncode:
            raise RuntimeError(f"{shlex.join(command)}\n{done.stderr[-2000:]}")
        children = after.children_user + after.children_system - before.children_user - before.children_system
        self.usages.setdefault(name, Usage()).add(children, done.stdout)

    def copy(self, name: str, *options: str) -> Variant:
        """`cp -r`."""
        return self.variant(name, "cp", "-r", *options, self.source, self.out)

    def convert(self, name: str, edit: Edit, *options: object, wait: bool = False) -> Variant:
        """`rewire.convert`."""
        plan = self.folder / f"{EDITS.index(edit)}.json"
        plan.write_text(json.dumps(edit.plan(self.size)), "utf-8")
        sync = () if wait else ("--no-sync",)
        return self.worker(name, "rewire", "--plan", plan, *options, *sync)

    def worker(self, name: str, what: str, *options: object) -> Variant:
        """A program of this suite."""
        return self.variant(name, sys.executable, "-m", "suite.convert_work", what, self.source, self.out, *options)

    def checked(self, variants: Mapping[str, tuple[Variant, Edit | None]]) -> dict[str, Verdict]:
        """Runs every variant once, untimed, and looks at what it gives; the edit None gives the source again."""
        found = {}
        for name, (variant, edit) in variants.items():
            variant.before()
            variant.run()
            after = read_checkpoint(self.out)
            found[name] = Verdict(*(edit or SAME).check(self.size, self.before, after))
        return found

    def measure(self, variants: Mapping[str, tuple[Variant, Edit | None]]) -> tuple[Samples, dict[str, Verdict]]:
        """Times per variant and round, and what was verified."""
        verdicts = self.checked(variants)
        self.usages.clear()
        only = [variant for variant, _ in variants.values()]
        return interleave(only, 0, least=self.rounds, warm_up=False), verdicts

    def notes(self) -> dict[str, dict[str, str]]:
        """Further figures of the variants that ran last."""
        return {name: usage.notes(self.size) for name, usage in self.usages.items()}


SAME = Edit("unchanged", lambda size: [], lambda size, before: iter(before.items()))


def best_of_two(samples: Samples) -> Samples:
    """With the faster mode of `cp` in every round as the baseline."""
    faster = [min(pair) for pair in zip(samples[CLONE], samples[PLAIN], strict=True)]
    return {COPY: faster, **samples}


# ---------------------------------------------------------------- the cases


def _edits(bench: Bench) -> Iterator[Result]:
    """Every edit with one thread and with two, in one interleaved run; and without checksums."""
    variants: dict[str, tuple[Variant, Edit | None]] = {
        CLONE: (bench.copy(CLONE), None),
        PLAIN: (bench.copy(PLAIN, "--reflink=never"), None),
    }
    aims: dict[str, float] = {}
    bare: dict[str, str] = {}
    for edit in EDITS:
        for jobs in (1, 2):
            name = f"{edit.name}, {_jobs(jobs)}"
            variants[name] = bench.convert(name, edit, "--jobs", jobs), edit
            aims |= {name: edit.aims[jobs]} if jobs in edit.aims else {}
        name = f"{edit.name}, no checksums"
        variants[name] = bench.convert(name, edit, "--no-checksums"), edit
        bare[f"{edit.name}, {_jobs(1)}"] = name
    samples, verdicts = bench.measure(variants)
    notes = bench.notes()
    yield from results(GROUP, bench.title, best_of_two(samples), aims=aims, verdicts=verdicts, notes=notes)
    for summed, name in bare.items():
        pair = {name: samples[name], summed: samples[summed]}
        yield from results(GROUP, f"{bench.title}: what checksums cost", pair, aims={summed: CHECKSUMS})


def _jobs(count: int) -> str:
    return f"{count} job{'s' * (count != 1)}"


def _on_disk(bench: Bench) -> Iterator[Result]:
    """All bytes on the disk before the clock stops, as `rewire convert` really does it; and with a manifest."""
    waiting = shlex.join(("cp", "-r", "--reflink=never", str(bench.source), str(bench.out)))
    copy, plain, sums = "cp -r and sync", "split in order", "split in order, SHA-256 manifest"
    manifest = bench.folder / "manifest"
    variants: dict[str, tuple[Variant, Edit | None]] = {
        copy: (bench.variant(copy, "sh", "-c", f"{waiting} && sync"), None),
        plain: (bench.convert(plain, IN_ORDER, wait=True), IN_ORDER),
        sums: (_without(manifest, bench.convert(sums, IN_ORDER, "--manifest", manifest, wait=True)), IN_ORDER),
    }
    samples, verdicts = bench.measure(variants)
    yield from results(GROUP, f"{bench.title}, on disk", samples, verdicts=verdicts, notes=bench.notes())


def _without(path: Path, variant: Variant) -> Variant:
    """The variant, with a file taken away first."""

    def before() -> None:
        path.unlink(missing_ok=True)
        variant.before()

    return Variant(variant.name, variant.run, before)


def _rivals(bench: Bench) -> Iterator[Result]:
    """What people do without Rewire; the baseline is Rewire, so that ratios say how much longer they take."""
    ours = "rewire convert, 1 job"
    variants: dict[str, tuple[Variant, Edit | None]] = {
        ours: (bench.convert(ours, IN_ORDER), IN_ORDER),
        BY_SHARD: (bench.worker(BY_SHARD, "by-shard"), IN_ORDER),
        BY_MODEL: (bench.worker(BY_MODEL, "by-model"), IN_ORDER),
    }
    mergekit = find_mergekit()
    if mergekit:
        variants[MERGEKIT] = _mergekit(bench, mergekit), None
    samples, verdicts = bench.measure(variants)
    notes = bench.notes()
    for name in notes.keys() & RIVALS.keys():
        least = Spread.of([b / a for a, b in zip(samples[ours], samples[name], strict=True)]).median
        wished = f"hoped for at least {RIVALS[name]:.0f} times: {'so' if least >= RIVALS[name] else 'NOT so'}"
        shares = bench.usages[name].memory / max(1, bench.usages[ours].memory)
        notes[name] |= {"": wished, **({"memory": f"{shares:.0f} times Rewire's"} if bench.usages[name].memory else {})}
    yield from results(GROUP, f"{bench.title}, without Rewire", samples, verdicts=verdicts, notes=notes)


def find_mergekit() -> str | None:
    """The command, where it is installed; it needs an environment of its own (`pipx install mergekit`)."""
    return shutil.which("mergekit-yaml", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")


def _mergekit(bench: Bench, command: str) -> Variant:
    """Its `passthrough` only copies; it splits nothing."""
    recipe = bench.folder / "mergekit.yaml"
    model = {"model": str(bench.source), "layer_range": [0, bench.size.layers]}
    config = {"slices": [{"sources": [model]}], "merge_method": "passthrough", "dtype": "bfloat16"}
    recipe.write_text(json.dumps(config), "utf-8")  # JSON is YAML
    return bench.variant(MERGEKIT, command, recipe, bench.out, "--lazy-unpickle")
