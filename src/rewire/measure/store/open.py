"""Opening a store: which database, connected how, and its schema brought up to date."""

from __future__ import annotations

import functools
import json
import os
import sqlite3
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError

from rewire.errors import MeasureError
from rewire.measure.store.migrations import STEPS, check_version, migrate, version_of
from rewire.measure.store.store import WRITING, Store
from rewire.measure.store.trouble import explain, explained, shown

TIMEOUT = 30.0
"""Seconds to wait for a lock."""

CONNECTING = 10
"""Seconds to wait for a server."""


def default_url() -> str:
    """The database where nobody names one: a file in the user's data directory."""
    return f"sqlite:///{data_folder() / 'bench.db'}"


def data_folder() -> Path:
    """Where programs of this user keep data (XDG_DATA_HOME on Linux, and what the others have for it)."""
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Application Support"
    else:
        given = os.environ.get("XDG_DATA_HOME", "")
        base = Path(given) if os.path.isabs(given) else Path.home() / ".local" / "share"
    return base / "rewire"


def open_store(
    database: str | os.PathLike[str] | None = None, *, write: bool = True, timeout: float = TIMEOUT
) -> Store:
    """Opens the store at a URL or in a file, and makes or updates its tables.

    Args:
        database: `sqlite:///FILE`, `postgresql+psycopg://USER@HOST/NAME`, or the name of a file; by default
            `default_url()`.
        write: whether anything will be written. Reading works where writing is not permitted, and does not make a
            database that is not there.
        timeout: seconds to wait for a lock of others.

    Raises:
        MeasureError: the database is locked, read-only, unreachable, of a newer schema, or none at all; the message
            says what to do.
    """
    url = as_url(database)
    _check_file(url, write)
    engine = _engine(url, timeout)
    store = Store(engine, url, write)
    try:
        with explained(url):
            if write:
                _prepare(store, timeout)
            else:
                _prepare_reading(store)
    except BaseException:
        engine.dispose()
        raise
    return store


def as_url(database: str | os.PathLike[str] | None) -> URL:
    """The URL of a database given as such, or as a file. Raises `MeasureError` for other engines."""
    given = os.fspath(database) if database is not None else default_url()
    given = given if "://" in given else f"sqlite:///{Path(given).expanduser()}"
    try:
        url = make_url(given)
    except (ArgumentError, ValueError) as error:
        raise MeasureError(f"--db {given} is no URL of a database: {error}") from error
    if url.drivername == "postgresql":
        return url.set(drivername="postgresql+psycopg")
    if url.drivername in ("sqlite", "sqlite+pysqlite", "postgresql+psycopg"):
        return url
    raise MeasureError(
        f"--db {url.drivername}://…: results are kept in SQLite (the name of a file) or in PostgreSQL "
        "(postgresql+psycopg://USER@HOST/NAME)"
    )


def _check_file(url: URL, write: bool) -> None:
    """The folder of a file is made for writing; what is not there cannot be read."""
    if url.get_backend_name() != "sqlite":
        return
    if not url.database or url.database == ":memory:":
        raise MeasureError("a database in memory would be gone at once; name a file with --db")
    if url.database.startswith("file:"):
        return  # a URI of SQLite's own, which says itself what may be made
    path = Path(url.database)
    if write:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MeasureError(f"the folder {path.parent} cannot be made: {error.strerror}") from error
    elif not path.is_file():
        raise MeasureError(f"there are no results: {path} does not exist. Measure first (rewire bench run MODEL)")


def _engine(url: URL, timeout: float) -> Engine:
    is_server = url.get_backend_name() == "postgresql"
    arguments: dict[str, Any] = {"connect_timeout": CONNECTING} if is_server else {"timeout": timeout}
    try:
        engine = create_engine(
            url,
            connect_args={**arguments, "check_same_thread": False} if not is_server else arguments,
            json_serializer=functools.partial(json.dumps, allow_nan=False, ensure_ascii=False),
        )
    except ModuleNotFoundError as error:
        raise MeasureError(
            f"{shown(url)} needs the package {error.name}; install Rewire "
            f"with its extra: pip install 'rewire[postgres]'"
        ) from error
    except NoSuchModuleError as error:
        raise MeasureError(f"--db {shown(url)}: {error}") from error
    _listen(engine, is_server, timeout)
    return engine


def _listen(engine: Engine, is_server: bool, timeout: float) -> None:
    """Every connection waits for locks, and SQLite's transactions begin where SQLAlchemy says so."""

    @event.listens_for(engine, "connect")
    def connected(connection: Any, record: Any) -> None:
        if is_server:
            connection.execute(f"SET lock_timeout = {round(timeout * 1000)}")
            connection.commit()
        else:
            connection.isolation_level = None  # else the driver begins transactions by itself, later
            connection.execute("PRAGMA foreign_keys = ON")

    @event.listens_for(engine, "begin")
    def begun(connection: Connection) -> None:
        if not is_server:
            # Whoever reads first and writes later cannot wait for a lock: two of these would wait for each other.
            writing = connection.get_execution_options().get(WRITING)
            connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")


def _prepare(store: Store, timeout: float) -> None:
    if store.url.get_backend_name() == "sqlite":
        _write_ahead(store.engine, timeout)
    with store.writing() as session:
        migrate(session.connection())
    store.mark_lost()


def _prepare_reading(store: Store) -> None:
    """A database that may be written is updated; another is read as it is."""
    with store.reading() as session:
        found = version_of(session.connection())
    check_version(found, len(STEPS))
    try:
        with store.writing() as session:
            migrate(session.connection())
        store.mark_lost()
    except DBAPIError as error:
        if found < len(STEPS) or not any(sign in str(error.orig) for sign in ("readonly", "read-only")):
            raise


def _write_ahead(engine: Engine, timeout: float) -> None:
    """Readers and one writer do not wait for each other. SQLite does not wait for the lock that this takes."""
    end = time.monotonic() + timeout
    while True:
        try:
            with closing(engine.raw_connection()) as connection:  # outside any transaction
                if connection.cursor().execute("PRAGMA journal_mode").fetchone()[0] != "wal":
                    connection.cursor().execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.Error as error:
            if "locked" not in str(error) or time.monotonic() > end:
                raise MeasureError(explain(engine.url, str(error))) from error
            time.sleep(0.05)
