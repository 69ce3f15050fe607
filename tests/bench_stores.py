"""What tests of the benchmark store share."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg

from postgres_server import USER
from rewire.measure.bench.records import Figure, Measurement, checked, omitted
from rewire.measure.store import DeviceSample, RunFacts, open_store

_numbers = itertools.count()


def postgres_url(folder: Path) -> str:
    """The URL of a new schema on the server in `folder`: as empty as a new database, and made at once."""
    name = f"bench_{next(_numbers)}"
    with psycopg.connect(f"host={folder} user={USER} dbname=postgres", autocommit=True) as connection:
        connection.execute(f"CREATE SCHEMA {name}")
    return f"postgresql+psycopg://{USER}@/postgres?host={folder}&options=-csearch_path%3D{name}"


def facts(model: str = "config:gpt2", **other: object) -> RunFacts:
    """Facts of a run."""
    known: dict[str, object] = {
        "device": "cpu",
        "suites": ("load",),
        "settings": {"batch": [1]},
        "machine": {"cores": 2},
    }
    return RunFacts(model, **{**known, **other})  # type: ignore[arg-type]


def measurement(seconds: float, *, faster: float = 1.25, batch: int = 1, padding: float = 0.0) -> Measurement:
    """Encoding that takes about so many seconds before a plan, and less after it."""
    before = tuple(seconds * (1 + 0.01 * step) for step in (-2, -1, 0, 1, 2))
    sides = {"before": Figure(before, 400 * 2**20), "after": Figure(tuple(one / faster for one in before), 300 * 2**20)}
    labels = {"batch": batch, "padding": padding, "tokens": 128}
    return Measurement("encode", "forward", sides, labels, "real tokens", 128.0 * batch * (1 - padding))


def fill(url: str, commits: Sequence[str] = ("aaaaaaa1", "bbbbbbb2", "ccccccc3"), factor: float = 1.1) -> None:
    """Runs of three commits, each `factor` times as slow as the one before; and one that has failed."""
    start = datetime.now(UTC)
    with open_store(url) as store:
        for number, commit in enumerate(commits):
            about = {"commit": commit, "branch": "main", "message": f"Change <{number}> & more"}
            with store.run(facts(plan_hash="ab12", **about)) as run:
                for batch, padding in ((1, 0.0), (8, 0.0), (8, 0.5), (32, 0.0), (32, 0.5)):
                    one = measurement(0.010 * batch**0.8 * factor**number, batch=batch, padding=padding)
                    run.measured(one.to_dict())
                run.measured(checked("encode", "outputs", "exact", 0.0, 1e-5))
                run.measured(omitted("decode", "", "BertModel is no decoder"))
                run.sampled(
                    [
                        DeviceSample(
                            start + timedelta(seconds=step), 100.0 + step, (500 + 10 * step) * 2**20, 30.0, 2**31
                        )
                        for step in range(20)
                    ]
                )
        store.fail(store.begin(facts(commit="ddddddd4", branch="main")), "train: not finite")
