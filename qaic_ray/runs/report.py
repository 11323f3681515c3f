"""What a run's result says: the figures of `report.json` that it gives, and the terminal's text.

The rest of the document, and the page, are made in `report/`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from qaic_ray.errors import UsageError
from qaic_ray.files.documents import read_object
from qaic_ray.metrics import Measurement
from qaic_ray.runs.delivery import ERRORS_NAME, Proof
from qaic_ray.runs.journal import is_held
from qaic_ray.runs.result import Cause, FleetResult, WorkerResult

FORMAT = 1
REPORT_NAME = "report.json"
PAGE_NAME = "report.html"
MAX_BINS = 25
NONE = "–"

Document = dict[str, Any]

_UNITS = ((0.9995e-3, 1e6, "µs"), (0.9995, 1e3, "ms"), (math.inf, 1.0, "s"))
_COUNTS = ("rows", "failed_rows", "cut_rows", "prompt_tokens", "generated_tokens")
_STEPS = ("prefill_steps", "prefill_s", "decode_steps", "decode_tokens", "decode_s")


@dataclass(frozen=True)
class RunSummary:
    """A run's result, its job, model and QPC; `sdk` is the SDK's label.

    `replay` is the command that replays what was recorded, None where nothing was.
    """

    result: FleetResult
    job: str
    sdk: str
    folder: Path
    model: str = ""
    qpc: str = ""
    proof: Proof | None = None
    replay: str | None = None

    @property
    def error(self) -> str | None:
        """Why the run is not complete, and what to do; None if it is."""
        broken_off = self.result.broken_off
        if broken_off is None:
            return None
        resume = f"`qaic-ray run --resume {self.folder}"
        safe = f"{self.result.total.rows:,} rows are safe"
        how = {
            Cause.CARDS: f"{safe}: when cards are well again, go on with {resume}`.",
            Cause.INPUT: (
                f"{safe}: when the input is as it was and can be read, go on with {resume}`; with "
                "another one whose answered rows are the same, add --input; or begin a new run."
            ),
            Cause.CHANGED: "Begin a new run.",
        }
        return f"{broken_off.error} {how[broken_off.cause]}"

    @property
    def goes_on(self) -> bool:
        """Whether the run ended early and can be resumed."""
        broken_off = self.result.broken_off
        return broken_off is not None and broken_off.cause is not Cause.CHANGED

    def document(self) -> Document:
        """The report as a JSON object."""
        total = self.result.total
        return {
            "format": FORMAT,
            "job": self.job,
            "model": self.model,
            "qpc": self.qpc,
            "sdk": self.sdk,
            "emulated": self.sdk.startswith("emulated"),
            "folder": str(self.folder),
            **_figures(total, *_COUNTS),
            "seconds": round(self.result.span.seconds, 6) if self.result.span else 0.0,
            "tokens_per_s": round(self.result.tokens_per_s, 3),
            "runmodel_tokens_per_s": _runmodel_rate(self.result.workers),
            "ttft_median_s": round(total.ttft_median_s, 6),
            "ttft_p90_s": round(total.ttft.quantile(0.9), 6),
            **_engine_document(total),
            "settings": dict(self.result.settings),
            "error": self.error,
            "goes_on": self.goes_on,
            "proof": None if self.proof is None else asdict(self.proof),
            "workers": [_worker_document(worker) for worker in self.result.workers],
            "ttft_s_histogram": histogram(dict(total.ttft.items())),
            "generated_tokens_histogram": histogram(self.result.length_counts, whole=True),
        }

    def renderables(self) -> Iterator[RenderableType]:
        """What the terminal shows."""
        yield from tables(self.document())
        if self.replay is not None:
            yield Text.assemble(("replay  ", "dim"), self.replay)


def is_finished(run_folder: Path) -> bool:
    """Whether a run is done: it has a report that does not say that it can be resumed."""
    try:
        return read_object(run_folder / REPORT_NAME)["goes_on"] is False
    except (UsageError, KeyError):
        return False


def last_unfinished(output: Path, request_name: str, job: str = "") -> Path | None:
    """The newest run in `output` that can be resumed; None if there is none.

    Args:
        output: the folder of run folders.
        request_name: the file by which a run folder is known; written when the run begins.
        job: only runs of this job.
    """
    begun = []
    for request in output.glob(f"*/{request_name}"):
        with suppress(OSError):  # it is being removed just now
            begun.append((request.stat().st_mtime_ns, request.parent))
    for _, folder in sorted(begun, reverse=True):
        is_of_job = not job or folder.name.startswith(f"{job}-")
        if is_of_job and not (is_finished(folder) or is_held(folder)):
            return folder
    return None


def histogram(counts: Mapping[int, int] | Mapping[float, int], *, whole: bool = False) -> Document:
    """Bins of equal, round width from 0 on: `edges` (one more than bins) and `counts`.

    Args:
        counts: value -> how often it came; no value is negative.
        whole: the values are whole numbers, and no bin is narrower than one.
    """
    if not counts:
        return {"edges": [], "counts": []}
    largest = max(counts)
    width = round_up(largest / MAX_BINS)
    if whole:
        width = max(1.0, math.ceil(width))
    binned = [0] * (math.floor(largest / width) + 1)
    for value, count in counts.items():
        binned[math.floor(value / width)] += count
    return {"edges": [round(i * width, 9) for i in range(len(binned) + 1)], "counts": binned}


def round_up(width: float) -> float:
    """The least of 1, 2, 2.5 and 5 times a power of ten that is not below `width`; 1 for 0."""
    if width <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(width))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= width)


def tables(document: Document, page: Path | None = None) -> Iterator[RenderableType]:
    """Draw a report for the terminal: a line for each card, the merged rate, errors.

    Args:
        document: of this version or an earlier one.
        page: where its page is, if not in the run's folder.
    """
    yield _heading(document)
    yield _card_table(document)
    yield Text.assemble(
        "merged ",
        (f"{rate_text(document['tokens_per_s'])} tokens/s", "bold"),
        f"  ({count_text(document['generated_tokens'])} tokens generated in ",
        f"{seconds_text(document['seconds'])}, first shard out to last row in)",
    )
    if (rate := document.get("runmodel_tokens_per_s")) is not None:
        yield Text(f"as the recipe's runModel.py counts: Output Tokens/sec per Card = {rate:.2f}")
    if remarks := ", ".join(_engine_remarks(document)):
        yield Text(remarks, style="dim")
    if cut := document.get("cut_rows"):
        yield Text(
            f"{count_text(cut)} of {count_text(document['rows'])} rows were cut at their most "
            "tokens (--max-tokens), or at the end of the context",
            style="dim",
        )
    if failed := document["failed_rows"]:
        rows = f"{count_text(failed)} of {count_text(document['rows'])} rows failed"
        yield Text(f"{rows}: see {ERRORS_NAME} in the run folder", style="red")
    for trouble in troubles(document):
        yield Text(trouble, style="red")
    if document.get("settings"):
        yield Text(f"not the defaults: {settings_text(document)}", style="dim")
    for lack in document.get("missing", ()):
        yield Text(lack, style="yellow")
    yield Text.assemble(("run folder  ", "dim"), document["folder"])
    yield Text.assemble(("report  ", "dim"), str(page or Path(document["folder"]) / PAGE_NAME))


def troubles(document: Document) -> list[str]:
    """A sentence for each worker that had an error, and one for the run's."""
    troubles = []
    for worker in document["workers"]:
        if worker["error"]:
            num_losses = worker.get("losses", 0)
            if not worker.get("ready_at_end"):
                happened = "was lost"
            elif num_losses:
                times = "once" if num_losses == 1 else f"{num_losses} times"
                happened = f"was lost {times} and came back"
            else:
                happened = "had an error and went on"
            troubles.append(f"{worker['name']} {happened}: {worker['error']}")
    return [*troubles, *filter(None, [document["error"]])]


def settings_text(document: Document) -> str:
    """The run's settings that are not the defaults."""
    return ", ".join(f"{name} {value}" for name, value in document.get("settings", {}).items())


def _runmodel_rate(workers: Sequence[WorkerResult]) -> float | None:
    """What runModel.py prints as "Output Tokens/sec per Card", over all batches of these workers.

    It counts, of a batch whose rows are all running, its decode steps but one times its rows, over
    the time of all of them. None for programs that it cannot run, and where nothing was decoded.
    """
    tokens, seconds = 0, 0.0
    for worker in workers:
        if worker.info is not None and worker.info.is_static:
            tokens += worker.measurement.loop_tokens * worker.info.slots
            seconds += worker.measurement.loop_s
    return round(tokens / seconds, 3) if seconds > 0 else None


def _engine_document(work: Measurement) -> Document:
    """How well the cards were filled; shares are null where there was nothing to share."""
    return {
        "occupancy": round(work.occupancy, 6) if work.decode_slots else None,
        **_figures(work, "reused_tokens", "drafted_tokens", "accepted_tokens"),
        "acceptance": round(work.acceptance, 6) if work.drafted_tokens else None,
        "tokens_per_row_step": round(work.tokens_per_row_step, 3) if work.decode_rows else None,
    }


def _engine_remarks(document: Document) -> Iterator[str]:
    if document["occupancy"] is not None:
        yield f"{document['occupancy']:.0%} of the rows of decode steps were used"
    if document["reused_tokens"]:
        yield f"{count_text(document['reused_tokens'])} prompt tokens were in a slot already"
    if document["acceptance"] is not None:
        yield (
            f"{document['acceptance']:.0%} of {count_text(document['drafted_tokens'])} drafted "
            f"tokens were right: {document['tokens_per_row_step']:.2f} tokens a row and step"
        )


def _heading(document: Document) -> Text:
    sdk = f"  {document['sdk']}"
    if document["emulated"]:
        sdk = f"{sdk}: not a card's speed"
    return Text.assemble((document["job"], "bold"), (sdk, "yellow" if document["emulated"] else ""))


def _card_table(document: Document) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_footer=True)
    table.add_column("card", footer="all", no_wrap=True)
    for name, footer in (
        ("prompts", count_text(document["rows"])),
        ("prompt tokens", count_text(document["prompt_tokens"])),
        ("generated", count_text(document["generated_tokens"])),
        ("TTFT median", seconds_text(document["ttft_median_s"])),
        ("decode tokens/s", ""),  # rates of cards do not add
    ):
        table.add_column(name, footer=footer, justify="right")
    for worker in document["workers"]:
        table.add_row(
            Text(worker["name"], style="red" if worker["error"] else ""),
            count_text(worker["rows"]),
            count_text(worker["prompt_tokens"]),
            count_text(worker["generated_tokens"]),
            seconds_text(worker["ttft_median_s"]),
            rate_text(worker["decode_tokens_per_s"]),
        )
    return table


def _figures(work: Measurement, *names: str) -> Document:
    return {name: round(getattr(work, name), 6) for name in names}


def _worker_document(worker: WorkerResult) -> Document:
    work = worker.measurement
    return {
        "name": worker.name,
        "device_ids": list(worker.info.device_ids) if worker.info else [],
        "slots": worker.info.slots if worker.info else 0,
        "load_s": round(worker.info.load_s, 6) if worker.info else 0.0,
        **_figures(work, *_COUNTS, "ttft_median_s", *_STEPS),
        **_engine_document(work),
        "decode_tokens_per_s": round(work.decode_tokens_per_s, 3) if work.decode_s > 0 else None,
        "runmodel_tokens_per_s": _runmodel_rate([worker]),
        "error": worker.error,
        "losses": worker.losses,
        "ready_at_end": worker.ready_at_end,
    }


def count_text(count: int) -> str:
    """1234567 -> 1,234,567."""
    return f"{count:,}"


def seconds_text(seconds: float) -> str:
    """Three figures: 12.3 µs, 123 ms, 1.23 s, 1,234 s; a dash for 0, where nothing was measured."""
    if seconds <= 0:
        return NONE
    scale, unit = next((scale, unit) for limit_s, scale, unit in _UNITS if seconds < limit_s)
    return f"{_three_figures(seconds * scale)} {unit}"


def rate_text(per_s: float | None) -> str:
    """Three figures, or a dash where nothing was measured."""
    return _three_figures(per_s) if per_s else NONE


def _three_figures(value: float) -> str:
    if value >= 999.5:
        return f"{value:,.0f}"
    return f"{value:#.3g}".rstrip(".")
