"""A mermaid diagram of states, drawn as SVG without mermaid, which is 3 MB of JavaScript.

Each state is a line downwards, each change of state an arrow in a row of its own with its reason
under it: so nothing overlaps, and it is read on a telephone too.
"""

from __future__ import annotations

import re
from html import escape

WIDTH, HEAD, ROW, MARGIN = 400, 34, 40, 8
STYLE = "font: 12px system-ui, sans-serif"

_CHANGE = re.compile(r"\s*(\[\*\]|\w+)\s*-->\s*(\[\*\]|\w+)\s*(?::\s*(.*?))?\s*")


def changes_of(source: str) -> list[tuple[str, str, str]]:
    """From, to and why of each change.

    Raises:
        ValueError: for a line that is no change, or another kind of diagram.
    """
    kind, *lines = [line for line in source.splitlines() if line.strip()]
    if kind.strip() != "stateDiagram-v2":
        raise ValueError(f"Only diagrams of states are drawn here, not {kind.strip()!r}.")
    found = []
    for line in lines:
        match = _CHANGE.fullmatch(line)
        if match is None:
            raise ValueError(f"{line.strip()!r} is no change of state like `a --> b: why`.")
        found.append((match[1], match[2], match[3] or ""))
    return found


def drawn(source: str) -> str:
    """The diagram as a figure of HTML, in the colour of the text around it."""
    changes = changes_of(source)
    states = list(dict.fromkeys(state for *ends, _ in changes for state in ends))
    column = (WIDTH - 2 * MARGIN) / len(states)
    x = {state: MARGIN + column * (at + 0.5) for at, state in enumerate(states)}
    height = HEAD + ROW * len(changes) + MARGIN
    parts = [_head(state, x[state], column, height) for state in states]
    for row, (start, end, why) in enumerate(changes):
        parts.append(_arrow(x[start], x[end], HEAD + ROW * row + 16, why))
    words = "; ".join(f"{a} to {b}{f': {why}' if why else ''}" for a, b, why in changes)
    return (
        f'<figure class="states" data-search-exclude><svg viewBox="0 0 {WIDTH} {height}" '
        f'role="img" aria-label="{escape(words.replace("[*]", "outside"))}" fill="none" '
        f'stroke="currentColor" style="{STYLE}">{"".join(parts)}</svg></figure>'
    )


def _head(state: str, x: float, column: float, height: int) -> str:
    line = f'<path d="M{x:.1f} {HEAD - 6}V{height - MARGIN}" opacity=".3"/>'
    if state == "[*]":
        return f'<circle cx="{x:.1f}" cy="17" r="7" fill="currentColor"/>{line}'
    box = f'<rect x="{x - column / 2 + 2:.1f}" y="4" width="{column - 4:.1f}" height="24" rx="5"/>'
    return f"{box}{line}{_text(state, x, 20)}"


def _arrow(start: float, end: float, y: int, why: str) -> str:
    if start == end:
        line = f"M{start:.1f} {y - 6}h22v8h-17"
        tip = f"M{start + 10:.1f} {y - 2}l-6 4l6 4"
    else:
        back = -7 if end > start else 7
        line = f"M{start:.1f} {y}H{end:.1f}"
        tip = f"M{end + back:.1f} {y - 4}L{end:.1f} {y}L{end + back:.1f} {y + 4}"
    middle = (start + end) / 2
    reach = 3.1 * len(why)  # half of the text's width, so that it stays inside
    middle = min(max(middle, MARGIN + reach), WIDTH - MARGIN - reach)
    return f'<path d="{line}"/><path d="{tip}"/>{_text(why, middle, y + 15)}'


def _text(words: str, x: float, y: int) -> str:
    place = f'x="{x:.1f}" y="{y}" text-anchor="middle"'
    return f'<text {place} fill="currentColor" stroke="none">{escape(words)}</text>'
