"""Figures as shapes: where lines, bars, marks and words of a chart go. Pure.

Places are in percent of a chart's width, and shapes in a box of 1000 x 100 that is stretched to the
chart's size, so that words keep their size on a narrow screen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from qaic_ray.runs.report import Document, count_text, round_up, seconds_text

WIDTH, HEIGHT = 1000.0, 100.0
MAX_BANDS = 10
"""Cards with a colour of their own in a stacked chart; the others have one together."""
MAX_STRIPS = 32
MAX_MARKS = 60
"""Of one card; marks on the same spot are one."""
_PAUSE = 12.0
_MARKS = {
    "worker_lost": ("dead", "lost"),
    "worker_retired": ("dead", "ended, as it was of no use"),
    "worker_given_up": ("dead", "given up"),
    "worker_reopening": ("open", "opened again"),
    "shard_failed": ("retry", "a shard failed"),
    "retried": ("retry", "prompts began again"),
}
_STEPS_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200)
_DAY_S = 86_400


@dataclass(frozen=True)
class Tick:
    """A word at a place of an axis, in percent; `spare` ones are left out where it is narrow."""

    at: float
    text: str
    spare: bool = False


@dataclass(frozen=True)
class Mark:
    """Something that happened, at a place of the time axis, in percent."""

    at: float
    kind: str
    text: str


@dataclass(frozen=True)
class Band:
    """One area of a stacked chart, or one strip; `colour` numbers the colours."""

    name: str
    path: str
    colour: int
    note: str = ""
    marks: tuple[Mark, ...] = ()


class TimeAxis:
    """Time from left to right, without the pauses between stretches.

    Args:
        stretches: from and to of each, in Unix time, by rising time.
    """

    def __init__(self, stretches: Sequence[Sequence[float]]) -> None:
        self._stretches = [(begin, max(end, begin + 1e-3)) for begin, end in stretches]
        self.seconds = sum(end - begin for begin, end in self._stretches)
        drawn = WIDTH - _PAUSE * (len(self._stretches) - 1)
        self._scale = drawn / self.seconds if self.seconds else 0.0

    def x(self, at: float) -> float:
        """Where a time is, from 0 to WIDTH; one in a pause is at its edge."""
        x = 0.0
        for number, (begin, end) in enumerate(self._stretches):
            if at <= end or number == len(self._stretches) - 1:
                return x + (min(max(at, begin), end) - begin) * self._scale
            x += (end - begin) * self._scale + _PAUSE
        return x

    @property
    def pauses(self) -> list[Mark]:
        """Between stretches: where, and for how long."""
        found = []
        for (_, end), (begin, _) in zip(self._stretches, self._stretches[1:], strict=False):
            at = (self.x(end) + _PAUSE / 2) / WIDTH * 100
            found.append(Mark(at, "pause", f"stopped for {span_text(begin - end)}, then resumed"))
        return found

    @property
    def ticks(self) -> list[Tick]:
        """Round times since the beginning of the run, pauses not counted."""
        if not self.seconds:
            return []
        wanted = self.seconds / 6
        step = next((s for s in _STEPS_S if s >= wanted), 0.0)
        step = step or math.ceil(wanted / _DAY_S) * _DAY_S
        if wanted < _STEPS_S[0]:
            step = round_up(wanted)
        count = math.floor(self.seconds / step * (1 + 1e-9))
        ticks = []
        for number in range(count + 1):
            at = self.x(self._unix(number * step)) / WIDTH * 100
            is_spare = number % 2 == 1 or at > 94
            ticks.append(Tick(at, clock_text(number * step, step), spare=is_spare))
        return ticks

    def _unix(self, elapsed_s: float) -> float:
        for begin, end in self._stretches:
            if elapsed_s <= end - begin:
                return begin + elapsed_s
            elapsed_s -= end - begin
        return self._stretches[-1][1]


def area(axis: TimeAxis, timeline: Document, heights: Sequence[float], most: float) -> str:
    """The path of an area under steps, one a bucket; nothing where there is no bucket."""
    times, width_s = timeline["times"], timeline["bucket_s"]
    scale = HEIGHT / most if most else 0.0
    parts: list[str] = []
    before, y_before = -math.inf, ""
    for at, height in zip(times, heights, strict=True):
        x, y = f"{axis.x(at):.1f}", f"{HEIGHT - height * scale:.1f}"
        if at - before > width_s * 1.01:
            if parts:
                parts.append(f"H{axis.x(before + width_s):.1f}V100")
            parts.append(f"M{x} 100V{y}")
        elif y != y_before:
            parts.append(f"H{x}V{y}")
        before, y_before = at, y
    if parts:
        parts.append(f"H{axis.x(before + width_s):.1f}V100")
    return "".join(parts)


@dataclass(frozen=True)
class Stack:
    """Tokens a second over time, stacked by card; the bands are to be drawn in their order."""

    bands: tuple[Band, ...]
    most: float
    bucket_s: float


def stack(timeline: Document, axis: TimeAxis) -> Stack:
    """The cards with most tokens have bands of their own."""
    times, width_s = timeline["times"], timeline["bucket_s"]
    lanes = sorted(timeline["workers"], key=lambda lane: -sum(lane["tokens"]))
    own = lanes if len(lanes) <= MAX_BANDS else lanes[: MAX_BANDS - 1]
    named = sorted(own, key=lambda lane: natural(lane["name"]))
    rows = [(lane["name"], lane["tokens"]) for lane in named]
    if rest := lanes[len(own) :]:
        sums = [sum(some) for some in zip(*(lane["tokens"] for lane in rest), strict=True)]
        rows.append((f"{len(rest)} more cards", sums))
    heights = [0.0] * len(times)
    layers = []
    for colour, (name, tokens) in enumerate(rows):
        heights = [h + count / width_s for h, count in zip(heights, tokens, strict=True)]
        layers.append((name, colour, heights))
    most = roof(max(heights, default=0.0))
    bands = tuple(
        Band(name, area(axis, timeline, layer, most), colour)
        for name, colour, layer in reversed(layers)
    )
    return Stack(bands, most, width_s)


def strips(document: Document, axis: TimeAxis) -> list[Band]:
    """Each card's used slots over time, as a share of those it has, with what happened to it."""
    timeline = document["timeline"]
    times = timeline["times"]
    slots = {worker["name"]: worker["slots"] for worker in document["workers"]}
    lanes = {lane["name"]: lane["slots_used"] for lane in timeline["workers"]}
    happened: dict[str, list[Document]] = {}
    for event in document["events"]:
        if event.get("worker") and event["event"] in _MARKS:
            happened.setdefault(event["worker"], []).append(event)
    names = sorted(lanes.keys() | happened.keys(), key=natural)
    if len(names) > MAX_STRIPS:
        names = sorted(names, key=lambda name: (name not in happened, natural(name)))[:MAX_STRIPS]
        names.sort(key=natural)
    found = []
    for colour, name in enumerate(names):
        used = lanes.get(name, [0.0] * len(times))
        most = slots.get(name) or max(used, default=0.0)
        path = area(axis, timeline, [min(count, most) for count in used], most)
        note = f"{_mean(used) / most:.0%} of {most:g} slots" if most else ""
        marks = _marks(happened.get(name, []), axis)
        found.append(Band(name, path, colour, note, marks))
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _marks(events: Sequence[Document], axis: TimeAxis) -> tuple[Mark, ...]:
    marks: dict[tuple[str, int], Mark] = {}
    for event in events:
        kind, words = _MARKS[event["event"]]
        at = axis.x(event["at"]) / WIDTH * 100
        text = f"{event['worker']}: {words}"
        if "prompts" in event:
            text = f"{event['worker']}: {event['prompts']} {words}"
        if event.get("error"):
            text += f" ({event['error']})"
        marks.setdefault((kind, round(at)), Mark(round(at, 2), kind, text))
    return tuple(list(marks.values())[:MAX_MARKS])


@dataclass(frozen=True)
class Bars:
    """A histogram: left, width and height of each bar, its words, and the axis below."""

    bars: tuple[tuple[float, float, float, str], ...]
    ticks: tuple[Tick, ...]
    lines: tuple[Tick, ...] = ()
    most: str = ""


def log_bars(latency: Document) -> Bars:
    """Bars of a histogram whose bins have one ratio, on a log axis, with lines for percentiles."""
    edges, counts = latency["bins"]["edges"], latency["bins"]["counts"]
    if not counts:
        return Bars((), ())
    low, high = math.log(edges[0]), math.log(edges[-1])

    def percent(seconds: float) -> float:
        return (math.log(max(seconds, edges[0])) - low) / (high - low) * 100

    lines = [
        Tick(min(percent(latency[f"p{q}_s"]), 100.0), f"p{q} {seconds_text(latency[f'p{q}_s'])}")
        for q in (50, 90, 99)
    ]
    ticks = _log_ticks(edges, percent)
    return _bars(latency["bins"], percent, seconds_text, ticks=ticks, lines=tuple(lines))


def linear_bars(bins: Document, unit: str) -> Bars:
    """Bars of a histogram from 0 on."""
    edges, counts = bins["edges"], bins["counts"]
    if not counts:
        return Bars((), ())
    step = max(1, math.ceil(len(counts) / 5))
    ticks = [
        Tick(edge / edges[-1] * 100, f"{edge:,g}", spare=bool(number % 2))
        for number, edge in enumerate(edges[::step])
    ]
    return _bars(
        bins,
        lambda value: value / edges[-1] * 100,
        lambda value: f"{value:,g} {unit}",
        ticks=tuple(ticks),
    )


def _bars(
    bins: Document,
    percent: Callable[[float], float],
    words: Callable[[float], str],
    *,
    ticks: tuple[Tick, ...],
    lines: tuple[Tick, ...] = (),
) -> Bars:
    edges, counts = bins["edges"], bins["counts"]
    most = max(counts)
    bars = []
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        left, right = percent(low) * WIDTH / 100, percent(high) * WIDTH / 100
        text = f"from {words(low)} to {words(high)}: {count_text(count)}"
        tall = HEIGHT * count / most
        bars.append((round(left, 2), round(right - left, 2), round(tall, 2), text))
    return Bars(tuple(bars), ticks, lines, count_text(most))


def _log_ticks(edges: Sequence[float], percent: Callable[[float], float]) -> tuple[Tick, ...]:
    """Powers of ten, with more between them where they are few; round steps within a few bins."""
    low, high = edges[0], edges[-1]
    if high < 2 * low:
        step = roof((high - low) / 4)
        inside = [step * n for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
    else:
        parts = (1, 1.5, 2, 3, 5, 7) if high <= 10 * low else (1, 2, 5)
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        powers = [10.0**power for power in range(first, last + 1)]
        rounds = parts if high <= 1000 * low else (1,)
        inside = [p * power for power in powers for p in rounds if low <= p * power <= high]
    return tuple(
        Tick(percent(at), seconds_text(at).replace(".00", "").replace(".0", ""), bool(number % 2))
        for number, at in enumerate(inside)
    )


def roof(value: float) -> float:
    """A round number that is not below `value`, and not far above it; 1 for 0."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    steps = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10)
    found = next(step * power for step in steps if step * power >= value * (1 - 1e-12))
    return float(f"{found:.3g}")


def natural(name: str) -> tuple[Any, ...]:
    """Orders card 2 before card 10."""
    parts = "".join(c if c.isdigit() else " " for c in name).split()
    return ("".join(c for c in name if not c.isdigit()), tuple(map(int, parts)), name)


def clock_text(seconds: float, step: float) -> str:
    """Time since the beginning as an axis has it: 0.2 s, 15 s, 2:30, 1:05:00."""
    if step < 1:
        return f"{seconds:.3g} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02}"
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def span_text(seconds: float) -> str:
    """A length of time in words: 12 s, 3 min 20 s, 2 h 5 min, 3 days 4 h."""
    whole = round(seconds)
    units = (("days", 86_400), ("h", 3600), ("min", 60), ("s", 1))
    parts = []
    for unit, size in units:
        count, whole = divmod(whole, size)
        if count:
            parts.append(f"{count} {'day' if unit == 'days' and count == 1 else unit}")
    return " ".join(parts[:2]) or f"{seconds:.2g} s"
