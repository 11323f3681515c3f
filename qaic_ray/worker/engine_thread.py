"""The thread that runs a card's engine: takes sequences in, makes steps, gives back what finished.

Any thread puts the sequences of a shard and gets a queue of what becomes of them. It knows no text.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace

from qaic_ray.engine import steps
from qaic_ray.engine.batching.batcher import Batcher
from qaic_ray.engine.batching.lockstep import LockstepBatcher
from qaic_ray.engine.engine import Engine, Finished
from qaic_ray.errors import DeviceError, DeviceLost, QaicRayError
from qaic_ray.metrics import EngineState, Measurement
from qaic_ray.model.detokenizer import StopFinder
from qaic_ray.rows import FinishReason
from qaic_ray.timeouts import Timeouts
from qaic_ray.worker.feeds import RowQueue, TokenFeed
from qaic_ray.worker.text import Answer

STATIC_LOOKAHEAD = 4
"""Sequences that the engine of a static program holds for each of its slots, so that it can start
sequences of about one length together."""

MAX_EARLY = 1024
"""Cancelled rows that are not here are remembered, so many of the last: theirs may be a shard that
is on its way."""

_AGAIN = "QS_AGAIN"
_Waiting = tuple[steps.Sequence, StopFinder | None]


class Backlog:
    """Sequences that the engine has no place for yet: those of the foreground go first.

    One of the background is given to the engine when a slot is free for it at once, beside those
    that are kept.
    """

    def __init__(self) -> None:
        self._foreground: deque[_Waiting] = deque()
        self._background: deque[_Waiting] = deque()

    def __len__(self) -> int:
        return len(self._foreground) + len(self._background)

    def add(self, waiting: Iterable[_Waiting]) -> None:
        """Let these wait behind others of their kind."""
        for one in waiting:
            (self._background if one[0].background else self._foreground).append(one)

    def next_for(self, batcher: Batcher | LockstepBatcher) -> _Waiting | None:
        """Take out the one that goes into the engine now; None where it has no place for it."""
        if self._foreground:
            shapes = batcher.shapes
            most = shapes.num_slots * (1 if shapes.continuous else STATIC_LOOKAHEAD)
            num_waiting = sum(not row.background for row in batcher.waiting)
            return self._foreground.popleft() if num_waiting < most else None
        if self._background and self._has_spare(batcher):
            return self._background.popleft()
        return None

    def take_out(self, sequences: Collection[steps.Sequence]) -> set[steps.Sequence]:
        """Let these wait no more; those of them that did."""
        gone = {one[0] for waiting in (self._foreground, self._background) for one in waiting}
        gone &= set(sequences)
        if gone:
            self._foreground = deque(one for one in self._foreground if one[0] not in gone)
            self._background = deque(one for one in self._background if one[0] not in gone)
        return gone

    def clear(self) -> None:
        """Forget all."""
        self._foreground.clear()
        self._background.clear()

    def _has_spare(self, batcher: Batcher | LockstepBatcher) -> bool:
        if batcher.running and not batcher.shapes.continuous:
            return False  # it would only wait in the engine
        return len(batcher.running) + len(batcher.waiting) < batcher.background_rows


class EngineThread:
    """An engine, the sequences that wait for it, and the thread that runs it.

    Args:
        name: the worker's.
        make_engine: makes the engine, and another one when that was lost with the card's state.
        goes_on: whether the card can go on after an error that did not lose it.
        feed: is told of each step.
        kept_slots: slots that the background leaves free where it begins, of all but one.
        timeouts: `gather_s` and `again_s` are used.
        on_lost: is told how many sequences an error has ended.
    """

    def __init__(
        self,
        name: str,
        make_engine: Callable[[], Engine],
        *,
        goes_on: bool,
        kept_slots: int,
        feed: TokenFeed,
        timeouts: Timeouts,
        on_lost: Callable[[int], None],
    ) -> None:
        self._make_engine = make_engine
        self._kept_slots = kept_slots
        self.engine = self._new_engine()
        self._name = name
        self._goes_on = goes_on
        self._feed = feed
        self._timeouts = timeouts
        self._on_lost = on_lost
        self._past = Measurement()  # of the engines before this one
        self._num_past = 0
        self._lock = threading.Condition()  # its lock may be taken again
        self._backlog = Backlog()
        self._owner: dict[steps.Sequence, RowQueue] = {}
        self._beginning: set[int] = set()  # rows whose sequences are being made
        self._cancelled: set[int] = set()
        self._early: dict[int, None] = {}  # cancelled, and never here
        self._failure: QaicRayError | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Run the engine from now on."""
        self._thread.start()

    def close(self) -> None:
        """Stop; whoever waits for rows gets an error."""
        with self._lock:
            self._closed = True
            self._lock.notify()
        self._thread.join()
        self._end_shards(DeviceError(f"{self._name} was closed."))

    # -- what other threads ask

    def state(self) -> EngineState:
        """How the engine stands, and what waits for it."""
        state = self.engine.state()
        return replace(state, waiting=state.waiting + len(self._backlog), engine=self._num_past)

    def measurement(self) -> Measurement:
        """All work so far."""
        with self._lock:
            return self._past + self.engine.measurement

    def expect(self, indexes: Collection[int]) -> None:
        """Sequences of these rows are being made: they can be cancelled already, or have been."""
        with self._lock:
            self._beginning.update(indexes)
            for index in self._early.keys() & set(indexes):
                del self._early[index]
                self._cancelled.add(index)

    def put(self, answers: Sequence[Answer], indexes: frozenset[int]) -> RowQueue:
        """Let the sequences of a shard wait for the engine; the queue gives what becomes of them.

        Args:
            answers: of the prompts that can be answered.
            indexes: of all the shard's prompts, which were expected.

        Raises:
            QaicRayError: the engine has ended.
        """
        outcome = RowQueue(self._timeouts.gather_s)
        with self._lock:
            self._beginning -= indexes
            # What was refused has no sequence to be ended.
            self._cancelled -= indexes - {answer.prompt.index for answer in answers}
            if self._failure is not None:
                raise self._failure
            if self._closed:
                raise DeviceError(f"{self._name} is closed.")
            for answer in answers:
                self._backlog.add(zip(answer.sequences, answer.readers, strict=True))
                self._owner.update(dict.fromkeys(answer.sequences, outcome))
                self._feed.add(answer.streamed)
            self._lock.notify()
        return outcome

    def cancel(self, indexes: Collection[int]) -> None:
        """End these rows before the next step, or as soon as they come."""
        with self._lock:
            here = self._beginning.union(sequence.key for sequence in list(self._owner))
            self._cancelled |= here.intersection(indexes)
            self._early.update(dict.fromkeys(index for index in indexes if index not in here))
            while len(self._early) > MAX_EARLY:
                del self._early[next(iter(self._early))]
            self._lock.notify()

    # -- the thread itself

    def _run(self) -> None:
        """Add sequences that arrived, make a step, return what finished; until it is closed."""
        while self._take_in():
            try:
                done = self._step()
            except QaicRayError as error:
                if self._fail(error):
                    continue
                return
            except BaseException as error:
                self._fail(DeviceLost(f"{self._name}: the engine failed: {error!r}."))
                raise
            self._feed.step_made(done)
            for finished in done:
                self._owner.pop(finished.sequence).put(finished)

    def _step(self) -> list[Finished]:
        """One step; it is tried again after QS_AGAIN, with which the runtime has done nothing."""
        for pause_s in self._timeouts.again_s:
            try:
                return self.engine.step()
            except DeviceError as error:
                if error.status != _AGAIN:
                    raise
            time.sleep(pause_s)
        return self.engine.step()

    def _take_in(self) -> bool:
        engine = self.engine
        with self._lock:
            while not (self._backlog or engine.busy or self._closed):
                self._lock.wait()
            if self._cancelled:
                self._end_cancelled(engine)
            while (waiting := self._backlog.next_for(engine.batcher)) is not None:
                engine.add(*waiting)
            return not self._closed

    def _end_cancelled(self, engine: Engine) -> None:
        ended = [sequence for sequence in self._owner if sequence.key in self._cancelled]
        self._cancelled &= self._beginning
        self._feed.drop(ended)
        waited = self._backlog.take_out(ended)
        for sequence in ended:
            if sequence in waited:
                sequence.finish_reason = FinishReason.ABORT
            else:
                engine.abort(sequence)
            self._owner.pop(sequence).put(Finished(sequence, 0.0, 0.0))

    def _new_engine(self) -> Engine:
        engine = self._make_engine()
        engine.batcher.kept_slots = self._kept_slots
        return engine

    def _fail(self, error: QaicRayError) -> bool:
        """End every shard that is here with the error; return whether the thread goes on.

        The rows that the engine held are lost, and a card that is lost is opened again by the
        driver.
        """
        lives = self._goes_on and not isinstance(error, DeviceLost)
        with self._lock:
            if lives:
                self._past += self.engine.measurement
                self._num_past += 1
                self.engine = self._new_engine()
            else:
                self._failure = error
            self._end_shards(error)
        return lives

    def _end_shards(self, error: QaicRayError) -> None:
        """Give an error to every shard that waits for rows."""
        with self._lock:
            outcomes = set(self._owner.values())
            self._feed.drop(list(self._owner))
            self._on_lost(len(self._owner))
            self._owner.clear()
            self._backlog.clear()
        for outcome in outcomes:
            outcome.put(error)
