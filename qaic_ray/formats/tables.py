"""Parquet tables: their rows as prompts, and a run's rows as one.

Prompts have a column for each field that a line of JSONL could have; others are not read. A null
means that the row has no such field. `prompt` is a column of texts, `messages` one of lists of
structs.

A written table has a typed column for each key of a row; `stop_reason` is two columns, the stop
string and `stop_reason_token`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, BinaryIO

from qaic_ray.errors import RowError, UsageError
from qaic_ray.formats.lines import EmptyInput, cannot_read
from qaic_ray.formats.row_fields import is_known, mistake
from qaic_ray.formats.row_range import ALL_ROWS, RowRange
from qaic_ray.formats.row_reader import Draft, OwnFields
from qaic_ray.rows import Prompt, Row

if TYPE_CHECKING:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    from qaic_ray.formats.frozen_file import KnownFile

PROMPT_COLUMNS = frozenset({"prompt", "messages"})
"""A table of prompts has one of them."""

_ONCE = ("prompt", "messages", "id")
_READ_ROWS = 256
_READ_BYTES = 2**20
_WRITE_ROWS = 1024
_GROUP_BYTES = 64 * 2**20
_GROUP_ROWS = 2**18


def checked_columns(name: str, columns: Sequence[str]) -> list[str]:
    """Those of a table's columns that are read; the others are the user's own.

    Raises:
        UsageError: none is of prompts, or one is a misspelt field of ours, or is there twice.
    """
    read = [column for column in columns if column in _ONCE or is_known(column)]
    for column in columns:
        if column.isprintable() and (error := mistake(column)):
            raise UsageError(f"{name}: {error}")
        if column in read and columns.count(column) > 1:
            raise UsageError(f'{name} has several columns "{column}": keep one of them.')
    if PROMPT_COLUMNS.isdisjoint(columns):
        some = ", ".join(c[:40] if c.isprintable() else repr(c[:40]) for c in columns[:20])
        raise UsageError(
            f'{name} has no column "prompt" and no "messages": its columns are {some}.'
        )
    return read


def open_parquet(path: str, frozen: KnownFile | None = None) -> ParquetFile:
    """A parquet file, of which the footer is read.

    Raises:
        UsageError: it is none.
    """
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        # Not pre-buffered: that holds a whole row group, which may be the whole file.
        source = path if frozen is None else pyarrow.PythonFile(frozen.open(), mode="r")
        return ParquetFile(source, buffer_size=_READ_BYTES, pre_buffer=False)
    except (OSError, pyarrow.ArrowException) as error:
        raise UsageError(
            f"{path} is no parquet file that can be read: {_first_line(error)}"
        ) from error


def prompts_from_parquet(
    path: str,
    own: OwnFields,
    frozen: KnownFile | None = None,
    *,
    name: str = "",
    rows: RowRange = ALL_ROWS,
) -> Iterator[Prompt | Row]:
    """An item for each row that is read; an error names it by its `index`, counted from 0.

    Args:
        path: of the file.
        own: reads the rows' fields.
        frozen: the file as it was when the run began; without it, it is read as it is.
        name: of the file in error rows; empty for its own.
        rows: which are read; row groups before the first are not touched.

    Raises:
        UsageError: at once, for a file that is not parquet, or has no prompts in it.
        QaicRayError: while reading, when that fails.
    """
    table = open_parquet(path, frozen)
    columns = _checked_table(path, table)

    def prompt(draft: Draft, row: dict[str, Any] | Exception) -> Prompt:
        if isinstance(row, UnicodeDecodeError):
            raise RowError("Not UTF-8.") from row
        if isinstance(row, Exception):
            raise RowError(f"A value that cannot be read: {_first_line(row)}") from row
        return own.read_row(draft, row)

    shown = name or PurePath(path).name
    groups, start = _groups_from(table, rows.first)
    return (
        Draft(index, "").read(prompt, row, f"{shown} row index {index}: ")
        for index, row in rows.of(_rows(path, table, columns, groups=groups, start=start), start)
    )


def _groups_from(table: ParquetFile, first: int) -> tuple[range, int]:
    """The row groups from that of a row on, and the number of the first row in them."""
    start = 0
    for group in range(table.num_row_groups):
        num_rows = table.metadata.row_group(group).num_rows
        if start + num_rows > first:
            return range(group, table.num_row_groups), start
        start += num_rows
    return range(0), min(start, first)


def check_parquet(path: str, frozen: KnownFile) -> None:
    """See whether a parquet file has prompts, by its footer.

    Raises:
        UsageError: as `prompts_from_parquet`.
    """
    with open_parquet(path, frozen) as table:
        _checked_table(path, table)


def _checked_table(path: str, table: ParquetFile) -> list[str]:
    columns = _prompt_columns(path, table.schema_arrow)
    if table.metadata.num_rows == 0:
        raise EmptyInput(f"There are no rows in {path}: give prompts.")
    return columns


def _prompt_columns(path: str, schema: pyarrow.Schema) -> list[str]:
    """The columns to read.

    Raises:
        UsageError: no row could be answered with these columns.
    """
    from pyarrow import types

    columns = checked_columns(path, schema.names)
    for name, allows, allowed in (
        ("prompt", _is_text, "texts"),
        ("messages", _is_list, 'lists of structs with "role" and "content"'),
    ):
        index = schema.get_field_index(name)
        kind = None if index < 0 else schema.types[index]
        if kind is not None and not (allows(types, kind) or types.is_null(kind)):
            raise UsageError(f'{path}: the column "{name}" is of {_short(kind)}, not of {allowed}.')
    return columns


def _is_text(types: Any, kind: Any) -> bool:
    kind = kind.value_type if types.is_dictionary(kind) else kind
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _is_list(types: Any, kind: Any) -> bool:
    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return bool(is_list and types.is_struct(kind.value_type))


def _rows(
    path: str, table: ParquetFile, columns: list[str], *, groups: range, start: int
) -> Iterator[dict[str, Any] | Exception]:
    import pyarrow

    num_rows = start
    how: dict[str, Any] = {"columns": columns, "use_threads": False, "row_groups": list(groups)}
    try:
        with table:
            for batch in table.iter_batches(_READ_ROWS, **how) if groups else ():
                yield from _python_rows(batch)
                num_rows += batch.num_rows
    except (OSError, pyarrow.ArrowException) as error:
        last = f"row index {num_rows - 1}" if num_rows > start else ""
        raise cannot_read(path, last, OSError(_first_line(error))) from error


def _python_rows(batch: pyarrow.RecordBatch) -> list[dict[str, Any] | Exception]:
    rows: list[dict[str, Any] | Exception] = []
    try:
        for row in batch.to_pylist():
            rows.append({name: _plain(value) for name, value in row.items()})
    # Parquet keeps any bytes as text; a time of nanoseconds is none of Python's.
    except (ValueError, ArithmeticError, TypeError) as error:
        if batch.num_rows == 1:
            return [error]
        for at in range(batch.num_rows):
            rows.extend(_python_rows(batch.slice(at, 1)))
    return rows


def _plain(value: Any) -> Any:
    """A value as JSON would have it.

    pandas makes floats of a column of whole numbers with gaps, and a struct has every key of every
    row.
    """
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _first_line(error: Exception) -> str:
    return f"{_short(str(error).strip()).rstrip('.')}."


def _short(text: object) -> str:
    return str(text).partition("\n")[0][:200]


@lru_cache(maxsize=1)
def row_schema() -> pyarrow.Schema:
    """The columns of a table of rows, in the order of a row's keys."""
    import pyarrow as pa

    token = [("token_id", pa.int32()), ("logprob", pa.float64())]
    logprobs = pa.list_(pa.struct([*token, ("top", pa.list_(pa.struct(token)))]))
    answer = [
        ("text", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("finish_reason", pa.string()),
        ("stop_reason", pa.string()),
        ("stop_reason_token", pa.int32()),
    ]
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
            ("reused_tokens", pa.int32()),
            ("generated_tokens", pa.int32()),
            ("ttft_s", pa.float64()),
            ("decode_s", pa.float64()),
            ("queue_s", pa.float64()),
            ("started_at", pa.float64()),
            ("ended_at", pa.float64()),
            ("worker", pa.string()),
            ("attempts", pa.int32()),
            ("logprobs", logprobs),
            ("prompt_logprobs", logprobs),
            ("choices", choices),
            ("error", pa.string()),
            ("error_class", pa.string()),
        ]
    )


def write_parquet(rows: Iterable[dict[str, Any]], stream: BinaryIO) -> None:
    """Write rows, as `Row.to_json` gives them, as one table.

    Args:
        rows: are taken as they are written.
        stream: to write to.
    """
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    with ParquetWriter(stream, row_schema(), compression="zstd") as writer:
        group: list[pyarrow.RecordBatch] = []
        rows = map(_split_reasons, rows)
        while some := list(islice(rows, _WRITE_ROWS)):
            group.append(pa.RecordBatch.from_pylist(some, schema=row_schema()))
            num_bytes = sum(part.nbytes for part in group)
            if num_bytes >= _GROUP_BYTES or len(group) * _WRITE_ROWS >= _GROUP_ROWS:
                writer.write_table(pa.Table.from_batches(group))
                group = []
        if group:
            writer.write_table(pa.Table.from_batches(group))


def _split_reasons(answer: dict[str, Any]) -> dict[str, Any]:
    """A row or a choice, with a stop token in its own column."""
    columns = dict(answer)
    if isinstance(answer.get("stop_reason"), int):
        columns |= {"stop_reason": None, "stop_reason_token": answer["stop_reason"]}
    if "choices" in answer:
        columns["choices"] = list(map(_split_reasons, answer["choices"]))
    return columns
