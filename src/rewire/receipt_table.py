"""The receipt as tables for the screen."""

from __future__ import annotations

from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from rewire.receipts import Counts, Receipt, summarise

_COLOURS = {"changed": "green", "refused": "red", "unmatched": "yellow"}


def receipt_table(receipt: Receipt) -> Group:
    """Decisions (layers alike in one row), then counts before and after."""
    title = f"{receipt.how} · {receipt.model} · plan {(receipt.plan_hash or 'without hash')[:12]}"
    return Group(Text(title, style="bold"), _decisions(receipt), _counts(receipt), Text(_footer(receipt), "dim"))


def _decisions(receipt: Receipt) -> Table:
    table = Table("edit", "where", "places", "outcome", "what", box=None, pad_edge=False)
    for decision, places in summarise(receipt.decisions):
        colour = _COLOURS[decision.outcome]
        table.add_row(
            f"{decision.edit} {decision.kind}",
            escape(decision.path or decision.target),
            str(places),
            f"[{colour}]{decision.outcome}[/]",
            escape(decision.detail),
        )
    return table


def _counts(receipt: Receipt) -> Table:
    table = Table("", "parameters", "trainable", "share", "bytes", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for when, counts in (("before", receipt.before), ("after", receipt.after)):
        table.add_row(when, *_cells(counts))
    return table


def _cells(counts: Counts) -> tuple[str, ...]:
    share = f"{counts.trainable_share:.4%}"
    return f"{counts.parameters:,}", f"{counts.trainable:,}", share, f"{counts.bytes:,}"


def _footer(receipt: Receipt) -> str:
    return (
        f"{len(receipt.tensors)} tensor groups · {receipt.seconds:.2f} s · largest change "
        f"{receipt.largest_change_bytes / 2**20:.1f} MiB · peak memory {receipt.peak_rss_bytes / 2**20:.0f} MiB"
    )
