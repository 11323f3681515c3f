"""A place to work on batches without cards: a fleet that a test holds, a clock, a death."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from byte_tokens import byte_tokenizer

from qaic_ray.errors import FleetBusy, FleetClosed
from qaic_ray.fleet.pending_row import PendingRow
from qaic_ray.model.tokenizer import Tokenizer
from qaic_ray.options import Generation
from qaic_ray.rows import ErrorClass, FinishReason, Prompt, Row, Sample
from qaic_ray.sampling_params import SamplingParams
from qaic_ray.serve.batches.open_batches import BatchLimits, BatchManager
from qaic_ray.serve.batches.request_lines import Answering
from qaic_ray.serve.protocol.answers import answer_body
from qaic_ray.serve.protocol.asked import ENDPOINTS
from qaic_ray.serve.protocol.context import ModelContext
from qaic_ray.serve.protocol.requests import read_request
from qaic_ray.timeouts import Timeouts
from qaic_ray.worker.prompt_encoder import PromptEncoder
from qaic_ray.worker.worker import WorkerInfo

MODEL = "tiny"
CTX_LEN = 64
SLOTS = 2
BROKEN = "breaks a card"
QUICK = Timeouts(read_poll_s=0.001, read_stall_s=0.002, commit_s=0.0)
HANGS_S = 60.0
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


def model_context() -> ModelContext:
    tokenizer = Tokenizer(byte_tokenizer(), {"chat_template": TEMPLATE}, ())
    return ModelContext(
        names=(MODEL,),
        encoder=PromptEncoder(tokenizer, Generation()),
        ctx_len=CTX_LEN,
        vocab_size=256,
        defaults=SamplingParams(),
    )


def answering(context: ModelContext | None = None, program: str = "q") -> Answering:
    context = context or model_context()

    def body(asked: Any, rows: Any, **about: Any) -> dict[str, Any]:
        return answer_body(asked, rows, context, **about)

    return Answering(
        ENDPOINTS,
        lambda endpoint, body, _: read_request(endpoint, body, context),
        body,
        MODEL,
        {"qpc": program, "model": {"tokenizer": "t"}},
    )


def text_of(token_ids: tuple[int, ...], seed: int | None, sample: int = 0) -> str:
    """What the fleet answers: it depends on the tokens and the seed, as a draw does."""
    return hashlib.sha256(repr((token_ids, seed, sample)).encode()).hexdigest()[:12]


def answer_of(prompt: Prompt) -> Row:
    """The row that the fleet gives."""
    params = prompt.sampling or SamplingParams()
    token_ids = prompt.token_ids or ()
    if BROKEN.encode() in bytes_of(token_ids):
        return Row.failed(prompt, "The card failed.", error_class=ErrorClass.DEVICE)
    samples = [
        Sample(text_of(token_ids, params.seed, number), (1, 2, number), FinishReason.STOP)
        for number in range(params.n)
    ]
    return Row(
        index=prompt.index,
        id=prompt.id,
        prompt=prompt.text,
        text=samples[0].text,
        finish_reason=FinishReason.STOP,
        token_ids=samples[0].token_ids,
        prompt_tokens=len(token_ids),
        worker="card 0",
        ended_at=1_000.5,
        choices=tuple(samples) if params.n > 1 else (),
    )


def bytes_of(token_ids: tuple[int, ...]) -> bytes:
    return Tokenizer(byte_tokenizer(), {}, ()).decode(token_ids).encode()


class HeldFleet:
    """A fleet that answers as many prompts as a test lets it; without a limit, each at once.

    `num_background` and `most` show how many it had at once, `prompts` all that it was given.
    """

    def __init__(
        self, *, slots: int = SLOTS, is_free: bool = True, room: int | None = None
    ) -> None:
        self.slots = slots
        self.room = room
        self.workers = (WorkerInfo("card 0", (0,), "simulated", slots, 32, CTX_LEN, 0.0),)
        self.is_free = is_free
        self.is_closed = False
        self.prompts: list[Prompt] = []
        self.most = 0
        self._lock = threading.RLock()
        self._open: dict[int, PendingRow] = {}

    def submit(self, prompt: Prompt, *, wait: bool = True) -> PendingRow:
        assert prompt.background
        with self._lock:
            if self.is_closed:
                raise FleetClosed("The fleet was closed.")
            if self.room is not None and len(self._open) >= self.room:
                raise FleetBusy("full")
            number = len(self.prompts)
            self.prompts.append(prompt)
            pending = PendingRow(replaced(prompt, number), self._cancel)
            self._open[number] = pending
            self.most = max(self.most, len(self._open))
            if self.is_free:
                self.answer(1)
        return pending

    def answer(self, num_rows: int) -> int:
        """Answer so many that are open, the newest first; how many there were."""
        with self._lock:
            done = [self._open.pop(number) for number in sorted(self._open)[::-1][:num_rows]]
        for pending in done:
            pending.finish(answer_of(pending.prompt))
        return len(done)

    def let_run(self) -> None:
        """Answer all, now and from now on."""
        with self._lock:
            self.is_free = True
        while self.answer(100):
            pass

    def close(self, *, is_drained: bool = False) -> None:
        """End: what is open is cancelled where there is time for that, else it fails."""
        with self._lock:
            self.is_closed = True
            left, self._open = list(self._open.values()), {}
        for pending in left:
            if is_drained:
                pending.finish(Row.cancelled(pending.prompt))
            else:
                pending.fail(FleetClosed("Every card was lost."))

    def _cancel(self, index: int) -> None:
        with self._lock:
            pending = self._open.pop(index, None)
        if pending is not None:
            pending.finish(Row.cancelled(pending.prompt))

    @property
    def num_open(self) -> int:
        return len(self._open)


def replaced(prompt: Prompt, index: int) -> Prompt:
    from dataclasses import replace

    return replace(prompt, index=index)


class Clock:
    """Unix time that a test moves."""

    def __init__(self, now_s: float = 1_800_000_000.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


def opened(
    folder: Path,
    fleet: HeldFleet,
    *,
    clock: Callable[[], float] | None = None,
    program: str = "q",
    starts: bool = True,
    **limits: Any,
) -> BatchManager:
    """The batches of a folder, at work."""
    manager = BatchManager(
        folder,
        fleet,
        limits=BatchLimits(**{"hold_s": 0.01, **limits}),
        clock=clock or Clock(),
        timeouts=QUICK,
    )
    if starts:
        manager.start(answering(program=program))
    return manager


def completion(custom_id: str, prompt: object = "hello", **fields: object) -> dict[str, Any]:
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 8, **fields}
    return {"custom_id": custom_id, "method": "POST", "url": ENDPOINTS[0], "body": body}


def jsonl(lines: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def given(manager: BatchManager, data: bytes) -> str:
    """The id of a file with these bytes."""
    with manager.files.begin("requests.jsonl", "batch", is_given=True) as new:
        new.write(data)
        return new.finish(30 * 24 * 3600).id


def until(condition: Callable[[], object]) -> None:
    """Wait for what other threads do."""
    until_s = time.monotonic() + HANGS_S
    while not condition():
        assert time.monotonic() < until_s, "it hangs"
        time.sleep(0.001)


def ended(manager: BatchManager, batch_id: str) -> dict[str, Any]:
    """The batch once it has ended."""
    until(
        lambda: manager.get(batch_id)["status"] in ("completed", "failed", "expired", "cancelled")
    )
    return manager.get(batch_id)


def content(manager: BatchManager, file_id: str | None) -> bytes:
    if file_id is None:
        return b""
    with manager.files.open(file_id) as stream:
        return stream.read()


def lines_of(manager: BatchManager, file_id: str | None) -> list[dict[str, Any]]:
    return [json.loads(line) for line in content(manager, file_id).splitlines()]


# -- death


class Killed(BaseException):
    """The process is dead: no thread of it does anything any more."""


class Death:
    """Ends everything at one of the next changes of the disk, as kill -9 does.

    From then on no change takes place; threads that try end with `Killed`. The disk is not waited
    for, since what is written survives the death of a process.
    """

    def __init__(self) -> None:
        self.num_changes = 0
        self._left: int | None = None
        self._lock = threading.Lock()

    @property
    def has_come(self) -> bool:
        return self._left == 0

    def after(self, num_changes: int) -> None:
        """Let so many changes take place first."""
        self._left = num_changes

    def undo(self) -> None:
        """A new process: the disk takes changes again."""
        self._left = None

    def bury(self, manager: BatchManager) -> None:
        """End what a dead process has left in this one; then the disk takes changes again."""
        self.after(0)
        with suppress(Killed):
            manager.close()
        self.undo()
        manager._held_folder.release(force=True)

    def _may(self) -> None:
        with self._lock:
            if self._left == 0:
                raise Killed
            self.num_changes += 1
            if self._left is not None:
                self._left -= 1
                if self._left == 0:
                    raise Killed

    def guard(self, function: Callable[..., Any], *, is_done: bool = True) -> Callable[..., Any]:
        def guarded(*args: Any, **more: Any) -> Any:
            self._may()
            return function(*args, **more) if is_done else None

        return guarded


_CHANGES = ("rename", "replace", "link", "unlink", "mkdir", "write", "chmod")


@contextmanager
def death() -> Iterator[Death]:
    """Everything that changes the disk goes through a `Death` meanwhile."""
    dying = Death()
    hook = threading.excepthook

    def quiet(args: threading.ExceptHookArgs) -> None:
        if args.exc_type is not Killed:
            hook(args)

    with pytest.MonkeyPatch.context() as patch:
        for name in _CHANGES:
            patch.setattr(os, name, dying.guard(getattr(os, name)))
        for name in ("fsync", "fdatasync"):
            patch.setattr(os, name, dying.guard(getattr(os, name), is_done=False))
        patch.setattr(shutil, "rmtree", dying.guard(shutil.rmtree))
        patch.setattr(threading, "excepthook", quiet)
        yield dying
