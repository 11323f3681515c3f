"""The tables and the picture of a run's document, for people; pure, but for `show`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from cpu import figures
from cpu.figures import Limits, ModelSize
from cpu.picture import Curve, Point, draw
from rich.console import Console
from rich.table import Table

Document = dict[str, Any]


def limits_of(document: Document) -> tuple[Limits, ModelSize, int]:
    """The machine's limits, the model's size, and the mean context of a decode step."""
    size = ModelSize(document["weights"], document["cache_values"])
    context = document["prompt_tokens"] + document["new_tokens"] // 2
    return Limits(**document["limits"]), size, context


def batches_of(document: Document) -> list[int]:
    """Batches whose decode was measured."""
    return figures.values_of(document["results"], "decode", "batch")


def _speed_cell(document: Document, name: str, fields: Document) -> str:
    for result in document["results"]:
        if result["contender"] == name and fields.items() <= result.items():
            found = result["tokens_per_s"]
            mark = "*" if figures.is_disturbed(result) else ""
            return f"{found['median']:,.0f}{mark} ({found['least']:,.0f}-{found['most']:,.0f})"
    return ""


def _ratio_cell(document: Document, name: str, fields: Document) -> str:
    return _quotient_text(figures.ratio(document["results"], name, **fields))


def _quotient_text(found: figures.Quotient | None, of: str = "") -> str:
    if found is None:
        return ""
    return f"{found.value:.2f}{'*' if found.disturbed else ''}{of}"


def decode_table(document: Document) -> Table:
    """Tokens/s by batch, ratios to the peer, and the limits."""
    batches = batches_of(document)
    title = f"decode, tokens/s of all rows: median (range), {document['threads']} threads"
    table = _table(title, ["", *(f"batch {batch}" for batch in batches)])
    for name in document["contenders"]:
        cells = [_speed_cell(document, name, _decode(batch)) for batch in batches]
        if any(cells):
            table.add_row(name, *cells)
    table.add_section()
    for name in document["contenders"]:
        cells = [_ratio_cell(document, name, _decode(batch)) for batch in batches]
        if name != document["ratios_to"] and any(cells):
            table.add_row(f"{name}, x {document['ratios_to']}", *cells)
    table.add_section()
    limits, size, context = limits_of(document)
    reads = [limits.read_tokens_per_s(size, batch, context) for batch in batches]
    read_name = f"limit: 8-bit weights read at {limits.read_gb_s:.0f} GB/s"
    table.add_row(read_name, *(f"{value:,.0f}" for value in reads))
    most = f"{limits.gemm_tokens_per_s(size):,.0f}"
    table.add_row(f"limit: float32 at {limits.gemm_gflop_s:.0f} GFLOP/s", *[most] * len(batches))
    return table


def _decode(batch: int) -> Document:
    return {"part": "decode", "batch": batch}


def other_table(document: Document) -> Table:
    """Prefill, long contexts, and a busy machine: one line a contender and case."""
    columns = ["", "contender", "tokens/s", "to first token", f"x {document['ratios_to']}", "x"]
    table = _table("prefill, long contexts, and a machine with other work", columns)
    for about, fields, more in _other_cases(document):
        rows = 0
        for name in document["contenders"]:
            speed = _speed_cell(document, name, fields)
            if not speed:
                continue
            first, ratio = more(name)
            table.add_row(about if not rows else "", name, speed, first,
                          _ratio_cell(document, name, fields), ratio)  # fmt: skip
            rows += 1
        table.add_section()
    return table


More = Callable[[str], tuple[str, str]]


def _other_cases(document: Document) -> Iterator[tuple[str, Document, More]]:
    results = document["results"]
    for tokens in figures.values_of(results, "prefill", "prompt_tokens"):
        fields = {"part": "prefill", "prompt_tokens": tokens}

        def to_first(name: str, fields: Document = fields, tokens: int = tokens) -> tuple[str, str]:
            value = figures.speed(results, name, **fields)
            return ("", "") if value is None else (f"{tokens / value * 1e3:,.0f} ms", "")

        yield f"prefill of {tokens} tokens", fields, to_first
    contexts = figures.values_of(results, "context", "ctx_len")
    for ctx_len in contexts:
        fields = {"part": "context", "ctx_len": ctx_len}

        def to_short(name: str, ctx_len: int = ctx_len) -> tuple[str, str]:
            if ctx_len == contexts[0]:
                return "", ""
            value = figures.context_ratio(results, name)
            return "", _quotient_text(value, f" of {contexts[0]}")

        yield f"decode, batch 1, ctx_len {ctx_len}", fields, to_short
    for batch in figures.values_of(results, "busy", "batch"):
        for beside in (False, True):
            fields = {"part": "busy", "batch": batch, "beside_busy": beside}

            def to_alone(name: str, batch: int = batch, beside: bool = beside) -> tuple[str, str]:
                value = figures.kept_share(results, name, batch) if beside else None
                return "", _quotient_text(value, " of alone")

            what = "beside a busy process" if beside else "alone"
            yield f"decode, batch {batch}, {what}", fields, to_alone


def promise_table(document: Document) -> Table:
    """What the project promises, and whether it holds."""
    table = _table("promises", ["", "is", "at least", ""])
    for promise in document["promises"]:
        verdict = "holds" if promise["holds"] else "MISSED"
        if promise["disturbed"]:  # a peer whose threads spin falls most, so that it proves nothing
            verdict = "disturbed*"
        table.add_row(
            promise["about"], f"{promise['figure']:.2f}", f"{promise['floor']:.2f}", verdict
        )
    return table


def _table(title: str, columns: list[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number == 0 else "right", no_wrap=True)
    return table


def show(document: Document) -> None:
    """Print the tables."""
    console = Console(width=max(150, Console().width))
    if batches_of(document):
        console.print(decode_table(document))
    if any(result["part"] != "decode" for result in document["results"]):
        console.print(other_table(document))
    if document["promises"]:
        console.print(promise_table(document))
    for line in footnotes(document):
        console.print(line, highlight=False)


def footnotes(document: Document) -> list[str]:
    """What has to be known with the tables."""
    results = document["results"]
    lines = [*document["notes"]]
    if any(figures.is_disturbed(result) for result in results):
        cores = f"{figures.NOISY_CORES:g} of a core"
        lines.append(f"* disturbed: others kept more than {cores} busy in every round")
    waited_s = document["waited_s"]
    lines.append(f"{waited_s:g} s in all of waits for a quiet machine, and of repeated timings")
    processor = document["processor"]
    sets = " ".join(processor["instruction_sets"]) or "no instruction set that matters here"
    lines.append(f"{processor['name']}, {processor['cores']} cores, {sets}")
    return lines


def picture_of(document: Document) -> str:
    """Tokens/s against batch, as SVG."""
    batches = batches_of(document)
    curves = []
    for name in document["contenders"]:
        points = [
            Point(r["batch"], **r["tokens_per_s"])
            for r in document["results"]
            if r["contender"] == name and r["part"] == "decode"
        ]
        curves.append(Curve(name, tuple(sorted(points, key=lambda point: point.batch))))
    limits, size, context = limits_of(document)
    reads = [(b, limits.read_tokens_per_s(size, b, context)) for b in batches]
    gemm = limits.gemm_tokens_per_s(size)
    curves += [
        Curve(f"8-bit weights read at {limits.read_gb_s:.0f} GB/s", _flat(reads), "7 4"),
        Curve(
            f"float32 at {limits.gemm_gflop_s:.0f} GFLOP/s",
            _flat([(b, gemm) for b in batches]),
            "2 4",
        ),
    ]
    processor = document["processor"]
    title = f"Decode of {document['model']} on a CPU, {document['threads']} threads"
    notes = [
        f"{processor['name']}, {document['at'][:10]}; prompts of {document['prompt_tokens']} "
        f"tokens, {document['new_tokens']} new ones a row; medians, and the range of the rounds",
        "Dashed: what memory and float32 arithmetic allow, measured in the same run. "
        "qaic_ray is its emulated SDK: no figure here is a card's.",
    ]
    return draw(curves, title, notes)


def _flat(values: list[tuple[int, float]]) -> tuple[Point, ...]:
    return tuple(Point(batch, value, value, value) for batch, value in values)
