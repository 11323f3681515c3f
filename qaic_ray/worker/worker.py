"""One card's work: prompts in, rows out. A tokenizer, a session and an engine; no Ray.

Shards overlap: each `answer` call tokenizes in its caller's thread, drops its sequences into the
one backlog, and takes its own rows back as they finish; their text is made in its thread too. One
thread runs the engine, so the card is never driven by two; it hands the engine no more than it will
soon begin, so that what is left can be given back to the driver.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qaic_ray.cards.lease import CardLease
from qaic_ray.contract import Specializations
from qaic_ray.documents import differences
from qaic_ray.engine import batcher
from qaic_ray.engine.engine import Engine, Finished
from qaic_ray.engine.session import Session
from qaic_ray.errors import DeviceError, DeviceLost, QaicRayError, RowError, UsageError
from qaic_ray.metrics import Measurement
from qaic_ray.model.checkpoint import load_tokenizer, open_checkpoint
from qaic_ray.model.stop_strings import StopReader
from qaic_ray.model.tokenizer_files import text_parts
from qaic_ray.rows import ROW_ALONE, Prompt, Row
from qaic_ray.sdk import open_sdk
from qaic_ray.worker.row_queue import RowQueue
from qaic_ray.worker.spec import TakenBack, WorkerInfo, WorkerSpec
from qaic_ray.worker.speculation import Drafting, open_drafting
from qaic_ray.worker.text import Answer, Answerer, check_chat

STATIC_LOOKAHEAD = 4
"""Rows that the engine of a static program is given for each of its places: a wave is made of rows
of about one length, and must have some to choose from."""

_AGAIN = "QS_AGAIN"
_AGAIN_PAUSES_S = (0.01, 0.03, 0.1, 0.3, 1.0)


@dataclass
class _Card:
    """Everything an opened worker holds; `past` is the work of engines before this one."""

    answerer: Answerer
    session: Session
    drafting: Drafting
    engine: Engine
    past: Measurement = field(default_factory=Measurement)


@dataclass(eq=False)
class _Shard:
    """A shard that is here, or was asked back before it came.

    `outcome` takes what becomes of its sequences: finished, given back unbegun, or lost.
    """

    outcome: RowQueue[Finished | list[batcher.Sequence]] = field(default_factory=RowQueue)
    is_queued: bool = False
    is_asked: bool = False


@dataclass(frozen=True)
class _Arrival:
    """A sequence for the engine, and whose it is."""

    sequence: batcher.Sequence
    reader: StopReader | None
    answer: Answer
    shard: _Shard


class CardWorker:
    """Answers prompts on one card, a part of one, or a device group."""

    def __init__(self, spec: WorkerSpec) -> None:
        self.spec = spec
        self._failed_rows = 0
        self._lock = threading.Condition()
        self._backlog: deque[_Arrival] = deque()
        self._owner: dict[batcher.Sequence, _Shard] = {}
        self._shards: dict[int, _Shard] = {}
        self._newest_shard = -1
        self._failure: QaicRayError | None = None
        self._closed = False
        self._opened: _Card | None = None
        self._lease = CardLease(spec.name, part=spec.part, is_used=spec.incarnation > 0)
        self._thread = threading.Thread(target=self._run, name=spec.name, daemon=True)

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
        checkpoint = open_checkpoint(self.spec.model, weights=False)
        self._check_text(checkpoint.folder)
        tokenizer = load_tokenizer(checkpoint)
        check_chat(tokenizer.chat_template, self.spec.generation, self.spec.model)
        sdk = open_sdk(Path(self.spec.sdk_root))
        session = self._lease.open(sdk, Path(self.spec.qpc), device_ids)
        try:
            self._check_shapes(session.specializations)
            drafting = open_drafting(self.spec.generation, sdk, session)
            engine = self._engine(session, drafting)
            answerer = Answerer(
                tokenizer,
                tokenizer.eos_ids,
                self.spec.generation,
                limits=engine,
                vocab_size=session.vocab_size or checkpoint.config.get("vocab_size"),
            )
        except BaseException:
            session.close()
            self._lease.release()
            raise
        with self._lock:
            if not self._closed:
                self._opened = _Card(answerer, session, drafting, engine)
                self._thread.start()
        if self._opened is None:  # it was closed meanwhile
            drafting.close()
            session.close()
            self._lease.release()
            raise DeviceError(f"{self.spec.name} was closed.")
        shapes = session.specializations
        return WorkerInfo(
            name=self.spec.name,
            device_ids=device_ids,
            sdk=", ".join(filter(None, (sdk.label, session.simulated_time))),
            slots=shapes.batch_size,
            prompt_len=shapes.prompt_len,
            ctx_len=shapes.ctx_len,
            load_s=time.perf_counter() - start_s,
            pid=os.getpid(),
            host=os.uname().nodename,
        )

    def answer(
        self, prompts: Sequence[Prompt], attempt: int = 1, shard_id: int = 0
    ) -> Iterator[list[Row] | TakenBack]:
        """Answer a shard; rows come in completion order, a few at a time.

        A prompt that cannot be answered is a row with finish_reason ERROR. After `take_back` there
        is a TakenBack among them, if it did not come with the last row.

        Raises:
            DeviceError: when the card fails; prompts without a row yet were not answered.
        """
        with self._lock:
            self._newest_shard = max(self._newest_shard, shard_id)
            shard = self._shards.setdefault(shard_id, _Shard())
        try:
            yield from self._answer(prompts, attempt, shard)
        finally:
            with self._lock:
                self._shards.pop(shard_id, None)

    def take_back(self, shard_id: int) -> None:
        """Have a shard give back the prompts that the engine was not given; `answer` yields them.

        A prompt of several samples of which one has begun stays.
        """
        with self._lock:
            if shard_id not in self._shards and shard_id <= self._newest_shard:
                return
            shard = self._shards.setdefault(shard_id, _Shard())
            shard.is_asked = True
            if shard.is_queued:
                self._give_back(shard)

    def num_steps(self) -> int:
        """How many steps the engine has made; may be asked for at any time."""
        card = self._opened
        if card is None:
            return 0
        work = (card.past, card.engine.measurement)
        return sum(part.prefill_steps + part.decode_steps for part in work)

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
            card.drafting.close()
            card.session.close()
        self._lease.release()

    # -- opening

    def _engine(self, session: Session, drafting: Drafting) -> Engine:
        return Engine(
            session,
            max_stall_s=self.spec.generation.max_stall_s,
            prefix_reuse=self.spec.generation.prefix_reuse,
            proposer=drafting.proposer,
        )

    def _check_text(self, folder: Path) -> None:
        """See that this worker's rows are made as those of all others."""
        changes = differences(self.spec.text, text_parts(folder)) if self.spec.text else []
        if changes:
            raise UsageError(
                f"The tokenizer in {folder} on {os.uname().nodename} is not the one that the run "
                f"began with ({', '.join(changes)}): one run has one tokenizer."
            )

    def _check_shapes(self, shapes: Specializations) -> None:
        for option, wanted, compiled in (
            ("--input-len", self.spec.generation.input_len, shapes.prompt_len),
            ("--ctx-len", self.spec.generation.ctx_len, shapes.ctx_len),
        ):
            if wanted not in (None, compiled):
                raise UsageError(
                    f"{option} is {wanted}, but {self.spec.qpc} was compiled for {compiled}: "
                    f"give {compiled}, or compile another variant."
                )

    # -- answering, in the thread of each shard

    @property
    def _card(self) -> _Card:
        if self._opened is None:
            raise DeviceError(f"{self.spec.name} is not open.")
        return self._opened

    def _answer(
        self, prompts: Sequence[Prompt], attempt: int, shard: _Shard
    ) -> Iterator[list[Row] | TakenBack]:
        answerer, name = self._card.answerer, self.spec.name
        begun: list[Answer] = []
        refused: list[Row] = []
        for prompt in prompts:
            try:
                with ROW_ALONE:
                    begun.append(answerer.begin(prompt))
            except RowError as error:
                refused.append(Row.failed(prompt, str(error), worker=name, attempts=attempt))
        self._queue(shard, begun, len(refused))
        if refused:
            yield refused
        pending = {sequence: answer for answer in begun for sequence in answer.sequences}
        while pending:
            complete = []
            for done in shard.outcome.take(len(pending)):
                if isinstance(done, list):
                    left = dict.fromkeys(pending.pop(sequence) for sequence in done)
                    yield TakenBack(tuple(answer.prompt.index for answer in left))
                    continue
                answer = pending.pop(done.sequence)
                answer.finished.append(done)
                if answer.is_complete:
                    complete.append(self._row(answerer, answer, attempt))
            if complete:
                yield complete

    def _row(self, answerer: Answerer, answer: Answer, attempt: int) -> Row:
        name = self.spec.name
        try:
            with ROW_ALONE:
                return answerer.row(answer, worker=name, attempts=attempt)
        except RowError as error:
            with self._lock:
                self._failed_rows += 1
            return Row.failed(answer.prompt, str(error), worker=name, attempts=attempt)

    def _queue(self, shard: _Shard, answers: Sequence[Answer], num_refused: int) -> None:
        with self._lock:
            self._failed_rows += num_refused
            if self._failure is not None:
                raise self._failure
            if self._closed:
                raise DeviceError(f"{self.spec.name} is closed.")
            for answer in answers:
                for sequence, reader in zip(answer.sequences, answer.readers, strict=True):
                    self._backlog.append(_Arrival(sequence, reader, answer, shard))
            shard.is_queued = bool(answers)
            if shard.is_asked and shard.is_queued:
                self._give_back(shard)
            self._lock.notify()

    def _give_back(self, shard: _Shard) -> None:
        """Take out of the backlog what of a shard has not begun; the lock is held."""
        own = [arrival for arrival in self._backlog if arrival.shard is shard]
        waiting = {arrival.sequence for arrival in own}
        whole = [a for a in own if waiting.issuperset(a.answer.sequences)]
        gone = set(map(id, whole))
        self._backlog = deque(a for a in self._backlog if id(a) not in gone)
        shard.outcome.put([arrival.sequence for arrival in whole])

    # -- the engine's thread

    def _run(self) -> None:
        """Take in what arrived, step, hand back what finished."""
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
            for finished in done:
                self._owner.pop(finished.sequence).outcome.put(finished)

    def _step(self, engine: Engine) -> list[Finished]:
        """One step, asked for again where the runtime says so; it has done nothing then."""
        for pause_s in _AGAIN_PAUSES_S:
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
            shapes = engine.batcher.shapes
            most = shapes.num_slots * (1 if shapes.continuous else STATIC_LOOKAHEAD)
            while self._backlog and len(engine.batcher.waiting) < most:
                arrival = self._backlog.popleft()
                self._owner[arrival.sequence] = arrival.shard
                engine.add(arrival.sequence, arrival.reader)
            return not self._closed

    def _fail(self, error: QaicRayError, card: _Card) -> bool:
        """Tell every shard that is here; whether the session may serve those that come.

        What a card held of the rows is lost with the engine. A draft program's state is not to be
        had back, and a card that is gone is opened anew by the driver.
        """
        lives = not isinstance(error, DeviceLost) and card.drafting.proposer is None
        with self._lock:
            if lives:
                card.past += card.engine.measurement
                card.engine = self._engine(card.session, card.drafting)
            else:
                self._failure = error
            self._end_shards(error)
        return lives

    def _end_shards(self, error: QaicRayError) -> None:
        """Let whoever waits for rows of the engine have an error instead."""
        with self._lock:
            shards = {*self._owner.values(), *(arrival.shard for arrival in self._backlog)}
            self._owner.clear()
            self._backlog.clear()
        for shard in shards:
            shard.outcome.put(error)
