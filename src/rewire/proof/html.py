"""A proof as one page that needs no network, readable on a phone and in the dark."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from html import escape

from rewire.proof.divergence import ModuleDifference
from rewire.proof.names import split_layer
from rewire.proof.report import Check, Group, Proof, grouped, show

# Cividis: one hue order for every kind of colour vision, dark to light as differences grow.
COLOURS = ("#00224e", "#1b3a6b", "#414d6b", "#5f636e", "#7c7b78", "#9b9476", "#bdaf6e", "#e0cb5e", "#fee838")
LOWEST = -16
"""Power of ten at the dark end; the light end is 1."""

STYLE = """
:root { color-scheme: light dark;
  --ink: #1a1a1a; --page: #fff; --line: #ccc; --soft: #666; --good: #00629b; --bad: #b34700 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --page: #16181b; --line: #444; --soft: #a0a0a0; --good: #6cb8f0; --bad: #ff9a52 } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  margin: 0 auto; padding: 1rem; max-width: 64rem; overflow-wrap: anywhere }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem } h3 { font-size: 1rem }
.good { color: var(--good) } .bad { color: var(--bad); font-weight: 600 } .soft { color: var(--soft) }
details { border-bottom: 1px solid var(--line); padding: .3rem 0 } summary { cursor: pointer }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .85rem; overflow-wrap: normal }
th, td { text-align: left; vertical-align: top; padding: .25rem .5rem; border-bottom: 1px solid var(--line) }
td.name { min-width: 11rem } td.detail { min-width: 14rem; overflow-wrap: anywhere }
td.number { white-space: nowrap }
table.heat th { font-weight: 400; white-space: nowrap; position: sticky; left: 0; background: var(--page) }
table.heat td, table.heat thead th { padding: 0 .2rem; min-width: 1.7rem; height: 1.7rem; font-size: .75rem;
  text-align: center; vertical-align: middle; font-variant-numeric: tabular-nums }
table.heat thead th:not(:first-child) { position: static }
table.heat td { border: 1px solid var(--page) }
table.heat td.beyond { outline: 2px solid var(--bad); outline-offset: -2px; font-weight: 700 }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; font-size: .85rem } dd { margin: 0 }
""".strip()


def page(proof: Proof) -> str:
    """The whole page.

    >>> text = page(Proof("Tiny", "exact", (Check("outputs", True, 0.0, 1e-5),), 0.0))
    >>> text.startswith("<!doctype html>"), "http" in text
    (True, False)
    """
    body = "\n".join(
        [
            f"<h1>{_verdict(proof)} {escape(proof.model)}</h1>",
            f"<p>{escape(proof.summary())}</p>",
            _checks(proof.checks),
            _heat_maps(proof),
            _listing("Inputs", proof.cases),
            _listing("Inputs that the untouched model does not take", proof.skipped),
            _environment(proof),
        ]
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Proof: {escape(proof.model)}</title>\n<style>\n{STYLE}\n</style></head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _verdict(proof: Proof) -> str:
    word = "passed" if proof.passed else "failed"
    return f'<span class="{_class(proof.passed)}">{_mark(proof.passed)} {word}</span>'


def _mark(is_good: bool) -> str:
    return "✓" if is_good else "✗"


def _class(is_good: bool) -> str:
    return "good" if is_good else "bad"


def _checks(checks: Iterable[Check]) -> str:
    return "\n".join(["<h2>Checks</h2>", *(_group(group) for group in grouped(checks))])


def _group(group: Group) -> str:
    """One line that opens on a table of its checks; open already where one failed."""
    worst = group.worst
    rows = "\n".join(_check_row(one) for one in group.checks)
    heading = "<tr><th></th><th>check</th><th>value</th><th>limit</th><th>detail</th></tr>"
    return (
        f"<details{'' if group.passed else ' open'}><summary>"
        f'<span class="{_class(group.passed)}">{_mark(group.passed)} {escape(group.title)}</span> '
        f'<span class="soft">{show(worst.value)} ({escape(worst.limit)})</span></summary>\n'
        f'<div class="wide"><table>{heading}\n{rows}\n</table></div></details>'
    )


def _check_row(one: Check) -> str:
    return (
        f'<tr><td class="{_class(one.passed)}">{_mark(one.passed)}</td>'
        f'<td class="name">{escape(one.name)}</td>'
        f'<td class="number">{show(one.value)}</td><td class="number">{escape(one.limit)}</td>'
        f'<td class="detail">{escape(one.detail)}</td></tr>'
    )


def _heat_maps(proof: Proof) -> str:
    if not proof.module_differences:
        return ""
    limit = next((one.tolerance for one in proof.checks if one.name.startswith("outputs")), math.inf)
    stacks: dict[str, list[ModuleDifference]] = {}
    for one in proof.module_differences:
        stacks.setdefault(split_layer(one.path)[0], []).append(one)
    parts = [_stack(name, found, limit) for name, found in stacks.items() if name]
    parts += [_outside(stacks[""], limit)] if "" in stacks else []
    return "\n".join(["<h2>Differences per module</h2>", _legend(), *parts])


def _legend() -> str:
    cells = "".join(
        _coloured(10.0 ** (LOWEST + 2 * index), math.inf, f"about 1e{LOWEST + 2 * index}")
        for index in range(len(COLOURS))
    )
    return (
        "<p>Largest relative difference of a module’s output over all inputs, as a power of ten. "
        "A dot means equal bit for bit; a frame, beyond the tolerance.</p>\n"
        f'<table class="heat" aria-label="scale"><tr>{cells}</tr></table>'
    )


def _stack(name: str, found: Sequence[ModuleDifference], limit: float) -> str:
    """One map: a row per place inside a layer, a column per layer."""
    cells = {split_layer(one.path)[1:]: one for one in found}
    layers = sorted({layer for layer, _ in cells if layer is not None})
    places = list(dict.fromkeys(place for _, place in cells))
    head = "".join(f"<th>{layer}</th>" for layer in layers)
    rows = "\n".join(
        f"<tr><th>{escape(place or '(whole layer)')}</th>"
        + "".join(_cell(cells.get((layer, place)), limit) for layer in layers)
        + "</tr>"
        for place in places
    )
    return (
        f'<h3>{escape(name)}</h3>\n<div class="wide"><table class="heat">'
        f"<thead><tr><th>layer</th>{head}</tr></thead>\n<tbody>{rows}</tbody></table></div>"
    )


def _outside(found: Iterable[ModuleDifference], limit: float) -> str:
    rows = "\n".join(f"<tr><th>{escape(one.path or '(model)')}</th>{_cell(one, limit)}</tr>" for one in found)
    return f'<h3>outside the layers</h3>\n<div class="wide"><table class="heat">{rows}</table></div>'


def _cell(one: ModuleDifference | None, limit: float) -> str:
    if one is None:
        return "<td></td>"
    label = f"{one.path or 'model'} ({one.kind}): {show(one.difference)}"
    return _coloured(one.difference, limit, label)


def _coloured(value: float, limit: float, label: str) -> str:
    beyond = ' class="beyond"' if value > limit else ""
    title = escape(label, quote=True)
    if value == 0:
        return f'<td title="{title}" aria-label="{title}">·</td>'
    power = 0 if math.isinf(value) else round(math.log10(value))
    level = min(max((power - LOWEST) * (len(COLOURS) - 1) // -LOWEST, 0), len(COLOURS) - 1)
    ink = "#fff" if level < len(COLOURS) // 2 else "#000"
    text = "∞" if math.isinf(value) else "≥1" if value >= 1 else f"{power}".replace("-", "−")
    style = f"background:{COLOURS[level]};color:{ink}"
    return f'<td{beyond} style="{style}" title="{title}" aria-label="{title}">{text}</td>'


def _listing(heading: str, texts: Iterable[str]) -> str:
    items = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return f"<h2>{heading}</h2>\n<ul>{items}</ul>" if items else ""


def _environment(proof: Proof) -> str:
    return f"<h2>Made with</h2>\n<dl>{''.join(_environment_rows(proof))}</dl>"


def _environment_rows(proof: Proof) -> Iterator[str]:
    yield f"<dt>seconds</dt><dd>{proof.seconds:.1f}</dd>"
    for key, value in proof.environment.items():
        yield f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>"
