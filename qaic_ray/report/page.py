"""The page of a report, drawn from its document alone: no network, no script, no other file."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from qaic_ray.report import drawing
from qaic_ray.runs.report import (
    Document,
    count_text,
    rate_text,
    seconds_text,
    settings_text,
    troubles,
)

MAX_TROUBLES = 12
_HERE = Path(__file__).parent

LATENCIES = {
    "ttft_queue": (
        "TTFT from the queue",
        "from when the row came to its card's worker to its first token",
    ),
    "ttft_engine": (
        "TTFT from the engine",
        "from when the row entered the engine, which takes in few more than it has slots for",
    ),
    "inter_token": (
        "Inter-token time",
        "from a step that gave a row tokens to the next that did; each token but a row's first",
    ),
    "time_per_output_token": (
        "Time per output token",
        "a row's time from its first token to its last, over the tokens behind the first",
    ),
    "end_to_end": (
        "End to end",
        "from when the row came to its card's worker to its last token",
    ),
    "queue": ("Queue", "from when the row came to its card's worker to its first step"),
}


def html_page(document: Document) -> str:
    """Draw the document of a run, of this version or an earlier one."""
    charts: dict[str, Any] = {}
    if "timeline" in document and document["timeline"]["times"]:
        axis = drawing.TimeAxis(document["timeline"]["stretches"])
        charts["axis"] = axis
        charts["stack"] = drawing.stack(document["timeline"], axis)
        charts["strips"] = drawing.strips(document, axis)
    latencies = []
    for name, (title, meaning) in LATENCIES.items():
        found = document.get("latency", {}).get(name)
        if found and found["count"]:
            latencies.append((title, meaning, found, drawing.log_bars(found)))
    histograms = [
        ("Tokens of a prompt", "prompt_tokens_histogram", "tokens"),
        ("Tokens of an answer", "generated_tokens_histogram", "tokens"),
    ]
    if not latencies:  # of an earlier version
        histograms.insert(0, ("Time to first token, seconds", "ttft_s_histogram", "s"))
    return draw(
        "page.html.j2",
        report=document,
        charts=charts,
        latencies=latencies,
        histograms=[
            (title, drawing.linear_bars(document[name], unit))
            for title, name, unit in histograms
            if name in document
        ],
        facts=_facts(document),
        best=max((w["decode_tokens_per_s"] or 0.0 for w in document["workers"]), default=0.0),
        troubles=_first_of(troubles(document)),
        settings=settings_text(document),
    )


def draw(template: str, **variables: Any) -> str:
    """A page of a template in this folder, with the shared styles and figures as text."""
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        count=count_text, seconds=seconds_text, rate=rate_text, day=day_text, span=drawing.span_text
    )
    styles = (_HERE / "page.css").read_text(encoding="utf-8")
    text = (_HERE / template).read_text(encoding="utf-8")
    return environment.from_string(text).render(styles=styles, **variables)


def day_text(at: float) -> str:
    """A Unix time as people read it, in UTC."""
    return datetime.fromtimestamp(at, timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")


def _first_of(sentences: list[str]) -> list[str]:
    left = len(sentences) - MAX_TROUBLES
    return [*sentences[:MAX_TROUBLES], *([f"... and {left} more"] if left > 0 else [])]


def _facts(document: Document) -> list[tuple[str, str]]:
    """What ran: name and value of all that is known."""
    ran = document.get("ran", {})
    facts = [
        ("Model", document["model"]),
        ("Program", document["qpc"]),
        ("Model digest", str(ran.get("model_sha256") or "")[:16]),
        ("Program digest", str(ran.get("qpc_sha256") or "")[:16]),
        ("Precision", str(ran.get("precision") or "")),
        ("NSPs", str(ran.get("num_cores") or "")),
        ("Shapes", _shapes(ran.get("specializations"))),
        ("Cards", str(len(document["workers"]))),
        ("SDK", document["sdk"]),
        ("qaic-ray", str(ran.get("qaic_ray") or "")),
        ("Ray", str(ran.get("ray") or "")),
        ("Python", str(ran.get("python") or "")),
        ("Host", str(ran.get("host") or "")),
        ("Started", day_text(document["started_at"]) if document.get("started_at") else ""),
        ("Command", str(ran.get("command") or "")),
        ("Resumed with", str(ran.get("resumed_with") or "")),
    ]
    sessions = document.get("sessions", [])
    if len(sessions) > 1:
        facts.append(("Sessions", f"{len(sessions)}: it was resumed"))
    return [(name, value) for name, value in facts if value]


def _shapes(entries: object) -> str:
    """The shapes of a program, in few words: rows x tokens, of contexts."""
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        return ""
    shapes = [
        f"{entry.get('batch_size')} x {entry.get('seq_len')} of {entry.get('ctx_len')}"
        for entry in entries
    ]
    return ", ".join(shapes)
