"""`rewire.convert` loses nothing: killed, interrupted, out of space, run twice, run by many."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from convert_kit import (
    SPLIT,
    assert_same,
    expected,
    files_of,
    model_tensors,
    plan_of,
    read_tensors,
    write_checkpoint,
)
from rewire.errors import CheckpointError, OutputError
from rewire.plan import Plan
from rewire.stream import convert, shards

PLAN = plan_of(SPLIT, config={"heads": 8})
LAB = Path(__file__).with_name("kill_lab.py")
TESTS = Path(__file__).parent


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source", model_tensors(), shards=3)


@pytest.fixture
def reference(source: Path, tmp_path: Path) -> Path:
    """The result of a conversion that nothing disturbed."""
    convert(source, tmp_path / "reference", PLAN)
    return tmp_path / "reference"


def assert_resumes(source: Path, out: Path, reference: Path, kept: int) -> None:
    done = convert(source, out, PLAN, resume=True)
    assert done.kept == kept
    assert files_of(out) == files_of(reference)
    assert not work_folder(out).exists()


def work_folder(out: Path) -> Path:
    return out.parent / f".{out.name}.rewire-convert"


def failing_at(monkeypatch: pytest.MonkeyPatch, shard: int, error: BaseException) -> None:
    """The next conversion fails before that shard."""
    write = shards.write_shard

    def write_or_fail(job: Any, number: int, *args: Any, **kwargs: Any) -> Any:
        if number == shard:
            raise error
        return write(job, number, *args, **kwargs)

    monkeypatch.setattr("rewire.stream.run.write_shard", write_or_fail)


# ---------------------------------------------------------------- killed


def run_lab(source: Path, reference: Path, work: Path, first: int, step: int) -> dict[str, int]:
    plan = work.with_suffix(".json")
    PLAN.write(plan)
    command = [sys.executable, LAB, source, plan, reference, work, str(first), str(step)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    states: dict[str, int] = json.loads(done.stdout)
    return states


def test_killed_at_some_calls(source: Path, reference: Path, tmp_path: Path) -> None:
    states = run_lab(source, reference, tmp_path / "lab", first=3, step=23)
    assert states["absent"] > 5


@pytest.mark.sweep
def test_killed_before_and_after_every_call(source: Path, reference: Path, tmp_path: Path) -> None:
    states = run_lab(source, reference, tmp_path / "lab", first=0, step=1)
    assert states["absent"] > 100
    assert states["whole"] >= 1


@pytest.mark.sweep
def test_killed_at_200_random_times(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", model_tensors(layers=40), shards=12)
    plan = plan_of({**SPLIT, "each": ["0..39"]})
    plan.write(tmp_path / "plan.json")
    convert(source, tmp_path / "reference", plan)
    wanted = files_of(tmp_path / "reference")
    command = [sys.executable, "-m", "rewire", "convert", source, tmp_path / "out", "--plan", tmp_path / "plan.json"]
    start = time.perf_counter()
    subprocess.run([*command, "--quiet"], check=True)
    whole = time.perf_counter() - start
    for path in (tmp_path / "out").iterdir():
        path.unlink()
    (tmp_path / "out").rmdir()
    dice, killed = random.Random(0), 0
    while killed < 200:
        child = subprocess.Popen([*command, "--resume", "--quiet"])
        time.sleep(dice.uniform(0.4, 1.05) * whole)
        child.send_signal(signal.SIGKILL)
        killed += child.wait() == -signal.SIGKILL
        if (tmp_path / "out").exists():
            assert files_of(tmp_path / "out") == wanted
            subprocess.run([*command, "--resume", "--quiet"], check=True)
            for path in (tmp_path / "out").iterdir():
                path.unlink()
            (tmp_path / "out").rmdir()
            assert not work_folder(tmp_path / "out").exists()


def test_an_exception_keeps_whole_shards_and_resuming_writes_the_others(
    source: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        failing_at(patch, 3, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            convert(source, out, PLAN)
    assert not out.exists()
    with pytest.raises(OutputError, match=r"2 of 3 shards.*--resume.*--restart"):
        convert(source, out, PLAN)
    assert_resumes(source, out, reference, kept=2)


def test_nothing_is_left_where_nothing_was_done(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing_at(monkeypatch, 1, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", PLAN)
    assert os.listdir(tmp_path) == ["source"]


def interrupted(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch, plan: Plan = PLAN, **options: Any) -> None:
    """A conversion that stops before its third shard."""
    with monkeypatch.context() as patch:
        failing_at(patch, 3, RuntimeError("stop"))
        with pytest.raises(RuntimeError):
            convert(source, out, plan, **options)


def test_restart_begins_anew(source: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = plan_of({"step": "drop", "source": "table"})
    interrupted(source, tmp_path / "out", monkeypatch, other)
    done = convert(source, tmp_path / "out", PLAN, restart=True)
    assert (done.kept, done.written) == (0, 3)
    assert files_of(tmp_path / "out") == files_of(reference)


@pytest.mark.parametrize(
    ("plan", "options"),
    [
        (plan_of({**SPLIT, "groups": 1}, config={"heads": 8}), {}),
        (plan_of(SPLIT, config={"heads": 9}), {}),
        (PLAN, {"max_shard_size": 10_000}),
    ],
)
def test_resuming_something_else_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan: Plan, options: dict[str, Any]
) -> None:
    interrupted(source, tmp_path / "out", monkeypatch)
    with pytest.raises(OutputError, match="cannot be gone on with"):
        convert(source, tmp_path / "out", plan, resume=True, **options)


def test_resuming_from_a_source_that_was_touched_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(source, tmp_path / "out", monkeypatch)
    os.utime(source / "model-00002-of-00003.safetensors", ns=(1, 1))
    with pytest.raises(OutputError, match=r"model-00002-of-00003\.safetensors"):
        convert(source, tmp_path / "out", PLAN, resume=True)


def test_a_damaged_shard_is_written_again(
    source: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(source, tmp_path / "out", monkeypatch)
    shard = work_folder(tmp_path / "out") / "model/model-00001-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert_resumes(source, tmp_path / "out", reference, kept=1)


@pytest.mark.parametrize("cut", [1, 30, 10**6])
def test_a_journal_line_that_was_cut_off_counts_for_nothing(
    source: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    interrupted(source, tmp_path / "out", monkeypatch)
    journal = work_folder(tmp_path / "out") / "part-1-of-1.jsonl"
    text = journal.read_bytes()
    journal.write_bytes(text[: max(5, len(text) - cut)])
    assert_resumes(source, tmp_path / "out", reference, kept=1 if cut < 1000 else 0)


def test_a_damaged_journal_is_no_traceback(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in (b"[]\n", b"{}\n", b"nonsense\n", b'{"part": 3}\n', b"\xff\n"):
        interrupted(source, tmp_path / "out", monkeypatch, restart=True)
        (work_folder(tmp_path / "out") / "part-1-of-1.jsonl").write_bytes(text)
        with pytest.raises(OutputError, match="is damaged"):
            convert(source, tmp_path / "out", PLAN, resume=True)


def test_a_finished_job_is_resumed_at_once(source: Path, reference: Path) -> None:
    start = time.perf_counter()
    done = convert(source, reference, PLAN, resume=True)
    assert (done.state, done.kept, done.bytes_written) == ("already", 3, 0)
    assert time.perf_counter() - start < 1
    with pytest.raises(OutputError, match="something else"):
        convert(source, reference, plan_of(), resume=True)
    with pytest.raises(OutputError, match="not empty"):
        convert(source, reference, PLAN)


def test_resuming_from_nothing_is_beginning(source: Path, reference: Path, tmp_path: Path) -> None:
    assert_resumes(source, tmp_path / "out", reference, kept=0)


# ---------------------------------------------------------------- space, reads, writes


def test_too_little_space_is_noticed_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = os.statvfs_result((4096, 4096, 1, 1, 1, 1, 1, 1, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: small)
    with pytest.raises(OutputError, match=r"4,096 bytes free, \d+,\d+ are needed"):
        convert(source, tmp_path / "out", PLAN)
    assert os.listdir(tmp_path) == ["source"]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_disk_that_fills_up(
    source: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    sizes = sorted(path.stat().st_size for path in reference.glob("*.safetensors"))
    with monkeypatch.context() as patch:
        full_after(patch, int(share * sum(sizes)))
        with pytest.raises(OutputError, match=r"--resume"):
            convert(source, tmp_path / "out", PLAN)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("*.part"))
    convert(source, tmp_path / "out", PLAN, resume=True)
    assert files_of(tmp_path / "out") == files_of(reference)


def full_after(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    """Writes fail once `room` bytes are written, as on a file system that cannot reserve space."""
    left = [room]

    def no_reserve(handle: int, start: int, length: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    def limited(call: Callable[..., int]) -> Callable[..., int]:
        def wrapped(*args: Any, **kwargs: Any) -> int:
            count = call(*args, **kwargs)
            left[0] -= count
            if left[0] < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return count

        return wrapped

    monkeypatch.setattr(os, "posix_fallocate", no_reserve)
    for name in ("pwrite", "pwritev", "copy_file_range"):
        monkeypatch.setattr(os, name, limited(getattr(os, name)))


def test_a_limit_on_file_sizes(source: Path, reference: Path, tmp_path: Path) -> None:
    """The kernel's own refusal, in a process of its own."""
    PLAN.write(tmp_path / "plan.json")
    command = [sys.executable, "-m", "rewire", "convert", source, tmp_path / "out", "--plan", tmp_path / "plan.json"]
    smallest = min(path.stat().st_size for path in reference.glob("*.safetensors"))

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (smallest - 10, resource.RLIM_INFINITY))

    done = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--resume" in done.stderr
    assert not (tmp_path / "out").exists()
    assert_resumes(source, tmp_path / "out", reference, kept=0)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 40 KiB of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40k", "none", disk], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("needs the right to mount a file system")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_disk_that_is_really_full(source: Path, reference: Path, small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(b"x" * 4096 * 5)
    with pytest.raises(OutputError):
        convert(source, small_disk / "out", PLAN)
    assert os.listdir(small_disk) in (
        ["ballast"],
        [".out.rewire-convert", "ballast"],
        ["ballast", ".out.rewire-convert"],
    )
    (small_disk / "ballast").unlink()
    with pytest.raises(OutputError):  # the shards fit now, and what lies beside them does not
        convert(source, small_disk / "out", PLAN, resume=True)
    assert not (small_disk / "out").exists()
    subprocess.run(["mount", "-o", "remount,size=1m", small_disk], check=True)
    convert(source, small_disk / "out", PLAN, resume=True)
    assert files_of(small_disk / "out") == files_of(reference)


def test_short_reads_and_writes(source: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv, pread, pwrite, copy = os.preadv, os.pread, os.pwrite, os.copy_file_range

    def short_copy(src: int, dst: int, count: int, *args: Any, **kwargs: Any) -> int:
        return copy(src, dst, min(count, 11), *args, **kwargs)

    monkeypatch.setattr(os, "preadv", lambda file, views, at: preadv(file, [memoryview(views[0])[:7]], at))
    monkeypatch.setattr(os, "pread", lambda file, count, at: pread(file, min(count, 7), at))
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: pwrite(file, memoryview(data)[:5], at))
    monkeypatch.setattr(os, "copy_file_range", short_copy)
    convert(source, tmp_path / "out", PLAN)
    assert files_of(tmp_path / "out") == files_of(reference)


def test_verify_finds_a_flipped_bit(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(source, tmp_path / "out", monkeypatch)
    shard = work_folder(tmp_path / "out") / "model/model-00002-of-00003.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors: bytes"):
        convert(source, tmp_path / "out", PLAN, resume=True, verify=True)
    assert not (tmp_path / "out").exists()


def test_shards_without_checksums_cannot_be_verified(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(source, tmp_path / "out", monkeypatch, checksums=False)
    with pytest.raises(OutputError, match="without checksums"):
        convert(source, tmp_path / "out", PLAN, resume=True, verify=True)


# ---------------------------------------------------------------- the source


def changes(source: Path) -> dict[str, Callable[[], object]]:
    file = source / "model-00003-of-00003.safetensors"

    def replaced() -> None:
        other = source / "other"
        other.write_bytes(file.read_bytes())
        other.replace(file)

    return {
        "touched": lambda: os.utime(file, ns=(1, 1)),
        "cut short": lambda: os.truncate(file, file.stat().st_size - 1),
        "grown": lambda: os.truncate(file, file.stat().st_size + 1),
        "deleted": file.unlink,
        "replaced": replaced,
    }


@pytest.mark.parametrize("what", ["touched", "cut short", "grown", "deleted", "replaced"])
@pytest.mark.parametrize("when", [1, 3])
def test_a_source_that_changes_meanwhile_is_never_published(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, when: int
) -> None:
    write = shards.write_shard

    def changing(job: Any, number: int, *args: Any, **kwargs: Any) -> Any:
        entry = write(job, number, *args, **kwargs)
        if number == when:
            changes(source)[what]()
        return entry

    monkeypatch.setattr("rewire.stream.run.write_shard", changing)
    with pytest.raises(CheckpointError, match=r"model-00003-of-00003\.safetensors"):
        convert(source, tmp_path / "out", PLAN)
    assert not (tmp_path / "out").exists()


def test_a_read_only_source(source: Path, reference: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in source.iterdir()}
    for path in (*source.iterdir(), source):
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        convert(source, tmp_path / "out", PLAN)
        assert files_of(tmp_path / "out") == files_of(reference)
        assert {path: path.stat().st_mtime_ns for path in source.iterdir()} == before
        assert os.access(tmp_path / "out/tokenizer.json", os.W_OK)
    finally:
        source.chmod(0o755)


def test_a_snapshot_of_links_is_only_read(source: Path, reference: Path, tmp_path: Path) -> None:
    """As the hub cache has it: the files of a snapshot are links into a folder of blobs."""
    cache = tmp_path / "cache/models--toy"
    blobs, snapshot = cache / "blobs", cache / "snapshots/main"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(source.iterdir())):
        blob = blobs / f"{number:064x}"
        blob.write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    before = files_of(blobs)
    convert(snapshot, tmp_path / "out", PLAN)
    assert files_of(tmp_path / "out") == files_of(reference)
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert files_of(blobs) == before
    with pytest.raises(OutputError, match="not empty"):
        convert(snapshot, blobs, PLAN)


def test_hard_links_are_never_written_through(source: Path, reference: Path, tmp_path: Path) -> None:
    """Somebody linked files of the source to where the work is done."""
    out = tmp_path / "out"
    model = work_folder(out) / "model"
    model.mkdir(parents=True)
    for name in ("model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors", "config.json"):
        os.link(source / name, model / name)
        os.link(source / name, model / f"{name}.part")
    before = files_of(source)
    assert_resumes(source, out, reference, kept=0)
    assert files_of(source) == before


def test_a_work_folder_that_is_a_link_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    work_folder(tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="is a link"):
        convert(source, tmp_path / "out", PLAN)
    assert os.listdir(tmp_path / "elsewhere") == []


# ---------------------------------------------------------------- many writers


def test_two_writers(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = shards.write_shard
    refused: list[str] = []

    def second(*args: Any, **kwargs: Any) -> Any:
        for options in ({}, {"resume": True}, {"restart": True}, {"shards": "1/2"}, {"finish": True}):
            with pytest.raises(OutputError) as caught:
                convert(source, tmp_path / "out", PLAN, **options)
            refused.append(str(caught.value))
        return write(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("rewire.stream.run.write_shard", second)
        done = convert(source, tmp_path / "out", PLAN)
    assert done.written == 3
    assert all(f"is being written by process {os.getpid()} on " in message for message in refused)
    assert_same(read_tensors(tmp_path / "out"), expected(model_tensors(), PLAN))


def test_a_file_system_without_locks(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_lock(handle: int, kind: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_lock)
    with pytest.raises(OutputError, match="knows no locks"):
        convert(source, tmp_path / "out", PLAN)


def test_parts_and_finish(source: Path, reference: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert convert(source, out, PLAN, shards="2/2").state == "part"
    with pytest.raises(OutputError, match=r"2 of 3 shards are not written yet.*part 1/2"):
        convert(source, out, PLAN, finish=True)
    with pytest.raises(OutputError, match="begun in 2 parts"):
        convert(source, out, PLAN)
    with pytest.raises(OutputError, match="begun in 2 parts"):
        convert(source, out, PLAN, shards="3/4")
    with pytest.raises(OutputError, match="another plan or source"):
        convert(source, out, plan_of(), shards="1/2")
    with pytest.raises(OutputError, match="--resume"):
        convert(source, out, PLAN, shards="2/2")
    assert convert(source, out, PLAN, shards="2/2", resume=True).kept == 1
    convert(source, out, PLAN, shards="1/2", verify=True)
    with pytest.raises(OutputError, match="another plan or source"):
        convert(source, out, plan_of(), finish=True)
    assert not out.exists()
    convert(source, out, PLAN, finish=True, verify=True)
    assert files_of(out) == files_of(reference)
    assert not work_folder(out).exists()
    assert convert(source, out, PLAN, finish=True).state == "already"
    assert convert(source, out, PLAN, shards="1/2", resume=True).state == "already"


def test_more_parts_than_shards(source: Path, reference: Path, tmp_path: Path) -> None:
    for number in range(1, 6):
        convert(source, tmp_path / "out", PLAN, shards=f"{number}/5")
    convert(source, tmp_path / "out", PLAN, finish=True)
    assert files_of(tmp_path / "out") == files_of(reference)


def test_the_whole_is_not_continued_in_parts(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(source, tmp_path / "out", monkeypatch)
    with pytest.raises(OutputError, match="begun whole"):
        convert(source, tmp_path / "out", PLAN, shards="1/2")


def test_four_processes_at_once(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", model_tensors(layers=12), shards=7)
    plan = plan_of({**SPLIT, "each": ["0..11"]})
    plan.write(tmp_path / "plan.json")
    convert(source, tmp_path / "reference", plan)
    command = [sys.executable, "-m", "rewire", "convert", source, tmp_path / "out", "--plan", tmp_path / "plan.json"]
    children = [subprocess.Popen([*command, "--quiet", "--shards", f"{n}/4"]) for n in range(1, 5)]
    assert [child.wait() for child in children] == [0, 0, 0, 0]
    subprocess.run([*command, "--quiet", "--finish", "--verify"], check=True)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "reference")
    assert not work_folder(tmp_path / "out").exists()


def test_something_comes_to_lie_at_the_destination(
    source: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = shards.write_shard

    def meanwhile(*args: Any, **kwargs: Any) -> Any:
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out/mine").touch()
        return write(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("rewire.stream.run.write_shard", meanwhile)
        with pytest.raises(OutputError, match="cannot be put in its place"):
            convert(source, tmp_path / "out", PLAN)
    assert os.listdir(tmp_path / "out") == ["mine"]
    (tmp_path / "out/mine").unlink()
    assert_resumes(source, tmp_path / "out", reference, kept=3)
