"""Results out: rows put back into the input's order, and written. Knows no Ray and no tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from qaic_ray.rows import Row

OUTPUTS_NAME = "outputs.jsonl"
ERRORS_NAME = "errors.jsonl"

# Python's str.splitlines (and others) also break lines here; inside JSON they can be escaped.
_LINE_BREAKS = str.maketrans({"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"})


class InputOrder:
    """Rows in by any order, each index once; rows out by rising index, as soon as that can be.

    Only rows that came before their turn are held.
    """

    def __init__(self) -> None:
        self._early: dict[int, Row] = {}
        self._next_index = 0

    @property
    def num_held(self) -> int:
        """Rows that wait for one before them."""
        return len(self._early)

    def push(self, row: Row) -> list[Row]:
        """Take a row; return those whose turn it is now, often none.

        Raises:
            ValueError: for an index that was there before.
        """
        if row.index < self._next_index or row.index in self._early:
            raise ValueError(f"Row {row.index} came twice.")
        self._early[row.index] = row
        ready = []
        while self._next_index in self._early:
            ready.append(self._early.pop(self._next_index))
            self._next_index += 1
        return ready


@contextmanager
def row_writer(folder: Path) -> Iterator[Callable[[Row], None]]:
    """Give the function that writes a row to `outputs.jsonl`, and to `errors.jsonl` if it failed.

    Both grow row by row under their own names and are flushed after each row, so that they can be
    followed (`tail -f`) while the run goes. A run that is killed leaves the rows it had; the last
    line may be torn.
    """
    with (
        (folder / OUTPUTS_NAME).open("w", encoding="utf-8", newline="\n") as outputs,
        (folder / ERRORS_NAME).open("w", encoding="utf-8", newline="\n") as errors,
    ):

        def write(row: Row) -> None:
            line = json.dumps(row.to_json(), ensure_ascii=False).translate(_LINE_BREAKS) + "\n"
            for stream in (outputs,) if row.ok else (outputs, errors):
                stream.write(line)
                stream.flush()

        yield write
