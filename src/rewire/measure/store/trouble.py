"""What the errors of a database mean, and what to do about them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import URL
from sqlalchemy.exc import DBAPIError, SQLAlchemyError, StatementError

from rewire.errors import MeasureError

START_ONE = (
    "start one, as by 'initdb -D DIR' and 'pg_ctl -D DIR -l DIR/log start' (or a container of the image postgres), "
    "make the database with 'createdb NAME', and name it as --db postgresql+psycopg://USER@HOST:PORT/NAME. Without "
    "--db the results go to a file, for which no server is needed"
)

_SQLITE = (
    ("database is locked", "is locked by another process; wait until that is done, or name another file with --db"),
    ("readonly database", "is read-only: results cannot be written; make it writable, or name another with --db"),
    ("unable to open database file", "cannot be opened; does its folder exist, and may you write there?"),
    ("file is not a database", "is no SQLite database; name another file with --db"),
    ("database disk image is malformed", "is damaged; restore it from a copy, or name another file with --db"),
    ("disk is full", "cannot be written: the disk is full"),
    ("already exists", "has tables that are called like Rewire's but are not; name another database with --db"),
    ("no such table", "has no tables of Rewire's yet: nothing was measured into it"),
)
_POSTGRES = (
    ("lock timeout", "is locked by another session; wait until that is done"),
    ("read-only transaction", "is read-only: results cannot be written"),
    ("password authentication failed", "refuses the password; give the right one in the URL or in ~/.pgpass"),
    ("no password supplied", "wants a password; give it in the URL or in ~/.pgpass"),
    ("permission denied", "may not be used so by this user; grant the right, or name another user in the URL"),
    ("already exists", "has tables that are called like Rewire's but are not; name another database with --db"),
)
_MISSING = ('database "', "does not exist")
_UNREACHABLE = (
    "connection failed",
    "connection is bad",
    "could not connect",
    "could not translate",
    "failed to resolve",
    "timeout expired",
)


@contextmanager
def explained(url: URL) -> Iterator[None]:
    """Errors of the database at `url` become a `MeasureError` that says what to do."""
    try:
        yield
    except DBAPIError as error:
        raise MeasureError(explain(url, str(error.orig or error))) from error
    except (StatementError, ValueError) as error:  # the database was not even asked
        raise MeasureError(f"this cannot be kept in {shown(url)}: {getattr(error, 'orig', error)}") from error
    except SQLAlchemyError as error:
        raise MeasureError(f"the database {shown(url)} cannot be used: {_first(str(error))}") from error


def explain(url: URL, text: str) -> str:
    """The message for what a database has said.

    >>> from sqlalchemy import make_url
    >>> explain(make_url("sqlite:///runs.db"), "attempt to write a readonly database")
    'the database runs.db is read-only: results cannot be written; make it writable, or name another with --db'
    """
    is_server = url.get_backend_name() == "postgresql"
    for sign, meaning in _POSTGRES if is_server else _SQLITE:
        if sign in text:
            return f"the database {shown(url)} {meaning}"
    if is_server and all(part in text for part in _MISSING):
        return f"the server of {shown(url)} has no database of this name; make it: createdb {url.database}"
    if is_server and any(sign in text for sign in _UNREACHABLE):
        return f"no PostgreSQL server answers at {shown(url)} ({_first(text)}); {START_ONE}"
    return f"the database {shown(url)} cannot be used: {_first(text)}"


def shown(url: URL) -> str:
    """How a database is called in messages: the file, or the URL without its password."""
    if url.get_backend_name() == "sqlite":
        return str(url.database)
    return url.render_as_string(hide_password=True)


def _first(text: str) -> str:
    return (text.strip() or "no message").splitlines()[0]
