"""Rows through a real session on an emulated card, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Listed
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from qaic_ray.engine.engine import Engine, Finished
from qaic_ray.engine.session import Runtime, Session
from qaic_ray.engine.steps import Sequence
from qaic_ray.sdk import Sdk


@contextmanager
def engine_on(
    sdk: Sdk, qpc: Path, *, device: int = 0, runtime: Runtime | None = None, **options: Any
) -> Iterator[Engine]:
    """An engine over a session on one card; the card is given back."""
    session = Session(sdk, qpc, [device], runtime=runtime)
    try:
        yield Engine(session, **options)
    finally:
        session.close()


def changed(runtime: ModuleType, **attributes: Any) -> ModuleType:
    """A runtime module that differs in some attributes."""
    module = ModuleType(runtime.__name__)
    vars(module).update(vars(runtime) | attributes)
    return module


def rows_of(
    engine: Engine,
    prompts: Listed[Listed[int]],
    wanted: Listed[int | None],
    stop_ids: Listed[int] = (),
) -> list[Sequence]:
    """Sequences whose keys are their places."""
    return [
        Sequence(key, tuple(prompt), engine.new_token_limit(len(prompt), most), frozenset(stop_ids))
        for key, (prompt, most) in enumerate(zip(prompts, wanted, strict=True))
    ]


def run(engine: Engine, rows: Listed[Sequence], arrivals: Listed[int] = ()) -> list[Finished]:
    """Every row to its end, in the order of their keys; row i is added at step `arrivals[i]`."""
    at = dict(zip([row.key for row in rows], arrivals or [0] * len(rows), strict=True))
    waiting = sorted(rows, key=lambda row: at[row.key])
    done: dict[int, Finished] = {}
    step = 0
    while waiting or engine.busy:
        while waiting and at[waiting[0].key] <= step:
            engine.add(waiting.pop(0))
        for finished in engine.step():
            assert finished.sequence.key not in done
            done[finished.sequence.key] = finished
        step += 1
    return [done[key] for key in sorted(done)]


def outputs(finished: Listed[Finished]) -> list[list[int]]:
    """The token ids of every row's answer."""
    return [item.sequence.output_ids for item in finished]
