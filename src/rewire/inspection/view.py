"""An inspection on the screen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.syntax import Syntax
from rich.text import Text
from rich.tree import Tree

from rewire.inspection.find import note
from rewire.inspection.patterns import runs
from rewire.inspection.record import EncoderReport, Family, Inspection, Node

_LONGEST = 32  # characters of the sizes of a module
_MOST_RUNS = 6  # runs of layer numbers


def view(found: Inspection) -> RenderableType:
    """Counts, the tree, the families, and a plan that would edit them."""
    parts: list[RenderableType] = [_title(found), Text(), _tree(found.tree), Text()]
    parts += [_heading("Projections found"), *_families(found.families)]
    if found.encoders is not None:
        parts += [Text(), _heading("Encoders"), *_encoders(found.encoders)]
    plan = found.plan
    if plan is not None:
        heading = Text.assemble(_heading("A plan that would edit them"), ("  (take what you need)", "dim"))
        parts += [Text(), heading, Syntax(plan.to_yaml().rstrip(), "yaml", background_color="default")]
    return Group(*parts)


def _heading(text: str) -> Text:
    return Text(text, style="bold")


def _title(found: Inspection) -> Text:
    counts = found.counts
    trainable = "all trainable" if counts.trainable == counts.parameters else f"{counts.trainable:,} trainable"
    text = Text.assemble((found.model, "bold"))
    if found.model_type:
        text.append(f" ({found.model_type})")
    text.append(f" · {counts.parameters:,} parameters, {trainable} · {_bytes(counts.bytes)}")
    text.append(f" {', '.join(found.dtypes)}")
    if found.plan_hash:
        text.append(f"\nedited by plan {found.plan_hash[:12]}", style="yellow")
    return text


def _tree(node: Node) -> Tree:
    branch = Tree(_label(node), guide_style="dim")
    _grow(branch, node, set())
    return branch


def _grow(branch: Tree, node: Node, shown: set[Node]) -> None:
    """Adds the children; what stands above already, but for its name, is not drawn again."""
    for child in node.children:
        nameless = replace(child, names=())
        if nameless in shown:
            branch.add(_label(child).append(" · as above", style="dim"))
            continue
        _grow(branch.add(_label(child)), child, shown)
        if child.children:
            shown.add(nameless)


def _label(node: Node) -> Text:
    text = Text.assemble((names(node.names), "bold"), no_wrap=False)
    between = " " if len(node.names) == 1 else " · " * bool(node.names)
    text.append(f"{between}{_times(node)}{node.module}", style="cyan")
    if node.detail:
        text.append(f" {_short(node.detail)}")
    if node.children and node.parameters:
        text.append(f" · {count(node.parameters)}{' each' if len(node.names) > 1 else ''}", style="dim")
    if node.note:
        text.append(f"  ◀ {node.note}", style="magenta" if node.note.startswith(("fused", "stacked")) else "green")
    return text


def _times(node: Node) -> str:
    return f"{len(node.names)} × " if len(node.names) > 1 else ""


def names(found: tuple[str, ...]) -> str:
    """Names of siblings in brief.

    >>> names(("0", "1", "2", "5")), names(("encoder",))
    ('0…2, 5', 'encoder')
    """
    if len(found) < 2:
        return "".join(found)
    drawn = runs(map(int, found), "…")
    return ", ".join(drawn if len(drawn) <= _MOST_RUNS else [*drawn[:3], "…", drawn[-1]])


def _short(text: str) -> str:
    """The beginning of a list, cut between two of its items.

    >>> _short("3, 768, kernel_size=(16, 16), stride=(16, 16)")
    '3, 768, kernel_size=(16, 16), …'
    """
    if len(text) <= _LONGEST:
        return text
    end = text.rfind(", ", 0, _LONGEST - 1)
    return f"{text[:end]}, …" if end > 0 else text[: _LONGEST - 1] + "…"


def _families(found: tuple[Family, ...]) -> Iterator[RenderableType]:
    if not found:
        yield Text(
            "  none: no fused or separate projections of attention or MLP are known here, and no experts", style="dim"
        )
    for family in found:
        yield _target(family)
        yield Padding(_facts(family), (0, 0, 0, 4), expand=False)


def _encoders(found: tuple[EncoderReport, ...]) -> Iterator[RenderableType]:
    if not found:
        yield Text("  none: no list of layers with attention in them", style="dim")
    for one in found:
        mark, colour = ("✗", "red") if one.refusal else ("✓", "green")
        text = Text.assemble((f"  {mark} ", colour), (one.path, "bold"))
        yield text.append(f" × {one.count}" if one.count > 1 else "")
        said = f"cannot be packed: {one.module}: {one.refusal}" if one.refusal else f"can be packed: {one.how}"
        said = said.replace(f"{one.module}: {one.module}: ", f"{one.module}: ")
        yield Padding(Text(said, style=colour), (0, 0, 0, 4), expand=False)


def _target(family: Family) -> Text:
    mark, colour = ("✗", "red") if family.refusal else ("✓", "green")
    text = Text.assemble((f"  {mark} ", colour), (family.path or "(the model itself)", "bold"))
    return text.append(f" × {family.count}" if family.count > 1 else "")


def _facts(family: Family) -> Text:
    text = Text(f"{note(family)}\n" if family.parts else "")
    text.append(_place(family), style="dim")
    says_more = family.layout or family.experts  # that of separate ones says the same again
    for line in family.evidence if says_more else ():
        text.append(f"\n{line}", style="dim")
    if family.refusal:
        text.append(f"\ncannot be edited: {family.refusal}", style="red")
    for kind in family.edit or ():
        but = ", but not in one plan with the edits above" if family.alone else ""
        text.append(f"\ncan be edited: {kind}{but}", style="green")
    return text


def _place(family: Family) -> str:
    kind = f"{family.module}, transposed," if family.transposed else family.module
    sizes = f" of {family.in_features:,} features" if family.in_features else ""
    return f"{kind}{sizes} in {family.owner}"


def count(number: int) -> str:
    """A number of parameters in brief.

    >>> count(768), count(22_713_216), count(6_607_343_616)
    ('768', '22.7 M', '6.61 B')
    """
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def _bytes(number: int) -> str:
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number} bytes"
