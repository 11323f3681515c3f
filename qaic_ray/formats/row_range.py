"""Which rows of one file are read: a range of their numbers, and of these perhaps a sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class RowRange:
    """Rows of a file, by their numbers there, which count from 0.

    Attributes:
        first: the first of them.
        end: the number behind the last one; None: the file's last.
        keeps: tells which of these are read; None: all.
    """

    first: int = 0
    end: int | None = None
    keeps: Callable[[int], bool] | None = None

    @property
    def is_whole(self) -> bool:
        """Whether every row of the file is read, whatever their number is."""
        return self == ALL_ROWS

    def of(self, rows: Iterable[T], start: int = 0) -> Iterator[tuple[int, T]]:
        """Those of the rows that are read, with their numbers; nothing behind the last is taken.

        Args:
            rows: of the file, in order.
            start: the number of the first of them, no more than `first`.
        """
        end = None if self.end is None else self.end - start
        numbered = islice(enumerate(rows, start), self.first - start, end)
        if self.keeps is None:
            return numbered
        keeps = self.keeps
        return (pair for pair in numbered if keeps(pair[0]))


ALL_ROWS = RowRange()
