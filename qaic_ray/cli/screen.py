"""What the user sees: stages and progress on stderr, results on stdout."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qaic_ray.compile.store import Build
from qaic_ray.errors import CompileError, ExitCode, QaicRayError, Unfinished
from qaic_ray.files.documents import json_text
from qaic_ray.pipeline.submit_step import JobStatus, Submission, progress_line

if TYPE_CHECKING:
    from qaic_ray.cards.inventory import NodeCards
    from qaic_ray.export.check.verify import VerifyReport
    from qaic_ray.export.export import ExportResult
    from qaic_ray.pipeline.job import Plan
    from qaic_ray.pipeline.steps import CompileOutcome
    from qaic_ray.rows import Row
    from qaic_ray.runs.report import RunSummary
    from qaic_ray.sdk import Device, Sdk
    from qaic_ray.worker.worker import WorkerInfo

GIB = 2**30
PROGRESS_EVERY_S = 10.0

_COLOURS = {"running": "cyan", "done": "green", "failed": "red"}


class Screen:
    """Draws for people; `stream` says whether answers are printed as they come."""

    def __init__(self, *, stream: bool = False) -> None:
        self._stream = stream
        self._out = Console(soft_wrap=True, highlight=False)
        self._err = Console(stderr=True, soft_wrap=True, highlight=False)
        self._began_s = time.monotonic()

    # -- while it runs: the pipeline's Listener

    def sdk_chosen(self, sdk: Sdk) -> None:
        """Say which SDK everything goes through, and what that means for figures."""
        if sdk.kind == "emulated":
            self._note(
                f"[yellow]{sdk.label}[/]: no card here; the road is the production one, the speed "
                "is this machine's."
            )
        else:
            self._note(f"{sdk.label} at {escape(str(sdk.root))}")

    def began(self, stage: str) -> None:
        """A stage begins."""
        self._began_s = time.monotonic()
        self._note(f"[dim]… {escape(stage)}[/]")

    def ended(self, stage: str) -> None:
        """The stage that began last is done."""
        seconds = time.monotonic() - self._began_s
        self._note(f"[green]✓[/] {escape(stage)} [dim]{seconds:.1f} s[/]")

    def compiled(self, outcome: CompileOutcome) -> None:
        """One variant is there, or failed."""
        label = escape(outcome.variant.label)
        if isinstance(outcome.result, Build):
            built = outcome.result
            how = "kept" if built.reused else f"{built.seconds:.1f} s"
            self._note(
                f"  [green]✓[/] compile {label} [dim]{how}, {built.qpc_bytes / 2**20:.0f} MiB[/]"
            )
        else:
            self._note(f"  [red]✗[/] compile {label}: {escape(str(outcome.result))}")

    def card_ready(self, info: WorkerInfo) -> None:
        """A card has loaded its program."""
        self._note(
            f"  [green]✓[/] {escape(info.name)} ready [dim]{info.load_s:.1f} s, "
            f"{info.slots} slots of {info.ctx_len} tokens[/]"
        )

    def remark(self, text: str) -> None:
        """Something that the user may want to mend."""
        self._note(f"[yellow]{escape(text)}[/]")

    def run_folder(self, folder: Path) -> None:
        """Where the run is kept."""
        self._note(f"[dim]run folder[/] {escape(str(folder))}")

    def answered(self, row: Row) -> None:
        """Print the next answer, in input order."""
        if not self._stream:
            return
        head = f"[bold cyan]{row.index}[/]" + (f" [cyan]{escape(row.id)}[/]" if row.id else "")
        self._out.print(f"{head} [dim]{escape(_one_line(row.prompt))}[/]")
        if not row.ok:
            self._out.print(f"[red]{escape(row.error or '')}[/]", end="\n\n")
            return
        for number, choice in enumerate(row.choices, start=1):
            self._out.print(f"[dim]{number} of {len(row.choices)}[/] {escape(choice.text)}")
        self._out.print("" if row.choices else f"{escape(row.text)}\n")

    # -- at the end

    def finish(self, summary: RunSummary, *, as_json: bool) -> None:
        """Print a run's tables; exit code 1 when rows failed.

        Raises:
            Unfinished: the run ended before its input did.
        """
        if self._stream:
            self._out.rule(style="dim")
        for part in summary.renderables():
            self._out.print(part)
        if as_json:
            _write_json(summary.document())
        if summary.error is not None:
            raise (Unfinished if summary.goes_on else QaicRayError)(summary.error)
        if not summary.result.ok:
            raise SystemExit(ExitCode.FAILED)

    def exported(self, result: ExportResult, *, as_json: bool) -> None:
        """Print where the model is and how far it is from PyTorch."""
        report = result.verification
        if report is not None:
            self._out.print(_verification_table(report))
            for activation in report.overflows:
                self._out.print(
                    f"[yellow]{escape(activation.name)} reaches {activation.largest:.3g}[/]: "
                    "beyond float16, so it overflows on the card."
                )
        if result.manifest.next_tokens:
            self._out.print(
                "[yellow]Programs of this export answer with token ids[/]: a host sees no logits, "
                "so a row whose logits overflow is answered wrong without a sign. Leave "
                "--next-tokens out to have such rows reported."
            )
        self._out.print(escape(str(result.folder)))
        if as_json:
            manifest = json.loads(result.manifest.to_json())
            _write_json({"folder": str(result.folder), "reused": result.reused, **manifest})

    def compiled_all(self, outcomes: Sequence[CompileOutcome], *, as_json: bool) -> None:
        """Print the folders; exit code 1 when a variant failed."""
        for outcome in outcomes:
            if isinstance(outcome.result, Build):
                self._out.print(escape(str(outcome.result.path)))
        if as_json:
            _write_json({"variants": [_outcome_document(outcome) for outcome in outcomes]})
        if not all(outcome.ok for outcome in outcomes):
            raise SystemExit(ExitCode.FAILED)

    def devices(self, sdk: Sdk, devices: Sequence[Device], *, as_json: bool) -> None:
        """Print the cards."""
        self._out.print(_card_table(f"Cards ({sdk.label})", devices, {}))
        if as_json:
            _write_json({"sdk": sdk.label, "devices": [vars(device) for device in devices]})

    def inventory(
        self, nodes: Sequence[NodeCards], problems: Sequence[str], *, as_json: bool
    ) -> None:
        """Print the cards of every node of a cluster, and what keeps some from being used."""
        for found in nodes:
            title = f"{found.host} ({found.node.address}), {found.node.offered} offered to Ray"
            if found.devices:
                title += f", {found.sdk}"
                self._out.print(_card_table(title, found.devices, found.held or {}))
            else:
                self._out.print(f"{escape(title)}: {escape(found.error or 'no cards')}")
        for problem in problems:
            self.remark(problem)
        if as_json:
            _write_json({"nodes": [asdict(found) for found in nodes], "problems": list(problems)})

    def plan(self, plan: Plan) -> None:
        """Print what a job would do."""
        self._out.print(f"[bold]{escape(plan.job)}[/]: {escape(plan.text)}")
        for name, argv, chosen in plan.compiles:
            mark = " [green](this one is run)[/]" if chosen else ""
            self._out.print(f"\n[bold]{escape(name)}[/]{mark}")
            self._out.print(escape(" \\\n    ".join(argv)))

    def _note(self, markup: str) -> None:
        self._err.print(markup)


def _card_table(title: str, devices: Sequence[Device], held: Mapping[int, str]) -> Table:
    table = Table(title=escape(title), title_justify="left")
    table.add_column("QID", justify="right")
    for column in ("status", "SKU"):
        table.add_column(column)
    for column in ("NSPs free", "DRAM free"):
        table.add_column(column, justify="right")
    if held:
        table.add_column("held by")
    for device in devices:
        free, total = device.dram_free_bytes / GIB, device.dram_total_bytes / GIB
        colour = "green" if device.ready else "red"
        table.add_row(
            str(device.qid),
            f"[{colour}]{escape(device.status)}[/]",
            escape(device.sku),
            f"{device.nsp_free} of {device.nsp_total}",
            f"{free:.1f} of {total:.1f} GiB",
            *([escape(held.get(device.qid, ""))] if held else ()),
        )
    return table


def _verification_table(report: VerifyReport) -> Table:
    what = "all layers" if report.level == "full" else f"layers {report.layers}"
    table = Table(
        title=f"Largest absolute difference to PyTorch ({what})",
        title_justify="left",
        caption=f"a logit may differ by {report.tolerance:g}",
        caption_justify="left",
    )
    table.add_column("check")
    for column in ("logits", "past keys", "past values", "top-1 equal"):
        table.add_column(column, justify="right")
    for line in report.scenarios:
        table.add_row(
            escape(line.scenario),
            *(f"{value:.1e}" for value in (line.logits, line.past_keys, line.past_values)),
            f"{line.num_top1_equal} of {line.num_rows}",
        )
    return table


def _one_line(text: str, limit: int = 100) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _outcome_document(outcome: CompileOutcome) -> dict[str, Any]:
    document: dict[str, Any] = {"name": outcome.variant.name, "ok": outcome.ok}
    if isinstance(outcome.result, Build):
        built = outcome.result
        document |= {
            "path": str(built.path),
            "reused": built.reused,
            "seconds": round(built.seconds, 3),
            "qpc_bytes": built.qpc_bytes,
        }
    else:
        document["error"] = str(outcome.result)
        if isinstance(outcome.result, CompileError):
            document["exit_code"] = outcome.result.exit_code
    return document


class ProgressLog(Screen):
    """A screen for nobody: in place of answers how many there are, now and then."""

    def __init__(self) -> None:
        super().__init__()
        self._rows = 0
        self._failed_rows = 0
        self._next_s = 0.0

    def answered(self, row: Row) -> None:
        """Count a row."""
        self._rows += 1
        self._failed_rows += not row.ok
        if time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + PROGRESS_EVERY_S
            sys.stderr.write(progress_line(self._rows, self._failed_rows) + "\n")


def show_submission(submission: Submission, *, as_json: bool) -> None:
    """Print the id, and beside it what was sent and what was not."""
    request, parcel = submission.request, submission.parcel
    note = Console(stderr=True, soft_wrap=True, highlight=False).print
    sent = ", ".join(f"{name} ({size:,} bytes)" for name, size in parcel.sent.items())
    note(f"[green]✓[/] sent {escape(sent)}")
    note(f"  runs in {escape(str(request.folder))} of the cluster's head")
    for path in parcel.expected:
        note(f"  [yellow]not sent[/], and must be there: {escape(path)}")
    at = "" if request.address is None else f" --address {request.address}"
    note(f"[dim]qaic-ray status|logs|stop {escape(submission.id + at)}[/]")
    write(submission.id + "\n")
    if as_json:
        _write_json(
            {
                "id": submission.id,
                "job": request.job.name,
                "folder": str(request.folder),
                "sent": parcel.sent,
                "expected": list(parcel.expected),
            }
        )


def show_jobs(found: Sequence[JobStatus], *, as_json: bool) -> None:
    """Print a table of jobs, and below it why those failed that did, and where results are."""
    table = Table()
    for column in ("id", "job", "state", "started", "took"):
        table.add_column(column)
    for column in ("rows done", "failed"):
        table.add_column(column, justify="right")
    out = Console(soft_wrap=True, highlight=False)
    for job in found:
        table.add_row(
            escape(job.id),
            escape(job.job),
            f"[{_COLOURS.get(job.state, 'yellow')}]{escape(job.state)}[/]",
            _when(job.started_s),
            _took(job),
            "" if job.rows is None else f"{job.rows:,}",
            "" if job.failed_rows is None else f"{job.failed_rows:,}",
        )
    if found:
        out.print(table)
    else:
        out.print("The cluster knows no detached job.")
    for job in found:
        if job.error:
            out.print(f"{escape(job.id)}: [red]{escape(job.error)}[/]")
        if job.folder:
            out.print(f"{escape(job.id)}: {escape(job.folder)}")
    if as_json:
        _write_json({"jobs": [asdict(job) for job in found]})


def _when(time_s: float | None) -> str:
    if time_s is None:
        return ""
    return datetime.fromtimestamp(time_s).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _took(job: JobStatus) -> str:
    if job.started_s is None:
        return ""
    seconds = int((job.ended_s or time.time()) - job.started_s)
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def write(text: str) -> None:
    """Put text on stdout as it is."""
    sys.stdout.write(text)
    sys.stdout.flush()


def _write_json(document: dict[str, Any]) -> None:
    # Not through the console: it would wrap or colour what programs read.
    write(json_text(document) + "\n")
