"""Which rows of an input are answered: pure. First a shard of it, of that a sample, of that the
first so many.

A row is known by its draw number: 2**40 times the number of its file, and its own number in the
file, both counted from 0. Neither a shard nor a sample changes it. It decides whether the row is
sampled; and where a row draws tokens at random, its seed is made of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

ROW_BITS = 40
"""A file has fewer rows than two to that power."""

_MASK = 2**64 - 1
_ODD, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_COUNTED_ROWS = 2**18


@dataclass(frozen=True)
class RowChoice:
    """A part of an input's rows.

    Attributes:
        shard: K and N: the K-th of N parts of about equal size, counted from 1; None: all of it.
        sample: of the shard's rows so many (an int), or each with that chance (a float).
        sample_seed: another one gives another sample.
        limit: of what is left only the first so many.
    """

    shard: tuple[int, int] | None = None
    sample: int | float | None = None
    sample_seed: int = 0
    limit: int | None = None

    def to_json(self) -> dict[str, Any]:
        """What two runs must have in common to answer the same rows; nothing for all rows."""
        said: dict[str, Any] = {}
        if self.shard is not None:
            said["shard"] = f"{self.shard[0]}/{self.shard[1]}"
        if self.sample is not None:
            said |= {"sample": self.sample, "sample_seed": self.sample_seed}
        if said and self.limit is not None:
            said["limit"] = self.limit
        return said


def draw_number(file: int, row: int) -> int:
    """The number of a row of an input, by those of its file and of itself in it."""
    return file << ROW_BITS | row


def bounds_by_size(sizes: Sequence[int], count: int) -> list[int]:
    """Where a list of files is cut into so many parts, each of one file or more.

    Args:
        sizes: of the files, in bytes.
        count: of the parts; no more than there are files.

    Returns:
        `count + 1` rising indexes; part i has the files from the i-th to the next one. Each cut is
        where the bytes before it are nearest to their share.
    """
    ends = list(accumulate(sizes, initial=0))
    bounds = [0]
    for part in range(1, count):
        share = ends[-1] * part
        allowed = range(bounds[-1] + 1, len(sizes) - (count - part) + 1)
        bounds.append(min(allowed, key=lambda cut: abs(ends[cut] * count - share)))
    return [*bounds, len(sizes)]


def rows_of_shard(counts: Sequence[int], shard: tuple[int, int]) -> list[tuple[int, int, int]]:
    """The rows of a shard, as many as any other has, or one fewer.

    Args:
        counts: of rows in each file.
        shard: K and N.

    Returns:
        File, first row and the number behind the last, of each file that it has rows of.
    """
    number, count = shard
    total = sum(counts)
    begin, end = total * (number - 1) // count, total * number // count
    found, start = [], 0
    for file, num_rows in enumerate(counts):
        first, last = max(begin - start, 0), min(end - start, num_rows)
        if first < last:
            found.append((file, first, last))
        start += num_rows
    return found


def _mixed(number: int, salt: int) -> int:
    """SplitMix64: a permutation of 64 bits, so that no two rows have the same."""
    number = number * _ODD + salt & _MASK
    number = (number ^ number >> 30) * _FIRST & _MASK
    number = (number ^ number >> 27) * _SECOND & _MASK
    return number ^ number >> 31


def _salt(seed: int) -> int:
    return int.from_bytes(hashlib.blake2b(b"sample %d" % seed, digest_size=8).digest(), "big")


def sampled(file: int, seed: int, below: int) -> Callable[[int], bool]:
    """Whether a row of a file is in a sample: its hash, of 64 bits, is below a bound."""
    salt = _salt(seed)
    return lambda row: _mixed(draw_number(file, row), salt) < below


def bound_of_share(share: float) -> int:
    """The bound of the hashes of a sample in which each row is with that chance."""
    return round(share * 2**64)


def bound_of_count(rows: Sequence[tuple[int, int, int]], seed: int, size: int) -> int:
    """The bound of the hashes of a sample of exactly `size` rows, or of all where they are fewer.

    It holds eight bytes for each row of the sample.

    Args:
        rows: file, first row and the number behind the last, as often as there are any.
        seed: of the sample.
        size: of the sample.
    """
    import numpy as np

    salt = np.uint64(_salt(seed))
    least = np.empty(0, np.uint64)
    with np.errstate(over="ignore"):
        for file, first, end in rows:
            for start in range(first, end, _COUNTED_ROWS):
                stop = min(end, start + _COUNTED_ROWS)
                numbers = np.arange(start, stop, dtype=np.uint64) | np.uint64(file << ROW_BITS)
                least = np.concatenate([least, _mixed_all(numbers, salt)])
                if len(least) > size:
                    least = np.partition(least, size)[: size + 1]
    if len(least) <= size:
        return 2**64
    return int(least.max())


def _mixed_all(numbers: Any, salt: Any) -> Any:
    """The same of an array, whose numbers have 64 bits by themselves."""
    import numpy as np

    numbers = numbers * np.uint64(_ODD) + salt
    numbers = (numbers ^ numbers >> np.uint64(30)) * np.uint64(_FIRST)
    numbers = (numbers ^ numbers >> np.uint64(27)) * np.uint64(_SECOND)
    return numbers ^ numbers >> np.uint64(31)
