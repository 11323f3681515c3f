"""Prompt files in every format, and their texts as those who wrote them know them."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Sequence

import pyarrow
from pyarrow import parquet

KINDS = ("jsonl", "jsonl.gz", "txt", "csv", "parquet", "json")


def content(kind: str, texts: Sequence[str]) -> bytes:
    """A file with these prompts."""
    rows = [{"prompt": text} for text in texts]
    if kind in ("jsonl", "jsonl.gz"):
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        return lines if kind == "jsonl" else gzip.compress(lines)
    if kind == "txt":
        return "".join(f"{text}\n" for text in texts).encode()
    if kind == "json":
        return json.dumps(rows).encode()
    if kind == "csv":
        stream = io.StringIO()
        writer = csv.writer(stream)
        writer.writerow(["prompt", "id"])
        writer.writerows([text, f"n{number}"] for number, text in enumerate(texts))
        return stream.getvalue().encode()
    sink = io.BytesIO()
    table = pyarrow.table({"prompt": pyarrow.array(texts, pyarrow.string())})
    parquet.write_table(table, sink, row_group_size=3)
    return sink.getvalue()
