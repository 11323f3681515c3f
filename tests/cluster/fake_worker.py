"""A worker with a card's methods and none of its work: sleeps, answers, fails, dies on order."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qaic_ray.cards.lease import Part
from qaic_ray.dispatch.policy import Policy
from qaic_ray.errors import CompileError, DeviceError, UsageError
from qaic_ray.metrics import EngineState, Measurement
from qaic_ray.rows import FinishReason, Prompt, Row
from qaic_ray.worker.worker import WorkerInfo

IMPATIENT = Policy(min_backoff_s=0.1, min_stall_s=60.0)
"""No test waits as long as a run of days may. But a busy machine keeps a worker that is well from
its steps for longer than a run's limit, and none is to be lost for that."""
OF_SILENCE = replace(IMPATIENT, min_stall_s=10.0, first_stall_s=10.0, stall_steps=10)
"""Of tests whose worker hangs: what is waited for here is that limit."""


@dataclass(frozen=True)
class FakeSpec:
    """`row_s`: seconds of card time a prompt; `slice_rows`: rows yielded at a time.

    `well_from`: the incarnation from which on the worker obeys no order to die, break or hang.
    """

    name: str
    device_ids: tuple[int, ...]
    slots: int = 4
    row_s: float = 0.0
    slice_rows: int = 1
    open_error: str = ""
    open_s: float = 0.0
    well_from: int = 1000
    node_id: str = ""
    part: Part | None = None
    choices: tuple[int, ...] = ()
    incarnation: int = 0
    metrics: bool = False


class FakeWorker:
    """Prompts are orders: `die` ends the process, `break` fails the card, `bug` is a bug, `stop`
    stops the process, which is still there then, `until F` waits for a file."""

    def __init__(self, spec: FakeSpec) -> None:
        self.spec = spec  # Ray asks for its `repr` also where this fails
        if spec.open_error == "make":
            raise ModuleNotFoundError("No module named 'nowhere'")
        self._card = threading.Lock()
        self._rows = 0

    def __repr__(self) -> str:
        return self.spec.name

    def open(self, device_ids: tuple[int, ...] | None = None) -> WorkerInfo:
        time.sleep(self.spec.open_s)
        match self.spec.open_error:
            case "usage":
                raise UsageError("The QPC was compiled for 14 NSPs.")
            case "device":
                raise DeviceError("No NSPs are free.", status="QS_NODEV")
            case "exit":
                os._exit(1)
            case "bug":
                raise KeyError("a bug")
        return WorkerInfo(
            self.spec.name,
            device_ids or self.spec.device_ids,
            f"pid {os.getpid()}, OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}",
            self.spec.slots,
            32,
            512,
            0.0,
            pid=os.getpid(),
        )

    def answer(self, prompts: Sequence[Prompt], attempt: int) -> Iterator[list[Row]]:
        rows: list[Row] = []
        for prompt in prompts:
            with self._card:
                time.sleep(self.spec.row_s)
            self._obey(prompt.text)
            self._rows += 1
            rows.append(
                Row(
                    index=prompt.index,
                    prompt=prompt.text,
                    text=prompt.text[::-1],
                    finish_reason=FinishReason.STOP,
                    token_ids=(1, 2),
                    prompt_tokens=3,
                    ttft_s=0.5,
                    worker=self.spec.name,
                    attempts=attempt,
                )
            )
            if len(rows) == self.spec.slice_rows:
                yield rows
                rows = []
        if rows:
            yield rows

    def _obey(self, order: str) -> None:
        if self.spec.incarnation >= self.spec.well_from:
            return
        match order:
            case _ if order.startswith("until "):
                wait_for(Path(order.removeprefix("until ")))
            case "die":
                os._exit(1)
            case "break":
                raise DeviceError("The card is off.", status="QS_ERROR")
            case "bug":
                raise KeyError("a bug")
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)

    def progress(self) -> tuple[int, int, EngineState]:
        return self._rows, 2 * self._rows, EngineState()

    def measurement(self) -> Measurement:
        return Measurement(rows=self._rows, decode_steps=7, decode_tokens=70, decode_s=2.0)

    def close(self) -> None:
        self.spec = None  # type: ignore[assignment]


def specs(count: int, **options: object) -> list[FakeSpec]:
    """One spec a card."""
    return [FakeSpec(f"card {i}", (i,), **options) for i in range(count)]  # type: ignore[arg-type]


def wait_for(path: Path) -> None:
    """Until there is such a file."""
    deadline_s = time.monotonic() + 120
    while not path.exists():
        if time.monotonic() > deadline_s:
            raise DeviceError(f"Nobody made {path}.")
        time.sleep(0.02)


def build(request: tuple[str, float]) -> str:
    """What a compile task does here: takes its time, and then what it is told."""
    what, seconds = request
    time.sleep(seconds)
    if what.startswith("until "):
        wait_for(Path(what.removeprefix("until ")))
    match what:
        case "refuse":
            raise CompileError("The compiler said no.", exit_code=255, log="text")
        case "die":
            os._exit(1)
        case "bug":
            raise KeyError("a bug")
    return f"built {what}"


def meet(request: tuple[str, int]) -> str:
    """A compile task that ends only while others run: it waits for `request[1]` of them."""
    folder, number = request
    Path(folder, str(os.getpid())).touch()
    deadline_s = time.monotonic() + 60
    while len(os.listdir(folder)) < number:
        if time.monotonic() > deadline_s:
            raise CompileError("Nobody else came.")
        time.sleep(0.02)
    return "met"
