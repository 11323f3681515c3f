"""The rows of a parquet file, as prompts: a column for each field that a line of JSONL could have.

`prompt` is a column of texts, `messages` one of lists of structs; null is as if a row had no such
field. Columns of the user's own are not read. Row groups are read piece by piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from qaic_ray.errors import RowError, UsageError
from qaic_ray.formats.jsonl import FieldRows
from qaic_ray.formats.lines import cannot_read
from qaic_ray.formats.prompt_fields import Draft
from qaic_ray.formats.row_fields import OwnFields, check_columns, is_known
from qaic_ray.rows import Prompt, Row

if TYPE_CHECKING:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    from qaic_ray.formats.frozen_file import FrozenFile

_BATCH_ROWS = 256
_BUFFER_BYTES = 2**20


def prompts_from_parquet(
    path: str, own: OwnFields, frozen: FrozenFile | None = None
) -> Iterator[Prompt | Row]:
    """An item for each row; its error, if it has one, counts rows from 0 as `index` does.

    Args:
        path: of the file.
        own: the fields that the run says.
        frozen: the file as it was when the run began; without it, it is read as it is.

    Raises:
        UsageError: at once, for what is no parquet file, or has no prompts in it.
        QaicRayError: while reading, when that fails.
    """
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        # Not pre-buffered: that holds a whole row group, which may be the whole file.
        source = path if frozen is None else pyarrow.PythonFile(frozen.open(), mode="r")
        table = ParquetFile(source, buffer_size=_BUFFER_BYTES, pre_buffer=False)
    except (OSError, pyarrow.ArrowException) as error:
        raise UsageError(
            f"{path} is no parquet file that can be read: {_first_line(error)}"
        ) from error
    columns = _columns(path, table.schema_arrow)
    if table.metadata.num_rows == 0:
        raise UsageError(f"There are no rows in {path}: give prompts.")
    return _items(path, table, columns, own)


def _columns(path: str, schema: pyarrow.Schema) -> list[str]:
    """The columns to read.

    Raises:
        UsageError: no row could be answered with these columns.
    """
    import pyarrow.types as kinds

    check_columns(path, schema.names)
    for name, allows, allowed in (
        ("prompt", _is_text, "texts"),
        ("messages", _is_list, 'lists of structs with "role" and "content"'),
    ):
        index = schema.get_field_index(name)
        if index >= 0 and not (allows(schema.types[index]) or kinds.is_null(schema.types[index])):
            raise UsageError(
                f'{path}: the column "{name}" is of {_short(schema.types[index])}, '
                f"not of {allowed}."
            )
    read = ("prompt", "messages", "id")
    return [name for name in schema.names if name in read or is_known(name)]


def _is_text(kind: pyarrow.DataType) -> bool:
    import pyarrow.types as kinds

    if kinds.is_dictionary(kind):
        kind = kind.value_type
    return bool(kinds.is_string(kind) or kinds.is_large_string(kind) or kinds.is_string_view(kind))


def _is_list(kind: pyarrow.DataType) -> bool:
    import pyarrow.types as kinds

    is_list = kinds.is_list(kind) or kinds.is_large_list(kind) or kinds.is_fixed_size_list(kind)
    return bool(is_list and kinds.is_struct(kind.value_type))


def _items(
    path: str, table: ParquetFile, columns: list[str], own: OwnFields
) -> Iterator[Prompt | Row]:
    from pathlib import PurePath

    read = FieldRows(own)
    name = PurePath(path).name

    def prompt(draft: Draft, row: dict[str, Any] | Exception) -> Prompt:
        if isinstance(row, UnicodeDecodeError):
            raise RowError("Not UTF-8.") from row
        if isinstance(row, Exception):
            raise RowError(f"A value that cannot be read: {_first_line(row)}") from row
        return read(draft, row)

    for index, row in enumerate(_rows(path, table, columns)):
        draft = Draft(index, "")
        yield draft.read(prompt, row, f"{name} row index {index}: ")


def _rows(
    path: str, table: ParquetFile, columns: list[str]
) -> Iterator[dict[str, Any] | Exception]:
    import pyarrow

    num_rows = 0
    try:
        with table:
            for batch in table.iter_batches(_BATCH_ROWS, columns=columns, use_threads=False):
                for row in _python_rows(batch):
                    if isinstance(row, dict):
                        row = {name: _plain(value) for name, value in row.items()}
                    yield row
                num_rows += batch.num_rows
    except (OSError, pyarrow.ArrowException) as error:
        last = f"row index {num_rows - 1}" if num_rows else None
        raise cannot_read(path, last, OSError(_first_line(error))) from error


def _python_rows(batch: pyarrow.RecordBatch) -> list[dict[str, Any] | Exception]:
    rows: list[dict[str, Any] | Exception] = []
    try:
        rows.extend(batch.to_pylist())
    # Parquet keeps any bytes as text; a time of nanoseconds is none of Python's.
    except (ValueError, ArithmeticError, TypeError) as error:
        if batch.num_rows == 1:
            return [error]
        for at in range(batch.num_rows):
            rows.extend(_python_rows(batch.slice(at, 1)))
    return rows


def _plain(value: Any) -> Any:
    """A value as JSON has it.

    A column of whole numbers of which some are missing is one of floats in a pandas table, and a
    struct has every key of every row.
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
