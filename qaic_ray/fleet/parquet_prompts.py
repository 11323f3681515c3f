"""The rows of a parquet file, as prompts: a column for each field that a line of JSONL could have.

`prompt` is a column of texts, `messages` one of lists of structs; null is as if a row had no such
field. Columns of the user's own are not read. Row groups are read piece by piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from qaic_ray.errors import RowError, UsageError
from qaic_ray.fleet.input_lines import cannot_read
from qaic_ray.fleet.jsonl import FieldRows
from qaic_ray.fleet.prompt_fields import Draft, mistake
from qaic_ray.rows import Prompt, Row
from qaic_ray.sampling_params import FIELDS, SamplingParams

if TYPE_CHECKING:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    from qaic_ray.fleet.frozen_file import FrozenFile

PARQUET_MAGIC = b"PAR1"

_BATCH_ROWS = 256
_BUFFER_BYTES = 2**20

# A column of whole numbers of which some are missing is one of floats in a pandas table.
_WHOLE_NUMBERS = (
    "n", "max_tokens", "max_completion_tokens", "min_tokens", "top_k", "seed", "logprobs",
)  # fmt: skip


def prompts_from_parquet(
    path: str, sampling: SamplingParams, frozen: FrozenFile | None = None
) -> Iterator[Prompt | Row]:
    """An item for each row; its error, if it has one, counts rows from 0 as `index` does.

    Args:
        path: of the file.
        sampling: the run's.
        frozen: the file as it was.

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
    return _items(path, table, columns, sampling)


def _columns(path: str, schema: pyarrow.Schema) -> list[str]:
    """The columns to read.

    Raises:
        UsageError: no row could be answered with these columns.
    """
    import pyarrow.types as kinds

    for name in schema.names:
        if error := mistake(name):
            raise UsageError(f"{path}: {error}")
    if not {"prompt", "messages"} & set(schema.names):
        raise UsageError(
            f'{path} has no column "prompt" and no "messages": its columns are '
            f"{', '.join(schema.names)}."
        )
    for name, allows, allowed in (
        ("prompt", _is_text, "texts"),
        ("messages", _is_list, 'lists of structs with "role" and "content"'),
    ):
        index = schema.get_field_index(name)
        if index >= 0 and not (allows(schema.types[index]) or kinds.is_null(schema.types[index])):
            raise UsageError(
                f'{path}: the column "{name}" is of {schema.types[index]}, not of {allowed}.'
            )
    return [name for name in schema.names if name in ("prompt", "messages", "id", *FIELDS)]


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
    path: str, table: ParquetFile, columns: list[str], sampling: SamplingParams
) -> Iterator[Prompt | Row]:
    from pathlib import PurePath

    read = FieldRows(sampling)
    name = PurePath(path).name
    for index, row in enumerate(_rows(path, table, columns)):
        draft = Draft(index, "")
        item: Prompt | Row
        try:
            if isinstance(row, UnicodeDecodeError):
                raise RowError("Not UTF-8.")
            item = read(draft, row)
        except RowError as error:
            item = draft.error_row(f"{name} row index {index}: {error}")
        yield item


def _rows(
    path: str, table: ParquetFile, columns: list[str]
) -> Iterator[dict[str, Any] | UnicodeDecodeError]:
    import pyarrow

    floats = [
        name
        for name in columns
        if name in _WHOLE_NUMBERS and pyarrow.types.is_floating(table.schema_arrow.field(name).type)
    ]
    num_rows = 0
    try:
        with table:
            for batch in table.iter_batches(_BATCH_ROWS, columns=columns, use_threads=False):
                for row in _python_rows(batch):
                    if isinstance(row, dict):
                        row.update({name: _whole(row[name]) for name in floats})
                    yield row
                num_rows += batch.num_rows
    except (OSError, pyarrow.ArrowException) as error:
        last = f"row index {num_rows - 1}" if num_rows else None
        raise cannot_read(path, last, OSError(_first_line(error))) from error


def _python_rows(batch: pyarrow.RecordBatch) -> list[dict[str, Any] | UnicodeDecodeError]:
    rows: list[dict[str, Any] | UnicodeDecodeError] = []
    try:
        rows.extend(batch.to_pylist())
    except UnicodeDecodeError as error:  # parquet keeps any bytes as text
        if batch.num_rows == 1:
            return [error]
        for at in range(batch.num_rows):
            rows.extend(_python_rows(batch.slice(at, 1)))
    return rows


def _whole(value: float | None) -> float | int | None:
    return int(value) if value is not None and value.is_integer() else value


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") + "."
