"""The items of one JSON array, each as text when it is asked for.

Only brackets and quotes are looked at. So an item that is no JSON is nobody's error but its own, as
long as its brackets close.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from qaic_ray.formats.lines import ENDLESS, MAX_LINE_BYTES, MAX_SKIPPED_BYTES, Input

_STRUCTURE = re.compile(rb'["\\{}\[\],]')
_QUOTE, _BACKSLASH, _COMMA = b'"\\,'
_OPENING, _CLOSING = b"{[", b"}]"


class _Item:
    """The item that is being read; of one that is too long only the beginning is kept."""

    def __init__(self) -> None:
        self._kept = bytearray()
        self.num_bytes = 0

    def add(self, part: bytes) -> None:
        """Take in what comes next."""
        self.num_bytes += len(part)
        self._kept += part[: max(0, MAX_LINE_BYTES + 1 - len(self._kept))]

    def take(self) -> bytes:
        """The item, as it stood; the next one begins."""
        item = bytes(self._kept).strip()
        self._kept.clear()
        self.num_bytes = 0
        return item


class _Scanner:
    """Where in the array we are, from one piece of text to the next."""

    def __init__(self) -> None:
        self.depth = 0
        self._in_text = False
        self._skipped_at = -1

    def cuts(self, chunk: bytes) -> Iterator[int]:
        """Where in the chunk the array begins, its items end, and it ends itself."""
        for match in _STRUCTURE.finditer(chunk):
            at, byte = match.start(), match.group()[0]
            if at == self._skipped_at:
                continue
            if self._in_text:
                if byte == _BACKSLASH:
                    self._skipped_at = at + 1
                self._in_text = byte != _QUOTE
            elif byte == _QUOTE:
                self._in_text = True
            elif byte in _OPENING:
                self.depth += 1
                if self.depth == 1:
                    yield at
            elif byte in _CLOSING:
                self.depth -= 1
                if self.depth == 0:
                    yield at
            elif byte == _COMMA and self.depth == 1:
                yield at
        self._skipped_at -= len(chunk)


def array_items(source: Input) -> Iterator[bytes]:
    """The items of the array that an input holds.

    Raises:
        QaicRayError: while reading, also where the array does not end, or something follows it.
    """
    scanner, item, num_items, has_ended = _Scanner(), _Item(), 0, False
    for chunk in source.chunks():
        start = 0
        for at in () if has_ended else scanner.cuts(chunk):
            item.add(chunk[start:at])
            start = at + 1
            text = item.take()
            has_ended = scanner.depth == 0
            if (text or not has_ended) and chunk[at : at + 1] != b"[":
                yield text
                num_items += 1
                source.last = f"item {num_items}"
            if has_ended:
                break
        if has_ended and chunk[start:].strip():
            raise source.broken("something stands behind the JSON array")
        item.add(chunk[start:])
        if item.num_bytes > MAX_SKIPPED_BYTES:
            raise source.broken(ENDLESS)
    if not has_ended:
        raise source.broken("the JSON array does not end")
