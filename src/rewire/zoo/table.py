"""The table of everything that the general rules of the zoo cannot know, put together from its parts."""

from __future__ import annotations

from rewire.zoo import table_audio, table_multimodal, table_text, table_vision
from rewire.zoo.entry import Entry

_PARTS = (table_text, table_vision, table_audio, table_multimodal)

ENTRIES: dict[str, Entry] = {name: entry for part in _PARTS for name, entry in part.ENTRIES.items()}
UNAVAILABLE: dict[str, str] = {name: why for part in _PARTS for name, why in part.UNAVAILABLE.items()}
