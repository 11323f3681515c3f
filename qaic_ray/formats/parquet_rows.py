"""A run's rows as a parquet table: a typed column for each key of a row.

`stop_reason` is two columns: the stop string, and `stop_reason_token`. Knows no run folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    import pyarrow

_BATCH_ROWS = 1024
_GROUP_BYTES = 64 * 2**20
_GROUP_ROWS = 2**18


@lru_cache(maxsize=1)
def row_schema() -> pyarrow.Schema:
    """The columns, in the order of a row's keys."""
    import pyarrow as pa

    ending = [
        ("finish_reason", pa.string()),
        ("stop_reason", pa.string()),
        ("stop_reason_token", pa.int32()),
    ]
    token = [("token_id", pa.int32()), ("logprob", pa.float64())]
    logprobs = pa.list_(pa.struct([*token, ("top", pa.list_(pa.struct(token)))]))
    answer = [("text", pa.string()), ("token_ids", pa.list_(pa.int32())), *ending]
    choices = pa.list_(pa.struct([("index", pa.int32()), *answer, ("logprobs", logprobs)]))
    messages = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    return pa.schema(
        [
            ("index", pa.int64()),
            ("id", pa.string()),
            ("prompt", pa.string()),
            ("messages", messages),
            *answer,
            ("prompt_tokens", pa.int32()),
            ("generated_tokens", pa.int32()),
            ("ttft_s", pa.float64()),
            ("decode_s", pa.float64()),
            ("worker", pa.string()),
            ("attempts", pa.int32()),
            ("logprobs", logprobs),
            ("choices", choices),
            ("error", pa.string()),
            ("error_class", pa.string()),
        ]
    )


def write_parquet(rows: Iterable[dict[str, Any]], stream: BinaryIO) -> None:
    """Write rows, as `Row.to_json` gives them, as one table; of a group of them at a time."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    with ParquetWriter(stream, row_schema(), compression="zstd") as writer:
        group: list[pyarrow.RecordBatch] = []
        for batch in _batches(rows):
            group.append(batch)
            if (
                sum(part.nbytes for part in group) >= _GROUP_BYTES
                or len(group) * _BATCH_ROWS >= _GROUP_ROWS
            ):
                writer.write_table(pa.Table.from_batches(group))
                group = []
        if group:
            writer.write_table(pa.Table.from_batches(group))


def _batches(rows: Iterable[dict[str, Any]]) -> Iterator[pyarrow.RecordBatch]:
    import pyarrow as pa

    rows = map(_columns, rows)
    while some := list(islice(rows, _BATCH_ROWS)):
        yield pa.RecordBatch.from_pylist(some, schema=row_schema())


def _columns(row: dict[str, Any]) -> dict[str, Any]:
    row = _tail(row)
    if "choices" in row:
        row["choices"] = [_tail(choice) for choice in row["choices"]]
    return row


def _tail(answer: dict[str, Any]) -> dict[str, Any]:
    reason = answer.get("stop_reason")
    if isinstance(reason, int):
        return {**answer, "stop_reason": None, "stop_reason_token": reason}
    return dict(answer)
