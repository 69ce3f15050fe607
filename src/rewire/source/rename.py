"""Renaming a model: `Llama` becomes `Gemma`, in every capitalisation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rewire.source.lex import lowered
from rewire.source.names import Names
from rewire.source.rules import NEWEST, Rules

NEVER = frozenset(
    {
        "mamba_ssm",
        "mamba-ssm",
        "use_mambapy",
        "mamba_inner_fn",
        "mamba_selective_state_update",
        "mamba_selective_scan",
        "is_mambapy_available",
        "mamba2_split_conv1d_scan_combined",
        "mamba2_selective_state_update",
        "mamba2_chunk_scan",
    }
)
"""Names of other packages and their functions: an identifier or string that is one of them stays."""

Substitution = tuple[int, int, str]


class Renaming:
    """Replaces a model's name in all its capitalisations.

    There is no condition on what follows the name, so that `SamModel` is found; ordinary words are hit as well:

    >>> to_sam2 = Renaming("sam", "sam2", Names({"sam": "SamConfig", "sam2": "Sam2Config"}))
    >>> to_sam2.apply("SamModel, SAM, sample, sesame")
    'Sam2Model, SAM2, sam2ple, sesame'
    """

    def __init__(self, old: str, new: str, names: Names, rules: Rules = NEWEST) -> None:
        self.old, self.new = old.replace("-", "_"), new
        self.kept = NEVER if rules.kept_names else frozenset()
        self._cased_new = names.cased(new)
        cased_old = names.cased(self.old)
        self._values = {self.old: new, self.old.upper(): new.upper(), cased_old: self._cased_new}
        self._is_upper = cased_old == self.old.upper()
        self._keys = tuple(dict.fromkeys(key.lower() for key in self._values))
        self._cache: dict[str, str] = {}

    def apply(self, text: str) -> str:
        """The text with every occurrence replaced."""
        parts: list[str] = []
        position = 0
        for start, end, new in self.matches(text, lowered(text)):
            parts += [text[position:start], new]
            position = end
        return "".join([*parts, text[position:]]) if parts else text

    def word(self, name: str) -> str:
        """An identifier, renamed."""
        found = self._cache.get(name)
        if found is None:
            found = self._cache[name] = name if name in self.kept else self.apply(name)
        return found

    def words(self, names: Iterable[str]) -> set[str]:
        """A set of identifiers, renamed."""
        known = self._cache
        return {known.get(name) or self.word(name) for name in names}

    def matches(self, text: str, lower: str) -> Iterator[Substitution]:
        """Every occurrence with what replaces it. `lower` is the text in lower case."""
        found = {key: lower.find(key) for key in self._keys}
        while found:
            key = min(found, key=found.__getitem__)
            start = found[key]
            if start < 0:
                del found[key]
                continue
            end = start + len(key)
            is_match = not (start and lower[start - 1].isalnum())
            if is_match:
                yield start, end, self._value(text, start, end)
            for other, position in found.items():
                if position < (end if is_match else start + 1):
                    found[other] = lower.find(other, end if is_match else start + 1)

    def _value(self, text: str, start: int, end: int) -> str:
        found = text[start:end]
        if self._is_upper and found.isupper() and not text[end : end + 1].isalpha():
            return self.new.upper()
        return self._values.get(found, self._cased_new)
