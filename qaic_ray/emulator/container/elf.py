"""A small ELF: named sections and nothing to run.

`network.elf` of a real program is machine code for a card's cores; ours has the same outer form, so
that the vendor's tools find its `metadata_fb`. The machine is none and there is no entry point: a
card's loader refuses it.
"""

from __future__ import annotations

import struct
from typing import Any, List, Mapping, Optional

IDENT = b"\x7fELF"
_IDENT_64_LITTLE = IDENT + b"\x02\x01\x01" + bytes(9)
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_NAMES = ".shstrtab"
_TYPE_NONE, _MACHINE_NONE, _VERSION = 0, 0, 1
_PROGBITS, _STRTAB = 1, 3
_ALIGN_BYTES = 8
_MAX_SECTIONS = 64


def build(sections: Mapping[str, bytes]) -> bytes:
    """An ELF of 64 bits, little-endian, with these sections in this order."""
    names = b"\0" + b"".join(name.encode() + b"\0" for name in [*sections, _NAMES])
    rows: List[bytes] = [bytes(_SECTION.size)]
    body = bytearray(_HEADER.size)
    for name, data in [*sections.items(), (_NAMES, names)]:
        body += bytes(-len(body) % _ALIGN_BYTES)
        kind = _STRTAB if name == _NAMES else _PROGBITS
        at = names.index(b"\0" + name.encode() + b"\0") + 1
        rows.append(_SECTION.pack(at, kind, 0, 0, len(body), len(data), 0, 0, _ALIGN_BYTES, 0))
        body += data
    body += bytes(-len(body) % _ALIGN_BYTES)
    _HEADER.pack_into(
        body,
        0,
        *(_IDENT_64_LITTLE, _TYPE_NONE, _MACHINE_NONE, _VERSION, 0, 0, len(body), 0),
        *(_HEADER.size, 0, 0, _SECTION.size, len(rows), len(rows) - 1),
    )
    return bytes(body) + b"".join(rows)


def find(data: bytes, name: str) -> Optional[bytes]:
    """A section's bytes; None where `data` is no ELF as `build` makes them, or has no such one."""
    if len(data) < _HEADER.size or not data.startswith(_IDENT_64_LITTLE):
        return None
    fields = _HEADER.unpack_from(data)
    table, row_bytes, count, names_at = fields[6], *fields[11:]
    if row_bytes != _SECTION.size or not names_at < count <= _MAX_SECTIONS:
        return None
    if table + count * row_bytes > len(data):
        return None
    rows = [_SECTION.unpack_from(data, table + i * row_bytes) for i in range(count)]
    names = _content(data, rows[names_at])
    for row in rows:
        if names[row[0] :].startswith(name.encode() + b"\0"):
            return _content(data, row)
    return None


def _content(data: bytes, row: Any) -> bytes:
    offset, size = row[4], row[5]
    return data[offset : offset + size]
