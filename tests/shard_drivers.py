"""Runs on simulated cards through the product's own step: input, driver, journal, files, report.

Only Ray, the model and the QPC are left out. An answer tells the number that the row's draws are
made of, so that it is the same in whichever shard the row is answered.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from simulated_cards import DirectReader, SimulatedCards, answer

from qaic_ray.dispatch.dispatcher import Event, RowsFinished, RunShard
from qaic_ray.options import RunOptions
from qaic_ray.pipeline import run_step
from qaic_ray.pipeline.request import RunRequest, read_request, resolved
from qaic_ray.rows import FinishReason, Prompt, Row
from qaic_ray.runs.driver import Driver
from qaic_ray.runs.report import RunSummary

FAILS = "fail"
"""A prompt with this word in it is refused by the model."""


class Killed(BaseException):
    """The process ends here."""


@dataclass
class FlatCards(SimulatedCards):
    """Cards that keep nothing of what they ran."""

    def run(self, shard: RunShard) -> None:
        super().run(shard)
        self.ran.clear()

    def _happened(self, card: Any, worker: str, event: Event) -> Event:
        super()._happened(card, worker, event)
        if isinstance(event, RowsFinished) and not self._left[event.shard_id]:
            del self._left[event.shard_id]
        return event


def drawn(prompt: Prompt, worker: str, attempt: int) -> Row:
    """An answer by the row's text and its draw number."""
    number = prompt.index if prompt.draw is None else prompt.draw
    row = answer(prompt, worker, attempt)
    if FAILS in prompt.text:
        refused = {"finish_reason": FinishReason.ERROR, "error": "It is refused."}
        return replace(row, text="", token_ids=(), **refused)
    return replace(row, text=f"{prompt.text.upper()} {number}", token_ids=(number % 89,))


def some_qpc(folder: Path) -> Path:
    """A folder that can be taken for a QPC's."""
    folder.mkdir(exist_ok=True)
    header = struct.pack("<4sBBHQQ", bytes.fromhex("7ccda100"), 0, 1, 1, 24, 0)
    (folder / "programqpc.bin").write_bytes(header)
    return folder


def run_of(folder: Path, **options: Any) -> RunRequest:
    """A new run, whose run folder will be in `folder`/runs."""
    folder.mkdir(parents=True, exist_ok=True)
    said = {"metrics": False, "devices": (0,), "output": str(folder / "runs"), **options}
    return RunRequest("run", "tiny", some_qpc(folder / "qpc"), resolved(RunOptions(**said)))


def resumed_run(folder: Path) -> RunRequest:
    """The run in a run folder, to go on with it."""
    return read_request(folder)


def _unheard(_: object) -> None:
    """What nobody listens to."""


def drive(
    request: RunRequest,
    *,
    qpc: str = "q",
    slots: int = 8,
    cards: type[SimulatedCards] = SimulatedCards,
    on_row: Callable[[Row], None] = lambda row: None,
) -> RunSummary:
    """Run it on two simulated cards; `on_row` may end it."""

    def run_prompts(prompts: Iterator[Prompt | Row], *_: object, **how: Any) -> Any:
        simulated = cards((0.0, 0.0), slots=slots, answer=drawn)
        audience, real = how["audience"], how["audience"].on_row

        def told(row: Row) -> None:
            real(row)
            on_row(row)

        driver = Driver(
            *(simulated, prompts, replace(audience, on_row=told)),
            clock=simulated.clock,
            journal=how["journal"],
            reader=DirectReader,
        )
        return driver.run()

    # No mock: that would keep every row that it is told.
    heard = ["answered", "saved", "generated", "running", "card_ready", "remark", "note"]
    heard += ["run_folder", "going"]
    listener: Any = SimpleNamespace(**dict.fromkeys(heard, _unheard), wants_tokens=False)
    here = SimpleNamespace(description="simulated", numerics=None, card_lines=dict)
    sdk: Any = SimpleNamespace(name="auto", here=here)
    cluster: Any = SimpleNamespace(run_prompts=run_prompts, write_logs_to=lambda *_: None)
    request.check_parts()
    with (
        mock.patch.object(run_step, "content_parts", return_value={"qpc": qpc, "model": {"m": 1}}),
        mock.patch.object(run_step, "worker_specs", return_value=[]),
        # Its template takes longer than the run.
        mock.patch("qaic_ray.report.document.html_page", return_value=""),
        run_step.resuming(request, sdk),
    ):
        return run_step.run_on(cluster, request, request.open_input(), sdk=sdk, listener=listener)
