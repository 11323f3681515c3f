"""The report as a document: what `report.json` has, and what the page is drawn from.

To the figures of `RunSummary` come those of the rows' times and of the run's events.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path

from qaic_ray.errors import QaicRayError, UsageError
from qaic_ray.files.documents import json_text
from qaic_ray.files.folders import write_whole
from qaic_ray.metrics import GROWTH, Durations
from qaic_ray.report.folder import RunRecord, RunState, base_document, read_run
from qaic_ray.report.page import html_page
from qaic_ray.report.statistics import OTHERS, RowStatistics
from qaic_ray.runs.delivery import OUTPUTS_NAME
from qaic_ray.runs.history import Happening, engine_work, read_history
from qaic_ray.runs.intake import INPUT, OPEN_SOURCE
from qaic_ray.runs.journal import last_fingerprint
from qaic_ray.runs.report import PAGE_NAME, REPORT_NAME, Document, RunSummary, histogram

MAX_LOG_BINS = 48
MAX_EVENTS = 400
"""Events in the document; of more, the first and the last. Their counts are always whole."""
POWER_GAP_S = 120.0
"""Between readings further apart the power is not known."""
MAX_NAMED = 5
PAUSE_S = 600.0
"""Without events, time in which nothing ran for so long is between two sessions."""

_OF_ALL = ("session_started", "session_ended")
_UNLISTED = {"power", *_OF_ALL}


def write_report(summary: RunSummary, statistics: RowStatistics) -> None:
    """Write `report.json` and `report.html` into the run folder, each whole or not at all.

    By its `report.json` a run is known as done, whatever becomes of the page.
    """
    base = summary.document()
    write_whole(summary.folder / REPORT_NAME, json_text(base, indent=2) + "\n")
    happenings = list(read_history(summary.folder))
    problems = missing(statistics, happenings, base)
    _write(base | details(statistics, happenings, base, problems), summary.folder)


def redraw(folder: Path, page: Path | None = None) -> Document:
    """Make a run's report anew from its folder, and write it there; the document.

    Args:
        folder: of a run in any state.
        page: where the page is written, in place of the run's folder; nothing is written there
            then.

    Raises:
        UsageError: it is not the folder of a run.
    """
    document = document_of(read_run(folder))
    if page is None:
        try:
            _write(document, folder)
        except OSError as error:
            raise UsageError(
                f"{folder} cannot be written ({error.strerror}): name a file for the page with "
                "--html."
            ) from error
    else:
        write_page(page, html_page(document))
    return document


def write_page(path: Path, page: str) -> None:
    """Write a page where a user wants it, whole or not at all.

    Raises:
        UsageError: it cannot be written there.
    """
    try:
        write_whole(path, page)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}.") from error


def document_of(run: RunRecord) -> Document:
    """The document of a run that was read from its folder."""
    base = base_document(run)
    said = [_state_sentence(run), *missing(run.statistics, run.happenings, base), *run.problems]
    found = details(run.statistics, run.happenings, base, [text for text in said if text])
    return base | found | {"state": run.state.value}


def _write(document: Document, folder: Path) -> None:
    write_whole(folder / PAGE_NAME, html_page(document))
    write_whole(folder / REPORT_NAME, json_text(document, indent=2) + "\n")


def details(
    statistics: RowStatistics,
    happenings: Sequence[Happening],
    base: Document,
    problems: Sequence[str],
) -> Document:
    """What rows and events add to the figures of `base`; `problems` is what the report lacks."""
    latency = {name: latency_of(found) for name, found in statistics.durations().items()}
    latency["inter_token"] = latency_of(_inter_token(happenings))
    found = statistics.document()
    sessions = _sessions(happenings)
    found["timeline"]["stretches"] = stretches(found["timeline"], sessions, happenings)
    started = [h for h in happenings if h["event"] == "session_started"]
    ran = _ran(started)
    return {
        "state": RunState.DONE.value,
        **found,
        "started_at": sessions[0][0] if sessions else found["first_row_at"],
        "ran": ran,
        "sessions": [{"from": begin, "to": end} for begin, end in sessions],
        "latency": latency,
        "prompt_tokens_histogram": histogram(statistics.prompt_lens, whole=True),
        "event_counts": _event_counts(happenings),
        "events": _listed(happenings),
        "compiles": _compiles(started, ran),
        "energy": energy(happenings, base),
        "missing": list(problems),
    }


def latency_of(durations: Durations) -> Document:
    """Count, percentiles and bins of durations, in seconds; percentiles to 0.2 %."""
    return {
        "count": len(durations),
        **{f"p{q}_s": round(durations.quantile(q / 100), 9) for q in (50, 90, 99)},
        "bins": log_histogram(durations),
    }


def log_histogram(durations: Durations) -> Document:
    """Bins whose ends have one ratio: `edges` (one more than bins) and `counts`."""
    if not durations.counts:
        return {"edges": [], "counts": []}
    first, last = min(durations.counts), max(durations.counts)
    group = max(1, math.ceil((last - first + 1) / MAX_LOG_BINS))
    first_group, last_group = first // group, last // group
    counts = [0] * (last_group - first_group + 1)
    for number, count in durations.counts.items():
        counts[number // group - first_group] += count
    edges = [GROWTH ** (number * group) for number in range(first_group, last_group + 2)]
    return {"edges": [float(f"{edge:.6g}") for edge in edges], "counts": counts}


def _inter_token(happenings: Iterable[Happening]) -> Durations:
    engines = (counts for h in happenings for counts in dict(h.get("engines") or {}).values())
    return sum((engine_work(counts).inter_token for counts in engines), start=Durations())


def _ran(started: Sequence[Happening]) -> Document:
    """What ran, as the last session said it, with the command that began the run."""
    if not started:
        return {}
    first, last = started[0], started[-1]
    left_out = {"at", "event", "compiles"}
    ran = {name: value for name, value in last.items() if name not in left_out}
    if len(started) > 1 and "command" in first:
        ran |= {"command": first["command"], "resumed_with": last.get("command")}
    return ran


def _compiles(started: Sequence[Happening], ran: Document) -> list[Document]:
    """Those of the job that the run is a part of, or that of its program alone."""
    for happening in reversed(started):
        if happening.get("compiles"):
            return list(happening["compiles"])
    seconds = ran.get("compile_s")
    return [] if seconds is None else [{"name": ran["qpc"], "seconds": seconds, "reused": True}]


def _sessions(happenings: Sequence[Happening]) -> list[tuple[float, float]]:
    """From and to of each session; one that was killed ends with its last event."""
    sessions: list[tuple[float, float]] = []
    for happening in happenings:
        at = happening["at"]
        if happening["event"] == "session_started" or not sessions:
            sessions.append((at, at))
        sessions[-1] = sessions[-1][0], max(at, sessions[-1][1])
    return sessions


def stretches(
    timeline: Document, sessions: Sequence[tuple[float, float]], happenings: Sequence[Happening]
) -> list[list[float]]:
    """The parts of time that are drawn, in order: where rows or cards were busy in a session.

    Pauses between sessions are left out; an outage within one is not.
    """
    width_s, times = timeline["bucket_s"], timeline["times"]
    of_cards = [h["at"] for h in happenings if "worker" in h]
    marks = sorted([*((at, at + width_s) for at in times), *((at, at) for at in of_cards)])
    starts = sorted(begin for begin, _ in sessions)
    found: list[list[float]] = []
    for begin, end in marks:
        is_new = not found
        if found and begin > found[-1][1]:
            is_new = any(found[-1][1] < start <= begin for start in starts)
            is_new = is_new or (not sessions and begin - found[-1][1] > PAUSE_S)
        if is_new:
            found.append([begin, end])
        else:
            found[-1][1] = max(end, found[-1][1])
    return found


def _event_counts(happenings: Iterable[Happening]) -> dict[str, dict[str, int]]:
    """Worker -> event -> how often; of retries the prompts."""
    counts: dict[str, Counter[str]] = {}
    for happening in happenings:
        worker, event = happening.get("worker"), happening["event"]
        if isinstance(worker, str):
            counts.setdefault(worker, Counter())[event] += int(happening.get("prompts", 1))
    return {worker: dict(sorted(found.items())) for worker, found in sorted(counts.items())}


def _listed(happenings: Iterable[Happening]) -> list[Happening]:
    listed = [h for h in happenings if h["event"] not in _UNLISTED]
    if len(listed) > MAX_EVENTS:
        listed = [*listed[: MAX_EVENTS // 2], *listed[-MAX_EVENTS // 2 :]]
    known = ("at", "event", "worker", "error", "incarnation", "attempt", "prompts", "slots")
    return [{key: h[key] for key in known if key in h} for h in listed]


def energy(happenings: Iterable[Happening], base: Document) -> Document | None:
    """The boards' power over time; None where no card told of any."""
    readings: dict[str, list[tuple[int, float, float]]] = {}
    session = 0
    for happening in happenings:
        session += happening["event"] == "session_started"
        for board, watts in dict(happening.get("watts") or {}).items():
            readings.setdefault(board, []).append((session, happening["at"], float(watts)))
    boards = {board: _joules(points) for board, points in sorted(readings.items())}
    joules = sum(board_j for board_j, _ in boards.values())
    seconds = max((board_s for _, board_s in boards.values()), default=0.0)
    if not seconds:
        return None
    tokens = base["generated_tokens"]
    return {
        "joules": round(joules, 3),
        "seconds": round(seconds, 3),
        "mean_watts": round(joules / seconds, 3),
        "joules_per_token": round(joules / tokens, 6) if tokens else None,
        "boards": len(boards),
        "simulated": base["emulated"],
    }


def _joules(points: Sequence[tuple[int, float, float]]) -> tuple[float, float]:
    """Energy of one board, and the seconds it is known for: the mean of each two readings.

    Args:
        points: session, time and watts.
    """
    joules = seconds = 0.0
    for (session, before, watts), (session_after, after, watts_after) in pairwise(points):
        if session == session_after and 0 < after - before <= POWER_GAP_S:
            seconds += after - before
            joules += (watts + watts_after) / 2 * (after - before)
    return joules, seconds


# -- what is missing


def _state_sentence(run: RunRecord) -> str:
    if run.state is RunState.RUNNING:
        now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
        return f"The run goes on: this is what it had at {now}."
    if run.state is RunState.UNFINISHED and _is_of_a_program(run):
        return (
            f"{run.tally.rows:,} rows are safe; the Python program that they are of gets its "
            "answers from here when it is started again with this folder."
        )
    if run.state is RunState.UNFINISHED:
        return (
            f"The run is not done, and nobody works on it: {run.tally.rows:,} rows are safe; go on "
            f"with `qaic-ray run --resume {run.folder}`."
        )
    return ""


def _is_of_a_program(run: RunRecord) -> bool:
    """Whether the rows are those of an open fleet, as `qaic_ray.LLM(folder=...)` keeps them."""
    with suppress(QaicRayError):  # a damaged journal is among the problems
        kept = last_fingerprint(run.folder)
        return kept is not None and kept.get(INPUT) == OPEN_SOURCE
    return False


def missing(
    statistics: RowStatistics, happenings: Sequence[Happening], base: Document
) -> list[str]:
    """A sentence for each thing that the report cannot tell."""
    said = []
    if statistics.untimed_rows:
        said.append(
            f"{statistics.untimed_rows:,} rows have no times of day, as an earlier version wrote "
            "them: they are in no figure over time, and not in those from the queue."
        )
    if base["rows"] > statistics.rows:
        said.append(
            f"{base['rows'] - statistics.rows:,} rows are not in the journal any more: only the "
            f"figures that the run itself kept have them ({OUTPUTS_NAME} has the rows)."
        )
    if not happenings:
        said.append("Nothing is known of what happened to cards, of versions and of power.")
    elif lost := _without_counts(happenings):
        said.append(
            f"Steps and inter-token times are without those of {', and of '.join(lost)}: what an "
            "engine counts is lost with its process."
        )
    if OTHERS in statistics.lanes:
        said.append(f"Cards from the {len(statistics.lanes)}th on are drawn together.")
    return said


def _without_counts(happenings: Sequence[Happening]) -> list[str]:
    """Sessions and lives of cards whose engines' counts are not known."""
    lost: list[str] = []
    named = sorted({h["worker"] for h in happenings if h["event"] in _LOSSES and "worker" in h})
    if named:
        more = f" and {len(named) - MAX_NAMED} more" if len(named) > MAX_NAMED else ""
        cards = f"{', '.join(named[:MAX_NAMED])}{more}"
        lost.append(f"{cards} before {'it was' if len(named) == 1 else 'they were'} lost")
    number, is_open = 0, False
    for happening in happenings:
        if happening["event"] == "session_started":
            if is_open:
                lost.append(f"session {number}, which was killed")
            number, is_open = number + 1, True
        elif happening["event"] == "session_ended":
            is_open = False
            if "engines" not in happening:
                lost.append(f"session {number}, which was stopped")
    return lost


_LOSSES = {"worker_lost", "worker_retired"}
