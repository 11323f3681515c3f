"""One card's work: prompts in, rows out. Needs a tokenizer, a session and an engine, and no Ray.

Shards overlap: each `answer` call tokenizes in its caller's thread, puts its sequences before the
one thread that runs the engine, and decodes its rows as they finish.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar

from qaic_ray.bundles.record import Recording
from qaic_ray.cards.inventory import WorkerPlace
from qaic_ray.cards.lease import open_session
from qaic_ray.engine.drafts import DRAFT_ROLE, Drafting, open_drafting
from qaic_ray.engine.engine import Engine
from qaic_ray.engine.session import Session
from qaic_ray.errors import DeviceError, RowError
from qaic_ray.metrics import NO_ENGINE, EngineState, Measurement
from qaic_ray.model.checkpoint import Checkpoint, load_tokenizer, open_checkpoint
from qaic_ray.model.tokenizer import Tokenizer
from qaic_ray.options import Generation
from qaic_ray.rows import ROW_ALONE, Prompt, Row, TokenChunk
from qaic_ray.sdk import Sdk, open_sdk
from qaic_ray.telemetry.recorder import NoSink, RequestRecorder
from qaic_ray.timeouts import DEFAULT_TIMEOUTS, Timeouts
from qaic_ray.worker.checks import check_shapes, check_text
from qaic_ray.worker.engine_thread import EngineThread
from qaic_ray.worker.feeds import TokenFeed
from qaic_ray.worker.recording import record_ended
from qaic_ray.worker.text import Answer, Answerer, Arrival, check_chat


@dataclass(frozen=True, kw_only=True)
class WorkerSpec(WorkerPlace):
    """What one worker is given by the driver; plain data, as is `WorkerInfo`.

    `model` is anything `open_checkpoint` takes; only its tokenizer and configuration are read, and
    these must have the `text` parts that the run began with, if any are given. `incarnation` is how
    often the worker was opened before, `kept_slots` how many slots rows of the background leave
    free, `metrics` whether its actor records what it does, `recording` what is dumped of its
    program's executions.
    """

    qpc: str
    model: str
    generation: Generation = field(default_factory=Generation)
    text: Mapping[str, str] = field(default_factory=dict)
    incarnation: int = 0
    kept_slots: int = 0
    metrics: bool = False
    recording: Recording | None = None
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


@dataclass(frozen=True)
class _Card:
    """What an opened worker holds until `held` is closed."""

    answerer: Answerer
    thread: EngineThread
    held: ExitStack


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
        self._lock = threading.Lock()
        self._feed = TokenFeed()
        self._closed = False
        self._opened: _Card | None = None

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
            if self.spec.recording is not None:
                session.record(self.spec.recording)
            check_shapes(self.spec.generation, self.spec.qpc, session.specializations)
            drafting = open_drafting(self.spec.generation, sdk, session)
            undo.callback(drafting.close)
            if self.spec.recording is not None and drafting.session is not None:
                drafting.session.record(self.spec.recording, DRAFT_ROLE)
            thread = self._engine_thread(session, drafting)
            answerer = Answerer(
                tokenizer,
                self.spec.generation,
                engine=thread.engine,
                vocab_size=session.vocab_size or checkpoint.config.get("vocab_size"),
            )
            with self._lock:
                if self._closed:
                    raise DeviceError(f"{self.spec.name} was closed.")
                self._opened = _Card(answerer, thread, undo.pop_all())
                thread.start()
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
        indexes = frozenset(prompt.index for prompt in prompts)
        card.thread.expect(indexes)
        for prompt in prompts:
            try:
                with ROW_ALONE:
                    begun.append(answerer.begin(prompt, arrived))
            except RowError as error:
                refused.append(Row.failed(prompt, str(error), worker=name, attempts=attempt))
                self.recorder.unanswered("error")
        with self._lock:
            self._failed_rows += len(refused)
        outcome = card.thread.put(begun, indexes)
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

        Those that have ended are passed over, and those that come later never begin. May be called
        at any time.
        """
        card = self._opened
        if card is not None:
            card.thread.cancel(indexes)

    def engine_state(self) -> EngineState:
        """How the engine stands, and what waits for it; may be asked for at any time."""
        card = self._opened
        return NO_ENGINE if card is None else card.thread.state()

    def progress(self) -> tuple[int, int, EngineState]:
        """Steps of the engine, tokens of these, how it stands; may be asked for at any time."""
        card = self._opened
        if card is None:
            return 0, 0, NO_ENGINE
        work = card.thread.measurement()
        num_tokens = work.decode_tokens + len(work.ttft)  # prefill gives each row its first
        num_steps = work.prefill_steps + work.decode_steps
        return num_steps, num_tokens, card.thread.state()

    def measurement(self) -> Measurement:
        """All work since `open`; may be asked for while answers are being made."""
        card = self._opened
        work = Measurement() if card is None else card.thread.measurement()
        return work + Measurement(rows=self._failed_rows, failed_rows=self._failed_rows)

    def close(self) -> None:
        """Stop the engine and give the card back; shards that are not done end with an error."""
        with self._lock:
            self._closed = True
            card, self._opened = self._opened, None
        if card is not None:
            card.thread.close()
            card.held.close()
        self._feed.close()

    # -- opening

    def _engine_thread(self, session: Session, drafting: Drafting) -> EngineThread:
        """Not begun. What a draft program holds is lost with the card's state: it cannot go on."""
        generation = self.spec.generation
        make_engine = partial(
            Engine,
            session,
            max_stall_s=generation.max_stall_s,
            prefix_reuse=generation.prefix_reuse,
            proposer=drafting.proposer,
        )
        return EngineThread(
            self.spec.name,
            make_engine,
            goes_on=drafting.proposer is None,
            kept_slots=self.spec.kept_slots,
            feed=self._feed,
            timeouts=self.spec.timeouts,
            on_lost=lambda number: self.recorder.unanswered("abort", number),
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
