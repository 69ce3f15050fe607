"""Real English for measurements: Python's own documentation, which comes with every Python."""

from __future__ import annotations

import re

SHORTEST, LONGEST = 30, 300


def real_text(characters: int | None = None) -> str:
    """The documentation of the language, always the same, cut off after so many characters.

    >>> len(real_text(1000))
    1000
    """
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name].strip() for name in sorted(topics))[:characters]


def real_sentences(count: int) -> list[str]:
    """Up to `count` different sentences, always the same ones, from all over the documentation.

    >>> [len(real_sentences(40)), real_sentences(40) == real_sentences(40)]
    [40, True]
    """
    from pydoc_data.topics import topics

    paragraphs = (" ".join(part.split()) for text in topics.values() for part in text.split("\n\n"))
    found = dict.fromkeys(
        sentence
        for paragraph in paragraphs
        for sentence in re.split(r"(?<=[.?!])\s+(?=[A-Z])", paragraph)
        if _is_prose(sentence)
    )
    step = max(1, len(found) // count)
    return list(found)[::step][:count]


def _is_prose(sentence: str) -> bool:
    """Whether this is a sentence of words, not code, a heading or a grammar rule."""
    plain = bool(re.fullmatch(r"[A-Z][A-Za-z ,;:'()\"-]+[.?!]", sentence))
    return plain and SHORTEST <= len(sentence) <= LONGEST
