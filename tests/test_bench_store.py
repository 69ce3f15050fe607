"""The benchmark store, every test on SQLite and on a real PostgreSQL server."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import inspect, make_url, text

from bench_stores import facts, postgres_url
from rewire.errors import MeasureError
from rewire.measure.store import DeviceSample, Store, default_url, open_store
from rewire.measure.store.migrations import STEPS, VERSION_TABLE, migrate, version_of
from rewire.measure.store.tables import Base, Benchmark

pytest_plugins = ["bench_fixtures"]

ROOT = Path(__file__).parents[1]


def raw(url: str) -> Any:
    """A connection of the driver itself."""
    if url.startswith("sqlite"):
        return sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)
    return psycopg.connect(url.replace("+psycopg", ""), autocommit=True)


def sample(second: int = 0, **other: Any) -> DeviceSample:
    return DeviceSample(datetime(2026, 1, 2, 3, 4, second, tzinfo=UTC), 150.0, 3 * 2**30, **other)


# ---------------------------------------------------------------- keeping and finding


def test_what_goes_in_comes_out(url: str) -> None:
    given = facts(
        plan={"rewire": 1, "edits": [{"split": {"target": "h.*"}}]},
        plan_hash="ab12",
        branch="main",
        commit="0123456789abcdef",
        message="Größer, schneller: \"'; DROP TABLE benchmarks; --",
    )
    measurement = {"suite": "load", "case": "load", "before": {"median": 0.25, "samples": [0.2, 0.3]}, "after": None}
    samples = (sample(), sample(1, gpu=37.5, gpu_memory=80 * 2**30))
    began = datetime.now(UTC)
    with open_store(url) as store:
        with store.run(given) as run:
            run.measured(measurement)
            run.sampled(samples)
        found = store.get(run.id, devices=True)
    assert found.facts == given
    assert found.measurements == (measurement,)
    assert found.devices == samples
    assert (found.status, found.error) == ("done", None)
    assert began <= found.created_at <= (found.finished_at or began) <= datetime.now(UTC)
    assert found.created_at.utcoffset() == timedelta(0)


def test_runs_are_found_by_number_place_commit_and_branch(url: str) -> None:
    with open_store(url) as store:
        for commit, branch in (("aaaa1111", "main"), ("bbbb2222", "faster"), ("bbbb2222", "faster")):
            with store.run(facts(commit=commit, branch=branch)):
                pass
        with pytest.raises(RuntimeError), store.run(facts(commit="bbbb2222", branch="faster")):
            raise RuntimeError("broken")
        ids = {name: store.get(name).id for name in ("1", "last", "last~2", "aaaa", "bbbb2222", "main", "faster")}
        assert ids == {"1": 1, "last": 4, "last~2": 2, "aaaa": 1, "bbbb2222": 3, "main": 1, "faster": 3}
        assert [run.id for run in store.runs()] == [1, 2, 3, 4]
        assert [run.id for run in store.runs(last=2)] == [3, 4]
        assert [run.id for run in store.runs(status="failed")] == [4]
        assert store.runs(model="another") == []


@pytest.mark.parametrize("name", ["7", "last~9", "cccc", "nowhere", "0", "'; --", "99999999999999999999", ""])
def test_no_such_run(url: str, name: str) -> None:
    with open_store(url) as store:
        with pytest.raises(MeasureError, match="the database is empty"):
            store.get(name)
        store.begin(facts())
        with pytest.raises(MeasureError, match=r"there is no run .*; the last one is 1"):
            store.get(name)


def test_numbers_that_are_not_finite_are_refused(url: str) -> None:
    with open_store(url) as store:
        with store.run(facts()) as run, pytest.raises(MeasureError, match=r"cannot be kept.*not JSON compliant"):
            run.measured({"median": float("nan")})
        assert store.get(run.id).measurements == ()


def test_times_are_kept_in_utc(url: str) -> None:
    east = timezone(timedelta(hours=9))
    moment = datetime(2026, 7, 1, 5, 0, tzinfo=east)
    with open_store(url) as store, store.run(facts()) as run:
        run.sampled([DeviceSample(moment, 1.0, 1)])
        assert store.get(run.id, devices=True).devices[0].time == datetime(2026, 6, 30, 20, 0, tzinfo=UTC)
    with open_store(url) as store, pytest.raises(MeasureError, match="has no time zone"), store.run(facts()) as run:
        run.sampled([DeviceSample(datetime(2026, 7, 1), 1.0, 1)])


# ---------------------------------------------------------------- runs that do not end well


def test_an_exception_marks_the_run_as_failed_and_keeps_what_was_measured(url: str) -> None:
    with open_store(url) as store:
        with pytest.raises(KeyboardInterrupt):
            interrupted(store)
        found = store.get("last")
    assert (found.status, found.error) == ("failed", "KeyboardInterrupt")
    assert found.measurements == ({"case": "first"},)
    assert found.finished_at is not None


def interrupted(store: Store) -> None:
    with store.run(facts()) as run:
        run.measured({"case": "first"})
        raise KeyboardInterrupt


def test_what_has_failed_never_becomes_a_success(url: str) -> None:
    with open_store(url) as store:
        with store.run(facts()) as run:
            store.fail(run.id, "decode: tokens differ")
            store.fail(run.id, "train: not finite")
        found = store.get(run.id)
        assert (found.status, found.error) == ("failed", "decode: tokens differ\ntrain: not finite")
        with pytest.raises(KeyboardInterrupt):
            failed_and_interrupted(store)
        assert store.get("last").error == "decode: tokens differ\nKeyboardInterrupt"


def failed_and_interrupted(store: Store) -> None:
    with store.run(facts()) as run:
        store.fail(run.id, "decode: tokens differ")
        raise KeyboardInterrupt


WRITER = """
import os, sys
from bench_stores import facts
from rewire.measure.store import open_store
with open_store(sys.argv[1]) as store, store.run(facts(model=sys.argv[2])) as run:
    for number in range(int(sys.argv[3])):
        run.measured({"writer": sys.argv[2], "number": number})
    if sys.argv[4:]:
        print("measured", flush=True)
        sys.stdin.read()
"""


def writer(url: str, *args: object, **kwargs: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WRITER, url, *map(str, args)]
    return subprocess.Popen(command, env=environment, text=True, **kwargs)


def test_a_killed_run_is_found_and_marked(url: str) -> None:
    with writer(url, "killed", 3, "wait", stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "measured\n"
        with open_store(url) as store:
            assert store.get("last").status == "running"  # it is alive, so it is left alone
        process.send_signal(signal.SIGKILL)
    with open_store(url, write=False) as store:
        found = store.get("last")
    assert found.status == "failed"
    assert "the process ended without saying so" in (found.error or "")
    assert len(found.measurements) == 3


def test_a_run_elsewhere_counts_as_lost_only_after_a_long_silence(url: str) -> None:
    with open_store(url) as store:
        number = store.begin(facts())
        elsewhere(store, number, datetime.now(UTC) - timedelta(minutes=5))
        assert store.mark_lost() == []
        elsewhere(store, number, datetime.now(UTC) - timedelta(minutes=11))
        assert store.mark_lost() == [number]
        assert store.get(number).status == "failed"
        store.end(number)  # it had only been suspended
        assert (store.get(number).status, store.get(number).error) == ("done", None)


def elsewhere(store: Any, number: int, heartbeat: datetime) -> None:
    with store.writing() as session:
        row = session.get(Benchmark, number)
        row.host, row.heartbeat = "another machine", heartbeat


# ---------------------------------------------------------------- several at once


def test_processes_write_side_by_side(url: str) -> None:
    count, each = 3, 25
    writers = [writer(url, f"writer {number}", each) for number in range(count)]  # all of them make the tables
    assert [one.wait(120) for one in writers] == [0] * count
    with open_store(url) as store:
        runs = store.runs()
        assert sorted(run.facts.model for run in runs) == [f"writer {number}" for number in range(count)]
        assert {run.status for run in runs} == {"done"}
        for run in runs:
            expected = tuple({"writer": run.facts.model, "number": number} for number in range(each))
            assert store.get(run.id).measurements == expected


def test_threads_make_and_use_one_store(url: str) -> None:
    def work(number: int) -> int:
        with open_store(url) as store, store.run(facts()) as run:
            run.measured({"number": number})
            return run.id

    with ThreadPoolExecutor(8) as pool:
        ids = list(pool.map(work, range(24)))
    assert sorted(ids) == list(range(1, 25))


# ---------------------------------------------------------------- schema


def test_tables_are_made_once(url: str) -> None:
    for _ in range(3):
        with open_store(url) as store, store.run(facts()):
            pass
    with open_store(url) as store:
        assert len(store.runs()) == 3
        with store.reading() as session:
            assert session.execute(text(f"SELECT COUNT(*) FROM {VERSION_TABLE}")).scalar_one() == len(STEPS)


def test_the_steps_make_the_tables_that_the_code_knows(url: str) -> None:
    with open_store(url) as store:
        seen = inspect(store.engine)
        assert set(seen.get_table_names()) == {*Base.metadata.tables, VERSION_TABLE}
        for name, table in Base.metadata.tables.items():
            found = {one["name"]: one for one in seen.get_columns(name)}
            assert list(found) == [column.name for column in table.columns]
            assert {k: v["nullable"] for k, v in found.items() if k != "id"} == {
                column.name: bool(column.nullable) for column in table.columns if column.name != "id"
            }
            compiled = {column.name: column.type.compile(store.engine.dialect) for column in table.columns}
            assert {k: v["type"].compile(store.engine.dialect) for k, v in found.items()} == compiled
            assert {one["name"] for one in seen.get_indexes(name)} == {index.name for index in table.indexes}


def test_an_older_database_is_brought_up_to_date(url: str) -> None:
    with open_store(url) as store, store.run(facts()):
        pass
    later = (*STEPS, ("ALTER TABLE benchmarks ADD COLUMN note TEXT", "UPDATE benchmarks SET note = 'kept'"))
    with open_store(url) as store:
        with store.writing() as session:
            assert migrate(session.connection(), later) == 1
        with store.writing() as session:
            assert migrate(session.connection(), later) == 0
            assert session.execute(text("SELECT note FROM benchmarks")).scalar_one() == "kept"


def test_a_step_that_fails_leaves_everything_as_it_was(url: str) -> None:
    broken = (*STEPS, ("ALTER TABLE benchmarks ADD COLUMN note TEXT", "UPDATE nothing_like_it SET a = 1"))
    with open_store(url) as store:
        with pytest.raises(Exception, match="nothing_like_it"), store.writing() as session:
            migrate(session.connection(), broken)
        assert "note" not in {column["name"] for column in inspect(store.engine).get_columns("benchmarks")}
        with store.reading() as session:
            assert version_of(session.connection()) == len(STEPS)


@pytest.mark.parametrize("write", [True, False])
def test_a_newer_schema_is_refused(url: str, write: bool) -> None:
    with open_store(url) as store, store.run(facts()):
        pass
    with raw(url) as connection:
        connection.execute(f"INSERT INTO {VERSION_TABLE} VALUES (99, 'later')")
    with pytest.raises(MeasureError, match=r"written by a newer Rewire \(schema 99; this one knows 1\).*update Rewire"):
        open_store(url, write=write)


def test_strangers_tables_are_not_taken_for_ours(url: str) -> None:
    with raw(url) as connection:
        connection.execute("CREATE TABLE benchmarks (name TEXT)")
    with pytest.raises(MeasureError, match="tables that are called like Rewire's but are not"):
        open_store(url)


# ---------------------------------------------------------------- databases that cannot be used


@contextmanager
def locked(url: str) -> Iterator[None]:
    connection = raw(url)
    if url.startswith("sqlite"):
        connection.execute("BEGIN EXCLUSIVE")
    else:
        connection.execute("BEGIN")
        connection.execute("LOCK TABLE benchmarks IN ACCESS EXCLUSIVE MODE")
    try:
        yield
    finally:
        connection.execute("ROLLBACK")
        connection.close()


def test_a_locked_database(url: str) -> None:
    with open_store(url):
        pass
    with locked(url), pytest.raises(MeasureError, match=r"is locked by another (process|session); wait"):
        open_store(url, timeout=0.3)


def test_a_lock_that_is_let_go_is_waited_for(url: str) -> None:
    with open_store(url):
        pass
    with ThreadPoolExecutor(1) as pool:
        with locked(url):
            waiting = pool.submit(begun, url)
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.5)
        assert waiting.result(timeout=20) == 1


def begun(url: str) -> int:
    with open_store(url, timeout=20) as store:
        return store.begin(facts())


def read_only(url: str) -> str:
    if url.startswith("sqlite"):
        return url.replace("sqlite:///", "sqlite:///file:") + "?mode=ro&uri=true"
    return f"{url}%20-cdefault_transaction_read_only%3Don"


def test_a_read_only_database_can_be_read(url: str) -> None:
    with open_store(url) as store, store.run(facts()) as run:
        run.measured({"a": 1})
    with pytest.raises(MeasureError, match="is read-only: results cannot be written"):
        begun(read_only(url))
    with open_store(read_only(url), write=False) as store:
        assert store.get("last").measurements == ({"a": 1},)


def test_no_server(tmp_path: Path) -> None:
    for place in (f"@/db?host={tmp_path}", "@127.0.0.1:1/db"):
        with pytest.raises(MeasureError, match=r"no PostgreSQL server answers at .*initdb -D DIR.*createdb NAME"):
            open_store(f"postgresql+psycopg://someone{place}")


def test_no_such_database(postgres: Path) -> None:
    url = make_url(postgres_url(postgres)).set(database="another")
    with pytest.raises(MeasureError, match="no database of this name; make it: createdb another"):
        open_store(url.render_as_string(False))


def test_passwords_are_not_shown() -> None:
    with pytest.raises(MeasureError) as caught:
        open_store("postgresql://someone:secret@127.0.0.1:1/db")
    assert "secret" not in str(caught.value)
    assert "someone:***@127.0.0.1:1" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mysql://host/db", "results are kept in SQLite"),
        ("sqlite:///:memory:", "would be gone at once"),
        ("://", "no URL of a database"),
        ("{tmp}/text.db", "is no SQLite database"),
        ("{tmp}/text.db/inside.db", "cannot be made"),
        ("{tmp}", "cannot be opened"),
    ],
)
def test_no_database_at_all(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "text.db").write_text("no database " * 100)
    with pytest.raises(MeasureError, match=said):
        open_store(name.format(tmp=tmp_path))


def test_reading_makes_no_database(tmp_path: Path) -> None:
    with pytest.raises(MeasureError, match=r"does not exist. Measure first"):
        open_store(tmp_path / "none.db", write=False)
    assert list(tmp_path.iterdir()) == []


def test_the_default_is_in_the_users_data_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_url() == f"sqlite:///{tmp_path}/rewire/bench.db"
    monkeypatch.setenv("XDG_DATA_HOME", "relative")  # which the standard says to ignore
    monkeypatch.setenv("HOME", "/home/someone")
    assert default_url() == "sqlite:////home/someone/.local/share/rewire/bench.db"
