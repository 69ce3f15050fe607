"""The panels of the dashboard: what they show, and the SQL for it on each engine.

The statements differ only in how a value is taken out of JSON, how a moment becomes what Grafana reads, and how the
range of time is named: `Dialect` holds these three.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SERIES, TABLE = "time_series", "table"


@dataclass(frozen=True)
class Dialect:
    """How the statements of one engine are spelled."""

    name: str

    def json(self, path: str) -> str:
        """A text inside `m.measurements`, by a path such as `before.median`."""
        parts = path.split(".")
        if self.name == "sqlite":
            return f"json_extract(m.measurements, '$.{path}')"
        return f"(m.measurements #>> '{{{','.join(parts)}}}')"

    def number(self, path: str) -> str:
        """A number there."""
        return self.json(path) if self.name == "sqlite" else f"{self.json(path)}::double precision"

    def moment(self, column: str) -> str:
        """A column of times, as Grafana reads them."""
        return f"CAST(strftime('%s', {column}) AS INTEGER)" if self.name == "sqlite" else column

    def within(self, column: str) -> str:
        """Whether a time is in the range that the dashboard shows."""
        if self.name == "sqlite":
            return f"{self.moment(column)} BETWEEN $__from / 1000 AND $__to / 1000"
        return f"$__timeFilter({column})"


SQLITE, POSTGRES = Dialect("sqlite"), Dialect("postgresql")

_NAME = "{suite} || ' · ' || {case} || COALESCE(' · batch ' || {batch}, '') || COALESCE(' · padding ' || {padding}, '')"
_MODELS = "b.model IN (${model:sqlstring})"


@dataclass(frozen=True)
class Panel:
    """One panel.

    Attributes:
        title: its heading.
        kind: Grafana's name for its type.
        format: `time_series` (columns time, metric, value) or `table`.
        sql: the statement, with the words of a dialect in braces.
        place: x, y, width and height on a grid 24 wide.
        unit: Grafana's name of the unit.
        options: further settings of the panel.
    """

    title: str
    kind: str
    format: str
    sql: str
    place: tuple[int, int, int, int]
    unit: str = "short"
    options: Mapping[str, Any] = field(default_factory=dict)

    def statement(self, dialect: Dialect) -> str:
        """The SQL for an engine."""
        text = dialect.json
        words = {
            "name": _NAME.format(
                suite=text("suite"), case=text("case"), batch=text("labels.batch"), padding=text("labels.padding")
            ),
            "kind": text("kind"),
            "unit": text("unit"),
            "batch": dialect.number("labels.batch"),
            "padding": text("labels.padding"),
            "before": dialect.number("before.median"),
            "after": dialect.number("after.median"),
            "rate_before": dialect.number("before.rate"),
            "rate_after": dialect.number("after.rate"),
            "peak_before": dialect.number("before.peak_bytes"),
            "peak_after": dialect.number("after.peak_bytes"),
            "ratio": dialect.number("ratio.value"),
            "low": dialect.number("ratio.low"),
            "high": dialect.number("ratio.high"),
            "saving": dialect.number("memory_saving"),
            "models": _MODELS,
            "created": dialect.moment("b.created_at"),
            "created_within": dialect.within("b.created_at"),
            "time": dialect.moment("d.time"),
            "time_within": dialect.within("d.time"),
        }
        return self.sql.format(**words)


_MEASURED = "FROM benchmarks b JOIN model_measurements m ON m.benchmark_id = b.id"
_TIMED = "{kind} = 'timed' AND {models} AND {created_within}"

PANELS: tuple[Panel, ...] = (
    Panel(
        "Runs",
        "table",
        TABLE,
        'SELECT b.id AS run, {created} AS time, b.status, b.model, b.device, b.branch, b."commit", b.message, '
        "b.plan_hash, b.error FROM benchmarks b WHERE {models} AND {created_within} ORDER BY b.id DESC",
        (0, 0, 18, 8),
    ),
    Panel(
        "Runs by status",
        "stat",
        TABLE,
        "SELECT COUNT(*) AS runs, COALESCE(SUM(CASE WHEN b.status = 'failed' THEN 1 ELSE 0 END), 0) AS failed, "
        "COALESCE(SUM(CASE WHEN b.status = 'running' THEN 1 ELSE 0 END), 0) AS running "
        "FROM benchmarks b WHERE {models} AND {created_within}",
        (18, 0, 6, 8),
    ),
    Panel(
        "Seconds before the plan, over the runs",
        "timeseries",
        SERIES,
        "SELECT {created} AS time, {name} AS metric, {before} AS value "
        f"{_MEASURED} WHERE {_TIMED} AND {{before}} IS NOT NULL ORDER BY 1, 2",
        (0, 8, 12, 9),
        "s",
    ),
    Panel(
        "Seconds after the plan, over the runs",
        "timeseries",
        SERIES,
        "SELECT {created} AS time, {name} AS metric, {after} AS value "
        f"{_MEASURED} WHERE {_TIMED} AND {{after}} IS NOT NULL ORDER BY 1, 2",
        (12, 8, 12, 9),
        "s",
    ),
    Panel(
        "How many times as fast after the plan, with the 95 % interval",
        "table",
        TABLE,
        "SELECT b.id AS run, {name} AS measured, {before} AS before_s, {after} AS after_s, {ratio} AS ratio, "
        "{low} AS low, {high} AS high, {saving} AS memory_saving "
        f"{_MEASURED} WHERE {_TIMED} AND {{ratio}} IS NOT NULL ORDER BY b.id DESC, 2",
        (0, 17, 14, 9),
    ),
    Panel(
        "Throughput by batch size, last run of each model",
        "barchart",
        TABLE,
        "SELECT {name} AS measured, {rate_before} AS before, {rate_after} AS after "
        f"{_MEASURED} WHERE {_TIMED} AND {{unit}} <> '' AND b.id IN "
        "(SELECT MAX(id) FROM benchmarks WHERE status = 'done' GROUP BY model) ORDER BY b.id, {batch}, {padding}",
        (14, 17, 10, 9),
        options={"xField": "measured"},
    ),
    Panel(
        "Peak memory after the plan (before it, where there is none)",
        "timeseries",
        SERIES,
        "SELECT {created} AS time, {name} AS metric, COALESCE({peak_after}, {peak_before}) AS value "
        f"{_MEASURED} WHERE {_TIMED} AND {{peak_before}} IS NOT NULL ORDER BY 1, 2",
        (0, 26, 12, 9),
        "bytes",
    ),
    Panel(
        "Memory of the process",
        "timeseries",
        SERIES,
        "SELECT {time} AS time, 'run ' || b.id AS metric, d.memory AS value FROM benchmarks b "
        "JOIN device_measurements d ON d.benchmark_id = b.id WHERE {models} AND {time_within} ORDER BY 1",
        (12, 26, 12, 9),
        "bytes",
    ),
    Panel(
        "Processor (100 % is one core)",
        "timeseries",
        SERIES,
        "SELECT {time} AS time, 'run ' || b.id AS metric, d.cpu AS value FROM benchmarks b "
        "JOIN device_measurements d ON d.benchmark_id = b.id WHERE {models} AND {time_within} ORDER BY 1",
        (0, 35, 12, 8),
        "percent",
    ),
    Panel(
        "GPU: use in per cent",
        "timeseries",
        SERIES,
        "SELECT {time} AS time, 'run ' || b.id AS metric, d.gpu AS value FROM benchmarks b "
        "JOIN device_measurements d ON d.benchmark_id = b.id "
        "WHERE {models} AND {time_within} AND d.gpu IS NOT NULL ORDER BY 1",
        (12, 35, 6, 8),
        "percent",
    ),
    Panel(
        "GPU: memory in use",
        "timeseries",
        SERIES,
        "SELECT {time} AS time, 'run ' || b.id AS metric, d.gpu_memory AS value FROM benchmarks b "
        "JOIN device_measurements d ON d.benchmark_id = b.id "
        "WHERE {models} AND {time_within} AND d.gpu_memory IS NOT NULL ORDER BY 1",
        (18, 35, 6, 8),
        "bytes",
    ),
)

MODELS_QUERY = "SELECT DISTINCT model FROM benchmarks ORDER BY model"
"""What the dashboard's choice of models offers."""
