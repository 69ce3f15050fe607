"""Which imported names a generated file uses.

Most uses are plain from the characters around a word. For the names that are left the definitions in which they occur
are parsed, so that a parameter or keyword of the same name does not count.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import cache

from rewire.source.lex import WORD, Token, code_only, tokens


def used_names(names: Collection[str], texts: Sequence[str], guards: Iterable[str]) -> set[str]:
    """Those of the bound names (`a.b` for `import a.b`) that the definitions or import guards use.

    >>> texts = ["def f(copy: 'Tensor', x=math.pi):\\n    return torch.nn.relu(x, inplace=True)\\n"]
    >>> sorted(used_names({"torch", "torch.nn", "copy", "math", "inplace", "Tensor"}, texts, []))
    ['Tensor', 'math', 'torch.nn']
    """
    lexed = [(text, found, code_only(text, found)) for text in texts for found in [tokens(text)]]
    code = "\n".join(part for _, _, part in lexed)
    words = set(WORD.findall(code))
    used = set(WORD.findall(" ".join(guards)))
    dotted = {name for name in names if "." in name}
    used |= {name for name in dotted if _pattern(name).search(code)}
    single = set(names) - dotted - used
    for root in {name.partition(".")[0] for name in dotted} & single:
        single.discard(root)
        if _is_used_alone(root, dotted, code):
            used.add(root)
    for bases in _BASES.findall(code):
        single -= set(WORD.findall(bases))
        used |= set(WORD.findall(bases))
    used |= {name for name in single if name in words and _is_plainly_used(name, code)}
    left = single - used
    if left:
        used |= {name for one in lexed for name in _found_by_parsing(left, *one)}
    return used.intersection(names)


@cache
def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(rf"{re.escape(name)}\b(?<![\w.]{re.escape(name)})")


_BEFORE = re.compile(r"(?:[:@|\[]|->|(?<!=)=|\b(?:return|raise|in|not|and|or|if|else|is))\s*$")
_AFTER = re.compile(r" ?[.(\[\]]")
_STORE = re.compile(r" =(?!=)")


def _is_plainly_used(name: str, code: str) -> bool:
    """Is there a place where the characters around the name show that it is read?"""
    for found in _pattern(name).finditer(code):
        before = code[max(0, found.start() - 12) : found.start()]
        if _AFTER.match(code, found.end()):
            if not before.endswith(("def ", "class ")):
                return True
        elif _BEFORE.search(before) and (before.rstrip().endswith(":") or not _STORE.match(code, found.end())):
            return True
    return False


def _is_used_alone(root: str, dotted: Iterable[str], code: str) -> bool:
    """Is `torch` used other than in `torch.nn.…`, if that is imported too?"""
    rests = tuple(name[len(root) :] for name in dotted if name.startswith(f"{root}."))
    followed = re.compile("|".join(rf"{re.escape(rest)}\b" for rest in rests))
    return any(not followed.match(code, found.end()) for found in _pattern(root).finditer(code))


_BASES = re.compile(r"^class \w+\(([^)]*)\)", re.MULTILINE)


def _found_by_parsing(names: set[str], text: str, strings: Iterable[Token], code: str) -> set[str]:
    """Those of the names that one definition uses."""
    quoted = {word for one in strings if one.kind == "string" for word in _annotation_words(text, one)}
    words = names.intersection(WORD.findall(code))
    is_worth_it = not names.isdisjoint(quoted) or any(_pattern(name).search(code) for name in words)
    return names.intersection(loaded(text)) if is_worth_it else set()


_ANNOTATION = re.compile(r"[\"'][\w.\[\], |]+[\"']")


def _annotation_words(text: str, token: Token) -> list[str]:
    """The words of a string that may be an annotation."""
    is_annotation = text[max(0, token.start - 2) : token.start].strip()[-1:] in tuple(":>[|,")
    is_annotation = is_annotation and _ANNOTATION.fullmatch(text, token.start, token.end) is not None
    return WORD.findall(text, token.start, token.end) if is_annotation else []


def loaded(text: str) -> Iterator[str]:
    """Names that a piece of code reads, those in annotations written as strings included.

    >>> sorted(set(loaded("def f(a: 'B', c=1) -> 'list[D]':\\n    return g(c=h)")))
    ['B', 'D', 'g', 'h', 'list']
    """
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            yield node.id
        for annotation in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if isinstance(annotation, ast.AST):
                yield from _words_in_strings(annotation)


def _words_in_strings(annotation: ast.AST) -> Iterator[str]:
    for node in ast.walk(annotation):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from WORD.findall(node.value)
