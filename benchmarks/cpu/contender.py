"""A contender of the benchmark: a child process that is asked one thing at a time, over JSON lines.

Every contender knows `open`, `decode(prompts, new_tokens)`, `prefill(prompt)` and `close`. `decode`
answers `tokens` that came in `seconds` with all rows running, `wall_s` of the whole call, and the
first `ids` of each row; `prefill` answers `tokens` and the `seconds` to the first one.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

END_S = 20.0


class ContenderError(Exception):
    """It died, or raised: what it said last."""


class Contender:
    """A child that lives as long as the block.

    Args:
        name: for tables.
        command: starts it.
        environment: of its process.
        opening: what `open` is given beside a case's own arguments.
    """

    def __init__(
        self, name: str, command: list[str], environment: Mapping[str, str], **opening: Any
    ) -> None:
        self.name = name
        self._opening = opening
        self._said = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  # see __exit__
        self._child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            env=dict(environment),
        )

    def __enter__(self) -> Contender:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        with suppress(BrokenPipeError):  # it has ended, with a request unread
            self._child.stdin.close()
        try:
            self._child.wait(END_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._child.stdout.close()
        self._said.close()

    @property
    def pid(self) -> int:
        """Of the child; it has no children of its own."""
        return self._child.pid

    def open(self, **case: Any) -> Any:
        """Load a program, model or server."""
        return self.ask("open", **self._opening, **case)

    def ask(self, do: str, **arguments: Any) -> Any:
        """One request.

        Raises:
            ContenderError: it did not do what it was asked.
        """
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        with suppress(BrokenPipeError):  # it has ended, and its stdout too
            self._child.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._child.stdin.flush()
        line = self._child.stdout.readline()
        if not line:
            raise ContenderError(f"{self.name} ended: {self._last_words()}")
        reply = json.loads(line)
        if "error" in reply:
            raise ContenderError(f"{self.name} could not {do}: {reply['error']}")
        return reply["answer"]

    def _last_words(self) -> str:
        self._child.wait(END_S)
        self._said.seek(0)
        lines = [line for line in self._said.read().splitlines() if line.strip()]
        return lines[-1] if lines else f"exit code {self._child.returncode}"


def script(name: str) -> str:
    """Path of a contender's program in this folder."""
    return str(Path(__file__).with_name(name))
