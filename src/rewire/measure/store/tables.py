"""The tables, the same on SQLite and PostgreSQL. `migrations` makes them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import JSON, BigInteger, DateTime, Dialect, Double, ForeignKey, Integer, Text, TypeDecorator
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

RUNNING, DONE, FAILED = "running", "done", "failed"
"""What a run may be."""

Json = JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")


class Utc(TypeDecorator[datetime]):
    """A moment, aware and in UTC; SQLite, which has no such type, keeps the text of the UTC time."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """To UTC; a time without a zone is refused, for nobody knows which it is."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"{value} has no time zone")
        moment = value.astimezone(UTC)
        return moment if dialect.name == "postgresql" else moment.replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """To an aware time in UTC."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Base(DeclarativeBase):
    """All tables."""


class Benchmark(Base):
    """One run of `rewire bench`."""

    __tablename__ = "benchmarks"

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    branch: Mapped[str | None] = mapped_column(Text)
    commit: Mapped[str | None] = mapped_column("commit", Text, quote=True, index=True)  # a keyword of SQLite
    message: Mapped[str | None] = mapped_column(Text)
    model: Mapped[str] = mapped_column(Text, index=True)
    plan: Mapped[Any | None] = mapped_column(Json)
    plan_hash: Mapped[str | None] = mapped_column(Text)
    device: Mapped[str] = mapped_column(Text)
    suites: Mapped[Any] = mapped_column(Json)
    settings: Mapped[Any] = mapped_column(Json)
    machine: Mapped[Any] = mapped_column(Json)
    status: Mapped[str] = mapped_column(Text, index=True)
    error: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(Utc)
    heartbeat: Mapped[datetime] = mapped_column(Utc)
    finished_at: Mapped[datetime | None] = mapped_column(Utc)
    host: Mapped[str] = mapped_column(Text)
    process: Mapped[int] = mapped_column(Integer)
    process_started: Mapped[float] = mapped_column(Double)


class DeviceMeasurement(Base):
    """What the machine was doing at one moment of a run. Bytes and per cent; the GPU's are NULL without one."""

    __tablename__ = "device_measurements"

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    benchmark_id: Mapped[int] = mapped_column(ForeignKey("benchmarks.id", ondelete="CASCADE"), index=True)
    cpu: Mapped[float] = mapped_column(Double)
    memory: Mapped[int] = mapped_column(BigInteger)
    gpu: Mapped[float | None] = mapped_column(Double)
    gpu_memory: Mapped[int | None] = mapped_column(BigInteger)
    time: Mapped[datetime] = mapped_column(Utc)


class ModelMeasurement(Base):
    """One thing that was measured, as data (see `rewire.measure.bench.records`)."""

    __tablename__ = "model_measurements"

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    benchmark_id: Mapped[int] = mapped_column(ForeignKey("benchmarks.id", ondelete="CASCADE"), index=True)
    measurements: Mapped[Any] = mapped_column(Json)
    time: Mapped[datetime] = mapped_column(Utc)
