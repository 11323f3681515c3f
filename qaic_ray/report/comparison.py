"""Several runs beside each other: as a document, a table for the terminal, and a page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from qaic_ray.report.document import document_of
from qaic_ray.report.folder import read_run
from qaic_ray.report.page import draw
from qaic_ray.runs.report import NONE, Document, count_text, rate_text, seconds_text

MAX_COLUMNS = 3
"""Runs that stand beside each other in a terminal's table; more stand below each other."""


@dataclass(frozen=True)
class Compared:
    """One figure of a run: its name, its key in the document, and how it is shown.

    `less_is_better` None: neither is.
    """

    name: str
    key: str
    text: Callable[[float], str]
    less_is_better: bool | None = None


COMPARED = (
    Compared("rows", "rows", lambda value: count_text(int(value))),
    Compared("failed rows", "failed_rows", lambda value: count_text(int(value))),
    Compared("generated tokens", "generated_tokens", lambda value: count_text(int(value))),
    Compared("seconds", "seconds", seconds_text),
    Compared("tokens/s", "tokens_per_s", rate_text, False),
    Compared("TTFT from the queue p50", "latency.ttft_queue.p50_s", seconds_text, True),
    Compared("TTFT from the queue p99", "latency.ttft_queue.p99_s", seconds_text, True),
    Compared("TTFT from the engine p50", "latency.ttft_engine.p50_s", seconds_text, True),
    Compared("TTFT from the engine p99", "latency.ttft_engine.p99_s", seconds_text, True),
    Compared("inter-token p50", "latency.inter_token.p50_s", seconds_text, True),
    Compared("inter-token p99", "latency.inter_token.p99_s", seconds_text, True),
    Compared("end to end p50", "latency.end_to_end.p50_s", seconds_text, True),
    Compared("end to end p99", "latency.end_to_end.p99_s", seconds_text, True),
    Compared("occupancy", "occupancy", lambda value: f"{value:.0%}", False),
    Compared("joules a token", "energy.joules_per_token", lambda value: f"{value:.3g}", True),
)
_OF_WHAT_RAN = (
    *("model", "model_sha256", "qpc", "precision", "num_cores", "sdk", "qaic_ray", "ray", "host"),
)


def compare(folders: Sequence[Path]) -> Document:
    """The figures of several runs, in any state, and in what they differ.

    Raises:
        UsageError: one is not the folder of a run.
    """
    documents = [document_of(read_run(folder)) for folder in folders]
    runs = []
    for document in documents:
        figures = {figure.key: _value(document, figure.key) for figure in COMPARED}
        runs.append(
            {
                "name": Path(document["folder"]).name,
                "folder": document["folder"],
                "job": document["job"],
                "state": document["state"],
                "emulated": document["emulated"],
                "cards": len(document["workers"]),
                "figures": figures,
                "missing": document["missing"],
            }
        )
    return {"runs": runs, "differences": _differences(documents)}


def _value(document: Document, key: str) -> float | None:
    value: object = document
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    is_measured = "latency" not in key or value > 0
    return value if is_measured else None


def _differences(documents: Sequence[Document]) -> Document:
    """What of that which ran is not the same: name -> the value of each run."""
    found: Document = {}
    for name in _OF_WHAT_RAN:
        values = [_of_what_ran(document, name) for document in documents]
        if len(set(values)) > 1:
            found[name] = values
    cards = [str(len(document["workers"])) for document in documents]
    return found | ({"cards": cards} if len(set(cards)) > 1 else {})


def _of_what_ran(document: Document, name: str) -> str:
    value = document.get("ran", {}).get(name) or document.get(name, "")
    return str(value)[:60]


def cells(comparison: Document) -> Iterator[tuple[Compared, list[str], list[float | None]]]:
    """Each figure that any run has: its text for each run, and the ratio to the first run's."""
    runs = comparison["runs"]
    for figure in COMPARED:
        values = [run["figures"][figure.key] for run in runs]
        if all(value is None for value in values):
            continue
        texts = [NONE if value is None else figure.text(value) for value in values]
        first = values[0]
        ratios = [value / first if value is not None and first else None for value in values]
        yield figure, texts, ratios


def comparison_tables(comparison: Document, page: Path | None = None) -> Iterator[RenderableType]:
    """Draw a comparison for the terminal; `page` is where its page is, if there is one."""
    runs = comparison["runs"]
    found = list(cells(comparison))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    if len(runs) <= MAX_COLUMNS:
        table.add_column("")
        for run in runs:
            table.add_column(_short_name(run), justify="right", overflow="fold")
        for figure, texts, ratios in found:
            table.add_row(figure.name, *map(_cell, texts, [figure] * len(texts), ratios))
    else:
        table.add_column("run", overflow="fold")
        chosen = [item for item in found if item[0].key in _OF_MANY]
        for figure, _, _ in chosen:
            table.add_column(figure.name, justify="right")
        for number, run in enumerate(runs):
            table.add_row(_short_name(run), *(texts[number] for _, texts, _ in chosen))
    yield table
    for name, values in comparison["differences"].items():
        yield Text(f"{name}: {' | '.join(value or NONE for value in values)}", style="dim")
    for run in runs:
        for text in run["missing"]:
            yield Text(f"{run['name']}: {text}", style="yellow")
    if page is not None:
        yield Text.assemble(("comparison  ", "dim"), str(page))


_OF_MANY = {
    *("rows", "failed_rows", "tokens_per_s", "latency.ttft_queue.p50_s"),
    *("latency.inter_token.p50_s", "latency.end_to_end.p99_s"),
}


def _short_name(run: Document) -> str:
    state = "" if run["state"] == "done" else f" ({run['state']})"
    return f"{run['name']}{state}"


def _cell(text: str, figure: Compared, ratio: float | None) -> Text:
    if ratio is None or figure.less_is_better is None or abs(ratio - 1) < 0.005:
        return Text(text)
    is_better = (ratio < 1) == figure.less_is_better
    return Text.assemble(text, (f" {ratio - 1:+.0%}", "green" if is_better else "red"))


def comparison_page(comparison: Document) -> str:
    """Draw a comparison as a page that needs no other file."""
    rows = []
    for figure, texts, ratios in cells(comparison):
        values = [run["figures"][figure.key] or 0.0 for run in comparison["runs"]]
        most = max(values)
        better = [
            None
            if ratio is None or figure.less_is_better is None or abs(ratio - 1) < 0.005
            else (ratio < 1) == figure.less_is_better
            for ratio in ratios
        ]
        shares = [100 * value / most if most else 0.0 for value in values]
        rows.append((figure, list(zip(texts, ratios, shares, better, strict=True))))
    return draw("comparison.html.j2", comparison=comparison, rows=rows)
