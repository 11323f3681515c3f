"""A chart of milliseconds against load as an SVG, and nothing else. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from cpu.picture import COLOURS, LABEL_GAP, spread

WIDTH, HEIGHT = 860, 460
LEFT, RIGHT, TOP, BOTTOM = 64, 190, 84, 74
_CSS = """
  svg { background: #ffffff }
  text { font: 13px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; fill: #343a40 }
  .title { font-size: 18px; font-weight: 600; fill: #212529 }
  .note { font-size: 12px; fill: #6c757d }
  .grid { stroke: #e9ecef; stroke-width: 1 }
  .axis { stroke: #adb5bd; stroke-width: 1 }
  .line { fill: none; stroke-width: 2.25; stroke-linejoin: round }
  .limit { stroke: #495057; stroke-width: 1.5; stroke-dasharray: 7 4 }
  .name { font-weight: 600 }
"""


class Plane:
    """Places of a chart: loads from left to right, milliseconds upward by their logarithm."""

    def __init__(self, loads: Sequence[float], values: Sequence[float]) -> None:
        self._first, self._last = min(loads), max(loads)
        self.low, self.high = min(values) / 1.3, max(values) * 1.3

    def x(self, load: float) -> float:
        """Pixels from the left."""
        share = (load - self._first) / ((self._last - self._first) or 1.0)
        return LEFT + 14 + share * (WIDTH - LEFT - RIGHT - 28)

    def y(self, value: float) -> float:
        """Pixels from the top."""
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    @property
    def ticks(self) -> list[float]:
        """1, 2 and 5 times powers of ten."""
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        every = [part * 10.0**power for power in powers for part in (1, 2, 5)]
        return [value for value in every if self.low <= value <= self.high]


def draw(
    lines: Mapping[str, Mapping[float, float]],
    limits: Mapping[str, float],
    title: str,
    notes: Sequence[str],
) -> str:
    """The picture as text.

    Args:
        lines: milliseconds by load (1.0 is all that the cards can give), of each name.
        limits: milliseconds that are promised, of each name.
        title: the head line.
        notes: lines in small letters: one below the title, others below the chart.
    """
    loads = sorted({load for line in lines.values() for load in line})
    values = [value for line in lines.values() for value in line.values()]
    plane = Plane(loads, [*values, *limits.values()])
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" role="img" aria-label="{escape(title)}">',
        f"<title>{escape(title)}</title><style>{_CSS}</style>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        _text(title, LEFT, 32, "title"),
        *(
            _text(note, LEFT, 54 if number == 0 else HEIGHT - 30 + 16 * number, "note")
            for number, note in enumerate(notes)
        ),
        _text("ms", LEFT - 30, TOP - 8, "note"),
        *_axes(plane, loads),
    ]
    heights = spread(
        {name: plane.y(line[max(line)]) for name, line in lines.items()}
        | {name: plane.y(value) for name, value in limits.items()},
        LABEL_GAP,
        TOP + 6,
        bottom,
    )
    for name, value in limits.items():
        parts.append(f'<path class="limit" d="M{LEFT} {plane.y(value):.1f}H{right}"/>')
        parts.append(_text(name, right + 12, heights[name] + 4, "note"))
    for number, (name, line) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        places = [(plane.x(load), plane.y(line[load]), load) for load in sorted(line)]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y, _ in places)
        parts.append(f'<path class="line" stroke="{colour}" d="{path}"/>')
        for x, y, load in places:
            note = escape(f"{name}: {line[load]:,.1f} ms at {load:.0%}")
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}">'
                f"<title>{note}</title></circle>"
            )
        parts.append(_text(name, right + 12, heights[name] + 4, "name", colour=colour))
    return "\n".join([*parts, "</svg>", ""])


def _axes(plane: Plane, loads: Sequence[float]) -> list[str]:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = []
    for value in plane.ticks:
        y = plane.y(value)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{right}"/>')
        parts.append(_text(f"{value:,g}", LEFT - 8, y + 4, "note", anchor="end"))
    parts.append(f'<path class="axis" d="M{LEFT} {bottom}H{right}"/>')
    for load in loads:
        x = plane.x(load)
        parts.append(f'<path class="axis" d="M{x:.1f} {bottom}v5"/>')
        parts.append(_text(f"{load:.0%}", x, bottom + 19, "note", anchor="middle"))
    middle = (LEFT + right) / 2
    words = "tokens asked for, of all that the cards can give"
    parts.append(_text(words, middle, bottom + 37, "", anchor="middle"))
    return parts


def _text(
    text: str, x: float, y: float, css: str, *, colour: str = "", anchor: str = "start"
) -> str:
    style = f' style="fill:{colour}"' if colour else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{css}"{style}>'
        f"{escape(text)}</text>"
    )
