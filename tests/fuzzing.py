"""Thousands of inputs through one reader: each ends soon, with a value or a refusal of one line.

`scripts/test fuzz` runs every test that is marked `fuzz`, and says how many inputs each reader had.
`QAIC_FUZZ_EXAMPLES` is another number of them.
"""

from __future__ import annotations

import logging
import os
import random
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NamedTuple, TypeVar

import pytest

MANY = int(os.environ.get("QAIC_FUZZ_EXAMPLES") or 10_000)
FEW = 300
LONGEST_S = 20
MOST_CHARS = 5000
"""Of a refusal; what it shows of an input is a small part of it."""

LONG = (pytest.mark.slow, pytest.mark.fuzz, pytest.mark.timeout(3600))
"""Marks of a test with many inputs; each input has a limit of its own."""

T = TypeVar("T")
_log = logging.getLogger(__name__)


def counts(few: int = FEW) -> list[object]:
    """Values for a parameter: how many inputs, in the fast tier and in the slow one."""
    return [few, pytest.param(MANY, marks=LONG)]


class Outcome(NamedTuple):
    """How many inputs were read, and how many refused."""

    read: int
    refused: int


@contextmanager
def awake() -> Iterator[None]:
    """An error where something takes longer than anybody would wait."""

    def too_long(_: int, frame: FrameType | None) -> None:
        raise AssertionError(f"it hangs at {frame}")

    old = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(LONGEST_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


def put_through(
    name: str,
    inputs: Iterable[T],
    read: Callable[[T], object],
    refusals: type[Exception] | tuple[type[Exception], ...],
    *,
    lines: int = 1,
) -> Outcome:
    """Read each input.

    Args:
        name: of the reader, for the log.
        inputs: good ones that were changed.
        read: what reads one, in memory or from a file that it writes.
        refusals: the errors that it may raise. Any other one fails the test.
        lines: how many lines a refusal may have.

    Raises:
        AssertionError: one hangs, or is refused with a text that nobody can read.
    """
    num_read = num_refused = 0
    start_s = time.perf_counter()
    for value in inputs:
        with awake():
            try:
                read(value)
                num_read += 1
            except refusals as error:
                num_refused += 1
                text = str(error)
                assert 0 < len(text) < MOST_CHARS, text[:300]
                assert text.count("\n") < lines, text[:300]
    took_s = time.perf_counter() - start_s
    total = num_read + num_refused
    _log.info(
        "%s: %d inputs, %d read, %d refused, %.1f s", name, total, num_read, num_refused, took_s
    )
    return Outcome(num_read, num_refused)


def changed_bytes(good: bytes, seed: int, number: int) -> Iterator[bytes]:
    """So many byte strings that differ from a good one in a few places."""
    rng = random.Random(seed)
    for _ in range(number):
        data = bytearray(good)
        for _ in range(rng.choice((1, 1, 2, 4, 16))):
            at = rng.randrange(len(data)) if data else 0
            kind = rng.randrange(5)
            if kind == 0 and data:
                data[at] ^= 1 << rng.randrange(8)
            elif kind == 1 and data:
                data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
            elif kind == 2:
                del data[at : at + rng.randrange(1, 30)]
            elif kind == 3:
                data[at:at] = data[at : at + rng.randrange(1, 60)]
            else:
                data[at : at + 8] = rng.randbytes(8)
        yield bytes(data[: rng.randrange(len(data) + 1)] if rng.random() < 0.1 else data)


def changed_words(
    good: list[str], others: list[str], seed: int, number: int
) -> Iterator[list[str]]:
    """So many command lines that differ from a good one: words dropped, doubled, moved, odd."""
    rng = random.Random(seed)
    odd = [
        "",
        "-",
        "--",
        "=",
        "-=",
        "\0",
        "9" * 5000,
        "-1",
        "1e9",
        "x" * 3000,
        "\ud800",
        "'",
        "a,b",
    ]
    for _ in range(number):
        words = list(good)
        for _ in range(rng.choice((1, 1, 2, 4))):
            at = rng.randrange(len(words) + 1)
            kind = rng.randrange(6)
            if kind == 0:
                del words[at : at + 1]
            elif kind == 1:
                words[at:at] = [rng.choice(others)]
            elif kind == 2:
                words[at:at] = words[at : at + 2]
            elif kind == 3:
                words[at : at + 1] = [rng.choice(odd)]
            elif kind == 4 and at < len(words):
                words[at] = words[at].partition("=")[0] + "=" + rng.choice(odd)
            elif at < len(words) and words[at]:
                cut = rng.randrange(len(words[at]))
                words[at] = words[at][:cut] + rng.choice(odd)[:40] + words[at][cut:]
        yield words
