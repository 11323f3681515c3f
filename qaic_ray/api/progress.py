"""A program's progress: a bar on stderr where that is a terminal, or the program's own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

UseTqdm = bool | Callable[..., Any]
"""True, False, or what makes a bar: called with `total` and `desc`, it has `update` and `close`."""


@contextmanager
def progress(total: int, use_tqdm: UseTqdm) -> Iterator[Callable[[], None]]:
    """A bar for so many prompts; yields a function that any thread calls when one is done."""
    if callable(use_tqdm):
        bar = use_tqdm(total=total, desc="Processed prompts")
        try:
            yield lambda: bar.update(1)
        finally:
            bar.close()
    elif use_tqdm and sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeRemainingColumn as Remaining

        columns = TextColumn("Processed prompts"), BarColumn(), MofNCompleteColumn(), Remaining()
        with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
            task = shown.add_task("", total=total)
            yield lambda: shown.advance(task)
    else:
        yield lambda: None
