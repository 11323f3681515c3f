"""One card's work: prompts in, rows out. Needs a tokenizer, a session and an engine, and no Ray.

Shards overlap: each `answer` call tokenizes in its caller's thread, puts its sequences into the one
backlog, and decodes its rows as they finish. One other thread runs the engine, on few at a time.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

from qaic_ray.cards.inventory import WorkerPlace
from qaic_ray.cards.lease import open_session
from qaic_ray.engine import steps
from qaic_ray.engine.drafts import Drafting, open_drafting
from qaic_ray.engine.engine import Engine, Finished
from qaic_ray.engine.session import Session
from qaic_ray.errors import DeviceError, DeviceLost, QaicRayError, RowError
from qaic_ray.metrics import EngineState, Measurement
from qaic_ray.model.checkpoint import Checkpoint, load_tokenizer, open_checkpoint
from qaic_ray.model.detokenizer import StopFinder
from qaic_ray.model.tokenizer import Tokenizer
from qaic_ray.options import Generation
from qaic_ray.rows import ROW_ALONE, FinishReason, Prompt, Row, TokenChunk
from qaic_ray.sdk import Sdk, open_sdk
from qaic_ray.telemetry.recorder import NoSink, RequestRecorder
from qaic_ray.timeouts import DEFAULT_TIMEOUTS, Timeouts
from qaic_ray.worker.checks import check_shapes, check_text
from qaic_ray.worker.feeds import RowQueue, TokenFeed
from qaic_ray.worker.recording import record_ended
from qaic_ray.worker.text import Answer, Answerer, Arrival, check_chat

STATIC_LOOKAHEAD = 4
"""Sequences that the engine of a static program holds for each of its slots, so that it can start
sequences of about one length together."""

_AGAIN = "QS_AGAIN"


@dataclass(frozen=True, kw_only=True)
class WorkerSpec(WorkerPlace):
    """What one worker is given by the driver; plain data, as is `WorkerInfo`.

    `model` is anything `open_checkpoint` takes; only its tokenizer and configuration are read, and
    these must have the `text` parts that the run began with, if any are given. `incarnation` is how
    often the worker was opened before, `metrics` whether its actor records what it does.
    """

    qpc: str
    model: str
    generation: Generation = field(default_factory=Generation)
    text: Mapping[str, str] = field(default_factory=dict)
    incarnation: int = 0
    metrics: bool = False
    timeouts: Timeouts = DEFAULT_TIMEOUTS


@dataclass(frozen=True)
class WorkerInfo:
    """What an opened worker has; `is_static`: rows begin together, each step is a token each."""

    name: str
    device_ids: tuple[int, ...]
    sdk: str
    slots: int
    prompt_len: int
    ctx_len: int
    load_s: float
    pid: int = 0
    is_static: bool = False


@dataclass
class _Card:
    """What an opened worker holds until `held` is closed; `past`: of `num_past` earlier engines."""

    answerer: Answerer
    session: Session
    drafting: Drafting
    engine: Engine
    held: ExitStack
    past: Measurement = field(default_factory=Measurement)
    num_past: int = 0


class CardWorker:
    """Answers prompts on one card, a part of one, or a device group.

    A subclass may open something else than a checkpoint, an SDK and a card; `recorder` hears all.
    """

    open_checkpoint: ClassVar[staticmethod[..., Checkpoint]] = staticmethod(open_checkpoint)
    load_tokenizer: ClassVar[staticmethod[[Checkpoint], Tokenizer]] = staticmethod(load_tokenizer)
    open_sdk: ClassVar[staticmethod[[Path], Sdk]] = staticmethod(open_sdk)
    open_session: ClassVar[Callable[..., tuple[Session, ExitStack]]] = staticmethod(open_session)

    def __init__(self, spec: WorkerSpec) -> None:
        self.spec = spec
        self.recorder = RequestRecorder(NoSink())
        self._failed_rows = 0
        self._lock = threading.Condition()
        self._backlog: deque[tuple[steps.Sequence, StopFinder | None]] = deque()
        self._owner: dict[steps.Sequence, RowQueue] = {}
        self._feed = TokenFeed()
        self._beginning: set[int] = set()  # rows that are being tokenized
        self._cancelled: set[int] = set()
        self._failure: QaicRayError | None = None
        self._closed = False
        self._opened: _Card | None = None
        self._thread = threading.Thread(target=self._run, name=spec.name, daemon=True)

    def __repr__(self) -> str:
        return self.spec.name  # what Ray's dashboard and logs call its actor

    def open(self, device_ids: tuple[int, ...] | None = None) -> WorkerInfo:
        """Load the tokenizer and the QPC, and start the engine's thread.

        Args:
            device_ids: the cards, where it was not the driver that chose them.

        Raises:
            DeviceError: from the card.
            UsageError: for a QPC, SDK or model that does not fit.
        """
        start_s = time.perf_counter()
        device_ids = self.spec.device_ids if device_ids is None else device_ids
        checkpoint = self.open_checkpoint(self.spec.model, weights=False)
        check_text(self.spec.text, checkpoint.folder)
        tokenizer = self.load_tokenizer(checkpoint)
        check_chat(tokenizer.chat_template, self.spec.generation, self.spec.model)
        sdk = self.open_sdk(Path(self.spec.sdk_root))
        with ExitStack() as undo:
            session, held = self.open_session(
                sdk,
                Path(self.spec.qpc),
                device_ids,
                what=self.spec.name,
                part=self.spec.part,
                is_used=self.spec.incarnation > 0,
                timeouts=self.spec.timeouts,
            )
            undo.push(held)
            check_shapes(self.spec.generation, self.spec.qpc, session.specializations)
            drafting = open_drafting(self.spec.generation, sdk, session)
            undo.callback(drafting.close)
            engine = self._engine(session, drafting)
            answerer = Answerer(
                tokenizer,
                self.spec.generation,
                engine=engine,
                vocab_size=session.vocab_size or checkpoint.config.get("vocab_size"),
            )
            with self._lock:
                if self._closed:
                    raise DeviceError(f"{self.spec.name} was closed.")
                self._opened = _Card(answerer, session, drafting, engine, undo.pop_all())
                self._thread.start()
        shapes = session.specializations
        return WorkerInfo(
            name=self.spec.name,
            device_ids=device_ids,
            sdk=", ".join(filter(None, (sdk.description, session.simulated_time))),
            slots=shapes.batch_size,
            prompt_len=shapes.prompt_len,
            ctx_len=shapes.ctx_len,
            load_s=time.perf_counter() - start_s,
            pid=os.getpid(),
            is_static=not shapes.continuous and shapes.decode_len == 1,
        )

    def answer(self, prompts: Sequence[Prompt], attempt: int = 1) -> Iterator[list[Row]]:
        """Answer a shard; rows come in completion order, a few at a time.

        A prompt that cannot be answered is a row with finish_reason ERROR.

        Raises:
            DeviceError: when the card fails; prompts without a row yet were not answered.
        """
        name, card = self.spec.name, self._opened
        if card is None:
            raise DeviceError(f"{name} is not open.")
        answerer, arrived = card.answerer, Arrival()
        begun: list[Answer] = []
        refused: list[Row] = []
        with self._lock:
            self._beginning.update(prompt.index for prompt in prompts)
        for prompt in prompts:
            try:
                with ROW_ALONE:
                    begun.append(answerer.begin(prompt, arrived))
            except RowError as error:
                refused.append(Row.failed(prompt, str(error), worker=name, attempts=attempt))
                self.recorder.unanswered("error")
        outcome = self._queue(begun, frozenset(prompt.index for prompt in prompts), len(refused))
        if refused:
            yield refused
        pending = {sequence: answer for answer in begun for sequence in answer.sequences}
        while pending:
            complete = []
            for done in outcome.take(len(pending)):
                answer = pending.pop(done.sequence)
                answer.finished.append(done)
                record_ended(self.recorder, done, arrived.clock_s)
                if len(answer.finished) == len(answer.sequences):
                    complete.append(self._row(answerer, answer, attempt))
            if complete:
                yield complete

    def tokens(self) -> Iterator[list[TokenChunk]]:
        """What rows of prompts with `stream` get, one list a step for all of them.

        Whoever is slow to take one gets several steps in the next. It ends with the worker.
        """
        while (chunks := self._feed.take()) is not None:
            if chunks:
                yield chunks

    def cancel(self, indexes: Collection[int]) -> None:
        """End these rows before the next step, each as a row of finish_reason ABORT.

        Those that are not here, or have ended, are passed over. May be called at any time.
        """
        wanted = frozenset(indexes)
        with self._lock:
            running = {sequence.key for sequence in list(self._owner)}
            self._cancelled |= wanted & (running | self._beginning)
            self._lock.notify()

    def engine_state(self) -> EngineState:
        """How the engine stands, and what waits for it; may be asked for at any time."""
        card = self._opened
        if card is None:
            return EngineState()
        state = card.engine.state()
        return replace(state, waiting=state.waiting + len(self._backlog), engine=card.num_past)

    def progress(self) -> tuple[int, int, int]:
        """Steps of the engine, tokens of these, rows in its slots; may be asked for at any time."""
        card = self._opened
        if card is None:
            return 0, 0, 0
        work, engine = card.past + card.engine.measurement, card.engine
        num_tokens = work.decode_tokens + len(work.ttft)  # prefill gives each row its first
        return work.prefill_steps + work.decode_steps, num_tokens, len(engine.batcher.running)

    def measurement(self) -> Measurement:
        """All work since `open`; may be asked for while answers are being made."""
        with self._lock:
            card = self._opened
            work = card.past + card.engine.measurement if card else Measurement()
            return work + Measurement(rows=self._failed_rows, failed_rows=self._failed_rows)

    def close(self) -> None:
        """Stop the engine and give the card back; shards that are not done end with an error."""
        with self._lock:
            self._closed = True
            self._lock.notify()
            card, self._opened = self._opened, None
        if card is not None:
            self._thread.join()
            self._end_shards(DeviceError(f"{self.spec.name} was closed."))
            card.held.close()
        self._feed.close()

    # -- opening

    def _engine(self, session: Session, drafting: Drafting) -> Engine:
        return Engine(
            session,
            max_stall_s=self.spec.generation.max_stall_s,
            prefix_reuse=self.spec.generation.prefix_reuse,
            proposer=drafting.proposer,
        )

    # -- answering, in the thread of each shard

    def _row(self, answerer: Answerer, answer: Answer, attempt: int) -> Row:
        name = self.spec.name
        try:
            with ROW_ALONE:
                return answerer.row(answer, worker=name, attempts=attempt)
        except RowError as error:
            with self._lock:
                self._failed_rows += 1
            return Row.failed(answer.prompt, str(error), worker=name, attempts=attempt)

    def _queue(
        self, answers: Sequence[Answer], indexes: frozenset[int], num_refused: int
    ) -> RowQueue:
        """Give answers to the engine's thread; their results come out of the queue.

        Args:
            answers: those of the prompts that can be answered.
            indexes: of all the shard's prompts.
            num_refused: the others.
        """
        outcome = RowQueue(self.spec.timeouts.gather_s)
        with self._lock:
            self._failed_rows += num_refused
            self._beginning -= indexes
            if self._failure is not None:
                raise self._failure
            if self._closed:
                raise DeviceError(f"{self.spec.name} is closed.")
            for answer in answers:
                self._backlog.extend(zip(answer.sequences, answer.readers, strict=True))
                self._owner.update(dict.fromkeys(answer.sequences, outcome))
                self._feed.add(answer.streamed)
            self._lock.notify()
        return outcome

    # -- the engine's thread

    def _run(self) -> None:
        """Add sequences that arrived, make a step, return what finished; until it is closed."""
        card = self._opened
        while card is not None and self._take_in(card.engine):
            try:
                done = self._step(card.engine)
            except QaicRayError as error:
                if self._fail(error, card):
                    continue
                return
            except BaseException as error:
                self._fail(DeviceLost(f"{self.spec.name}: the engine failed: {error!r}."), card)
                raise
            self._feed.step_made(done)
            for finished in done:
                self._owner.pop(finished.sequence).put(finished)

    def _step(self, engine: Engine) -> list[Finished]:
        """One step; it is tried again after QS_AGAIN, with which the runtime has done nothing."""
        for pause_s in self.spec.timeouts.again_s:
            try:
                return engine.step()
            except DeviceError as error:
                if error.status != _AGAIN:
                    raise
            time.sleep(pause_s)
        return engine.step()

    def _take_in(self, engine: Engine) -> bool:
        with self._lock:
            while not (self._backlog or engine.busy or self._closed):
                self._lock.wait()
            if self._cancelled:
                self._end_cancelled(engine)
            shapes = engine.batcher.shapes
            most = shapes.num_slots * (1 if shapes.continuous else STATIC_LOOKAHEAD)
            while self._backlog and len(engine.batcher.waiting) < most:
                engine.add(*self._backlog.popleft())
            return not self._closed

    def _end_cancelled(self, engine: Engine) -> None:
        ended = [sequence for sequence in self._owner if sequence.key in self._cancelled]
        self._cancelled &= self._beginning
        self._feed.drop(ended)
        waiting = {sequence for sequence, _ in self._backlog}
        for sequence in ended:
            if sequence in waiting:
                sequence.finish_reason = FinishReason.ABORT
            else:
                engine.abort(sequence)
            self._owner.pop(sequence).put(Finished(sequence, 0.0, 0.0))
        self._backlog = deque(one for one in self._backlog if one[0].finish_reason is None)

    def _fail(self, error: QaicRayError, card: _Card) -> bool:
        """End every shard that is here with the error; return whether the session can go on.

        The rows that the engine held are lost. A session with a draft program cannot go on, as that
        program's state is lost too, and a card that is lost is opened again by the driver.
        """
        lives = not isinstance(error, DeviceLost) and card.drafting.proposer is None
        with self._lock:
            if lives:
                card.past += card.engine.measurement
                card.num_past += 1
                card.engine = self._engine(card.session, card.drafting)
            else:
                self._failure = error
            self._end_shards(error)
        return lives

    def _end_shards(self, error: QaicRayError) -> None:
        """Give an error to every shard that waits for rows."""
        with self._lock:
            outcomes = set(self._owner.values())
            self._feed.drop(list(self._owner))
            self.recorder.unanswered("abort", len(self._owner))
            self._owner.clear()
            self._backlog.clear()
        for outcome in outcomes:
            outcome.put(error)
