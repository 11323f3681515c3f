"""One card's work: prompts in, rows out. A tokenizer, a session and an engine; no Ray.

Shards overlap: each `answer` call tokenizes in its caller's thread, drops its sequences into the
one engine, and takes its own rows back as they finish. One thread runs the engine, so the card is
never driven by two.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qaic_ray.contract import Specializations
from qaic_ray.errors import DeviceError, QaicRayError, RowError, UsageError
from qaic_ray.metrics import Measurement
from qaic_ray.model import load_tokenizer, open_checkpoint
from qaic_ray.rows import Prompt, Row
from qaic_ray.run import batch
from qaic_ray.run.engine import Engine
from qaic_ray.run.session import Session
from qaic_ray.sdk import open_sdk
from qaic_ray.tokenizer import Tokenizer


@dataclass(frozen=True)
class Generation:
    """How answers are made, and what of the QPC is relied on.

    `generation_len` None means: until the context is full. `prompt_len` and `ctx_len`, where
    given, must be what the QPC was compiled for.
    """

    generation_len: int | None = None
    chat: bool = False
    prompt_len: int | None = None
    ctx_len: int | None = None


@dataclass(frozen=True)
class WorkerSpec:
    """What one card is to do; plain data, made by the driver.

    `model` is anything `open_checkpoint` takes; only its tokenizer and configuration are read.
    """

    name: str
    device_ids: tuple[int, ...]
    sdk_root: str
    qpc: str
    model: str
    generation: Generation = Generation()


@dataclass(frozen=True)
class WorkerInfo:
    """What an opened worker has."""

    name: str
    device_ids: tuple[int, ...]
    sdk: str
    slots: int
    prompt_len: int
    ctx_len: int
    load_s: float


@dataclass(frozen=True)
class _Finished:
    """What the engine's thread hands back to one `answer` call."""

    sequence: batch.Sequence
    ttft_s: float
    decode_s: float


@dataclass(frozen=True)
class _Card:
    """Everything an opened worker holds."""

    tokenizer: Tokenizer
    stop_ids: frozenset[int]
    session: Session
    engine: Engine
    thread: threading.Thread


_Outcome = queue.SimpleQueue[_Finished | QaicRayError]


class CardWorker:
    """Answers prompts on one card or device group."""

    def __init__(self, spec: WorkerSpec) -> None:
        self.spec = spec
        self._keys = 0
        self._failed_rows = 0
        self._lock = threading.Condition()
        self._arrived: list[tuple[batch.Sequence, _Outcome]] = []
        self._failure: QaicRayError | None = None
        self._closed = False
        self._opened: _Card | None = None

    def open(self) -> WorkerInfo:
        """Load the tokenizer and the QPC, and start the engine's thread.

        Raises:
            DeviceError: from the card.
            UsageError: for a QPC, SDK or model that does not fit.
        """
        start_s = time.perf_counter()
        checkpoint = open_checkpoint(self.spec.model, weights=False)
        tokenizer = load_tokenizer(checkpoint)
        if self.spec.generation.chat and not tokenizer.has_chat_template:
            raise UsageError(
                f"{self.spec.model} has no chat template: leave --chat (run.chat) out, or use the "
                "chat version of the model."
            )
        sdk = open_sdk(Path(self.spec.sdk_root))
        session = Session(sdk, Path(self.spec.qpc), self.spec.device_ids)
        try:
            engine = Engine(session)
            self._check_shapes(session.specializations)
        except UsageError:
            session.close()
            raise
        thread = threading.Thread(
            target=self._run, args=(engine,), name=self.spec.name, daemon=True
        )
        stop_ids = frozenset(checkpoint.eos_ids)
        self._opened = _Card(tokenizer, stop_ids, session, engine, thread)
        thread.start()
        shapes = session.specializations
        return WorkerInfo(
            name=self.spec.name,
            device_ids=self.spec.device_ids,
            sdk=", ".join(filter(None, (sdk.label, session.simulated_time))),
            slots=shapes.batch_size,
            prompt_len=shapes.prompt_len,
            ctx_len=shapes.ctx_len,
            load_s=time.perf_counter() - start_s,
        )

    def answer(self, prompts: Sequence[Prompt], attempt: int = 1) -> Iterator[list[Row]]:
        """Answer a shard; rows come in completion order, a few at a time.

        A prompt that cannot be answered is a row with finish_reason ERROR.

        Raises:
            DeviceError: when the card fails; prompts without a row yet were not answered.
        """
        finished: _Outcome = queue.SimpleQueue()
        pending: dict[batch.Sequence, Prompt] = {}
        refused: list[Row] = []
        for prompt in prompts:
            try:
                pending[self._sequence(prompt)] = prompt
            except RowError as error:
                row = Row.failed(prompt, str(error), worker=self.spec.name, attempts=attempt)
                refused.append(row)
        with self._lock:
            self._failed_rows += len(refused)
            self._raise_failure()
            self._arrived.extend((sequence, finished) for sequence in pending)
            self._lock.notify()
        if refused:
            yield refused
        while pending:
            yield [self._row(pending.pop(done.sequence), done, attempt) for done in _take(finished)]

    def measurement(self) -> Measurement:
        """All work since `open`; may be asked for while answers are being made."""
        with self._lock:
            work = self._opened.engine.measurement if self._opened else Measurement()
            return work + Measurement(rows=self._failed_rows, failed_rows=self._failed_rows)

    def close(self) -> None:
        """Stop the engine and give the card back."""
        with self._lock:
            self._closed = True
            self._lock.notify()
        card, self._opened = self._opened, None
        if card is not None:
            card.thread.join()
            card.session.close()

    @property
    def _card(self) -> _Card:
        if self._opened is None:
            raise DeviceError(f"{self.spec.name} is not open.")
        return self._opened

    def _check_shapes(self, shapes: Specializations) -> None:
        for option, wanted, compiled in (
            ("--input-len", self.spec.generation.prompt_len, shapes.prompt_len),
            ("--ctx-len", self.spec.generation.ctx_len, shapes.ctx_len),
        ):
            if wanted not in (None, compiled):
                raise UsageError(
                    f"{option} is {wanted}, but {self.spec.qpc} was compiled for {compiled}: "
                    f"give {compiled}, or compile another variant."
                )

    def _sequence(self, prompt: Prompt) -> batch.Sequence:
        card = self._card
        if not prompt.text:
            raise RowError("The prompt is empty: it has no token to start from.")
        with self._lock:  # the tokenizer's Rust half must not be borrowed by two threads
            self._keys += 1
            key = self._keys
            if self.spec.generation.chat:
                ids = card.tokenizer.chat([{"role": "user", "content": prompt.text}])
            else:
                ids = card.tokenizer.encode(prompt.text)
        limit = card.engine.new_token_limit(len(ids), self.spec.generation.generation_len)
        return batch.Sequence(key, tuple(ids), limit, card.stop_ids)

    def _row(self, prompt: Prompt, done: _Finished, attempt: int) -> Row:
        sequence = done.sequence
        assert sequence.finish_reason is not None
        with self._lock:
            text = self._card.tokenizer.decode(sequence.output_ids)
        return Row(
            index=prompt.index,
            id=prompt.id,
            prompt=prompt.text,
            text=text,
            finish_reason=sequence.finish_reason,
            token_ids=tuple(sequence.output_ids),
            prompt_tokens=len(sequence.prompt_ids),
            ttft_s=done.ttft_s,
            decode_s=done.decode_s,
            worker=self.spec.name,
            attempts=attempt,
        )

    def _run(self, engine: Engine) -> None:
        """The engine's thread: take in what arrived, step, hand back what finished."""
        owner: dict[batch.Sequence, _Outcome] = {}
        while self._take_in(engine, owner):
            try:
                done = engine.step()
            except QaicRayError as error:
                self._fail(error, owner)
                return
            for sequence, ttft_s, decode_s in done:
                owner.pop(sequence).put(_Finished(sequence, ttft_s, decode_s))

    def _take_in(self, engine: Engine, owner: dict[batch.Sequence, _Outcome]) -> bool:
        with self._lock:
            while not (self._arrived or engine.busy or self._closed):
                self._lock.wait()
            for sequence, finished in self._arrived:
                owner[sequence] = finished
                engine.add(sequence)
            self._arrived.clear()
            return not self._closed

    def _fail(self, error: QaicRayError, owner: dict[batch.Sequence, _Outcome]) -> None:
        with self._lock:
            self._failure = error
            waiting = {*owner.values(), *(finished for _, finished in self._arrived)}
            self._arrived.clear()
        for finished in waiting:
            finished.put(error)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._closed:
            raise DeviceError(f"{self.spec.name} is closed.")


def _take(finished: _Outcome) -> list[_Finished]:
    """Wait for one, then take whatever else is there."""
    items = [finished.get()]
    while not finished.empty():
        items.append(finished.get())
    for item in items:
        if isinstance(item, QaicRayError):
            raise item
    return [item for item in items if isinstance(item, _Finished)]
