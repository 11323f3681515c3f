"""What the user sees: stages and progress on stderr, results on stdout."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from qaic_ray.cli.answers import Answers, Streaming
from qaic_ray.cli.live.grid_watch import GridWatch
from qaic_ray.cli.live.live_line import LiveLine, write_json_line
from qaic_ray.cli.live.live_text import Stage, warning_line
from qaic_ray.compile.store import Build, BuildRequest
from qaic_ray.errors import CompileError, ExitCode, QaicRayError, Unfinished
from qaic_ray.files.documents import json_text
from qaic_ray.sdk import boards

if TYPE_CHECKING:
    from qaic_ray.cards.inventory import NodeCards
    from qaic_ray.compile.compiler import Variant
    from qaic_ray.export.check.replay import Activation
    from qaic_ray.export.check.verify import VerifyReport
    from qaic_ray.export.export import ExportResult
    from qaic_ray.pipeline.compile_step import Compiled
    from qaic_ray.pipeline.job import Plan
    from qaic_ray.pipeline.submit_step import Parcel, SubmitRequest
    from qaic_ray.rows import Row
    from qaic_ray.runs.report import RunSummary
    from qaic_ray.runs.run_view import RunFollower, RunView
    from qaic_ray.runs.token_streams import TokenDelta
    from qaic_ray.sdk import Device, Sdk
    from qaic_ray.worker.worker import WorkerInfo

GIB = 2**30
OVERFLOWS_SHOWN = 3

_right = partial(Column, justify="right")


class Screen(AbstractContextManager["Screen"]):
    """Draws for people. Within its context there is a live line, if anything goes on.

    Args:
        stream: whether answers are printed as they come, in input order.
        as_json: stdout is JSON and nothing else: one object, and before it a line a row where
            answers are printed.
        verbose: a line a card too.
        log_json: what is said on stderr is objects of JSON.
    """

    def __init__(
        self,
        *,
        stream: bool = False,
        as_json: bool = False,
        verbose: bool = False,
        log_json: bool = False,
    ) -> None:
        self._as_json, self._log_json, self._verbose = as_json, log_json, verbose
        self._out = Console(soft_wrap=True, highlight=False, quiet=as_json)
        self._note = Console(stderr=True, soft_wrap=True, highlight=False).print
        self._began_s = time.monotonic()
        self._live = LiveLine(as_json=log_json, verbose=verbose)
        self._grid: GridWatch | None = None
        self._held: list[str] = []
        self.show_answers(Streaming.ORDERED if stream else Streaming.NONE)

    def __exit__(self, *_: object) -> None:
        self._live.stop()
        for markup in self._held:  # the text that was being written has no end
            self._note(markup)

    def show_answers(self, streaming: Streaming) -> None:
        """How answers are printed from now on."""
        self._answers = Answers(self._out, streaming, as_json=self._as_json)
        self._shares_terminal = sys.stdout.isatty()

    # -- while it runs: the pipeline's Listener

    def sdk_chosen(self, sdk: Sdk) -> None:
        """Say which SDK everything goes through, and what that means for figures."""
        if sdk.kind == "emulated":
            self._say(
                f"[yellow]{sdk.label}[/]: there is no card here. The steps are the same, the speed "
                "is this machine's."
            )
        else:
            self._say(f"{sdk.label} at {escape(str(sdk.root))}")

    def began(self, stage: str) -> None:
        """A stage begins."""
        began_s = self._began_s = time.monotonic()
        self._say(f"[dim]… {escape(stage)}[/]")
        self._live.show(lambda: Stage(stage, time.monotonic() - began_s))

    def ended(self, stage: str) -> None:
        """The stage that began last is done."""
        seconds = time.monotonic() - self._began_s
        self._live.stop()
        self._say(f"[green]✓[/] {escape(stage)} [dim]{seconds:.1f} s[/]")

    def compiling(self, number: int) -> None:
        """So many variants are compiled from now on."""
        self._grid = GridWatch(number)
        self._live.show(self._grid.view)

    def building(self, request: BuildRequest) -> None:
        """The build of a variant begins."""
        if self._grid is not None:
            self._grid.began(request)

    def compiled(self, variant: Variant, result: Build | QaicRayError) -> None:
        """One variant is there, or failed."""
        if self._grid is not None and self._grid.ended(variant.label, ok=isinstance(result, Build)):
            self._live.stop()
        label = escape(variant.label)
        if isinstance(result, Build):
            how = "kept" if result.reused else f"{result.seconds:.1f} s"
            size = f"{result.qpc_bytes / 2**20:.0f} MiB"
            self._say(f"  [green]✓[/] compile {label} [dim]{how}, {size}[/]")
        else:
            self._say(f"  [red]✗[/] compile {label}: {escape(str(result))}")

    def card_ready(self, info: WorkerInfo) -> None:
        """A card has loaded its program."""
        slots = "1 slot" if info.slots == 1 else f"{info.slots} slots"
        self._say(
            f"  [green]✓[/] {escape(info.name)} ready [dim]{info.load_s:.1f} s, "
            f"{slots} of {info.ctx_len} tokens[/]"
        )

    def note(self, text: str) -> None:
        """Something that was decided, and how to have it otherwise."""
        self._say(f"[dim]{escape(text)}[/]")

    def remark(self, text: str) -> None:
        """Something that the user may want to mend."""
        self._say(f"[yellow]{escape(text)}[/]")

    def dashboard(self, ways_in: Sequence[str]) -> None:
        """Say where Ray's dashboard is, its URL on a line of its own."""
        for line in ways_in:
            self._note(escape(line))

    def run_folder(self, folder: Path) -> None:
        """Where the run is kept."""
        self._say(f"[dim]run folder[/] {escape(str(folder))}")

    def serving(self, address: str, names: Sequence[str], *, pid: int) -> None:
        """The interface is up, on stdout: where, and the model's names for its clients."""
        self._live.stop()
        if self._as_json:
            write(json_text({"address": address, "models": list(names), "pid": pid}) + "\n")
            sys.stdout.flush()
            return
        self._out.print(f"Serving {', '.join(map(escape, names))} at {address}")

    def answered(self, row: Row) -> None:
        """The next row, in input order."""
        answers = self._answers
        if answers.streaming in (Streaming.ORDERED, Streaming.TOKENS):
            with self._beside():
                answers.answered(row)
            self._live.unhide()
            self._say_held()

    def saved(self, row: Row) -> None:
        """A row is in the journal."""
        if self._answers.streaming is Streaming.ROWS:
            with self._beside():
                self._answers.saved(row)

    @property
    def wants_tokens(self) -> bool:
        """Whether text is shown while it is generated."""
        return self._answers.streaming is Streaming.TOKENS

    def generated(self, deltas: Sequence[TokenDelta]) -> None:
        """Rows got tokens; while one is being written, the live line would break it."""
        with self._beside(hide=True):
            self._answers.generated(deltas)

    def running(self, watch: RunFollower) -> None:
        """A run goes on; how it stands can be asked for."""
        self._live.show(watch.view)

    def going(self, view: RunView) -> None:
        """The first rows have ended."""
        self._say(f"[yellow]{escape(warning_line(view))}[/]")

    def _beside(self, *, hide: bool = False) -> AbstractContextManager[None]:
        """Print on stdout; where that is the live line's terminal, without it."""
        return self._live.paused(hide=hide) if self._shares_terminal else nullcontext()

    def _say(self, markup: str) -> None:
        """A line on stderr."""
        if self._log_json:
            text = Text.from_markup(markup).plain.strip()
            write_json_line({"event": "note", "text": text})
            return
        if self._shares_terminal and self._answers.is_within_line:
            self._held.append(markup)  # it would stand amid the text that is being written
            return
        with self._live.paused():
            self._note(markup)

    def _say_held(self) -> None:
        held, self._held = self._held, []
        for markup in held:
            self._say(markup)

    # -- at the end

    def finish(self, summary: RunSummary) -> None:
        """Print a run's tables; exit code 1 when rows failed.

        Raises:
            Unfinished: the run ended before its input did.
        """
        self._live.stop()
        self._say_held()
        if self._answers.streaming is not Streaming.NONE:
            self._out.rule(style="dim")
        for part in summary.renderables():
            self._out.print(part)
        is_stream = self._answers.streaming is not Streaming.NONE
        self._end_with(({"type": "report"} if is_stream else {}) | summary.document())
        if summary.error is not None:
            raise (Unfinished if summary.goes_on else QaicRayError)(summary.error)
        if not summary.result.ok:
            raise SystemExit(ExitCode.FAILED)

    def nothing_to_do(self, why: str) -> None:
        """Say so: nothing was asked for that is not done."""
        self.remark(why)
        self._end_with({"remark": why})

    def exported(self, result: ExportResult) -> None:
        """Print where the model is and how far it is from PyTorch."""
        report = result.verification
        if report is not None:
            self._out.print(_verification_table(report))
            self._overflows(report.overflows)
        if result.manifest.next_tokens:
            self._out.print(
                "[yellow]Programs of this export answer with token ids[/]: a host sees no logits, "
                "so a row whose logits overflow is answered wrong without a sign. Leave "
                "--next-tokens out to have such rows reported."
            )
        self._out.print(escape(str(result.folder)))
        manifest = json.loads(result.manifest.to_json())
        self._end_with({"folder": str(result.folder), "reused": result.reused, **manifest})

    def _overflows(self, overflows: Sequence[Activation]) -> None:
        shown = overflows
        if not self._verbose:  # a model that has one often has dozens
            shown = sorted(overflows, key=lambda a: -a.largest)[:OVERFLOWS_SHOWN]
        for activation in shown:
            self._out.print(
                f"[yellow]{escape(activation.name)} reaches {activation.largest:.3g}[/]: "
                "beyond float16, so it overflows on the card."
            )
        if rest := len(overflows) - len(shown):
            self._out.print(f"[yellow]and {rest} more[/], none of them larger: -v names all.")

    def compiled_all(self, outcomes: Sequence[Compiled]) -> None:
        """Print the folders; exit code 1 when a variant failed."""
        built = [result for _, result in outcomes if isinstance(result, Build)]
        for result in built:
            self._out.print(escape(str(result.path)))
        self._end_with({"variants": [_compiled_document(*outcome) for outcome in outcomes]})
        if len(built) < len(outcomes):
            raise SystemExit(ExitCode.FAILED)

    def devices(self, sdk: Sdk, devices: Sequence[Device]) -> None:
        """Print the cards."""
        self._out.print(_card_table(f"Cards ({sdk.label})", devices, {}))
        peers = {found[0].board: [device.qid for device in found] for found in boards(devices)}
        document = {"sdk": sdk.label, "devices": [vars(device) for device in devices]}
        self._end_with({**document, "boards": {name: qids for name, qids in peers.items() if name}})

    def inventory(self, nodes: Sequence[NodeCards], problems: Sequence[str]) -> None:
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
        self._end_with({"nodes": [asdict(found) for found in nodes], "problems": list(problems)})

    def plan(self, plan: Plan) -> None:
        """Print what a job would do."""
        self._out.print(f"[bold]{escape(plan.job)}[/]: {escape(plan.text)}")
        for name, argv, chosen in plan.compiles:
            mark = " [green](this one is run)[/]" if chosen else ""
            self._out.print(f"\n[bold]{escape(name)}[/]{mark}")
            self._out.print(escape(" \\\n    ".join(argv)))
        names = "name", "command", "is_run"
        compiles = [dict(zip(names, found, strict=True)) for found in plan.compiles]
        self._end_with({"job": plan.job, "text": plan.text, "compiles": compiles})

    def submitted(self, request: SubmitRequest, submission_id: str, parcel: Parcel) -> None:
        """Print the id, and beside it what was sent and what was not."""
        job, folder = request.job, str(request.folder)
        files = ", ".join(f"{name} ({size:,} bytes)" for name, size in parcel.sent.items())
        self._note(f"[green]✓[/] sent {escape(files)}")
        self._note(f"  runs in {escape(folder)} of the cluster's head")
        for path in parcel.expected:
            self._note(f"  [yellow]not sent[/], and must be there: {escape(path)}")
        at = "" if job.ray.address is None else f" --address {job.ray.address}"
        self._note(f"[dim]qaic-ray status|logs|stop {escape(submission_id + at)}[/]")
        if not self._as_json:
            write(submission_id + "\n")
        self._end_with({"id": submission_id, "job": job.name, "folder": folder, **vars(parcel)})

    def _end_with(self, document: dict[str, Any]) -> None:
        if self._as_json:
            # Not through the console: it would wrap or colour what programs read.
            write(json_text(document) + "\n")


def _card_table(title: str, devices: Sequence[Device], held: Mapping[int, str]) -> Table:
    columns = _right("QID"), "status", "SKU", _right("NSPs free"), _right("DRAM free")
    boards_shown = any(len(board) > 1 for board in boards(devices))
    more = [*(["board"] if boards_shown else []), *(["held by"] if held else [])]
    table = Table(*columns, *more, title=escape(title), title_justify="left")
    for device in devices:
        free, total = device.dram_free_bytes / GIB, device.dram_total_bytes / GIB
        colour = "green" if device.ready else "red"
        table.add_row(
            str(device.qid),
            f"[{colour}]{escape(device.status)}[/]",
            escape(device.sku),
            f"{device.nsp_free} of {device.nsp_total}",
            f"{free:.1f} of {total:.1f} GiB",
            *([escape(device.board)] if boards_shown else ()),
            *([escape(held.get(device.qid, ""))] if held else ()),
        )
    return table


def _verification_table(report: VerifyReport) -> Table:
    what = "all layers" if report.level == "full" else f"layers {report.layers}"
    table = Table(
        "check",
        *map(_right, ("logits", "past keys", "past values", "top-1 equal")),
        title=f"Largest absolute difference to PyTorch ({what})",
        title_justify="left",
        caption=f"a logit may differ by {report.tolerance:g}",
        caption_justify="left",
    )
    for line in report.scenarios:
        table.add_row(
            escape(line.scenario),
            *(f"{value:.1e}" for value in (line.logits, line.past_keys, line.past_values)),
            f"{line.num_top1_equal} of {line.num_rows}",
        )
    return table


def _compiled_document(variant: Variant, result: Build | QaicRayError) -> dict[str, Any]:
    document: dict[str, Any] = {"name": variant.name, "ok": isinstance(result, Build)}
    if isinstance(result, Build):
        seconds = round(result.seconds, 3)
        return document | {**vars(result), "path": str(result.path), "seconds": seconds}
    document["error"] = str(result)
    if isinstance(result, CompileError):
        document["exit_code"] = result.exit_code
    return document


def write(text: str) -> None:
    """Put text on stdout as it is."""
    sys.stdout.write(text)
    sys.stdout.flush()
