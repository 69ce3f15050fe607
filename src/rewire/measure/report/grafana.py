"""A dashboard for Grafana: a data source, a provider of dashboards, and the dashboard itself.

The files are read by Grafana's provisioning (https://grafana.com/docs/grafana/latest/administration/provisioning/).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from sqlalchemy import URL

from rewire.errors import OutputError
from rewire.measure.report.panels import MODELS_QUERY, PANELS, POSTGRES, SERIES, SQLITE, Dialect, Panel

SOURCE = {"sqlite": "frser-sqlite-datasource", "postgresql": "grafana-postgresql-datasource"}
"""Types of data sources: a plugin of the community for SQLite, and one that Grafana comes with."""

UID = "rewire-bench"
_PASSWORD = "$REWIRE_BENCH_PASSWORD"
_PATH = "/etc/grafana/dashboards"


def write_dashboard(folder: Path, url: URL) -> list[Path]:
    """Writes the files for the database at `url` into `folder`; returns their paths.

    The password is not written: Grafana takes it from the environment variable REWIRE_BENCH_PASSWORD. Raises
    `OutputError` where the files cannot be written.
    """
    dialect = SQLITE if url.get_backend_name() == "sqlite" else POSTGRES
    files = {
        "provisioning/datasources/rewire.yaml": _yaml({"apiVersion": 1, "datasources": [data_source(url)]}),
        "provisioning/dashboards/rewire.yaml": _yaml({"apiVersion": 1, "providers": [_provider()]}),
        "dashboards/rewire.json": json.dumps(dashboard(dialect), indent=1, ensure_ascii=False) + "\n",
    }
    written = []
    for name, text in files.items():
        path = folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")
        except OSError as error:
            raise OutputError(f"{path} cannot be written: {error.strerror}") from error
        written.append(path)
    return written


def _yaml(data: dict[str, Any]) -> str:
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)


def data_source(url: URL) -> dict[str, Any]:
    """Where Grafana finds the results."""
    common = {"name": "Rewire benchmarks", "uid": UID, "type": SOURCE[url.get_backend_name()], "access": "proxy"}
    if url.get_backend_name() == "sqlite":
        path = str(Path(url.database or "").absolute())
        return {**common, "jsonData": {"path": path}}
    host = url.host or str(url.query.get("host", "localhost"))
    return {
        **common,
        "url": host if host.startswith("/") else f"{host}:{url.port or 5432}",
        "user": url.username or "",
        "secureJsonData": {"password": _PASSWORD},
        "jsonData": {"database": url.database or "", "sslmode": str(url.query.get("sslmode", "disable"))},
    }


def _provider() -> dict[str, Any]:
    return {"name": "Rewire", "type": "file", "allowUiUpdates": True, "options": {"path": _PATH}}


def dashboard(dialect: Dialect) -> dict[str, Any]:
    """The dashboard with all panels."""
    return {
        "uid": "rewire-bench",
        "title": "Rewire benchmarks",
        "tags": ["rewire"],
        "schemaVersion": 39,
        "editable": True,
        "time": {"from": "now-90d", "to": "now"},
        "timezone": "utc",
        "templating": {"list": [_model_variable(dialect)]},
        "panels": [_panel(number + 1, panel, dialect) for number, panel in enumerate(PANELS)],
    }


def _source(dialect: Dialect) -> dict[str, str]:
    return {"type": SOURCE[dialect.name], "uid": UID}


def _model_variable(dialect: Dialect) -> dict[str, Any]:
    """The choice of models: several, at first all."""
    query: Any = MODELS_QUERY
    if dialect is SQLITE:
        query = {"rawQueryText": MODELS_QUERY, "queryText": MODELS_QUERY, "queryType": "table", "timeColumns": []}
    return {
        "name": "model",
        "label": "Model",
        "type": "query",
        "datasource": _source(dialect),
        "query": query,
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def _panel(number: int, panel: Panel, dialect: Dialect) -> dict[str, Any]:
    x, y, width, height = panel.place
    return {
        "id": number,
        "title": panel.title,
        "type": panel.kind,
        "datasource": _source(dialect),
        "gridPos": {"x": x, "y": y, "w": width, "h": height},
        "fieldConfig": {"defaults": {"unit": panel.unit}, "overrides": []},
        "options": dict(panel.options),
        "targets": [{"refId": "A", "datasource": _source(dialect), **_query(panel, dialect)}],
    }


def _query(panel: Panel, dialect: Dialect) -> dict[str, Any]:
    """The statement as the data source wants it."""
    sql = panel.statement(dialect)
    if dialect is POSTGRES:
        return {"rawSql": sql, "rawQuery": True, "format": panel.format, "editorMode": "code"}
    kind = "time series" if panel.format == SERIES else "table"
    return {"rawQueryText": sql, "queryText": sql, "queryType": kind, "timeColumns": ["time"]}
