"""Documents as nobody would write them: a good one with something of it made odd, by a seed."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 10**400, 1.5, -0.0),
    *(float("inf"), float("nan"), "", "x", "\0", "../..", "/", "9" * 5000, "\ud800", "x" * 5_000),
    *([], {}, [None], [[]], {"a": {}}, [0] * 2000, {"": ""}, "~nosuchuser/x", "1e5", "[" * 3000),
)
"""Values of every type, some huge, none of them at home anywhere."""


def documents(good: Any, seed: int, number: int) -> Iterator[Any]:
    """So many values that differ from a good one: keys dropped, added, renamed; values odd."""
    rng = random.Random(seed)
    for _ in range(number):
        value = copy.deepcopy(good)
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            value = _changed(value, rng)
        yield value


def texts(good: str, seed: int, number: int) -> Iterator[bytes]:
    """So many byte strings that differ from a good text: flipped, cut, doubled, put in."""
    rng = random.Random(seed)
    for _ in range(number):
        data = bytearray(good.encode())
        for _ in range(rng.choice((1, 1, 2, 8))):
            at = rng.randrange(len(data) + 1)
            kind = rng.randrange(5)
            if kind == 0 and at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            elif kind == 1:
                del data[at:]
            elif kind == 2:
                del data[at : at + rng.randrange(1, 20)]
            elif kind == 3:
                data[at:at] = data[at : at + 40]
            else:
                data[at:at] = rng.choice(
                    [
                        b"\0",
                        b"\xff\xfe",
                        b"[" * 2_000,
                        b'{"":' * 2_000,
                        b"9" * 5000,
                        b"&a *a",
                        b"- ",
                    ]
                )
        yield bytes(data)


def _changed(value: Any, rng: random.Random) -> Any:
    """One place of a value made odd."""
    holders = list(_holders(value))
    if not holders or rng.random() < 0.05:
        return copy.deepcopy(rng.choice(ODD))
    holder = rng.choice(holders)
    keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
    key = rng.choice(keys)
    kind = rng.randrange(6)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[rng.choice(["", "x", "k" * 3000, key + "s"])] = copy.deepcopy(rng.choice(ODD))
    elif kind == 2:
        deep: Any = holder[key]
        for _ in range(rng.choice((1, 50, 400))):
            deep = [deep] if rng.random() < 0.5 else {"a": deep}
        holder[key] = deep
    else:
        holder[key] = copy.deepcopy(rng.choice(ODD))
    return value


def _holders(value: Any) -> Iterator[Any]:
    if isinstance(value, (dict, list)):
        if value:
            yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _holders(inner)
