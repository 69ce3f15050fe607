"""`rewire.convert`: a checkpoint on disk becomes another one, whatever its size.

```
headers, plan ─→ Task ─→ Job ─→ lock, journal ─→ shard after shard ─→ everything beside, checks, index ─→ one rename
```
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rewire.checkpoint import Checkpoint, Sources, open_checkpoint
from rewire.errors import CheckpointError, OutputError, RevertError
from rewire.stream.job import Job, make_job, parse_part, signature
from rewire.stream.paths import check_folders
from rewire.stream.publish import config_after
from rewire.stream.quantised import carry
from rewire.stream.report import Conversion
from rewire.stream.run import How, Progress, Run
from rewire.stream.task import check_names, check_sources, make_task
from rewire.stream.workspace import Workspace, enough_space

if TYPE_CHECKING:
    from rewire.plan import Edit, Plan


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    plan: Plan | Edit | None = None,
    *,
    revert: bool = False,
    dry_run: bool = False,
    resume: bool = False,
    restart: bool = False,
    shards: str | None = None,
    finish: bool = False,
    jobs: int = 1,
    max_shard_size: int | str | None = None,
    checksums: bool = True,
    verify: bool = False,
    manifest: str | os.PathLike[str] | None = None,
    repair_index: bool = False,
    follow_links: bool = False,
    allow_code: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Applies the tensor rules of a plan to a checkpoint on disk; the model is not built and torch is not loaded.

    The result is in the edited layout, for `rewire.load(destination)`; `revert=True` leads back to the original
    one, for plain `from_pretrained`. The destination appears whole or not at all. What a call that was cut short
    has written lies beside it, in `.NAME.rewire-convert`, until a call with `resume` or `restart` goes on.

    Args:
        source: a folder with safetensors, or a snapshot in a hub cache. It is only read.
        destination: the folder to write; new or empty.
        plan: what to change. One that is not resolved yet is resolved first, which does load torch.
        revert: whether to bring an edited folder back; the plan is the one that it records.
        dry_run: whether to stop before anything is written. `fates()` of the result says what would become of
            every tensor.
        resume: whether to go on with what an earlier call left.
        restart: whether to throw that away and begin anew.
        shards: which part of the output shards to write, `"3/16"` for the third of sixteen. Parts may be written
            at the same time, by several machines on one file system.
        finish: whether to publish what all parts have written.
        jobs: threads that write at the same time.
        max_shard_size: largest shard, in bytes or as text (`"5GB"`); by default the result is sharded as the
            source is.
        checksums: whether to record a checksum of every range that is read or written.
        verify: whether to read everything again before publishing, and compare the checksums.
        manifest: where to write SHA-256 sums of all files, for `sha256sum --check`.
        repair_index: whether a missing or wrong index of the source is made anew, in memory.
        follow_links: whether files of the source may be links that lead out of the folder (and the hub cache).
        allow_code: whether classes that the plan names by import path may be imported and run, to resolve it.
        progress: called as bytes are written.

    Raises:
        CheckpointError: the source is damaged (all faults at once), changed meanwhile, or holds adapters.
        PlanError, ResolveError, RuleError: the plan does not fit the source.
        RevertError: the folder cannot be brought back.
        OutputError: the destination is taken, somebody else is writing it, something is left of an earlier call, or
            the disk is full.
    """
    start = time.perf_counter()
    _check_options(resume=resume, restart=restart, shards=shards, finish=finish, jobs=jobs)
    if verify and not checksums:
        raise OutputError("verify compares checksums, so it cannot go without them")
    part = None if shards is None else parse_part(shards)
    source = Path(source)
    real = check_folders(source, Path(destination))
    checkpoint = open_checkpoint(source, repair_index=repair_index, follow_links=follow_links)
    job = plan_job(checkpoint, _one_plan(plan), revert=revert, max_shard_size=max_shard_size, allow_code=allow_code)
    sums = None if manifest is None else _check_manifest(Path(manifest), real, source)
    how = How(part, resume, restart, jobs, checksums, verify, sums, progress)
    run = Run(job, Workspace(real), how, start)
    if dry_run:
        return run.report("planned")
    with enough_space(run.work):
        return run.finish() if finish else run.write()


def _check_options(*, resume: bool, restart: bool, shards: str | None, finish: bool, jobs: int) -> None:
    if resume and restart:
        raise OutputError("resume goes on and restart begins anew; choose one of them")
    if restart and shards is not None:
        raise OutputError("restart throws the work of all parts away; delete the work folder before the parts begin")
    if finish and (shards is not None or restart):
        raise OutputError("finish publishes what all parts have written; it goes with neither shards nor restart")
    if jobs < 1:
        raise OutputError(f"jobs is {jobs}; at least one thread has to write")


def _check_manifest(manifest: Path, *folders: Path) -> Path:
    """Within a model's folder it would be carried along by the next edit, and be wrong then."""
    real = Path(os.path.realpath(manifest))
    if real.is_dir() or any(Path(os.path.realpath(folder)) in (real, *real.parents) for folder in folders):
        raise OutputError(f"{manifest} lies in a folder of the model, or is a folder; name a file beside it")
    return real


def _one_plan(plan: Plan | Edit | None) -> Plan | None:
    if plan is None:
        return None
    from rewire.plan import Plan

    return plan if isinstance(plan, Plan) else Plan([plan])


def plan_job(
    checkpoint: Checkpoint, plan: Plan | None, *, revert: bool, max_shard_size: int | str | None, allow_code: bool
) -> Job:
    """Everything that is decided before anything is written."""
    source = checkpoint.folder
    check_names(checkpoint.tensors, source)
    task = make_task(source, checkpoint.tensors, plan, revert=revert, allow_code=allow_code)
    if (task.config or task.unset) and checkpoint.config is None:
        raise CheckpointError(f"{source} has no config.json, and the plan changes values in it")
    infos = {name: (info.dtype, info.shape) for name, info in checkpoint.tensors.items()}
    config = None if checkpoint.config is None else config_after(checkpoint.config, task)
    carried = carry(task.rule, infos, config, lambda name: _read(checkpoint, name))
    check_sources(carried.rule, checkpoint.tensors, source)
    job = make_job(checkpoint, task, carried, max_shard_size)
    if task.signature not in (None, signature((one.name, one.dtype, one.shape) for one in job.tensors())):
        raise RevertError(
            f"{source} cannot be brought back: what its steps lead to has not the names, types and shapes of the "
            "checkpoint that it was made from. It was changed since, or its quantised tensors can be read in two ways"
        )
    return job


def _read(checkpoint: Checkpoint, name: str) -> bytes:
    """The bytes of a small tensor."""
    info = checkpoint.tensors[name]
    data = bytearray(info.stop - info.start)
    with Sources(checkpoint, (info.shard,)) as sources:
        sources.pread_exact(info.shard, info.start, data)
    return bytes(data)
