"""How far a run is, by its folder alone: from the report where it is done, else from the journal.

A journal that grows is read from where the last look ended, so that looking every second costs what
is new.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qaic_ray.errors import QaicRayError, UsageError
from qaic_ray.files.documents import checked, read_object, read_yaml
from qaic_ray.inspect.holder import holder_of
from qaic_ray.runs.journal import JOURNAL_NAME, is_whole, read_header
from qaic_ray.runs.report import REPORT_NAME

RUNNING, UNFINISHED, DONE = "running", "unfinished", "done"

# Inside a JSON text every quote of a prompt or an answer is escaped: these are keys of the row.
_SPAN = re.compile(rb'"span_s":([-+.0-9eE]+),"row":')
_TOKEN_IDS = re.compile(rb'"token_ids":\[([^\]]*)\]')
_CHOICES = b'"choices":['
_REASON = re.compile(rb'"finish_reason":"(\w+)"')


@dataclass(frozen=True)
class RunStatus:
    """A run at one moment.

    Attributes:
        state: running; unfinished: nobody works on it, and it can be resumed; done.
        rows: rows of the input that have an answer or an error, `failed_rows` those with an error.
        total_rows: of the input; None where that is not known.
        seconds: for which cards worked, over all sessions.
        tokens_per_s: generated tokens over these seconds.
        eta_s: seconds until the end at the rate so far; None where that is not known.
        started_s, last_row_s: Unix times of the beginning, and of the row that came last.
        sessions: how many processes have worked on it so far.
        pid: of the process that works on it, where that can be seen.
        problem: a sentence, where something of the folder cannot be read.
    """

    folder: str
    job: str = ""
    model: str = ""
    qpc: str = ""
    state: str = UNFINISHED
    rows: int = 0
    failed_rows: int = 0
    total_rows: int | None = None
    generated_tokens: int = 0
    seconds: float = 0.0
    tokens_per_s: float = 0.0
    eta_s: float | None = None
    started_s: float | None = None
    last_row_s: float | None = None
    sessions: int = 0
    pid: int | None = None
    problem: str = ""

    @property
    def name(self) -> str:
        """The folder's own name."""
        return Path(self.folder).name

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        rounded = {name: round(getattr(self, name), 3) for name in ("seconds", "tokens_per_s")}
        eta_s = None if self.eta_s is None else round(self.eta_s, 1)
        return {"name": self.name, **asdict(self), **rounded, "eta_s": eta_s}


@dataclass
class JournalCounts:
    """Counts of a journal's rows; `refresh` reads what was written since the last time.

    Attributes:
        ok_rows, failed_rows, generated_tokens: of all sessions; errors that a later session tried
            again are not counted.
        spans_s: session -> seconds for which its cards had worked when its last row came.
        problem: a sentence where a segment is damaged or of another version.
    """

    run_folder: Path
    ok_rows: int = 0
    failed_rows: int = 0
    generated_tokens: int = 0
    spans_s: dict[int, float] = field(default_factory=dict)
    last_row_s: float | None = None
    problem: str = ""
    _read: dict[Path, int] = field(default_factory=dict)
    _session: int = -1

    def refresh(self) -> None:
        """Count what is new."""
        for path in sorted((self.run_folder / JOURNAL_NAME).glob("*.jsonl")):
            try:
                self._count(path)
            except OSError as error:
                self.problem = f"{path} cannot be read: {error.strerror}."
            except QaicRayError as error:
                self.problem = str(error)

    def _count(self, path: Path) -> None:
        size = path.stat().st_size
        if size == self._read.get(path):
            return
        with path.open("rb", buffering=2**20) as stream:
            if path not in self._read:
                first = stream.readline()
                if not first.endswith(b"\n"):
                    return  # it is being written
                self._begin(path)
                self._read[path] = len(first)
            stream.seek(self._read[path])
            self._add_rows(path, stream)

    def _begin(self, path: Path) -> None:
        header = read_header(path)
        if header.session == self._session:
            return
        self._session = header.session
        self.spans_s.setdefault(header.session, 0.0)
        if header.retry_errors:
            self.failed_rows = 0

    def _add_rows(self, path: Path, lines: Iterator[bytes]) -> None:
        before = self._read[path]
        for line in lines:
            if not line.endswith(b"\n"):
                break  # its other half comes later
            self._read[path] += len(line)
            if is_whole(line):
                self._add(line)
            else:
                self.problem = f"{path} is damaged: see `qaic-ray run --resume`."
        if self._read[path] > before:
            self.last_row_s = max(self.last_row_s or 0.0, path.stat().st_mtime)

    def _add(self, line: bytes) -> None:
        found = _SPAN.search(line)
        if found:
            self.spans_s[self._session] = float(found[1])
        reason = _REASON.search(line)  # the first one is the row's, those of its choices follow
        if reason and reason[1] in (b"error", b"abort"):
            self.failed_rows += 1
        else:
            self.ok_rows += 1
        one, _, several = line.partition(_CHOICES)  # the first answer stands in both
        answers = _TOKEN_IDS.findall(several or one)
        self.generated_tokens += sum(ids.count(b",") + 1 for ids in answers if ids)


class RunWatch:
    """Looks at one run folder again and again.

    Args:
        folder: the run's; has the file `request_name`.
        request_name: of the file by which a run folder is known.
        total_rows: gives the rows of the input; called once, and not at all for a run that is done.
    """

    def __init__(
        self, folder: Path, request_name: str, total_rows: Callable[[Path], int | None]
    ) -> None:
        self.folder = folder
        self._request = folder / request_name
        self._counts = JournalCounts(folder)
        self._count_total = total_rows
        self._total: int | None = None
        self._is_counted = False

    def look(self) -> RunStatus:
        """How far the run is now."""
        holder = holder_of(self.folder)
        about = self._about()
        report = self._report()
        if holder is None and report is not None and report.get("goes_on") is False:
            return self._done(about, report)
        counts = self._counts
        counts.refresh()
        rows, seconds = counts.ok_rows + counts.failed_rows, sum(counts.spans_s.values())
        total = self._total_rows()
        return RunStatus(
            **about,
            state=UNFINISHED if holder is None else RUNNING,
            rows=rows,
            failed_rows=counts.failed_rows,
            total_rows=total,
            generated_tokens=counts.generated_tokens,
            seconds=seconds,
            tokens_per_s=counts.generated_tokens / seconds if seconds else 0.0,
            eta_s=None if holder is None else eta_s(rows, total, self._worked_s(seconds)),
            last_row_s=counts.last_row_s,
            sessions=len(counts.spans_s),
            pid=None if holder is None else holder.pid,
            problem=counts.problem,
        )

    def _about(self) -> dict[str, Any]:
        about: dict[str, Any] = {"folder": str(self.folder.absolute())}
        try:
            about["started_s"] = self._began_s()
            request = checked(dict[str, Any], read_yaml(self._request), str(self._request))
        except (OSError, QaicRayError):
            return about  # of another version, perhaps; the journal still tells
        names = {"name": "job", "model": "model", "qpc": "qpc"}
        return about | {names[key]: str(request[key]) for key in names if key in request}

    def _began_s(self) -> float:
        # job.yaml is written once; the request again when the run goes on with another input.
        job = self.folder / "job.yaml"
        return (job if job.exists() else self._request).stat().st_mtime

    def _report(self) -> dict[str, Any] | None:
        try:
            return read_object(self.folder / REPORT_NAME)
        except UsageError:
            return None

    def _done(self, about: dict[str, Any], report: dict[str, Any]) -> RunStatus:
        numbers = {
            name: report[name]
            for name in ("rows", "failed_rows", "generated_tokens", "seconds", "tokens_per_s")
            if isinstance(report.get(name), (int, float))
        }
        segments = [p.stat().st_mtime for p in (self.folder / JOURNAL_NAME).glob("*.jsonl")]
        return RunStatus(
            **about,
            state=DONE,
            **numbers,
            total_rows=numbers.get("rows"),
            last_row_s=max(segments, default=None),
            problem=str(report.get("error") or ""),
        )

    def _total_rows(self) -> int | None:
        if not self._is_counted:
            self._is_counted = True
            self._total = self._count_total(self.folder)
        return self._total

    def _worked_s(self, seconds: float) -> float:
        """The work so far; what is on a card since the last row came counts too."""
        last_s = self._counts.last_row_s
        return seconds if last_s is None else seconds + max(0.0, time.time() - last_s)


def eta_s(rows: int, total: int | None, seconds: float) -> float | None:
    """Seconds until the rest is done, if it takes as long a row as what is done."""
    if total is None or not rows or seconds <= 0:
        return None
    return max(0, total - rows) * seconds / rows


def run_folders(output: Path, request_name: str) -> list[Path]:
    """The run folders in a folder, the newest first."""
    found = []
    for request in output.glob(f"*/{request_name}"):
        job = request.with_name("job.yaml")
        try:
            found.append(((job if job.exists() else request).stat().st_mtime_ns, request.parent))
        except OSError:
            continue  # it is being removed just now
    return [folder for _, folder in sorted(found, reverse=True)]
