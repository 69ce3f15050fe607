"""What new safetensors files begin with, and how tensors are shared out among them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence

from rewire.checkpoint.dtypes import DTYPES, tensor_bytes
from rewire.checkpoint.header import LENGTH, LONGEST, METADATA
from rewire.errors import OutputError

Entry = tuple[str, str, tuple[int, ...]]
"""Name, element type (a key of `DTYPES`) and shape of a tensor that is to be written."""

MAX_SHARD_SIZE = "50GB"  # what save_pretrained of Transformers 5 has as its default
PAGE = 4096
_ALIGNMENT = 8
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def header_bytes(entries: Sequence[Entry], metadata: Mapping[str, str], *, align_to: int | None = None) -> bytes:
    """The beginning of a file: length and header, padded with blanks so that the tensors begin at a multiple of 8.

    The same arguments give the same bytes.

    Args:
        entries: the tensors, in the order in which their bytes follow.
        metadata: text about the file; Transformers writes `{"format": "pt"}`.
        align_to: where in a page of 4,096 bytes the tensors are to begin. The offset of a source keeps the way open
            for file systems that share whole pages between files. One that is no multiple of 8 is not followed.

    Raises:
        OutputError: a name occurs twice or is reserved, a tensor ends inside a byte, or the header is too long.

    >>> header_bytes([("w", "U8", (2,))], {})
    b'8\\x00\\x00\\x00\\x00\\x00\\x00\\x00{"w":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}  '
    """
    text = "{" + ",".join(_members(entries, metadata)) + "}"
    try:
        header = text.encode()
    except UnicodeEncodeError as error:
        raise OutputError(f"a name cannot be written as UTF-8: {text[error.start - 20 : error.end]!r}") from None
    header = header.ljust(len(header) + _padding(LENGTH + len(header), align_to))
    if len(header) > LONGEST:
        raise OutputError(
            f"a header for {len(entries):,} tensors takes {len(header):,} bytes; {LONGEST:,} are the most that "
            "safetensors reads. Write smaller shards (max_shard_size)"
        )
    return len(header).to_bytes(LENGTH, "little") + header


def _members(entries: Sequence[Entry], metadata: Mapping[str, str]) -> Iterator[str]:
    if metadata:
        yield f'"{METADATA}":{_json(dict(metadata))}'
    seen: set[str] = set()
    start = 0
    for name, dtype, shape in entries:
        if name == METADATA:
            raise OutputError(f"a tensor cannot be called {METADATA}: safetensors could not read it again. Rename it")
        if name in seen:
            raise OutputError(f"two tensors are called {name!r}")
        seen.add(name)
        stop = start + entry_bytes((name, dtype, shape))
        yield (
            f'{_json(name)}:{{"dtype":"{dtype}","shape":[{",".join(map(str, shape))}],"data_offsets":[{start},{stop}]}}'
        )
        start = stop


def entry_bytes(entry: Entry) -> int:
    """Bytes of a tensor that is to be written. Raises `OutputError` where it ends inside a byte.

    >>> entry_bytes(("w", "BF16", (2, 3)))
    12
    """
    name, dtype, shape = entry
    try:
        return tensor_bytes(dtype, shape)
    except (OverflowError, ValueError) as error:
        raise OutputError(f"tensor {name!r} cannot be written ({dtype} of shape {list(shape)}): {error}") from None


def _json(value: str | dict[str, str]) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _padding(length: int, align_to: int | None) -> int:
    if align_to is None or align_to % _ALIGNMENT:
        return -length % _ALIGNMENT
    return (align_to - length) % PAGE


def aligned_order(entries: Iterable[Entry]) -> list[Entry]:
    """The entries as they are if every tensor then begins at a multiple of its element's width; else wide ones first.

    Readers that map a file want whole elements where the processor expects them. Entries of one width keep their
    order.

    >>> aligned_order([("a", "U8", (3,)), ("b", "F32", (1,)), ("c", "F32", (1,))])
    [('b', 'F32', (1,)), ('c', 'F32', (1,)), ('a', 'U8', (3,))]
    """
    given = list(entries)
    start = 0
    for entry in given:
        if start % max(DTYPES[entry[1]] // 8, 1):
            return sorted(given, key=lambda entry: -DTYPES[entry[1]])
        start += entry_bytes(entry)
    return given


def partition(entries: Iterable[Entry], max_shard_size: int | str = MAX_SHARD_SIZE) -> list[list[Entry]]:
    """Shares tensors out among shards of at most `max_shard_size`, in order; a larger tensor has one to itself.

    Counted as Transformers counts: bytes of tensors, without headers, and decimal units. No entries make one empty
    shard, so that there is always a file.

    >>> partition([("a", "U8", (3,)), ("b", "U8", (3,)), ("c", "U8", (1,))], 4)
    [[('a', 'U8', (3,))], [('b', 'U8', (3,)), ('c', 'U8', (1,))]]
    """
    most = parse_size(max_shard_size)
    shards: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        size = entry_bytes(entry)
        if shards[-1] and filled + size > most:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += size
    return shards


def parse_size(size: int | str) -> int:
    """Bytes, from a number or from text such as "5GB" (decimal units). Raises `OutputError`.

    >>> parse_size("5GB"), parse_size("1.5 mb"), parse_size(7)
    (5000000000, 1500000, 7)
    """
    text = str(size).strip().upper()
    unit = _UNITS.get(text[-2:], 1)
    try:
        count = int(float(text[:-2]) * unit) if unit > 1 else int(text)
    except (ValueError, OverflowError):
        count = 0
    if count < 1:
        raise OutputError(f"{size!r} is no size of a shard; write a number of bytes, or one with KB, MB, GB or TB")
    return count
