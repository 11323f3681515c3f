"""What people see of runs, rows, jobs and machines: tables as wide as the terminal, and no wider.

A table leaves out its least important columns where the terminal is narrow; JSON has them all. Off
a terminal nothing is wrapped, so that other programs find whole lines.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

from qaic_ray.check.facts import Grade
from qaic_ray.cli.screen import write
from qaic_ray.doctor.facts import Finding, Verdict
from qaic_ray.files.documents import json_text

if TYPE_CHECKING:
    from qaic_ray.check.check_step import Checked
    from qaic_ray.inspect.run_status import RunStatus
    from qaic_ray.pipeline.looking import Statuses
    from qaic_ray.pipeline.row_view import RowView
    from qaic_ray.pipeline.submit_step import JobStatus

WIDE = 1000
"""Columns where there is no terminal: enough for any line."""
MIN_NAME = 16
_BETWEEN = 3
"""Columns that a table puts between two of its own."""

_STATE_STYLES = {"running": "cyan", "done": "green", "failed": "red", "unfinished": "yellow"}
_GRADE_STYLES = {Grade.REFUSED: "red", Grade.REMARK: "yellow"}
_VERDICT_STYLES = {Verdict.OK: "green", Verdict.WARN: "yellow", Verdict.FAIL: "red"}


def console() -> Console:
    """stdout, as wide as its terminal is."""
    if "COLUMNS" in os.environ:
        return Console(highlight=False)
    if not is_terminal():
        return Console(highlight=False, width=WIDE)
    # Without both rich takes a dumb terminal for one of 80 columns.
    columns, lines = os.get_terminal_size(sys.stdout.fileno())
    return Console(highlight=False, width=columns or 80, height=lines or 25)


def draw(what: Callable[[int], RenderableType]) -> None:
    """Put on stdout what a function makes for a width; without spaces at the ends of lines."""
    out = console()
    with out.capture() as captured:
        out.print(what(out.width), crop=False)
    lines = captured.get().splitlines()
    write("".join(f"{line.rstrip()}\n" for line in lines))


def write_json(document: dict[str, Any]) -> None:
    """Put an object on one line of stdout, whatever the terminal."""
    write(json_text(document) + "\n")


def is_terminal() -> bool:
    """Whether stdout is a terminal."""
    return sys.stdout.isatty()


def can_redraw() -> bool:
    """Whether stdout is a terminal on which lines can be drawn again."""
    return is_terminal() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown", "")


# -- runs and jobs


@dataclass(frozen=True)
class _Field:
    """A column: its head, its cells, and its rank; those of the highest rank go first."""

    head: str
    cells: Sequence[Text]
    rank: int
    is_number: bool = True

    @property
    def width(self) -> int:
        return max(len(self.head), *(cell.cell_len for cell in self.cells))


def status_table(found: Statuses, width: int) -> RenderableType:
    """Runs and jobs in one table, and below it what is not in it."""
    lines = [*map(_of_run, found.runs), *map(_of_job, found.jobs)]
    below = [_note(run) for run in found.runs if run.problem]
    for job in found.jobs:
        if job.error:
            below.append(Text.assemble(f"{job.id}: ", (job.error, "red")))
        if job.folder:
            # Whole, to be copied.
            below.append(Text(f"{job.id}: {job.folder}", no_wrap=True, overflow="ignore"))
    if found.hidden:
        runs = "1 run that is done is" if found.hidden == 1 else f"{found.hidden} runs done are"
        below.append(Text(f"{runs} not shown: `qaic-ray runs` lists all.", "dim"))
    if found.remark:
        below.append(Text(found.remark, "yellow"))
    return Group(*([_table(_STATUS_HEADS, lines, width)] if lines else []), *below)


def runs_table(runs: Sequence[RunStatus], width: int) -> RenderableType:
    """The runs of a folder."""
    below = [_note(run) for run in runs if run.problem]
    return Group(_table(_RUN_HEADS, [_of_listed(run) for run in runs], width), *below)


def status_line(found: Statuses) -> str:
    """What goes on, on one line, for a log."""
    is_one = len(found.runs) + len(found.jobs) == 1
    parts = []
    for run in found.runs:
        if is_one or run.state == "running":
            eta = "" if run.eta_s is None else f", ETA {clock(run.eta_s)}"
            parts.append(
                f"{run.name}: {run.state}, {_rows(run)} rows, {run.failed_rows:,} failed, "
                f"{run.tokens_per_s:,.1f} tokens/s{eta}"
            )
    for job in found.jobs:
        if is_one or job.state in ("running", "waiting"):
            parts.append(f"{job.id}: {job.state}, {job.rows or 0:,} rows")
    return "; ".join(parts) or "nothing is running"


# Head, rank (0: always there), whether it is a number.
_STATUS_HEADS = (
    ("run or job", 0, False),
    ("state", 0, False),
    ("rows", 0, True),
    ("failed", 0, True),
    ("tok/s", 2, True),
    ("ETA", 1, True),
    ("tokens", 4, True),
    ("started", 3, False),
    ("worked", 5, True),
)
_RUN_HEADS = (
    ("run", 0, False),
    ("state", 0, False),
    ("rows", 0, True),
    ("failed", 0, True),
    ("tok/s", 1, True),
    ("started", 2, False),
    ("worked", 4, True),
    ("tokens", 5, True),
    ("model", 3, False),
    ("program", 6, False),
)


def _of_run(run: RunStatus) -> list[Text]:
    return [
        Text(run.name),
        _state(run.state),
        Text(_rows(run)),
        _failures(run.failed_rows),
        Text(f"{run.tokens_per_s:,.1f}" if run.rows else ""),
        Text("" if run.eta_s is None else clock(run.eta_s)),
        Text(f"{run.generated_tokens:,}"),
        Text(_when(run.started_s)),
        Text(clock(run.seconds)),
    ]


def _of_job(job: JobStatus) -> list[Text]:
    ended_s = job.ended_s or time.time()
    return [
        Text(job.id),
        _state(job.state),
        Text("" if job.rows is None else f"{job.rows:,}"),
        Text("") if job.failed_rows is None else _failures(job.failed_rows),
        *(Text(""), Text(""), Text("")),
        Text(_when(job.started_s)),
        Text("" if job.started_s is None else clock(ended_s - job.started_s)),
    ]


def _of_listed(run: RunStatus) -> list[Text]:
    name, state, rows, failed, rate, _, tokens, started, worked = _of_run(run)
    last = [run.model.rpartition("/")[2], run.qpc.rpartition("/")[2]]
    return [name, state, rows, failed, rate, started, worked, tokens, *map(Text, last)]


def _state(state: str) -> Text:
    return Text(state, _STATE_STYLES.get(state, "yellow"))


def _rows(run: RunStatus) -> str:
    if run.total_rows is None:
        return f"{run.rows:,}"
    return f"{run.rows:,} of {run.total_rows:,}" if run.state != "done" else f"{run.rows:,}"


def _failures(number: int) -> Text:
    return Text(f"{number:,}", "red" if number else "")


def _note(run: RunStatus) -> Text:
    return Text.assemble(f"{run.name}: ", (run.problem, "yellow"))


def _table(
    heads: Sequence[tuple[str, int, bool]], lines: Sequence[Sequence[Text]], width: int
) -> Table:
    fields = [
        _Field(head, [line[at] for line in lines], rank, is_number)
        for at, (head, rank, is_number) in enumerate(heads)
    ]
    shown = _that_fit(fields, width)
    columns = [
        Column(
            field.head,
            justify="right" if field.is_number else "left",
            no_wrap=field is not fields[0],
            overflow="fold",
        )
        for field in shown
    ]
    table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for cells in zip(*(field.cells for field in shown), strict=True):
        table.add_row(*cells)
    return table


def _that_fit(fields: Sequence[_Field], width: int) -> list[_Field]:
    """The columns for which there is room; the name may be broken over lines, but not to bits."""
    if not fields[0].cells:
        return [field for field in fields if field.rank == 0]

    def needed(some: Iterable[_Field]) -> int:
        rest = [field for field in some if field is not fields[0]]
        name = min(fields[0].width, max(MIN_NAME, width // 3))
        return name + sum(field.width + _BETWEEN for field in rest)

    shown = [field for field in fields if field.rank == 0]
    for field in sorted((f for f in fields if f.rank), key=lambda f: f.rank):
        if needed([*shown, field]) <= width and any(cell.cell_len for cell in field.cells):
            shown.append(field)
    return [field for field in fields if field in shown]


def clock(seconds: float) -> str:
    """`h:mm:ss`."""
    whole = int(seconds + 0.5)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def _when(time_s: float | None) -> str:
    if time_s is None:
        return ""
    return datetime.fromtimestamp(time_s).strftime("%m-%d %H:%M")


# -- a row


def row_lines(view: RowView) -> RenderableType:
    """A row: its figures, its prompt as the model was given it, and its answer or error."""
    row = view.row
    figures = Table.grid(padding=(0, 2))
    figures.add_column(style="dim", no_wrap=True)
    figures.add_column(overflow="fold")
    for name, value in _row_figures(view):
        figures.add_row(name, value)
    parts: list[RenderableType] = [figures]
    rendering = view.rendering
    if rendering.remark:
        parts.append(Text(rendering.remark, "yellow"))
    if rendering.text is not None:
        parts += _section(f"prompt, {len(rendering.token_ids)} tokens", rendering.text)
        parts += _section("prompt ids", " ".join(map(str, rendering.token_ids)))
    else:
        parts += _section("prompt, as the input has it", row.prompt)
    for number, choice in enumerate(row.choices, start=1):
        title = f"answer {number} of {len(row.choices)}, {choice.finish_reason.value}"
        parts += _section(title, choice.text)
    if row.ok and not row.choices:
        parts += _section(f"answer, {len(row.token_ids)} tokens", row.text)
        parts += _section("answer ids", " ".join(map(str, row.token_ids)))
    return Group(*parts)


def _row_figures(view: RowView) -> Iterable[tuple[str, Text]]:
    row = view.row
    yield "run", Text(str(view.folder))
    yield "row", Text(f"{row.index}" + ("" if row.id is None else f", id {row.id}"))
    yield "card", Text(row.worker or "none")
    yield "attempts", Text(f"{row.attempts}")
    if row.ok:
        why = "" if row.stop_reason is None else f" by {row.stop_reason!r}"
        yield "ended", Text(f"{row.finish_reason.value}{why}")
        yield "first token", Text(f"{row.ttft_s:.3f} s")
        yield "decode", Text(f"{row.decode_s:.3f} s{_rate(row.generated_tokens, row.decode_s)}")
    else:
        kind = "" if row.error_class is None else f" ({row.error_class.value})"
        yield "error", Text(f"{row.error or ''}{kind}", "red")
    for name in ("started_at", "ended_at"):
        if value := getattr(row, name, None):
            yield name.replace("_", " "), Text(_when(value) if isinstance(value, float) else value)
    for record in view.records[:-1] if len(view.records) > 1 else ():
        said = record.row.error or record.row.finish_reason.value
        yield f"session {record.session}", Text(f"{record.row.worker or 'no card'}: {said}")
    if not view.records[-1].is_final:
        yield "now", Text("a later session tries it again", "yellow")


def _rate(tokens: int, seconds: float) -> str:
    return f", {(tokens - 1) / seconds:,.1f} tokens/s" if seconds > 0 and tokens > 1 else ""


def _section(title: str, text: str) -> list[RenderableType]:
    return [Text(f"\n{title}", "bold"), Padding(Text(text, overflow="fold"), (0, 0, 0, 2))]


# -- a machine


def findings_table(findings: Sequence[Finding]) -> RenderableType:
    """A line for each check, and below it what to do."""
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    node = ""
    for finding in findings:
        if finding.node != node:
            node = finding.node
            table.add_row("", Text(node or "all nodes", "bold"), "")
        text = Text(finding.says)
        if finding.remedy:
            text.append(f"\n{finding.remedy}", "bold")
        style = _VERDICT_STYLES[finding.verdict]
        table.add_row(Text(finding.verdict.value, style), finding.check, text)
    return Group(table, _summary(findings))


def _summary(findings: Sequence[Finding]) -> Text:
    """How many checks came to what."""
    counts = {v: sum(one.verdict is v for one in findings) for v in Verdict}
    words = {Verdict.OK: "well", Verdict.WARN: "may be mended", Verdict.FAIL: "must be mended"}
    said = [f"{count} {words[verdict]}" for verdict, count in counts.items() if count]
    worst = next((v for v in reversed(Verdict) if counts[v]), Verdict.OK)
    return Text(", ".join(said), _VERDICT_STYLES[worst])


def check_table(found: Checked) -> RenderableType:
    """A line for each finding: what is wrong, what to do, and where the rule stands."""
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for one in found.findings:
        text = Text(f"{one.place}: {one.says}")
        text.append(f"\n{one.remedy}", "bold")
        text.append(f"\n{one.rule}: {one.source}", "dim")
        table.add_row(Text(one.grade.value, _GRADE_STYLES[one.grade]), text)
    for made in found.converted:
        table.add_row(Text("converted", "green"), Text(f"{found.folder}/{made.place}: {made.says}"))
    return Group(*([table] if table.row_count else []), _check_summary(found))


def _check_summary(found: Checked) -> Text:
    counts = {grade: sum(one.grade is grade for one in found.findings) for grade in Grade}
    target, card = found.target, found.target.card
    of = f"Apps {target.apps_text}" if target.apps else "any Apps version"
    of += f" and {card.name} cards" if card is not None else ""
    if not found.findings:
        return Text(f"Nothing found, for {of}.", "green")
    refused, remarks = counts[Grade.REFUSED], counts[Grade.REMARK]
    said = [
        *([f"{refused} would be refused"] if refused else []),
        *([f"{remarks} remark{'s' if remarks > 1 else ''}"] if remarks else []),
    ]
    return Text(f"{', '.join(said)}, for {of}.", "red" if refused else "yellow")
