"""The rows of a CSV or TSV file, as prompts: a column for each field that JSON could have.

By Python's reader, a row when it has been read: pyarrow's waits for a megabyte, ends at the first
row of another length, and tells types by the first of its blocks. The first row names the columns,
and columns of the user's own are not read. An empty cell is as if a row had no such field.
`prompt`, `id` and `stop` are texts; what is JSON in any other cell (a number, true, a list, an
object) is that.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from typing import Any

from qaic_ray.errors import RowError, UsageError
from qaic_ray.formats.jsonl import FieldRows
from qaic_ray.formats.lines import MAX_LINE_BYTES, Input
from qaic_ray.formats.prompt_fields import Draft
from qaic_ray.formats.row_fields import OwnFields, check_columns, is_known
from qaic_ray.option_types import PromptFormat
from qaic_ray.rows import Prompt, Row

# A semicolon is what spreadsheets write where the comma is a decimal mark.
_DELIMITERS = {PromptFormat.CSV: ",;", PromptFormat.TSV: "\t"}
_PROMPTS = frozenset({"prompt", "messages"})
_READ = (*_PROMPTS, "id")
_PYTHON_WORDS = {"True": "true", "False": "false", "None": "null", "nan": "null", "NaN": "null"}


def prompts_from_csv(
    name: str, source: Input, form: PromptFormat, own: OwnFields
) -> Iterator[Prompt | Row]:
    """An item for each row; its error, if it has one, tells the line that it begins in.

    Args:
        name: of the input.
        source: opened.
        form: CSV or TSV.
        own: the fields that the run says.

    Raises:
        UsageError: while reading, for a header that names no prompts.
        QaicRayError: while reading, when that fails, and for a cell that is never closed.
    """
    csv.field_size_limit(MAX_LINE_BYTES)  # Python's own limit is less than a long prompt
    lines = (line.decode("utf-8", "surrogateescape") for line in source.whole_lines())
    first = next(lines, "")
    delimiter = _delimiter(first, _DELIMITERS[form])
    records = _records(source, csv.reader(chain([first], lines), delimiter=delimiter, strict=True))
    _, header = next(records, (1, []))
    columns = _columns(name, header)
    read = FieldRows(own)

    def prompt(draft: Draft, cells: list[str] | csv.Error) -> Prompt:
        if isinstance(cells, csv.Error):
            raise RowError(f"Not {form.value.upper()}: {cells}.")
        if len(cells) != len(columns):
            raise RowError(
                f"It has {len(cells)} cells, and the header has {len(columns)}: put quotes around "
                f"a cell that holds {delimiter!r}."
            )
        return read(draft, _document(dict(zip(columns, cells, strict=True))))

    for index, (line, cells) in enumerate(records):
        draft = Draft(index, "" if isinstance(cells, csv.Error) else delimiter.join(cells))
        yield draft.read(prompt, cells, f"{name} line {line}: ")


def _delimiter(header: str, possible: str) -> str:
    """What stands between the columns: that with which one of them has prompts."""
    for delimiter in possible:
        with suppress(csv.Error):  # of which the first record is told
            if not _PROMPTS.isdisjoint(next(csv.reader([header], delimiter=delimiter), [])):
                return delimiter
    return possible[0]


def _records(source: Input, reader: Any) -> Iterator[tuple[int, list[str]] | tuple[int, csv.Error]]:
    """Each record with the line that it begins in; an error for one that is none."""
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
        if cells:  # a blank line is none
            yield line, cells


def _columns(name: str, header: list[str] | csv.Error) -> list[str]:
    """The header's names.

    Raises:
        UsageError: no row could be answered with these columns.
    """
    if isinstance(header, csv.Error):
        raise UsageError(f"{name}: the first line, which names the columns, is damaged: {header}.")
    names = [column.strip() for column in header]
    check_columns(name, names)
    return names


def _document(row: dict[str, str]) -> dict[str, Any]:
    """The row's fields, as JSON has them."""
    fields = {}
    for key, cell in row.items():
        if not (key in _READ or is_known(key)) or (not cell and key != "prompt"):
            continue
        if any("\udc80" <= character <= "\udcff" for character in cell):
            raise RowError(f'Not UTF-8: the column "{key}".')
        is_text = key in ("prompt", "id") or (key == "stop" and not cell.startswith("["))
        fields[key] = cell if is_text else _value(cell)
    if "messages" in fields and not fields.get("prompt"):
        fields.pop("prompt", None)
    return fields


def _value(cell: str) -> Any:
    """A cell as the JSON that it is, else as the text."""
    try:
        return json.loads(_PYTHON_WORDS.get(cell, cell))
    except (ValueError, RecursionError):
        return cell
