"""Sequences into slots, slots into steps: the batcher, a pure state machine.

Knows no device, clock, file, thread or tensor. `plan` says what the card should compute next,
`commit` hears which tokens came out. A row whose uncomputed tokens number exactly one rides in the
decode shape, whether that token is its last prompt token or its last answer token; a row with
more uses the prefill shape, `prompt_len` tokens at a time. A program without a prefill shape
(`prompt_len` 1) is therefore no special case.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from qaic_ray.errors import RowError
from qaic_ray.rows import FinishReason


@dataclass(eq=False)
class Sequence:
    """Token ids of one row in flight; compared by identity.

    `max_new_tokens` is how many tokens may be generated at most; `stop_ids` end the row and are
    kept as its last token. `num_computed` counts the tokens, prompt and answer, whose keys and
    values the card holds.
    """

    key: int
    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    stop_ids: frozenset[int] = frozenset()
    output_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    finish_reason: FinishReason | None = None

    @property
    def num_tokens(self) -> int:
        """Prompt and answer so far."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def num_uncomputed(self) -> int:
        """Tokens the card has not seen yet; 0 only before a row is committed as finished."""
        return self.num_tokens - self.num_computed

    def next_ids(self, limit: int) -> tuple[int, ...]:
        """At most `limit` of the uncomputed tokens, in order."""
        start = self.num_computed
        prompt_len = len(self.prompt_ids)
        if start >= prompt_len:
            return tuple(self.output_ids[start - prompt_len : start - prompt_len + limit])
        return self.prompt_ids[start : start + limit]


@dataclass(frozen=True)
class Chunk:
    """Tokens of one row in a step: `ids` at positions `start`, `start + 1`, ... of `slot`.

    `samples` says that the last of them is the row's newest token, so the step's logits of this
    row choose the next one; logits of the other chunks mean nothing.
    """

    slot: int
    sequence: Sequence
    start: int
    ids: tuple[int, ...]
    samples: bool


@dataclass(frozen=True)
class Step:
    """One execution of the program: its shape (`seq_len`) and the rows that take part."""

    seq_len: int
    chunks: tuple[Chunk, ...]

    @property
    def is_decode(self) -> bool:
        """Whether the step runs in the decode shape."""
        return self.seq_len == 1


class Batcher:
    """Gives sequences slots and plans steps over them.

    Args:
        num_slots: rows of the compiled batch.
        prompt_len: tokens of one prefill chunk; 1 for a program without a prefill shape.
        ctx_len: tokens one slot can hold.
        prefill_rows: rows of the prefill shape; 1 for continuous batching.
        continuous: whether a slot is refilled while others run; otherwise rows start together.
    """

    def __init__(
        self, *, num_slots: int, prompt_len: int, ctx_len: int, prefill_rows: int, continuous: bool
    ) -> None:
        self.num_slots = num_slots
        self.prompt_len = prompt_len
        self.ctx_len = ctx_len
        self.prefill_rows = prefill_rows
        self.continuous = continuous
        self.waiting: deque[Sequence] = deque()
        self.running: dict[int, Sequence] = {}
        self._free_slots = list(range(num_slots - 1, -1, -1))

    @property
    def busy(self) -> bool:
        """Whether any sequence waits or runs."""
        return bool(self.waiting or self.running)

    def new_token_limit(self, prompt_tokens: int, generation_len: int | None) -> int:
        """How many tokens a prompt may generate: what was asked for, within the context.

        The last token of an answer is never fed back, so a prompt that fills the context still
        gets one.

        Raises:
            RowError: for a prompt with no token, or with more than the context holds.
        """
        if prompt_tokens == 0:
            raise RowError("The prompt is empty: it has no token to start from.")
        room = self.ctx_len - prompt_tokens + 1
        if room < 1:
            raise RowError(
                f"The prompt has {prompt_tokens} tokens, more than the context of {self.ctx_len} "
                "the QPC was compiled for: shorten it, or compile with a larger ctx_len."
            )
        return room if generation_len is None else min(room, generation_len)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence whose `max_new_tokens` came from `new_token_limit`."""
        self.waiting.append(sequence)

    def plan(self) -> Step | None:
        """The next step, or None when nothing waits or runs. Prefill goes before decode."""
        self._admit()
        if not self.running:
            return None
        prefills = [item for item in self.running.items() if item[1].num_uncomputed > 1]
        if prefills and self.prompt_len > 1:
            rows, seq_len = prefills[: self.prefill_rows], self.prompt_len
        else:
            rows, seq_len = list(self.running.items()), 1
        return Step(seq_len, tuple(_chunk(slot, row, seq_len) for slot, row in rows))

    def commit(self, step: Step, tokens: list[int]) -> list[Sequence]:
        """Take in a step's outcome; return the sequences it finished, in slot order of the step.

        Args:
            step: what `plan` returned last.
            tokens: one token a chunk, in the step's order; read only where the chunk samples.
        """
        finished = []
        for chunk, token in zip(step.chunks, tokens, strict=True):
            sequence = chunk.sequence
            sequence.num_computed += len(chunk.ids)
            if not chunk.samples:
                continue
            sequence.output_ids.append(token)
            sequence.finish_reason = _finish_reason(sequence, token)
            if sequence.finish_reason is not None:
                del self.running[chunk.slot]
                self._free_slots.append(chunk.slot)
                finished.append(sequence)
        return finished

    def check(self) -> None:
        """Invariants, for tests: slots are a partition, and nobody outgrows the context."""
        occupied = set(self.running)
        assert occupied.isdisjoint(self._free_slots)
        assert occupied | set(self._free_slots) == set(range(self.num_slots))
        assert len(self._free_slots) == self.num_slots - len(occupied)
        for sequence in self.running.values():
            assert sequence.finish_reason is None
            assert 0 <= sequence.num_computed < sequence.num_tokens <= self.ctx_len
            assert len(sequence.output_ids) < sequence.max_new_tokens

    def _admit(self) -> None:
        if self.running and not self.continuous:
            return
        while self.waiting and self._free_slots:
            self.running[self._free_slots.pop()] = self.waiting.popleft()


def _chunk(slot: int, sequence: Sequence, seq_len: int) -> Chunk:
    ids = sequence.next_ids(seq_len)
    start = sequence.num_computed
    return Chunk(slot, sequence, start, ids, start + len(ids) == sequence.num_tokens)


def _finish_reason(sequence: Sequence, token: int) -> FinishReason | None:
    if token in sequence.stop_ids:
        return FinishReason.STOP
    if len(sequence.output_ids) >= sequence.max_new_tokens:
        return FinishReason.LENGTH
    return None
