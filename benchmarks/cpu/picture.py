"""Tokens/s against batch as an SVG: a line for each contender, and the machine's limits. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape

WIDTH, HEIGHT = 900, 560
LEFT, RIGHT, TOP, BOTTOM = 64, 246, 92, 84
FAR = 3.0
"""A limit is not drawn beyond so many times the highest figure."""
LABEL_GAP = 17
"""Pixels between the names at the right."""
COLOURS = ("#0b6e99", "#d9480f", "#5f3dc4", "#2b8a3e", "#868e96", "#a61e4d", "#5c940d", "#364fc7")
LIMIT_COLOUR = "#495057"

_CSS = """
  svg { background: #ffffff }
  text { font: 13px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; fill: #343a40 }
  .title { font-size: 18px; font-weight: 600; fill: #212529 }
  .note { font-size: 12px; fill: #6c757d }
  .grid { stroke: #e9ecef; stroke-width: 1 }
  .axis { stroke: #adb5bd; stroke-width: 1 }
  .line { fill: none; stroke-width: 2.25; stroke-linejoin: round }
  .range { stroke-width: 5; stroke-opacity: .22 }
  .limit { fill: none; stroke: #495057; stroke-width: 1.5 }
  .leader { fill: none; stroke-width: .75; stroke-opacity: .6 }
  .name { font-weight: 600 }
"""


@dataclass(frozen=True)
class Point:
    """Tokens/s at a batch: the median, and the range over the rounds."""

    batch: float
    median: float
    least: float
    most: float


@dataclass(frozen=True)
class Curve:
    """A contender, or a limit: those are dashed, and have no range."""

    name: str
    points: tuple[Point, ...]
    dash: str = ""


def without_far_limits(curves: Sequence[Curve]) -> list[Curve]:
    """The curves, with limits ended where they are far above everything that was measured."""
    measured = [p.most for curve in curves if not curve.dash for p in curve.points]
    begins = [curve.points[0].median for curve in curves if curve.dash]
    most = max([FAR * value for value in measured] + [1.2 * value for value in begins])
    return [_ended_at(curve, most) if curve.dash else curve for curve in curves]


def _ended_at(curve: Curve, most: float) -> Curve:
    """A rising curve up to `most`, with a point there on its line between two others."""
    kept = [point for point in curve.points if point.median <= most]
    if len(kept) < len(curve.points):
        a, b = kept[-1], curve.points[len(kept)]
        share = math.log(most / a.median) / math.log(b.median / a.median)
        batch = a.batch * (b.batch / a.batch) ** share
        kept.append(Point(batch, most, most, most))
    return replace(curve, points=tuple(kept))


class Plane:
    """Places of a chart with two logarithmic axes."""

    def __init__(self, curves: Sequence[Curve]) -> None:
        self.batches = sorted({p.batch for c in curves if not c.dash for p in c.points})
        values = [v for curve in curves for p in curve.points for v in (p.least, p.most)]
        self.low, self.high = min(values) / 1.15, max(values) * 1.15
        self._span = math.log2(self.batches[-1] / self.batches[0]) or 1.0

    def x(self, batch: float) -> float:
        """Pixels from the left."""
        share = math.log2(batch / self.batches[0]) / self._span
        return LEFT + 14 + share * (WIDTH - LEFT - RIGHT - 28)

    def y(self, value: float) -> float:
        """Pixels from the top."""
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def ends_early(self, curve: Curve) -> bool:
        """Whether a curve does not come to the right edge, and has its name where it ends."""
        return bool(curve.dash) and curve.points[-1].batch < self.batches[-1]

    @property
    def ticks(self) -> list[float]:
        """Round values of the upright axis: 1, 2 and 5 times powers of ten."""
        first = math.floor(math.log10(self.low))
        last = math.ceil(math.log10(self.high))
        every = [part * 10.0**power for power in range(first, last + 1) for part in (1, 2, 5)]
        return [value for value in every if self.low <= value <= self.high]


def spread(wanted: Mapping[str, float], gap: float, low: float, high: float) -> dict[str, float]:
    """Heights of names at least `gap` apart, in their order, as near to those wanted as that is.

    Args:
        wanted: height of each.
        gap: between two.
        low, high: where the first may begin, and the last end, if there is room.
    """
    names = sorted(wanted, key=lambda name: wanted[name])
    blocks: list[tuple[list[str], float]] = []  # names that touch, and where their first one is

    def begin(some: Sequence[str]) -> float:
        ideal = sum(wanted[name] - gap * i for i, name in enumerate(some)) / len(some)
        return max(low, min(ideal, high - gap * (len(some) - 1)))

    for name in names:
        block = [name]
        while blocks and blocks[-1][1] + gap * len(blocks[-1][0]) > begin(block):
            block = blocks.pop()[0] + block
        blocks.append((block, begin(block)))
    return {name: at + gap * i for some, at in blocks for i, name in enumerate(some)}


def draw(curves: Sequence[Curve], title: str, notes: Sequence[str]) -> str:
    """The picture as text.

    Args:
        curves: with a `dash` those are limits; the others are given colours in their order.
        title: the head line.
        notes: lines in small letters: one below the title, others below the chart.
    """
    curves = without_far_limits([curve for curve in curves if curve.points])
    plane = Plane(curves)
    colours = _colours(curves)
    wanted = {c.name: plane.y(c.points[-1].median) for c in curves if not plane.ends_early(c)}
    heights = spread(wanted, LABEL_GAP, TOP + 6, HEIGHT - BOTTOM)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="{escape(title)}">',
        f"<title>{escape(title)}</title><style>{_CSS}</style>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="34" class="title">{escape(title)}</text>',
        *_axes(plane),
        *(_note(note, number) for number, note in enumerate(notes)),
    ]
    for curve in curves:
        parts += _curve(curve, plane, colours[curve.name])
    for curve in curves:
        parts += _name(curve, plane, colours[curve.name], heights.get(curve.name))
    return "\n".join([*parts, "</svg>", ""])


def _colours(curves: Sequence[Curve]) -> dict[str, str]:
    named = [curve.name for curve in curves if not curve.dash]
    return {
        curve.name: LIMIT_COLOUR if curve.dash else COLOURS[named.index(curve.name) % len(COLOURS)]
        for curve in curves
    }


def _note(text: str, number: int) -> str:
    y = 56 if number == 0 else HEIGHT - 28 + 16 * (number - 1)
    return f'<text x="{LEFT}" y="{y}" class="note">{escape(text)}</text>'


def _axes(plane: Plane) -> list[str]:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = []
    for value in plane.ticks:
        y = f"{plane.y(value):.1f}"
        parts.append(f'<path class="grid" d="M{LEFT} {y}H{right}"/>')
        parts.append(
            f'<text x="{LEFT - 8}" y="{y}" text-anchor="end" dominant-baseline="central" '
            f'class="note">{value:,g}</text>'
        )
    parts.append(f'<path class="axis" d="M{LEFT} {bottom}H{right}"/>')
    for batch in plane.batches:
        x = f"{plane.x(batch):.1f}"
        parts.append(f'<path class="axis" d="M{x} {bottom}v5"/>')
        parts.append(
            f'<text x="{x}" y="{bottom + 19}" text-anchor="middle" class="note">{batch}</text>'
        )
    parts.append(
        f'<text x="{(LEFT + right) / 2}" y="{bottom + 37}" text-anchor="middle">'
        "rows that are answered together (batch)</text>"
    )
    parts.append(f'<text x="{LEFT - 44}" y="{TOP - 12}">tokens/s of all rows</text>')
    return parts


def _curve(curve: Curve, plane: Plane, colour: str) -> list[str]:
    places = [(plane.x(point.batch), plane.y(point.median)) for point in curve.points]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    if curve.dash:
        return [f'<path class="limit" stroke-dasharray="{curve.dash}" d="{path}"/>']
    parts = [f'<path class="line" stroke="{colour}" d="{path}"/>']
    for (x, y), point in zip(places, curve.points, strict=True):
        note = f"{curve.name}, batch {point.batch}: {point.median:,.0f} tokens/s"
        note += f" ({point.least:,.0f} to {point.most:,.0f})"
        low, high = plane.y(point.least), plane.y(point.most)
        parts.append(
            f'<path class="range" stroke="{colour}" d="M{x:.1f} {low:.1f}V{high:.1f}"/>'
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}">'
            f"<title>{escape(note)}</title></circle>"
        )
    return parts


def _name(curve: Curve, plane: Plane, colour: str, height: float | None) -> list[str]:
    """A name at the right edge, led to its line; or at the line's end, where that is elsewhere."""
    last = curve.points[-1]
    x, y = plane.x(last.batch), plane.y(last.median)
    css = "note" if curve.dash else "name"
    if height is None:
        return [_text(curve.name, (x + 8, y), css, colour)]
    at = WIDTH - RIGHT + 12
    path = f"M{x + 6:.1f} {y:.1f}L{at - 4} {height:.1f}"
    leader = f'<path class="leader" stroke="{colour}" d="{path}"/>'
    return [leader, _text(curve.name, (at, height), css, colour)]


def _text(text: str, place: tuple[float, float], css: str, colour: str) -> str:
    x, y = place
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" dominant-baseline="central" class="{css}" '
        f'style="fill:{colour}">{escape(text)}</text>'
    )
