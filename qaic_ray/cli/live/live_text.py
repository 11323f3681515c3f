"""What the live line says, and the log line in its place off a terminal. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.text import Text

from qaic_ray.runs.run_view import BACKOFF, BUSY, LOST, OPENING, READY, RunView, share_by_length

SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
PLAIN_SPINNER = "|/-\\"
MAX_CARD_LINES = 16
MAX_SAMPLE = 60

_BETWEEN = " · "
_STATE_STYLES = {BUSY: "green", OPENING: "cyan", BACKOFF: "yellow", LOST: "red"}


@dataclass(frozen=True)
class Stage:
    """A stage that goes on; `seconds` since it began."""

    name: str
    seconds: float


@dataclass(frozen=True)
class GridView:
    """A grid that is compiled; `building` has the seconds of each variant that is, by its label.

    `log` is the compiler's, of the one that was begun first.
    """

    total: int
    done: int = 0
    failed: int = 0
    building: Mapping[str, float] = field(default_factory=dict)
    log: str = ""


View = Stage | GridView | RunView


def live_lines(view: View, *, width: int, frame: str, verbose: bool = False) -> list[Text]:
    """The lines of a terminal of `width` columns; none is longer.

    Args:
        view: how things stand.
        width: columns.
        frame: of the spinner.
        verbose: a line a card too.
    """
    head, room = (f"{frame} ", "cyan"), width - len(frame) - 1
    match view:
        case Stage(name, seconds):
            parts = [(0, Text(name)), (1, Text(clock(seconds), "dim"))]
        case GridView():
            parts = _grid_parts(view)
        case RunView():
            parts = _run_parts(view)
    lines = [Text.assemble(head, _fitted(parts, room))]
    if verbose and isinstance(view, RunView):
        lines += _card_lines(view)
    for line in lines:
        line.no_wrap = True
        line.truncate(width, overflow="ellipsis")
    return lines


def log_line(view: View, *, verbose: bool = False) -> str:
    """The same for a log, in one line; of a run it begins as `submit_step.progress_line` has it.

    No other begins with the command's name: that is for its last sentence.
    """
    from qaic_ray.pipeline.submit_step import progress_line

    match view:
        case Stage(name, seconds):
            return f"… {name}, {clock(seconds)}"
        case GridView():
            return "… " + ", ".join(part.plain for _, part in _grid_parts(view))
    parts = [part.plain for rank, part in _run_parts(view) if rank > 1]
    said = [] if view.rows_total is None else [f"of {_total(view)}"]
    line = "; ".join([progress_line(view.rows_done, view.rows_failed), *said, *parts])
    return "\n".join([line, *(card.plain for card in _card_lines(view))]) if verbose else line


def log_document(view: View, *, verbose: bool = False) -> dict[str, Any]:
    """The same as an object of JSON."""
    match view:
        case Stage(name, seconds):
            return {"event": "stage", "stage": name, "seconds": round(seconds, 1)}
        case GridView():
            building = {label: round(seconds, 1) for label, seconds in view.building.items()}
            return {"event": "compile", **asdict(view), "building": building}
    document = {
        "event": "progress",
        "rows_done": view.rows_done,
        "rows_failed": view.rows_failed,
        "rows_total": view.rows_total,
        "rows_total_exact": view.is_exact,
        "tokens_per_s": round(view.tokens_per_s, 1),
        "eta_s": None if view.eta_s is None else round(view.eta_s, 1),
        "cards_busy": view.num_busy,
        "cards": len(view.cards),
        "seconds": round(view.seconds, 1),
    }
    if verbose:
        document["card_states"] = [asdict(card) for card in view.cards]
    return document


def warning_line(view: RunView) -> str:
    """How a run is going, after its first rows, in one line."""
    parts = [f"after {view.num_ended:,} rows: "]
    if view.eta_s is not None:
        parts.append(f"about {clock(view.eta_s)} to go, ")
    parts.append(f"{share_by_length(view):.0%} ended by length, ")
    errors = ", ".join(f"{number} {name}" for name, number in sorted(view.by_error.items()))
    parts.append(f"errors: {errors or 'none'}")
    if view.sample is not None:
        text = " ".join(view.sample.text.split())
        text = text if len(text) <= MAX_SAMPLE else f"{text[: MAX_SAMPLE - 1]}…"
        parts.append(f"; row {view.sample.index} answers: {text}")
    return "".join(parts)


def clock(seconds: float) -> str:
    """`m:ss`, or `h:mm:ss` from an hour on."""
    whole = int(seconds + 0.5)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def _total(view: RunView) -> str:
    return f"{'' if view.is_exact else '~'}{view.rows_total:,}"


def _run_parts(view: RunView) -> list[tuple[int, Text]]:
    """Parts of the line, each with its rank; those of the highest rank go first."""
    num_cards = len(view.cards)
    num_opening = sum(card.state == OPENING for card in view.cards)
    whole = "" if view.rows_total is None else f" of {_total(view)}"
    parts = [(0, Text(f"{view.rows_done:,}{whole} rows"))]
    if view.rows_failed:
        parts.append((1, Text(f"{view.rows_failed:,} failed", "red")))
    if view.is_exact and view.rows_done == view.rows_total:
        return [*parts, (2, Text("closing the cards")), (6, Text(clock(view.seconds), "dim"))]
    parts.append((2, Text(f"{view.tokens_per_s:,.0f} tokens/s", "bold")))
    if view.eta_s is not None:
        parts.append((3, Text(f"ETA {clock(view.eta_s)}")))
    if num_cards:
        parts.append((4, Text(f"{view.num_busy} of {num_cards} cards busy")))
    if num_opening:
        parts.append((5, Text(f"{num_opening} opening", "cyan")))
    parts.append((6, Text(clock(view.seconds), "dim")))
    return parts


def _grid_parts(view: GridView) -> list[tuple[int, Text]]:
    parts = [(0, Text(f"{view.done} of {view.total} compiled"))]
    if view.failed:
        parts.append((1, Text(f"{view.failed} failed", "red")))
    if view.building:
        label, seconds = next(iter(view.building.items()))
        parts.append((2, Text(f"building {label} {clock(seconds)}")))
        if len(view.building) > 1:
            parts.append((4, Text(f"and {len(view.building) - 1} more")))
    if view.log:
        parts.append((3, Text(f"log at {view.log}", "dim")))
    return parts


def _card_lines(view: RunView) -> list[Text]:
    if not view.cards:
        return []
    name_width = max(len(card.name) for card in view.cards)
    lines = []
    for card in view.cards[:MAX_CARD_LINES]:
        line = Text.assemble(
            f"  {card.name:{name_width}}  ",
            (f"{card.state:7}", _STATE_STYLES.get(card.state, "")),
        )
        if card.state in (BUSY, READY):
            line.append(f"  {card.running:>3} of {card.slots} slots")
            line.append(f"  {card.tokens_per_s:>7,.0f} tokens/s")
        if card.restarts:
            line.append(f"  {card.restarts} restarts", "yellow")
        if card.error:
            line.append(f"  {' '.join(card.error.split())}", "red")
        lines.append(line)
    if len(view.cards) > MAX_CARD_LINES:
        lines.append(Text(f"  and {len(view.cards) - MAX_CARD_LINES} more", "dim"))
    return lines


def _fitted(parts: list[tuple[int, Text]], width: int) -> Text:
    """As many parts as there is room for, the least important left out first."""
    shown = list(parts)
    while len(shown) > 1 and len(Text(_BETWEEN).join(part for _, part in shown)) > width:
        shown.remove(max(shown, key=lambda part: part[0]))
    return Text(_BETWEEN).join(part for _, part in shown)
