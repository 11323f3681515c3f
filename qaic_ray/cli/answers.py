"""Answers on stdout: as they end, in input order, or token by token."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from enum import Enum
from typing import TYPE_CHECKING

from rich.console import Console
from rich.control import strip_control_codes
from rich.markup import escape

from qaic_ray.files.documents import json_text
from qaic_ray.formats.prompts import split_prompts

if TYPE_CHECKING:
    from qaic_ray.rows import Row
    from qaic_ray.runs.token_streams import TokenDelta

MAX_PROMPT = 100


class Streaming(str, Enum):
    """How answers are printed while a run goes."""

    AUTO = "auto"
    ROWS = "rows"
    """Each as soon as it is in the journal."""
    ORDERED = "ordered"
    """In input order."""
    TOKENS = "tokens"
    """In input order, the one whose turn it is as it is generated."""
    NONE = "none"


def chosen(asked: Streaming, *, prompt: str | None, is_terminal: bool) -> Streaming:
    """What `auto` means.

    Args:
        asked: by the user.
        prompt: the `--prompt` text; None for prompts of a file.
        is_terminal: whether stdout is one.
    """
    if asked is not Streaming.AUTO:
        return asked
    if not is_terminal:
        return Streaming.ORDERED
    is_single = prompt is not None and len(split_prompts(prompt)) == 1
    return Streaming.TOKENS if is_single else Streaming.ROWS


class Answers:
    """Prints answers one way.

    Args:
        out: stdout.
        streaming: the way; not AUTO.
        as_json: a row is a line of JSON, as in `outputs.jsonl` but for its type.
    """

    def __init__(self, out: Console, streaming: Streaming, *, as_json: bool = False) -> None:
        self.streaming = streaming
        self._out, self._as_json = out, as_json
        self._texts: dict[int, str] = {}
        self._turn = 0
        self._is_open = False
        self._num_written = 0

    def saved(self, row: Row) -> None:
        """A row is in the journal."""
        if self.streaming is Streaming.ROWS:
            self.print(row)

    def answered(self, row: Row) -> None:
        """It is this row's turn, in input order."""
        if self.streaming is Streaming.ORDERED:
            self.print(row)
        elif self.streaming is Streaming.TOKENS:
            self._end_turn(row)

    def print(self, row: Row) -> None:
        """A whole row."""
        if self._as_json:
            sys.stdout.write(json_text({"type": "row", **row.to_json()}) + "\n")
            sys.stdout.flush()
            return
        self._head(row)
        self._body(row)

    def generated(self, deltas: Iterable[TokenDelta]) -> None:
        """Text of rows, with several choices of the first one."""
        for delta in deltas:
            if delta.choice:
                continue
            if delta.restarted and delta.index in self._texts:
                self._texts[delta.index] = ""
                if delta.index == self._turn and self._is_open:
                    self._num_written = 0
                    self._put("\n(begun again, with another answer)\n")
            self._texts[delta.index] = self._texts.get(delta.index, "") + delta.text
        self._write_turn()

    @property
    def is_within_line(self) -> bool:
        """Whether a text has begun and not ended."""
        return self._is_open

    def _write_turn(self) -> None:
        text = self._texts.get(self._turn, "")
        if text and not self._is_open:
            self._is_open = True
            self._out.print(f"[bold cyan]{self._turn}[/]", end=" ")
        if len(text) > self._num_written:
            self._put(text[self._num_written :])
            self._num_written = len(text)

    def _end_turn(self, row: Row) -> None:
        """The row is whole; what of it was written already is not written again."""
        self._texts.pop(row.index, None)
        if self._is_open and row.ok and not row.choices:
            self._put("\n\n")
        elif self._is_open:
            self._put("\n")
            self._body(row)
        else:
            self.print(row)
        self._turn, self._is_open, self._num_written = row.index + 1, False, 0
        self._write_turn()

    def _head(self, row: Row) -> None:
        head = f"[bold cyan]{row.index}[/]" + (f" [cyan]{escape(row.id)}[/]" if row.id else "")
        self._out.print(f"{head} [dim]{escape(one_line(row.prompt))}[/]")

    def _body(self, row: Row) -> None:
        if not row.ok:
            self._out.print(f"[red]{escape(row.error or '')}[/]", end="\n\n")
            return
        for number, choice in enumerate(row.choices, start=1):
            self._out.print(f"[dim]{number} of {len(row.choices)}[/] {escape(choice.text)}")
        self._out.print("" if row.choices else f"{escape(row.text)}\n")

    @staticmethod
    def _put(text: str) -> None:
        sys.stdout.write(strip_control_codes(text))
        sys.stdout.flush()


def one_line(text: str, limit: int = MAX_PROMPT) -> str:
    """A text on one line, cut where it is too long."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"
