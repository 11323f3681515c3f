"""One card's work: prompts in, rows out. A tokenizer, a session and an engine; no Ray.

Shards overlap: each `answer` call tokenizes in its caller's thread, drops its sequences into the
one engine, and takes its own rows back as they finish; their text is made in its thread too. One
thread runs the engine, so the card is never driven by two.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qaic_ray.contract import Specializations
from qaic_ray.detokenizer import StopReader
from qaic_ray.errors import DeviceError, QaicRayError, RowError, UsageError
from qaic_ray.fleet.answers import Answer, Answerer, Generation
from qaic_ray.fleet.speculation import Drafting, open_drafting
from qaic_ray.metrics import Measurement
from qaic_ray.model import Checkpoint, load_tokenizer, open_checkpoint
from qaic_ray.rows import Prompt, Row
from qaic_ray.run import batch
from qaic_ray.run.engine import MAX_STALL_S, Engine, Finished
from qaic_ray.run.session import Session
from qaic_ray.sdk import open_sdk
from qaic_ray.tokenizer import Tokenizer


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
    generation: Generation = field(default_factory=Generation)


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
class _Card:
    """Everything an opened worker holds."""

    answerer: Answerer
    session: Session
    drafting: Drafting
    engine: Engine
    thread: threading.Thread


_Outcome = queue.SimpleQueue[Finished | QaicRayError]


@dataclass(frozen=True)
class _Arrival:
    """A sequence for the engine's thread, and where to put what became of it."""

    sequence: batch.Sequence
    reader: StopReader | None
    outcome: _Outcome


class CardWorker:
    """Answers prompts on one card or device group."""

    def __init__(self, spec: WorkerSpec) -> None:
        self.spec = spec
        self._failed_rows = 0
        self._lock = threading.Condition()
        self._arrived: list[_Arrival] = []
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
            self._check_shapes(session.specializations)
            drafting = open_drafting(self.spec.generation.speculation, sdk, session)
        except QaicRayError:
            session.close()
            raise
        self._opened = self._start(checkpoint, tokenizer, session, drafting)
        self._opened.thread.start()
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
        answerer = self._card.answerer
        begun: list[Answer] = []
        refused: list[Row] = []
        for prompt in prompts:
            try:
                begun.append(answerer.begin(prompt))
            except RowError as error:
                row = Row.failed(prompt, str(error), worker=self.spec.name, attempts=attempt)
                refused.append(row)
        outcome: _Outcome = queue.SimpleQueue()
        with self._lock:
            self._failed_rows += len(refused)
            self._raise_failure()
            self._arrived.extend(_arrivals(begun, outcome))
            self._lock.notify()
        if refused:
            yield refused
        pending = {sequence: answer for answer in begun for sequence in answer.sequences}
        while pending:
            complete = []
            for done in _take(outcome):
                answer = pending.pop(done.sequence)
                answer.finished.append(done)
                if answer.is_complete:
                    complete.append(answerer.row(answer, worker=self.spec.name, attempts=attempt))
            if complete:
                yield complete

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
            card.drafting.close()
            card.session.close()

    @property
    def _card(self) -> _Card:
        if self._opened is None:
            raise DeviceError(f"{self.spec.name} is not open.")
        return self._opened

    def _start(
        self, checkpoint: Checkpoint, tokenizer: Tokenizer, session: Session, drafting: Drafting
    ) -> _Card:
        """Everything around an opened session; the thread is not started."""
        generation = self.spec.generation
        max_stall_s = generation.max_stall_s
        engine = Engine(
            session,
            max_stall_s=MAX_STALL_S if max_stall_s is None else max_stall_s,
            prefix_reuse=generation.prefix_reuse,
            proposer=drafting.proposer,
        )
        thread = threading.Thread(
            target=self._run, args=(engine,), name=self.spec.name, daemon=True
        )
        answerer = Answerer(tokenizer, checkpoint.eos_ids, generation, engine)
        return _Card(answerer, session, drafting, engine, thread)

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

    def _run(self, engine: Engine) -> None:
        """The engine's thread: take in what arrived, step, hand back what finished."""
        owner: dict[batch.Sequence, _Outcome] = {}
        while self._take_in(engine, owner):
            try:
                done = engine.step()
            except QaicRayError as error:
                self._fail(error, owner)
                return
            except BaseException as error:
                self._fail(DeviceError(f"{self.spec.name}: the engine failed: {error!r}."), owner)
                raise
            for finished in done:
                owner.pop(finished.sequence).put(finished)

    def _take_in(self, engine: Engine, owner: dict[batch.Sequence, _Outcome]) -> bool:
        with self._lock:
            while not (self._arrived or engine.busy or self._closed):
                self._lock.wait()
            for arrival in self._arrived:
                owner[arrival.sequence] = arrival.outcome
                engine.add(arrival.sequence, arrival.reader)
            self._arrived.clear()
            return not self._closed

    def _fail(self, error: QaicRayError, owner: dict[batch.Sequence, _Outcome]) -> None:
        with self._lock:
            self._failure = error
            waiting = {*owner.values(), *(arrival.outcome for arrival in self._arrived)}
            self._arrived.clear()
        for outcome in waiting:
            outcome.put(error)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._closed:
            raise DeviceError(f"{self.spec.name} is closed.")


def _arrivals(answers: Sequence[Answer], outcome: _Outcome) -> Iterator[_Arrival]:
    for answer in answers:
        for sequence, reader in zip(answer.sequences, answer.readers, strict=True):
            yield _Arrival(sequence, reader, outcome)


def _take(outcome: _Outcome) -> list[Finished]:
    """Wait for one, then take whatever else is there."""
    items = [outcome.get()]
    while not outcome.empty():
        items.append(outcome.get())
    for item in items:
        if isinstance(item, QaicRayError):
            raise item
    return [item for item in items if isinstance(item, Finished)]
