"""Whether what a page shows of a command's output is what the command printed.

Equal means: the same lines in the same order, up to numbers, durations, sizes, digests and paths of
the reader's own. Empty lines, and how wide a gap is, do not count. Lines may be left out only where
the page has a line `...`; a line that ends with ` ...` may go on.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

LEFT_OUT = "..."

_SUBSTITUTES: tuple[tuple[re.Pattern[str], str], ...] = (
    # A run, and a job that was handed to a cluster.
    (re.compile(r"\d{8}-\d{6}(?:-[0-9a-f]{4})?\b"), "#"),
    (re.compile(r"\x1b\[[0-9;?]*[A-Za-z]"), ""),
    # Digests and ids in hexadecimal, with a figure in them: no word of a language.
    (re.compile(r"\b(?=[0-9a-f]*\d)(?=[0-9a-f]*[a-f])[0-9a-f]{6,}\b"), "#"),
    (re.compile(r"\d+(?:[.,:T-]\d+)*Z?"), "#"),
    (re.compile(r"(?<=#) ?(?:ns|us|ms|s|min|h)\b"), " s"),
    (re.compile(r"(?<=#) ?(?:B|KiB|MiB|GiB|kB|KB|MB|GB)(?=\W|$)"), " B"),
    (re.compile(r"[─━═]+"), "─"),
    (re.compile(r"\s+"), " "),
)


def normal(line: str) -> str:
    """A line as it is on every machine."""
    for pattern, put in _SUBSTITUTES:
        line = pattern.sub(put, line)
    return line.strip()


def difference(shown: Sequence[str], printed: Sequence[str], *, ended: bool = True) -> str | None:
    """What the page shows and the command did not print, or nothing.

    Args:
        shown: lines of the page.
        printed: lines of the command, with the reader's own paths in them.
        ended: whether the command has ended, so that no line may follow the last one.
    """
    real = [line for line in map(normal, printed) if line]
    pieces: list[list[str]] = [[]]
    for line in (line.strip() for line in shown):
        if line == LEFT_OUT:
            pieces.append([])
        elif line:
            pieces[-1].append(normal(line))
    at = 0
    for number, piece in enumerate(pieces):
        is_first, is_last = number == 0, number == len(pieces) - 1
        places = range(at, len(real) - len(piece) + 1)
        if is_first:
            places = places[:1]
        if is_last and ended:
            exact = len(real) - len(piece)
            places = range(exact, exact + 1) if exact in places else range(0)
        found = next((place for place in places if _equal(piece, real[place:])), None)
        if found is None:
            return _told(piece, real[at:])
        at = found + len(piece)
    return None


def _equal(piece: Sequence[str], real: Sequence[str]) -> bool:
    return all(_same(line, seen) for line, seen in zip(piece, real, strict=False))


def _same(line: str, seen: str) -> bool:
    if line.endswith(f" {LEFT_OUT}"):
        return seen.startswith(line.removesuffix(LEFT_OUT).rstrip())
    return line == seen


def _told(piece: Sequence[str], real: Sequence[str]) -> str:
    wanted = "\n".join(f"  | {line}" for line in piece) or "  | (its end)"
    seen = "\n".join(f"  | {line}" for line in real)
    return f"the page shows, up to numbers:\n{wanted}\nprinted was:\n{seen}"
