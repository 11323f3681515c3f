"""What was measured of one inference, as a file: `qaic-runner` writes it, `qaic-opstats` reads it.

The vendor's raw statistics are a device's, and not public. Ours hold events of the host, around the
emulated runtime, under a mark of our own: neither tool takes the other's file for its own.
"""

from __future__ import annotations

import json
from typing import Any, Dict, List, NamedTuple, Sequence

from ..documents import Refusal, is_number, parse_json

MAGIC = b"QAICEMUSTATS 1\n"

Event = Dict[str, Any]


class RawStatsError(Refusal, ValueError):
    """The file is no raw statistics of this SDK, or is damaged."""


class RawStats(NamedTuple):
    """Events (name, begin and duration in microseconds) of one inference of a network."""

    network: str
    inference: int
    events: List[Event]


def serialize(stats: RawStats) -> bytes:
    """The file's bytes."""
    return MAGIC + json.dumps(stats._asdict()).encode()


def parse(data: bytes, name: str) -> RawStats:
    """Read a file's bytes; `name` is for the message.

    Raises:
        RawStatsError: where they are not ours.
    """
    if not data.startswith(MAGIC):
        raise RawStatsError(f"{name} is no raw statistics file of this emulated SDK")
    try:
        text = data[len(MAGIC) :].decode()
    except UnicodeDecodeError as error:
        raise RawStatsError(f"{name} is damaged: it is not UTF-8 text") from error
    content = parse_json(text, name, RawStatsError)
    if not isinstance(content, dict) or content.keys() != set(RawStats._fields):
        raise RawStatsError(f"{name} is damaged: it has other fields")
    stats = RawStats(**content)
    if (
        not isinstance(stats.network, str)
        or type(stats.inference) is not int
        or not isinstance(stats.events, list)
        or not all(map(_is_event, stats.events))
    ):
        raise RawStatsError(f"{name} is damaged: a field has another type")
    return stats


def _is_event(event: Any) -> bool:
    return (
        isinstance(event, dict)
        and isinstance(event.get("name"), str)
        and all(is_number(event.get(key)) for key in ("ts", "dur"))
    )


def summary(network: str, events: Sequence[Event]) -> str:
    """A table of the events by name: how often, how long in microseconds, and what share."""
    totals: Dict[str, List[float]] = {}
    for event in events:
        totals.setdefault(event["name"], []).append(event["dur"])
    whole = sum(map(sum, totals.values())) or 1.0
    lines = [
        f"[{network}] host time on this machine: the SDK is emulated, and has no device cycles",
        "",
        f"{'count':>6} {'us':>14} {'us(%)':>8}  event",
    ]
    for name, times in sorted(totals.items(), key=lambda item: -sum(item[1])):
        share = 100 * sum(times) / whole
        lines.append(f"{len(times):>6} {sum(times):>14.3f} {share:>7.2f}%  {name}")
    return "\n".join(lines) + "\n"


def trace(events: Sequence[Event]) -> str:
    """The events as a Chrome trace."""
    return json.dumps({"traceEvents": list(events), "displayTimeUnit": "ms"})
