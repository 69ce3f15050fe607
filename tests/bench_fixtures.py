"""Fixtures for tests of the benchmark store; a test file names this module in `pytest_plugins`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bench_stores import postgres_url
from postgres_server import NoServer, server

ENGINES = ["sqlite", "postgres"]


@pytest.fixture(scope="session")
def postgres() -> Iterator[Path]:
    """The folder with the socket of a running PostgreSQL server; skips, with the reason, where there is none."""
    try:
        with server() as folder:
            yield folder
    except NoServer as reason:
        pytest.skip(str(reason))


@pytest.fixture(params=ENGINES)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'bench.db'}"
    return postgres_url(request.getfixturevalue("postgres"))
