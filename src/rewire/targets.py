"""The small language in which a plan says *where*: globs over module paths.

```
vision_encoder.layers.*.attn.qkv    `*` stands for anything within one level, `?` for one character
vision_encoder.**                   `**` stands for any number of levels, none included
layers.[0-11].mlp                   a whole level in brackets counts: 0, 1, … 11 (also `[0,2,4-6]`, `[!0-3]`)
layers.*.{q,k}_proj                 `{…}` lists alternatives
layer[1-4].*.conv[!3]               elsewhere brackets are a set of characters, as in fnmatch
**:Linear                           a class name (a glob too) after the colon
@attention(vision_encoder.**)       every attention that detection finds, narrowed to a part of the model
```

Matching is done by one compiled regular expression per target. It cannot backtrack for long: everything
before the last star is matched in atomic groups. For globs that is enough: the first match is as good as any.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from rewire.errors import PlanError

#: What `@…` may name. Detection (see `families`) decides which modules these are.
STRUCTURAL = ("attention", "mlp", "experts", "encoder")

_MAX_TEXT = 2_000  # characters of one target
_MAX_DEPTH = 8  # brackets within brackets
_MAX_ALTERNATIVES = 256  # after multiplying out every `{…}`
_MAX_RANGE = 4_096  # numbers in one `[…]`
_MAX_REGEX = 100_000  # characters, so that a hostile plan cannot stall the compiler

_HELP = (
    "a target is a path such as `encoder.layers.*.attn`, with `*` (within a level), `**` (levels), "
    "`[0-5]` (numbered levels), `{a,b}` (either), an optional `:ClassName`, or one of "
    + ", ".join(f"`@{name}`" for name in STRUCTURAL)
)


@dataclass(frozen=True)
class Target:
    """One parsed target. Make it with `Target.parse`.

    >>> target = Target.parse("layers.[0-1].attn:*Attention")
    >>> [target.path_matches(path) for path in ("layers.1.attn", "layers.2.attn", "layers.1.attn.q")]
    [True, False, False]
    >>> target.class_matches(["BertAttention", "Module"])
    True
    >>> Target.parse("@attention(vision.**)").structural
    'attention'
    """

    text: str
    glob: str
    structural: str | None = None
    class_glob: str | None = None
    _path: re.Pattern[str] = field(default=re.compile(""), repr=False, compare=False)
    _class: re.Pattern[str] | None = field(default=None, repr=False, compare=False)

    @staticmethod
    @functools.lru_cache(maxsize=1024)  # a pure function; edits parse their target each time they are asked
    def parse(text: str) -> Target:
        """Read a target; raise `PlanError` with what is allowed if it is malformed.

        The empty text is the model itself.
        """
        try:
            return _parse(text)
        except _Malformed as error:
            raise PlanError(f"target {_shorten(text)!r}: {error}; {_HELP}") from None

    def path_matches(self, path: str) -> bool:
        """Whether the glob matches this whole path. `""`, the model itself, is matched by `**` and `""` only.

        For a structural target this is the narrowing alone: `@mlp(encoder.**)` matches all of `encoder`.
        """
        return self._path.fullmatch(path and path + ".") is not None

    def class_matches(self, names: Iterable[str]) -> bool:
        """Whether the class part fits any of these names: those of a module's class and of its bases."""
        return self._class is None or any(self._class.fullmatch(name) for name in names)

    def nearest(self, paths: Iterable[str], n: int = 5) -> list[str]:
        """The `n` existing paths that look most like this target, one for each family of numbered paths.

        >>> Target.parse("encoder.layers.*.atn").nearest(["encoder.layers.0.attn", "encoder.layers.1.attn"])
        ['encoder.layers.0.attn']
        """
        first_of: dict[str, str] = {}
        for path in paths:
            if path:
                first_of.setdefault(_generalise(path), path)
        wanted = [alternative.split(".") for alternative in list(_alternatives(self.glob))[:16]]
        if self.structural is not None:
            wanted = [[*(s for s in segments if s != "**"), self.structural] for segments in wanted]
        score = {general: max(_likeness(segments, general) for segments in wanted) for general in first_of}
        best = sorted(first_of, key=lambda general: (-score[general], len(general), general))
        return [first_of[general] for general in best[:n]]

    def __str__(self) -> str:
        """The target as it was written."""
        return self.text


class _Malformed(Exception):
    """What is wrong with a target, without saying which one."""


def _parse(text: str) -> Target:
    if len(text) > _MAX_TEXT:
        raise _Malformed(f"longer than {_MAX_TEXT} characters")
    if blank := re.search(r"\s", text):
        raise _Malformed(f"blank {blank.group()!r} at position {blank.start()}")
    place, class_glob = _cut_class(text)
    structural, glob = _cut_structural(place) if place.startswith("@") else (None, place)
    if class_glob is not None and not place:
        raise _Malformed(f"no path before the class; write `**:{class_glob}` for every place")
    class_pattern = None if class_glob is None else _class_regex(class_glob)
    return Target(text, glob, structural, class_glob, _path_regex(glob), class_pattern)


def _cut_class(text: str) -> tuple[str, str | None]:
    """Split `path:Class` at the colon that stands outside all brackets."""
    colons = [position for position, character, depth in _scan(text) if character == ":" and depth == 0]
    if not colons:
        return text, None
    if len(colons) > 1:
        raise _Malformed("more than one `:`")
    class_glob = text[colons[0] + 1 :]
    if not class_glob:
        raise _Malformed("no class name after `:`")
    return text[: colons[0]], class_glob


def _cut_structural(place: str) -> tuple[str, str]:
    """Split `@attention(glob)` into its two parts; without parentheses the glob is `**`."""
    found = re.fullmatch(r"@(\w*)(?:\((.*)\))?", place)
    name = found.group(1) if found else re.match(r"@(\w*)", place).group(1)  # type: ignore[union-attr]
    if name not in STRUCTURAL:
        close = difflib.get_close_matches(name, STRUCTURAL, 1)
        raise _Malformed(f"unknown `@{name}`" + (f"; did you mean `@{close[0]}`?" if close else ""))
    if found is None:
        raise _Malformed(f"after `@{name}` only `(glob)` and `:ClassName` may stand")
    if found.group(2) == "":
        raise _Malformed("nothing between the parentheses")
    return name, "**" if found.group(2) is None else found.group(2)


def _scan(text: str) -> Iterator[tuple[int, str, int]]:
    """Every character with the number of brackets open around it; refuse those that do not pair."""
    closers: list[str] = []
    for position, character in enumerate(text):
        if closers[-1:] == ["]"] and not re.fullmatch(r"[\w,!\]-]", character):
            raise _Malformed(f"`{character}` at position {position} may not stand inside `[…]`")
        if character in "[{(":
            closers.append({"[": "]", "{": "}", "(": ")"}[character])
            if len(closers) > _MAX_DEPTH:
                raise _Malformed(f"brackets nested more than {_MAX_DEPTH} deep")
        elif closers and character == closers[-1]:
            closers.pop()
            yield position, character, len(closers) + 1
            continue
        elif character in "]})":
            raise _Malformed(f"`{character}` at position {position} closes nothing")
        yield position, character, len(closers)
    if closers:
        raise _Malformed(f"a `{closers[-1]}` is missing")


def _alternatives(glob: str) -> Iterator[str]:
    """Multiply out `{a,b}`: `x.{a,b}` gives `x.a` and `x.b`."""
    inside = [(position, character) for position, character, depth in _scan(glob) if depth == 1]
    opening = next((position for position, character in inside if character == "{"), None)
    if opening is None:
        yield glob
        return
    closing = next(position for position, character in inside if character == "}" and position > opening)
    commas = [position for position, character in inside if character == "," and opening < position < closing]
    edges = [opening, *commas, closing]
    for start, end in itertools.pairwise(edges):
        yield from _alternatives(glob[:opening] + glob[start + 1 : end] + glob[closing + 1 :])


def _few_alternatives(glob: str) -> list[str]:
    found: list[str] = []
    for alternative in _alternatives(glob):
        found.append(alternative)
        if len(found) > _MAX_ALTERNATIVES:
            raise _Malformed(f"`{{…}}` stands for more than {_MAX_ALTERNATIVES} alternatives")
    return found


def _path_regex(glob: str) -> re.Pattern[str]:
    """The regex of a path glob. The path to match gets a dot added, so that every level ends in one."""
    if not glob:
        return re.compile("")
    return _compile(_levels_regex(alternative) for alternative in _few_alternatives(glob))


def _class_regex(glob: str) -> re.Pattern[str]:
    if "." in glob or "**" in glob or "(" in glob:
        raise _Malformed(f"`{glob}` is no class name: write the bare name, with `*` for any part of it")
    return _compile(_name_regex(alternative) for alternative in _few_alternatives(glob))


def _compile(regexes: Iterable[str]) -> re.Pattern[str]:
    whole = "|".join(regexes)
    if len(whole) > _MAX_REGEX:
        raise _Malformed("too many alternatives and numbers; write several edits")
    return re.compile(whole)


def _levels_regex(glob: str) -> str:
    """Chunks of levels between `**`; every chunk but the first and last is taken where it fits first."""
    chunks: list[list[str]] = [[]]
    for segment in _levels(glob):
        if segment == "**":
            chunks.append([])
        else:
            chunks[-1].append(_segment_regex(segment) + r"\.")
    joined = ["".join(chunk) for chunk in chunks]
    return _around_stars(joined, between=r"(?:[^.]+\.)*")


def _around_stars(pieces: Sequence[str], between: str) -> str:
    """The pieces in order with anything of the form `between` in the gaps.

    The first and the last piece are anchored. One in the middle is taken where it fits first, for good: what
    matches with a later place also matches with this one, so there is no need to come back to it.
    """
    if len(pieces) == 1:
        return pieces[0]
    middle = "".join(f"(?>{between}?{piece})" for piece in pieces[1:-1])
    return pieces[0] + middle + between + pieces[-1]


def _levels(glob: str) -> list[str]:
    """Split at the dots. By now no braces are left, and a set of characters cannot hold a dot."""
    segments = glob.split(".")
    if "" in segments:
        raise _Malformed("an empty level (a dot at the start, at the end, or two in a row)")
    for segment in segments:
        if "**" in segment and segment != "**":
            raise _Malformed(f"`**` must be a whole level, not part of `{segment}`: `**.name` or `*name`")
        if "(" in segment or ")" in segment:
            raise _Malformed("parentheses may stand only after `@name`")
        if "@" in segment or ":" in segment:
            raise _Malformed(f"`{segment}`: `@name` may only begin a target, `:ClassName` only end it")
    return segments


def _segment_regex(segment: str) -> str:
    if segment == "*":
        return r"[^.]+"
    if found := re.fullmatch(r"\[(!?)([0-9,-]+)\]", segment):
        return _numbers_regex(found.group(2), negated=bool(found.group(1)))
    return _name_regex(segment)


def _numbers_regex(spec: str, *, negated: bool) -> str:
    """`0,2,4-6` as the numbers it lists."""
    numbers: set[int] = set()
    for item in spec.split(","):
        found = re.fullmatch(r"(0|[1-9]\d{0,8})(?:-(0|[1-9]\d{0,8}))?", item)
        if found is None:
            raise _Malformed(f"`[{spec}]` is no list of numbers and ranges such as `[0,2,4-6]`")
        low, high = int(found.group(1)), int(found.group(2) or found.group(1))
        if high < low:
            raise _Malformed(f"the range `{item}` runs backwards")
        if high - low >= _MAX_RANGE:
            raise _Malformed(f"the range `{item}` is longer than {_MAX_RANGE}")
        numbers.update(range(low, high + 1))
    if spec.isdigit() and len(spec) > 1:
        # fnmatch would read one character out of these digits; do not guess.
        raise _Malformed(f"`[{spec}]` is ambiguous: write `{spec}` or `[{','.join(spec)}]`")
    listed = "|".join(map(str, sorted(numbers)))
    return rf"(?!(?:{listed})\.)\d+" if negated else f"(?:{listed})"


def _name_regex(glob: str) -> str:
    """One level, or a class name: `*`, `?` and sets of characters."""
    return _around_stars([_piece_regex(piece) for piece in glob.split("*")], between="[^.]*")


def _piece_regex(piece: str) -> str:
    """A stretch without stars."""
    tokens = re.findall(r"\[[^\]]*\]|[^\[]", piece)
    return "".join(_set_regex(token) if len(token) > 1 else _character_regex(token) for token in tokens)


def _character_regex(character: str) -> str:
    return r"[^.]" if character == "?" else re.escape(character)


def _set_regex(token: str) -> str:
    """`[abc]`, `[a-z]`, `[!abc]`: one character out of (or outside) these."""
    body = token[1:-1]
    negated = body.startswith("!")
    body = body.removeprefix("!")
    if not body:
        raise _Malformed(f"`{token}` is empty")
    if re.search(r"\d-\d\d", body):
        raise _Malformed(f"`{token}` inside a name stands for one character, not for a range of numbers; use `{{…,…}}`")
    inner = ""
    for low, high, single in re.findall(r"(.)-(.)|(.)", body):
        if high < low:
            raise _Malformed(f"the range `{low}-{high}` runs backwards")
        inner += re.escape(single) if single else f"{re.escape(low)}-{re.escape(high)}"
    return f"[^.{inner}]" if negated else f"[{inner}]"


def _generalise(path: str) -> str:
    """`layers.11.attn` → `layers.*.attn`, so that the layers of a model count once."""
    return ".".join("*" if segment.isdigit() else segment for segment in path.split("."))


def _likeness(wanted: Sequence[str], general: str) -> float:
    """How much a path looks like a glob: leading levels in common, last names, and the whole text."""
    segments = general.split(".")
    asked = ["*" if re.fullmatch(r"\d+|\[!?[\d,-]+\]", segment) else segment for segment in wanted]
    shared = 0
    for mine, theirs in zip(asked, segments, strict=False):
        if mine == "**" or not _level_matches(mine, theirs):
            break
        shared += 1
    leaf = _ratio(asked[-1], segments[-1])
    return shared / len(asked) + leaf + _ratio(".".join(asked), general)


def _level_matches(glob: str, segment: str) -> bool:
    return glob == "*" or re.fullmatch(_name_regex(glob), segment) is not None


def _ratio(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other, autojunk=False).ratio()


def _shorten(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
