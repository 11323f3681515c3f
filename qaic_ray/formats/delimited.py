"""Tables of text: the rows of a CSV or TSV file as prompts.

The first row names the columns. There is one for each field that a line of JSONL could have; others
are not read. An empty cell means that the row has no such field. `prompt`, `id` and `stop` are
texts; any other cell that holds JSON (a number, true, a list, an object) is that value.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from typing import Any

from qaic_ray.errors import RowError, UsageError
from qaic_ray.formats.lines import MAX_LINE_BYTES, PromptInput
from qaic_ray.formats.row_range import ALL_ROWS, RowRange
from qaic_ray.formats.row_reader import Draft, OwnFields
from qaic_ray.formats.tables import PROMPT_COLUMNS, checked_columns
from qaic_ray.option_types import PromptFormat
from qaic_ray.rows import Prompt, Row

# A semicolon is what spreadsheets write where the comma is a decimal mark.
_DELIMITERS = {PromptFormat.CSV: ",;", PromptFormat.TSV: "\t"}
_PYTHON_WORDS = {"True": "true", "False": "false", "None": "null", "nan": "null", "NaN": "null"}

CsvRecords = Iterator[tuple[int, list[str] | csv.Error]]


def csv_records(
    source: PromptInput, form: PromptFormat
) -> tuple[str, list[str] | csv.Error, CsvRecords]:
    """The delimiter and the header of an opened input, and its records as they are read.

    A record comes with the line that it begins in; one that is damaged is its error.

    Raises:
        QaicRayError: while reading, when that fails, and for a cell that is never closed.
    """
    csv.field_size_limit(MAX_LINE_BYTES)  # Python's own limit is less than a long prompt
    lines = (line.decode("utf-8", "surrogateescape") for line in source.whole_lines())
    first = next(lines, "")
    delimiter = _delimiter(first, _DELIMITERS[form])
    # Not pyarrow's reader: it waits for a megabyte, ends at the first row of another length, and
    # guesses types from its first block.
    records = _records(source, csv.reader(chain([first], lines), delimiter=delimiter, strict=True))
    _, header = next(records, (1, []))
    return delimiter, header, records


def prompts_from_csv(
    source: PromptInput, own: OwnFields, form: PromptFormat, rows: RowRange = ALL_ROWS
) -> Iterator[Prompt | Row]:
    """An item for each row that is read; an error names the line that the row begins in.

    Args:
        source: opened.
        own: reads the rows' fields.
        form: CSV or TSV.
        rows: which records are read.

    Raises:
        UsageError: while reading, for a header that names no prompts.
        QaicRayError: while reading, when that fails, and for a cell that is never closed.
    """
    delimiter, header, records = csv_records(source, form)
    if isinstance(header, csv.Error):
        raise UsageError(
            f"{source.name}: the first line, which names the columns, is damaged: {header}."
        )
    columns = [column.strip() for column in header]
    read = set(checked_columns(source.name, columns))

    def prompt(draft: Draft, cells: list[str] | csv.Error) -> Prompt:
        if isinstance(cells, csv.Error):
            raise RowError(f"Not {form.value.upper()}: {cells}.")
        if len(cells) != len(columns):
            raise RowError(
                f"It has {len(cells)} cells, and the header has {len(columns)}: put quotes around "
                f"a cell that holds {delimiter!r}."
            )
        row = {key: cell for key, cell in zip(columns, cells, strict=True) if key in read}
        return own.read_row(draft, _document(row))

    for index, (line, cells) in rows.of(records):
        raw = "" if isinstance(cells, csv.Error) else delimiter.join(cells)
        yield Draft(index, raw).read(prompt, cells, f"{source.name} line {line}: ")


def _delimiter(header: str, possible: str) -> str:
    """The delimiter with which a column of the header holds prompts."""
    for delimiter in possible:
        with suppress(csv.Error):  # raised again with the first record
            if not PROMPT_COLUMNS.isdisjoint(next(csv.reader([header], delimiter=delimiter), [])):
                return delimiter
    return possible[0]


def _records(source: PromptInput, reader: Any) -> CsvRecords:
    """Each record, or its error, with the line that it begins in."""
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if reader.line_num > line:
                source.last = f"line {line - 1}"
                raise source.broken(f"a cell that begins in line {line} is not closed") from error
            yield line, error
            continue
        if cells:  # a blank line is no record
            yield line, cells


def _document(row: dict[str, str]) -> dict[str, Any]:
    """The row's fields as JSON values."""
    fields = {}
    for key, cell in row.items():
        if not cell and key != "prompt":
            continue
        if any("\udc80" <= character <= "\udcff" for character in cell):
            raise RowError(f'Not UTF-8: the column "{key}".')
        is_text = key in ("prompt", "id") or (key == "stop" and not cell.startswith("["))
        fields[key] = cell if is_text else _value(cell)
    if "messages" in fields and not fields.get("prompt"):
        fields.pop("prompt", None)
    return fields


def _value(cell: str) -> Any:
    """A cell as JSON where it is JSON, else as text."""
    try:
        return json.loads(_PYTHON_WORDS.get(cell, cell))
    except (ValueError, RecursionError):
        return cell
