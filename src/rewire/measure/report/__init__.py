"""Results for people: a page with plots, and a dashboard for Grafana."""

from rewire.measure.report.grafana import write_dashboard
from rewire.measure.report.page import write_report

__all__ = ["write_report", "write_dashboard"]
