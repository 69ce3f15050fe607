"""Results as one page that needs no network."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from rewire.errors import MeasureError, OutputError
from rewire.measure.bench.records import AFTER, BEFORE, CHECKED, FAILED, OMITTED, Figure, Measurement, measurements
from rewire.measure.bench.show import figure as figure_text
from rewire.measure.bench.show import mebibytes, memory, seconds
from rewire.measure.report.charts import Axes, Bar, Line, Point, bars, legend, lines
from rewire.measure.report.style import STYLE
from rewire.measure.store import DeviceSample, Run, Store

TREND = 50
"""Runs in the trend at most: the last ones."""

STYLES = {BEFORE: "s0", AFTER: "s1"}
_MANY = 200


def write_report(store: Store, name: str, path: Path) -> None:
    """Writes the page of a run, with the trend over the runs of the same model on the same device.

    Raises `MeasureError` where there is no such run, or nothing was measured in it; `OutputError` where the file cannot
    be written.
    """
    run = store.get(name, devices=True)
    if not measurements(run.measurements):
        raise MeasureError(f"nothing was measured in {run.name}, which is {run.status}: {run.error or 'no error'}")
    text = page(run, related(store, run))
    building = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        building.write_text(text, "utf-8")
        os.replace(building, path)
    except OSError as error:
        building.unlink(missing_ok=True)
        raise OutputError(f"{path} cannot be written: {error.strerror}") from error


def related(store: Store, run: Run) -> list[Run]:
    """The runs that `run` can be followed back to: of its model, on its device, done, up to itself."""
    known = [one for one in store.runs(model=run.facts.model) if one.status == "done" and one.id < run.id]
    alike = [one for one in known if one.facts.device == run.facts.device]
    return [*(store.get(one.id) for one in alike[-TREND + 1 :]), run]


def page(run: Run, trend: Sequence[Run]) -> str:
    """The whole page."""
    found = measurements(run.measurements)
    title = f"{run.facts.model}: {run.name}"
    body = "\n".join(
        [
            f"<header><h1>{escape(run.facts.model)}</h1>",
            *_head(run),
            "</header>",
            _section("Before and after the plan" if _has_plan(found) else "Times", [_times(one) for one in found]),
            _section("Throughput by batch size", list(_throughput(found))),
            _section("Peak memory", [_peaks(one) for one in found if any(s.peak_bytes for s in one.sides.values())]),
            _section("The machine meanwhile", list(_devices(run.devices))),
            _section("Over the commits", list(_trends(trend, found))),
            _table(found),
            _made_with(run),
        ]
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title>\n<style>\n{STYLE}\n</style></head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _has_plan(found: Sequence[Measurement]) -> bool:
    return any(AFTER in one.sides for one in found)


def _head(run: Run) -> Iterator[str]:
    facts = run.facts
    about = [run.name, facts.device, f"{run.created_at:%Y-%m-%d %H:%M} UTC", f"<b>{run.status}</b>"]
    yield f"<p>{' · '.join(escape(one) if '<' not in one else one for one in about)}</p>"
    if facts.message:
        yield f"<p class='soft'>{escape(' · '.join(one for one in (facts.branch, facts.message) if one))}</p>"
    if run.error:
        yield f"<p class='bad'>{escape(run.error)}</p>"
    for one in run.measurements:
        text = _note(one)
        if text:
            yield f"<p class='{'bad' if one['kind'] == FAILED else 'soft'}'>{escape(text)}</p>"


def _note(one: object) -> str:
    match one:
        case {"kind": kind, "suite": suite, "what": what, "difference": float(apart), "promise": promise} if (
            kind == CHECKED
        ):
            return f"{suite}: {what} of the two models agree, {apart:.1e} apart (the plan promises: {promise})"
        case {"kind": kind, "suite": suite, "case": case, "reason": reason} if kind == OMITTED:
            return f"not measured: {suite} {case}: {reason}".replace(" :", ":")
        case {"kind": kind, "suite": suite, "error": error} if kind == FAILED:
            return f"{suite} failed: {error}"
    return ""


def _section(title: str, cards: Sequence[str]) -> str:
    inside = "\n".join(f'<div class="card">{card}</div>' for card in cards)
    return f'<section><h2>{escape(title)}</h2>\n<div class="cards">{inside}</div></section>' if cards else ""


# ---------------------------------------------------------------- one run


def _times(one: Measurement) -> str:
    drawn = bars([_bar(side, figure) for side, figure in one.sides.items()], f"seconds of {one.title}")
    return f"<h3>{escape(one.title)}</h3>{drawn}{_verdict(one)}"


def _bar(side: str, figure: Figure) -> Bar:
    spread = figure.spread
    return Bar(side, STYLES[side], spread.median, spread.lower, spread.upper, figure_text(figure))


def _verdict(one: Measurement) -> str:
    ratio = one.ratio
    if ratio is None:
        return ""
    interval = "" if ratio.low is None else f" (95 % interval {ratio.low:.3f}–{ratio.high:.3f})"
    return f"<p><b>{ratio.value:.3f}</b> times as fast{interval}</p>"


def _peaks(one: Measurement) -> str:
    known = [(side, figure.peak_bytes) for side, figure in one.sides.items() if figure.peak_bytes is not None]
    drawn = bars(
        [Bar(side, STYLES[side], peak, peak, peak, mebibytes(peak)) for side, peak in known],
        f"peak bytes of {one.title}",
    )
    saving = one.memory_saving
    text = "" if saving is None else f"<p><b>{saving:+.1%}</b> saved</p>"
    return f"<h3>{escape(one.title)}</h3>{drawn}{text}"


def _throughput(found: Sequence[Measurement]) -> Iterator[str]:
    """A plot for each case that was measured with several batch sizes; a line for each side and share of padding."""
    cases: dict[tuple[str, str, str], list[Measurement]] = {}
    for one in found:
        if one.unit and isinstance(one.labels.get("batch"), int):
            cases.setdefault((one.suite, one.case, one.unit), []).append(one)
    for (suite, case, unit), group in cases.items():
        batches = sorted({int(one.labels["batch"]) for one in group})
        if len(batches) > 1:
            drawn = _by_batch(group)
            axes = Axes([(batch, str(batch)) for batch in batches], _short, "batch size", is_log=True)
            names = legend([(line.name, line.style) for line in drawn])
            title = f"{suite} · {case}: {unit} per second"
            yield f"<h3>{escape(title)}</h3>{names}{lines(drawn, axes, title)}"


def _by_batch(group: Sequence[Measurement]) -> list[Line]:
    series: dict[str, list[Point]] = {}
    for one in sorted(group, key=lambda one: one.labels["batch"]):
        for side in one.sides:
            rate, spread = one.rate(side) or 0.0, one.sides[side].spread
            share = one.labels.get("padding")
            name = side if share is None else f"{side}, {float(share):.0%} padding"
            title = f"{name}, batch {one.labels['batch']}: {rate:,.0f} {one.unit}/s"
            point = Point(float(one.labels["batch"]), rate, title, one.work / spread.upper, one.work / spread.lower)
            series.setdefault(name, []).append(point)
    return [Line(name, f"s{number % 6}", points) for number, (name, points) in enumerate(series.items())]


def _short(value: float) -> str:
    """
    >>> _short(1234567.0), _short(25000.0), _short(12.5), _short(0.0)
    ('1.23 M', '25 k', '12.5', '0')
    """
    for factor, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= factor:
            return f"{value / factor:.3g}{unit}"
    return f"{value:.3g}"


def _devices(samples: Sequence[DeviceSample]) -> Iterator[str]:
    if len(samples) < 2:
        return
    yield _over_time("memory of the process", samples, [one.memory for one in samples], memory, "s1")
    yield _over_time("processor (100 % is one core)", samples, [one.cpu for one in samples], _percent, "s3")
    if all(one.gpu is not None for one in samples):
        yield _over_time("GPU", samples, [one.gpu or 0.0 for one in samples], _percent, "s4")
        yield _over_time("memory of the GPU", samples, [one.gpu_memory or 0 for one in samples], memory, "s5")


def _percent(value: float) -> str:
    return f"{value:.0f} %"


def _over_time(title: str, samples: Sequence[DeviceSample], values: Sequence[float], text: object, style: str) -> str:
    assert callable(text)
    start = samples[0].time
    kept = range(0, len(samples), max(1, len(samples) // _MANY))
    moments = [(samples[number].time - start).total_seconds() for number in kept]
    points = [
        Point(moment, values[number], f"{moment:.1f} s: {text(values[number])}")
        for moment, number in zip(moments, kept, strict=True)
    ]
    step = 1.0 if text is not memory else 2.0**30 if max(values) >= 2**30 else 2.0**20
    whole = [(share * moments[-1], f"{share * moments[-1]:.0f} s") for share in (0.0, 0.5, 1.0)]
    drawn = lines([Line(title, style, points, is_dense=True)], Axes(whole, text, height=170, step=step), title)
    return f"<h3>{escape(title)}, at most {escape(text(max(values)))}</h3>{drawn}"


# ---------------------------------------------------------------- many runs


def _trends(runs: Sequence[Run], found: Sequence[Measurement]) -> Iterator[str]:
    """A plot for each case of the last run that earlier ones have measured too."""
    if len(runs) < 2:
        return
    known = [(run, {one.key: one for one in measurements(run.measurements)}) for run in runs]
    for one in found:
        having = [(number, run, cases[one.key]) for number, (run, cases) in enumerate(known) if one.key in cases]
        if len(having) > 1:
            yield _trend(one.title, having)


def _trend(title: str, having: Sequence[tuple[int, Run, Measurement]]) -> str:
    drawn = [
        Line(
            side,
            STYLES[side],
            [_place(number, run, one.sides[side]) for number, run, one in having if side in one.sides],
        )
        for side in (BEFORE, AFTER)
        if any(side in one.sides for _, _, one in having)
    ]
    ticks = [(float(number), (run.facts.commit or f"run {run.id}")[:7]) for number, run, _ in having]
    names = legend([(line.name, line.style) for line in drawn])
    return f"<h3>{escape(title)}</h3>{names}{lines(drawn, Axes(ticks, seconds), f'{title} over the commits')}"


def _place(number: int, run: Run, figure: Figure) -> Point:
    spread = figure.spread
    title = f"{run.name}: {seconds(spread.median)}; {run.facts.message or ''}"
    return Point(float(number), spread.median, title, spread.lower, spread.upper)


# ---------------------------------------------------------------- tables


def _table(found: Sequence[Measurement]) -> str:
    heads = ("case", "before", "after", "ratio", "95 % interval", "peak before", "peak after", "saved")
    head = "".join(f"<th{' class=number' if number else ''}>{name}</th>" for number, name in enumerate(heads))
    rows = "\n".join(f"<tr><td>{escape(one.title)}</td>{''.join(_cells(one))}</tr>" for one in found)
    return (
        "<section><h2>All figures</h2>\n<p class='soft'>Medians. A ratio of more than 1 is faster after the plan.</p>"
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table></div></section>'
    )


def _cells(one: Measurement) -> Iterator[str]:
    sides = [one.sides.get(side) for side in (BEFORE, AFTER)]
    ratio, saving = one.ratio, one.memory_saving
    texts = [seconds(side.spread.median) if side is not None else "" for side in sides]
    texts += ["" if ratio is None else f"{ratio.value:.3f}"]
    texts += ["" if ratio is None or ratio.low is None else f"{ratio.low:.3f}–{ratio.high:.3f}"]
    texts += ["" if side is None or side.peak_bytes is None else mebibytes(side.peak_bytes) for side in sides]
    texts += ["" if saving is None else f"{saving:+.1%}"]
    yield from (f'<td class="number">{escape(text)}</td>' for text in texts)


def _made_with(run: Run) -> str:
    facts = {"plan": run.facts.plan_hash, "commit": run.facts.commit, **run.facts.machine, **run.facts.settings}
    rows = "".join(
        f"<dt>{escape(str(key))}</dt><dd>{escape(str(value))}</dd>"
        for key, value in facts.items()
        if value not in (None, [], {})
    )
    return f"<section><h2>Made with</h2>\n<dl>{rows}</dl></section>"
