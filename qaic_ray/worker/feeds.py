"""What the engine's thread hands to other threads: finished sequences, and tokens while they come.

Whoever takes gets everything that has come since it took last, so a slow taker gets fewer and
larger batches.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Collection, Iterable
from contextlib import suppress

from qaic_ray.engine import steps
from qaic_ray.engine.engine import Finished
from qaic_ray.errors import QaicRayError, RowError
from qaic_ray.model.detokenizer import StopFinder
from qaic_ray.rows import ROW_ALONE, TokenChunk

MAX_ENDED = 256
"""Ended rows whose last tokens are kept for a slow taker; the rows themselves tell them too."""


class RowQueue:
    """Queue from the engine's thread to a shard's thread; returns items in batches.

    Args:
        gather_s: what is put within this after the first item comes in the same batch, in seconds.
    """

    def __init__(self, gather_s: float) -> None:
        self._gather_s = gather_s
        self._items: queue.SimpleQueue[Finished | QaicRayError] = queue.SimpleQueue()

    def put(self, item: Finished | QaicRayError) -> None:
        """Add one; nothing may follow an error."""
        self._items.put(item)

    def take(self, most: int) -> list[Finished]:
        """Wait for an item; return it with those that come soon after it, up to `most`.

        Raises:
            QaicRayError: the one that was put, after all items before it.
        """
        item = self._items.get()
        until_s = time.monotonic() + self._gather_s
        taken: list[Finished] = []
        with suppress(queue.Empty):
            while not isinstance(item, QaicRayError):
                taken.append(item)
                if len(taken) == most:
                    return taken
                item = self._items.get(timeout=max(0.0, until_s - time.monotonic()))
            self._items.put(item)  # for the next call
            if not taken:
                raise item
        return taken


class StreamedSequence:
    """A sequence whose tokens are told while they come.

    The tokens are read off the sequence, and stop strings are looked for here too: what the engine
    will cut off is never told.

    Args:
        sequence: in an engine, or on its way there.
        choice: which of the row's samples it is, from 0.
        finder: makes its text; nobody else's.
    """

    def __init__(self, sequence: steps.Sequence, choice: int, finder: StopFinder) -> None:
        self.sequence = sequence
        self._choice = choice
        self._finder = finder
        self._num_tokens = 0
        self._num_chars = 0

    def read(self) -> TokenChunk | None:
        """What has come since the last call; None for nothing.

        Raises:
            RowError: where its tokens cannot be read as text.
        """
        sequence, finder = self.sequence, self._finder
        first, first_char = self._num_tokens, self._num_chars
        token_ids = () if finder.stop else tuple(sequence.output_ids[first:])
        if not token_ids:
            return None
        with ROW_ALONE:
            kept = finder.read(self._shown(token_ids))
            text = finder.certain[first_char:]
        if kept is not None:
            token_ids = token_ids[: kept - first]
        self._num_tokens += len(token_ids)
        self._num_chars += len(text)
        logprobs = () if sequence.params.logprobs is None else sequence.logprobs
        return TokenChunk(
            sequence.key,
            self._choice,
            first_char,
            text,
            first,
            token_ids,
            tuple(logprobs[first : self._num_tokens]),
        )

    def _shown(self, token_ids: tuple[int, ...]) -> tuple[int, ...]:
        """Without the stop token that may end the row, where its text is not the answer's."""
        is_hidden = token_ids[-1] in self.sequence.stop_ids
        if is_hidden and not self.sequence.params.include_stop_str_in_output:
            return token_ids[:-1]
        return token_ids


class TokenFeed:
    """Tokens of streamed sequences, from the engine's thread to one that sends them on.

    The engine's thread only says that it has made a step; text is made in the thread that takes.
    What waits here is bounded: no more than the sequences themselves.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running: dict[steps.Sequence, StreamedSequence] = {}
        self._ended: dict[steps.Sequence, StreamedSequence] = {}
        self._is_new = False
        self._closed = False

    def add(self, streamed: Iterable[StreamedSequence]) -> None:
        """Tell of these from now on."""
        with self._changed:
            self._running.update((one.sequence, one) for one in streamed)

    def step_made(self, finished: Iterable[Finished]) -> None:
        """The engine has made a step, and these ended in it. Costs nothing while none streams."""
        if not self._running:
            return
        with self._changed:
            for done in finished:
                one = self._running.pop(done.sequence, None)
                if one is not None and done.error is None:
                    self._ended[done.sequence] = one
            while len(self._ended) > MAX_ENDED:
                del self._ended[next(iter(self._ended))]
            self._is_new = True
            self._changed.notify()

    def drop(self, sequences: Collection[steps.Sequence]) -> None:
        """Tell nothing more of these: they were cancelled, or lost with the card's state."""
        with self._changed:
            for sequence in sequences:
                self._running.pop(sequence, None)
                self._ended.pop(sequence, None)

    def close(self) -> None:
        """Nothing more comes."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def take(self) -> list[TokenChunk] | None:
        """Wait for a step, and return what it gave; None once there is no more."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_new or self._closed)
            if not self._is_new:
                return None
            self._is_new = False
            streamed = [*self._ended.values(), *self._running.values()]
            self._ended.clear()
        chunks = []
        for one in streamed:
            try:
                chunk = one.read()
            except RowError:  # its row will say so
                self.drop([one.sequence])
                continue
            if chunk is not None:
                chunks.append(chunk)
        return chunks
