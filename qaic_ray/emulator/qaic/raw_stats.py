"""What was measured of one inference, as a file: `qaic-runner` writes it, `qaic-opstats` reads it.

The vendor's raw statistics are a device's, and not public. Ours hold events of the host, around the
emulated runtime and of the operators that onnxruntime ran, under a mark of our own: neither tool
takes the other's file for its own.
"""

from __future__ import annotations

import json
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

from ..documents import Refusal, is_number, parse_json

MAGIC = b"QAICEMUSTATS 1\n"

Event = Dict[str, Any]

_US = 1e6
_MEASURED = "_kernel_time"
"""What onnxruntime's name of an operator's event ends with."""


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


class Operator(NamedTuple):
    """An execution of a node: seconds from when its run began, and how many it took."""

    node: str
    kind: str
    begun: float
    seconds: float


class Run(NamedTuple):
    """One run of a graph, and its operators in order."""

    seconds: float
    operators: List[Operator]


def runs(profiles: Sequence[str]) -> Dict[int, List[Run]]:
    """The runs that onnxruntime measured, by the thread that did them, in order.

    A thread that ran several graphs is left out: their clocks are not the same.

    Args:
        profiles: its JSON, one of each session.
    """
    found: Dict[int, List[Run]] = {}
    twice = set()
    for text in profiles:
        for thread, made in _runs_of(json.loads(text)).items():
            if thread in found:
                twice.add(thread)
            found[thread] = made
    return {thread: made for thread, made in found.items() if thread not in twice}


def _runs_of(events: Sequence[Event]) -> Dict[int, List[Run]]:
    ordered = sorted((e for e in events if "ts" in e), key=lambda e: (e["ts"], -e["dur"]))
    made: Dict[int, List[Run]] = {}
    begun: Dict[int, float] = {}
    for event in ordered:
        thread, name = int(event["tid"]), str(event["name"])
        if event["cat"] == "Session" and name == "model_run":
            made.setdefault(thread, []).append(Run(event["dur"] / _US, []))
            begun[thread] = event["ts"]
        elif event["cat"] == "Node" and name.endswith(_MEASURED) and thread in made:
            node = name[: -len(_MEASURED)]
            moment = (event["ts"] - begun[thread]) / _US
            kind = str(event["args"].get("op_name"))
            operator = Operator(node.rpartition("#")[0] or node, kind, moment, event["dur"] / _US)
            made[thread][-1].operators.append(operator)
    return made


def _kind(event: Event) -> Optional[str]:
    """The type of the operator that an event is of; None for a part of an inference."""
    details = event.get("args")
    kind = details.get("opKind") if isinstance(details, dict) else None
    return kind if isinstance(kind, str) else None


def summary(network: str, events: Sequence[Event]) -> str:
    """Tables of the parts of an inference, and of operators by type.

    A row says how often, how long in microseconds, and what share of its table.
    """
    parts = [(event["name"], event["dur"]) for event in events if _kind(event) is None]
    kinds = [(kind, event["dur"]) for event in events if (kind := _kind(event)) is not None]
    lines = [
        f"[{network}] host time on this machine: the SDK is emulated, and has no device cycles",
        "",
        *_table("event", parts),
        "",
    ]
    if kinds:
        lines += _table("operators of Execute, as onnxruntime ran them", kinds)
    else:
        lines.append("No operators: the program runs as one compiled step, or was not measured.")
    return "\n".join(lines) + "\n"


def _table(heading: str, rows: Sequence[Tuple[str, float]]) -> List[str]:
    totals: Dict[str, List[float]] = {}
    for name, duration in rows:
        totals.setdefault(name, []).append(duration)
    whole = sum(map(sum, totals.values())) or 1.0
    lines = [f"{'count':>6} {'us':>14} {'us(%)':>8}  {heading}"]
    for name, times in sorted(totals.items(), key=lambda item: -sum(item[1])):
        share = 100 * sum(times) / whole
        lines.append(f"{len(times):>6} {sum(times):>14.3f} {share:>7.2f}%  {name}")
    return lines


def trace(events: Sequence[Event]) -> str:
    """The events as a Chrome trace."""
    return json.dumps({"traceEvents": list(events), "displayTimeUnit": "ms"})
