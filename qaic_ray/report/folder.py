"""A run read from its folder: every row of its journal, and what happened to it.

The folder may be that of a run that goes on, was killed, or was written by an earlier version: what
can be read is read, and what cannot is said.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qaic_ray.errors import QaicRayError, UsageError
from qaic_ray.files.documents import checked, read_object, read_yaml
from qaic_ray.inspect.holder import holder_of
from qaic_ray.metrics import Measurement, Span, Tally
from qaic_ray.report.statistics import RowStatistics
from qaic_ray.runs.history import Happening, engine_work, read_history
from qaic_ray.runs.journal import (
    BEFORE_JSON,
    JOURNAL_NAME,
    RECORD,
    Header,
    JournalRecord,
    is_whole,
    read_header,
)
from qaic_ray.runs.report import REPORT_NAME, Document, RunSummary
from qaic_ray.runs.result import FleetResult, WorkerResult

REQUEST_NAME = "request.yaml"


class RunState(str, Enum):
    """Where a run stands."""

    DONE = "done"
    RUNNING = "running"
    UNFINISHED = "unfinished"
    """Nobody works on it, and it can be resumed."""


@dataclass
class RunRecord:
    """All that the folder of a run tells.

    Attributes:
        report: its `report.json`, if it has one.
        request: what was asked for, as far as that can be read.
        happenings: its events; a copy is in the memory, without the readings of power.
        spans_s: session -> seconds for which cards had worked when its last row came.
        problems: a sentence for each thing that cannot be read.
    """

    folder: Path
    state: RunState
    statistics: RowStatistics
    tally: Tally
    report: Document | None = None
    request: Document = field(default_factory=dict)
    happenings: list[Happening] = field(default_factory=list)
    spans_s: dict[int, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def read_run(folder: Path) -> RunRecord:
    """Read the folder of a run.

    Raises:
        UsageError: it is not one.
    """
    if not (folder / REQUEST_NAME).exists() and not (folder / REPORT_NAME).exists():
        raise UsageError(
            f"{folder} is not the folder of a run: it has no {REQUEST_NAME}, and no {REPORT_NAME}."
        )
    report = _report(folder)
    is_done = report is not None and report.get("goes_on") is False
    left = RunState.DONE if is_done else RunState.UNFINISHED
    state = left if holder_of(folder) is None else RunState.RUNNING
    run = RunRecord(folder.absolute(), state, RowStatistics(), Tally(), report)
    run.request = _request(run)
    run.happenings = list(read_history(folder))
    for record, session in _records(run):
        run.statistics.add(record.row)
        run.tally.add(record.row)
        run.spans_s[session] = max(record.span_s, run.spans_s.get(session, 0.0))
    return run


def base_document(run: RunRecord) -> Document:
    """The figures that a report of any version has: the report's own, or from rows and events."""
    if run.state is RunState.DONE and run.report is not None:
        return dict(run.report)
    workers, engines = _workers(run), _engines(run)
    names = [*workers, *run.tally.earlier_workers(list(workers))]
    result = FleetResult(
        workers=tuple(
            WorkerResult(
                name,
                None,
                run.tally.measurement(name, engines.get(name)),
                error=workers.get(name, {}).get("error"),
                losses=workers.get(name, {}).get("losses", 0),
                ready_at_end=workers.get(name, {}).get("ready", False),
            )
            for name in names
        ),
        unassigned=run.tally.measurement(""),
        span=Span(0.0, sum(run.spans_s.values())) if run.spans_s else None,
        length_counts=dict(run.tally.length_counts),
    )
    asked = run.request
    summary = RunSummary(
        result,
        job=str(asked.get("name", run.folder.name)),
        sdk=next((str(w["sdk"]) for w in workers.values() if w.get("sdk")), ""),
        folder=run.folder,
        model=str(asked.get("model", "")),
        qpc=Path(str(asked.get("qpc", ""))).name,
    )
    document = summary.document()
    for worker in document["workers"]:
        known = workers.get(worker["name"], {})
        worker |= {key: known[key] for key in ("device_ids", "slots", "load_s") if key in known}
    return document | {"goes_on": True, "error": (run.report or {}).get("error")}


def _report(folder: Path) -> Document | None:
    try:
        return read_object(folder / REPORT_NAME)
    except UsageError:
        return None


def _request(run: RunRecord) -> Document:
    path = run.folder / REQUEST_NAME
    try:
        return checked(dict[str, Any], read_yaml(path), str(path))
    except QaicRayError as error:
        run.problems.append(str(error))
        return {}


def _records(run: RunRecord) -> Iterator[tuple[JournalRecord, int]]:
    """Rows of every session that count: an error that a later session retries does not."""
    headers = _headers(run)
    retried = max((header.session for header in headers.values() if header.retry_errors), default=0)
    for path, header in headers.items():
        for record in _lines(run, path):
            if record.row.ok or header.session >= retried:
                yield record, header.session


def _headers(run: RunRecord) -> dict[Path, Header]:
    headers = {}
    for path in sorted((run.folder / JOURNAL_NAME).glob("*.jsonl")):
        try:
            headers[path] = read_header(path)
        except (QaicRayError, OSError) as error:
            run.problems.append(f"{path} is left out: {error}")
    return headers


def _lines(run: RunRecord, path: Path) -> Iterator[JournalRecord]:
    with path.open("rb", buffering=2**20) as stream:
        stream.readline()
        for number, line in enumerate(stream, start=2):
            if not line.endswith(b"\n"):
                return  # it is being written, or was when its session was killed
            try:
                if not is_whole(line):
                    raise ValueError
                yield RECORD.validate_json(line[BEFORE_JSON:], strict=True)
            except (ValueError, ValidationError):
                run.problems.append(f"{path} is damaged at line {number}, which is left out.")


def _workers(run: RunRecord) -> dict[str, Document]:
    """What the events tell of each worker."""
    workers: dict[str, Document] = {}
    for happening in run.happenings:
        name = happening.get("worker")
        if happening["event"] == "session_started":
            for known in workers.values():
                known["ready"] = False
        if not isinstance(name, str):
            continue
        known = workers.setdefault(name, {"losses": 0})
        match happening["event"]:
            case "worker_ready":
                keys = ("device_ids", "slots", "load_s", "sdk")
                known |= {key: happening[key] for key in keys if key in happening}
                known["ready"] = True
            case "worker_lost" | "worker_retired":
                known["losses"] += 1
                known |= {"ready": False, "error": happening.get("error")}
            case "worker_given_up":
                known |= {"ready": False, "error": happening.get("error")}
    return workers


def _engines(run: RunRecord) -> dict[str, Measurement]:
    """Counts of each worker's engines, of sessions that ended by themselves."""
    engines: dict[str, Measurement] = {}
    for happening in run.happenings:
        for name, counts in dict(happening.get("engines") or {}).items():
            engines[name] = engines.get(name, Measurement()) + engine_work(counts)
    return engines
