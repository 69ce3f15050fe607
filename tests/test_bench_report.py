"""What is made of results: comparisons, the gate, the page in a real browser, the dashboard's SQL on both engines."""

from __future__ import annotations

import json
import re
import sqlite3
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import make_url

import browser
from bench_stores import facts, fill, measurement
from cli_runner import BERT, JOIN, config, write_plan
from cli_runner import rewire as run
from rewire.errors import MeasureError
from rewire.measure.bench.compare import compare_runs, gate, parse_share
from rewire.measure.report.charts import Bar, bars
from rewire.measure.report.panels import MODELS_QUERY, PANELS, POSTGRES, SQLITE
from rewire.measure.store import open_store

pytest_plugins = ["bench_fixtures"]


def test_a_run_of_the_command_goes_into_either_database(url: str, tmp_path: Path) -> None:
    plan = write_plan(tmp_path, JOIN)
    effort = ["--suite", "encode", "--batch", 2, "--tokens", 8, "--repeats", 3, "--seconds", 0, "--warm-ups", 0]
    done = run("bench", *config("bert", BERT), "--plan", plan, *effort, "--db", url, "--json")
    assert done.code == 0, done.err
    found = run("bench", "show", "last", "--db", url, "--json").json
    assert found == {**done.json, "devices": found["devices"]}
    assert [one["kind"] for one in found["measurements"]] == ["checked", "timed", "timed"]
    assert found["devices"][-1]["memory"] > 2**20
    assert run("bench", "report", "--html", tmp_path / "a.html", "--db", url).code == 0


# ---------------------------------------------------------------- two runs


def kept(url: str, *found: Any, **about: Any) -> int:
    with open_store(url) as store, store.run(facts(**about)) as run:
        for one in found:
            run.measured(one.to_dict())
        return run.id


def two(url: str, base: list[Any], head: list[Any], **about: Any) -> tuple[Any, Any]:
    ids = kept(url, *base), kept(url, *head, **about)
    with open_store(url) as store:
        return store.get(ids[0]), store.get(ids[1])


def test_comparison(url: str) -> None:
    base, head = two(url, [measurement(0.1)], [measurement(0.12, faster=1.5)], settings={"batch": [2]})
    found = compare_runs(base, head)
    before, after = found.rows
    assert (before.title, before.side) == ("encode · forward · batch 1 · padding 0% · tokens 128", "before")
    assert before.slowdown.value == pytest.approx(1.2)
    assert after.slowdown.value == pytest.approx(1.2 * 1.25 / 1.5)
    assert before.slowdown.low <= 1.2 <= before.slowdown.high
    assert before.memory == 1.0
    assert found.differences == ("batch: [1] → [2]",)


def test_a_gate_lets_pass_what_is_not_slower(url: str) -> None:
    base, head = two(url, [measurement(0.1)], [measurement(0.104)])
    assert gate(base, head, 0.05).passed
    assert [row.side for row in gate(base, head, 0.03).offending] == ["before", "after"]
    assert gate(head, base, 0.0).passed  # faster


def test_a_gate_does_not_take_noise_for_a_slowdown(url: str) -> None:
    noisy, one = measurement(0.1), measurement(0.1).to_dict()
    for side in ("before", "after"):
        one[side]["samples"] = [0.05, 0.08, 0.125, 0.13, 0.30]
    base, head = two(url, [noisy], [type(noisy).from_dict(one)])
    verdict = gate(base, head, 0.05)
    assert verdict.comparison.rows[0].slowdown.value > 1.05
    assert verdict.passed


def test_a_gate_misses_what_is_no_longer_measured(url: str) -> None:
    both = [measurement(0.1), measurement(0.2, batch=8)]
    base, head = two(url, both, both[:1])
    assert [row.title for row in gate(base, head, 0.5).offending] == [" · ".join(both[1].key)] * 2
    assert gate(head, base, 0.5).passed  # new cases do not offend


def test_a_gate_does_not_judge_single_samples(url: str) -> None:
    def once(seconds: float) -> Any:
        data = measurement(0.1).to_dict()
        for side in ("before", "after"):
            data[side]["samples"] = [seconds]
        return type(measurement(1)).from_dict(data)

    base, head = two(url, [once(1.0)], [once(9.0)])
    assert (gate(base, head, 0.05).passed, len(gate(base, head, 0.05).unjudged)) == (True, 2)


def test_what_cannot_be_compared(url: str) -> None:
    base, head = two(url, [measurement(0.1)], [measurement(0.1, batch=64)])
    with pytest.raises(MeasureError, match="have no case in common"):
        compare_runs(base, head)
    with pytest.raises(MeasureError, match="is one run; comparing takes two"):
        compare_runs(base, base)


def test_the_gate_on_the_command_line(url: str) -> None:
    fill(url)
    slower = run("bench", "gate", "aaaa", "cccc", "--max-slowdown", "5%", "--db", url)
    assert slower.code == 1
    assert "failed: 10 of 10 rows are more than 5.0% slower" in slower.err
    assert slower.out.count("1.210 (") == 10
    passed = run("bench", "gate", "aaaa", "cccc", "--max-slowdown", "25%", "--db", url)
    assert (passed.code, passed.err) == (0, "")
    judged = run("bench", "gate", "aaaa", "cccc", "--max-slowdown", "0.05", "--db", url, "--json")
    assert judged.json["passed"] is False
    failed = run("bench", "gate", "aaaa", "last", "--db", url)
    assert failed.code == 2
    assert "is failed and no measurement to compare with: train: not finite" in " ".join(failed.err.split())
    assert run("bench", "gate", "aaaa", "9999", "--db", url).code == 2


@given(share=st.floats(0, 99, allow_nan=False))
def test_shares(share: float) -> None:
    assert parse_share(str(share)) == share
    assert parse_share(f" {share}% ") == pytest.approx(share / 100)


# ---------------------------------------------------------------- the page


@pytest.fixture(scope="module")
def chromium() -> str:
    found = browser.find()
    if found is None:
        pytest.skip("no Chromium is installed (scripts/install_test_services.sh installs it)")
    return found


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    fill(str(folder / "bench.db"))
    done = run("bench", "report", "--html", folder / "report.html", "--run", "cccc", "--db", folder / "bench.db")
    assert done.code == 0, done.err
    return folder / "report.html"


def test_the_page_needs_nothing_else(page: Path) -> None:
    text = page.read_text("utf-8")
    assert re.findall(r"https?://|src=|@import|url\(|<script|<link", text) == []
    assert "Change &lt;2&gt; &amp; more" in text  # and nothing that was measured is taken for markup
    assert "<2>" not in text


def sections(text: str) -> dict[str, str]:
    found = re.findall(r"<section><h2>(.*?)</h2>(.*?)</section>", text, re.DOTALL)
    return dict(found)


def values(text: str, mark: str) -> list[float]:
    return [float(one) for one in re.findall(rf'<{mark} [^>]*data-value="([^"]+)"', text)]


def test_the_browser_shows_the_values(page: Path, chromium: str, tmp_path: Path) -> None:
    parts = sections(browser.dom(chromium, page, tmp_path))
    sizes = [(1, 0.0), (8, 0.0), (8, 0.5), (32, 0.0), (32, 0.5)]
    before = [0.010 * batch**0.8 * 1.21 for batch, _ in sizes]
    times = values(parts["Before and after the plan"], "rect")
    assert times[::2] == pytest.approx(before)
    assert times[1::2] == pytest.approx([one / 1.25 for one in before])
    assert "<b>1.250</b> times as fast (95 % interval 1.250–1.250)" in parts["Before and after the plan"]
    assert "12.1 (12.0–12.2) ms" in parts["Before and after the plan"]
    rates = [128 * batch * (1 - padding) / (0.010 * batch**0.8 * 1.21) for batch, padding in sizes]
    plotted = values(parts["Throughput by batch size"], "circle")
    assert sorted(plotted) == pytest.approx(sorted([*rates, *(1.25 * rate for rate in rates)]))
    assert values(parts["Peak memory"], "rect") == [400 * 2**20, 300 * 2**20] * 5
    assert "<b>+25.0%</b> saved" in parts["Peak memory"]
    machine = parts["The machine meanwhile"]
    assert values(machine, "circle")[:20] == [(500 + 10 * step) * 2**20 for step in range(20)]
    assert "memory of the process, at most 690 MiB" in machine
    assert "GPU, at most 30 %" in machine
    trend = values(parts["Over the commits"], "circle")
    assert trend[:3] == pytest.approx([0.010, 0.011, 0.0121])
    assert all(commit in parts["Over the commits"] for commit in ("aaaaaaa", "bbbbbbb", "ccccccc"))
    assert "BertModel is no decoder" in page.read_text("utf-8")


OVERFLOW = """(d, w) => ({
  over: d.documentElement.scrollWidth - w.innerWidth,
  small: Math.min(...[...d.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height)),
  outside: [...d.querySelectorAll('svg text')].filter(t => {
    const b = t.getBoundingClientRect(), c = t.closest('.card').getBoundingClientRect();
    return b.left < c.left || b.right > c.right }).length,
  columns: getComputedStyle(d.querySelector('.cards')).gridTemplateColumns.split(' ').length })"""


@pytest.mark.parametrize(("width", "columns"), [(390, 1), (320, 1), (1280, 3)])
def test_the_page_fits_a_phone_and_a_wide_screen(
    page: Path, chromium: str, tmp_path: Path, width: int, columns: int
) -> None:
    found = browser.measured(chromium, page, tmp_path, OVERFLOW, width=width)
    assert found["over"] <= 0  # nothing has to be scrolled sideways
    assert found["outside"] == 0
    assert found["small"] >= 9
    assert found["columns"] == columns


COLOURS = """(d, w) => { const of = (s, p) => w.getComputedStyle(d.querySelector(s))[p]; return {
  page: of('body', 'backgroundColor'), ink: of('body', 'color'), card: of('.card', 'backgroundColor'),
  text: of('svg text', 'fill'), soft: of('svg text.soft', 'fill'),
  before: of('rect.s0', 'fill'), after: of('rect.s1', 'fill') } }"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_can_be_read_in_the_light_and_in_the_dark(
    page: Path, chromium: str, tmp_path: Path, scheme: str
) -> None:
    found = browser.measured(chromium, page, tmp_path, COLOURS, width=800, scheme=scheme)
    light = {name: brightness(colour) for name, colour in found.items()}
    assert (light["page"] > 0.5) == (scheme == "light")
    assert contrast(light["ink"], light["page"]) >= 7
    assert contrast(light["text"], light["card"]) >= 7
    assert contrast(light["soft"], light["card"]) >= 4.5
    assert min(contrast(light[side], light["card"]) for side in ("before", "after")) >= 3
    assert found["before"] != found["after"]


def brightness(colour: str) -> float:
    """Relative luminance, as WCAG 2 defines it."""
    parts = [int(one) / 255 for one in re.findall(r"\d+", colour)[:3]]
    linear = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in parts]
    return sum(weight * one for weight, one in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: float, other: float) -> float:
    high, low = max(one, other), min(one, other)
    return (high + 0.05) / (low + 0.05)


@given(shares=st.lists(st.floats(0.001, 1000), min_size=1, max_size=6))
def test_bars_are_as_long_as_their_values(shares: list[float]) -> None:
    drawn = bars([Bar("a", "s0", one, one, one, "") for one in shares], "label")
    lengths = [float(one) for one in re.findall(r'width="([\d.]+)"', drawn)]
    assert lengths == pytest.approx([340 * one / max(shares) for one in shares], abs=0.01)


def test_nothing_to_report(tmp_path: Path) -> None:
    database = tmp_path / "bench.db"
    with open_store(database) as store:
        store.fail(store.begin(facts()), "load: broken")
    done = run("bench", "report", "--html", tmp_path / "a.html", "--db", database)
    assert done.code == 2
    assert "nothing was measured in run 1" in done.err
    assert not (tmp_path / "a.html").exists()


# ---------------------------------------------------------------- the dashboard


def expanded(sql: str, models: list[str]) -> str:
    """As Grafana fills a statement in before it sends it: the range of time, and the models that were chosen."""
    start, end = datetime(2020, 1, 1, tzinfo=UTC), datetime(2100, 1, 1, tzinfo=UTC)
    between = f"BETWEEN '{start:%Y-%m-%dT%H:%M:%SZ}' AND '{end:%Y-%m-%dT%H:%M:%SZ}'"
    sql = re.sub(r"\$__timeFilter\((.*?)\)", rf"\1 {between}", sql)
    sql = sql.replace("$__from", str(int(start.timestamp() * 1000))).replace("$__to", str(int(end.timestamp() * 1000)))
    quoted = ",".join("'" + model.replace("'", "''") + "'" for model in models)
    return sql.replace("${model:sqlstring}", quoted)


def asked(url: str, sql: str) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Columns and rows, by the driver alone."""
    if url.startswith("sqlite"):
        connection: Any = sqlite3.connect(f"file:{url.removeprefix('sqlite:///')}?mode=ro", uri=True)
    else:
        connection = psycopg.connect(url.replace("+psycopg", ""))
    try:
        cursor = connection.execute(sql)
        return [one[0] for one in cursor.description], cursor.fetchall()
    finally:
        connection.close()


@pytest.mark.parametrize("panel", PANELS, ids=lambda one: one.title)
def test_every_panel_finds_its_rows(url: str, panel: Any) -> None:
    fill(url)
    dialect = SQLITE if url.startswith("sqlite") else POSTGRES
    sql = panel.statement(dialect)
    columns, rows = asked(url, expanded(sql, ["config:gpt2", "it's another"]))
    assert re.search(r"\$\{|\$__", expanded(sql, [])) is None
    assert rows
    if panel.format == "time_series":
        assert columns == ["time", "metric", "value"]
        assert all(isinstance(row[0], int if dialect is SQLITE else datetime) for row in rows)
        assert all(isinstance(row[1], str) and isinstance(row[2], int | float) for row in rows)
        assert rows == sorted(rows, key=lambda row: row[0])
    assert panel.kind == "stat" or asked(url, expanded(sql, ["no such model"]))[1] == []


def test_panels_show_what_was_measured(url: str) -> None:
    fill(url)
    dialect = SQLITE if url.startswith("sqlite") else POSTGRES
    found = {one.title: asked(url, expanded(one.statement(dialect), ["config:gpt2"]))[1] for one in PANELS}
    assert [row[0] for row in found["Runs"]] == [4, 3, 2, 1]
    assert found["Runs by status"] == [(4, 1, 0)]
    before = [row[2] for row in found["Seconds before the plan, over the runs"] if "batch 1 " in row[1]]
    assert sorted(before) == pytest.approx([0.010, 0.011, 0.0121])
    ratios = found["How many times as fast after the plan, with the 95 % interval"]
    assert len(ratios) == 15
    assert ratios[0][4:] == pytest.approx((1.25, 1.25, 1.25, 0.25))
    throughput = found["Throughput by batch size, last run of each model"]
    assert [row[0] for row in throughput] == [
        f"encode · forward · batch {batch} · padding {share}"
        for batch, share in ((1, "0.0"), (8, "0.0"), (8, "0.5"), (32, "0.0"), (32, "0.5"))
    ]
    assert throughput[0][1] == pytest.approx(128 / 0.0121)
    assert {row[2] for row in found["Memory of the process"]} == {(500 + 10 * step) * 2**20 for step in range(20)}
    assert asked(url, MODELS_QUERY)[1] == [("config:gpt2",)]


def test_the_dashboards_files(url: str, tmp_path: Path) -> None:
    done = run("bench", "dashboard", "--grafana", tmp_path / "grafana", "--db", url)
    assert done.code == 0, done.err
    source = yaml.safe_load((tmp_path / "grafana/provisioning/datasources/rewire.yaml").read_text("utf-8"))
    (data_source,) = source["datasources"]
    provider = yaml.safe_load((tmp_path / "grafana/provisioning/dashboards/rewire.yaml").read_text("utf-8"))
    assert provider["providers"][0]["type"] == "file"
    board = json.loads((tmp_path / "grafana/dashboards/rewire.json").read_text("utf-8"))
    kind = "frser-sqlite-datasource" if url.startswith("sqlite") else "grafana-postgresql-datasource"
    assert data_source["type"] == kind
    assert [panel["title"] for panel in board["panels"]] == [panel.title for panel in PANELS]
    assert len({panel["id"] for panel in board["panels"]}) == len(PANELS)
    for panel in board["panels"]:
        assert panel["datasource"] == {"type": kind, "uid": data_source["uid"]}
        assert panel["targets"][0]["queryText" if url.startswith("sqlite") else "rawSql"]
    assert overlaps([panel["gridPos"] for panel in board["panels"]]) == []


def overlaps(places: list[dict[str, int]]) -> list[Any]:
    taken: dict[tuple[int, int], int] = {}
    found = []
    for number, place in enumerate(places):
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert x < 24
                found += [(taken[x, y], number)] if (x, y) in taken else []
                taken[x, y] = number
    return found


def test_passwords_are_not_written(tmp_path: Path) -> None:
    url = "postgresql+psycopg://someone:secret@db.example:5433/results"
    assert run("bench", "dashboard", "--grafana", tmp_path, "--db", url).code == 0
    written = "".join(path.read_text("utf-8") for path in tmp_path.rglob("*.*") if path.is_file())
    assert "secret" not in written
    source = yaml.safe_load((tmp_path / "provisioning/datasources/rewire.yaml").read_text("utf-8"))["datasources"][0]
    assert (source["url"], source["user"], source["jsonData"]["database"]) == ("db.example:5433", "someone", "results")
    assert make_url(url).password == "secret"


# ---------------------------------------------------------------- without torch


@pytest.mark.parametrize("words", [["list"], ["show", "1"], ["gate", "1", "2"], ["export", "--csv"]], ids=" ".join)
def test_looking_at_results_needs_no_torch(words: list[str], tmp_path: Path) -> None:
    database = tmp_path / "bench.db"
    fill(str(database))
    code = (
        "import sys\nfrom rewire.cli import main\n"
        f"sys.argv = ['rewire', 'bench', *{words!r}, '--db', {str(database)!r}]\n"
        "try:\n    main()\nfinally:\n    print(sorted({'torch', 'transformers'} & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == "[]"
    assert done.returncode == (1 if words[0] == "gate" else 0)
