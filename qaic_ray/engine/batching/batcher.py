"""Sequences into slots, slots into steps, for `position-ids`: each row goes on by itself. Pure.

`plan` says what the card computes next, `commit` takes in the tokens that came out.

    uncomputed tokens of a row    where they are computed
    at most `ride_len`            in the decode shape, together with every other such row
    more                          in a prefill shape, `prefill_rows` rows at a time: see `_sharing`
    more, and no prefill shape    in the decode shape, `decode_len` at a time (a `pl1` program)
    more, of the background       in either: it rides in decode steps that are made for others

so a prompt's last token and an answer's newest are one case, and so is an answer that is computed
again.
"""

from __future__ import annotations

from collections.abc import Sequence as Listed

from qaic_ray.engine.batching.in_flight import InFlight
from qaic_ray.engine.steps import ProgramShapes, Sequence, Step

PREFIX_BLOCK = 16
"""Tokens by which a beginning that a slot holds is longer than another; fewer where a prefill takes
fewer."""
MAX_PREEMPTED = 64
"""A row of the background that lost its slot so often and got no token in between keeps the next
one until it has."""


class Batcher(InFlight):
    """Gives sequences slots of their own and plans steps over them.

    A slot remembers the tokens that its cache holds; a prompt that begins with them is computed
    from there on.

    Args:
        shapes: what the program can run.
        prefix_reuse: whether a prompt may start from what a slot's cache holds already.
        ride_len: uncomputed tokens that a row may have and go to the decode shape all the same;
            what the shape takes at once where nothing is said.
    """

    def __init__(
        self, shapes: ProgramShapes, *, prefix_reuse: bool = True, ride_len: int | None = None
    ) -> None:
        super().__init__(shapes)
        self._prefilling: dict[int, Sequence] = {}
        self._prefix_reuse = prefix_reuse
        self._block = min(PREFIX_BLOCK, *shapes.prefill_lens, shapes.ctx_len)
        self._ride_len = max(ride_len or 1, shapes.decode_len)
        self._ride_columns = shapes.ride_columns
        # Slot -> the tokens its cache holds, the longest free first.
        self._free: dict[int, tuple[int, ...]] = dict.fromkeys(range(shapes.num_slots), ())
        self._steady: Step | None = None

    @property
    def free_slots(self) -> Listed[int]:
        """Slots without a row."""
        return list(self._free)

    @property
    def num_decoding(self) -> int:
        """Rows that wait for their next token and not for a prefill."""
        return len(self.running) - len(self._prefilling)

    @property
    def decodes_foreground(self) -> bool:
        """Whether a row of the foreground waits for its next token and not for a prefill."""
        return any(
            not row.background and slot not in self._prefilling
            for slot, row in self.running.items()
        )

    @property
    def prefills_foreground(self) -> bool:
        """Whether a row of the foreground wants prefill."""
        return any(not row.background for row in self._prefilling.values())

    def plan(self, *, decode_first: bool = False) -> Step | None:
        """The next step, or None when nothing waits or runs.

        Prefill goes before decode, because an empty row of the decode shape is lost; with
        `decode_first` rows that can decode are not made to wait any longer. Rows of the background
        get the places of a prefill that the others leave.
        """
        self.admit()
        if not self.running:
            return None
        if self._prefilling and not (decode_first and self.num_decoding):
            return self._prefill()
        if self._steady is None:
            self._steady = self._decode()
        return self._steady

    def commit(self, step: Step, chosen: Listed[Listed[int]]) -> list[Sequence]:
        """Take in a step's outcome; return the sequences it finished, in the step's order.

        Args:
            step: what `plan` returned last.
            chosen: for each row of the step the tokens chosen for it, one more than the drafted
                tokens that it accepted; read only where the row was to be answered.
        """
        finished = []
        for (_, sequence), count, tokens in zip(step.rows, step.counts, chosen, strict=True):
            computed = sequence.num_computed + count
            if computed < len(sequence.prompt_ids) + len(sequence.output_ids):
                sequence.num_computed = computed
                continue
            sequence.num_computed = computed + sequence.take(tokens) - 1
            if sequence.finish_reason is not None:
                self._release(sequence)
                finished.append(sequence)
        if step is not self._steady or self.shapes.decode_len > 1:
            self._steady = None
        if self._prefilling:
            self._sort(step)
        return finished

    def check(self) -> None:
        """Invariants, for tests: slots are a partition, and no row outgrows the context."""
        occupied = set(self.running)
        assert occupied.isdisjoint(self._free)
        assert occupied | set(self._free) == set(range(self.shapes.num_slots))
        assert set(self._prefilling) <= occupied
        assert len(occupied) <= self.shapes.num_rows
        assert self.num_background == sum(row.background for row in self.running.values())
        for slot, sequence in self.running.items():
            assert sequence.slot == slot
            assert sequence.finish_reason is None
            assert 0 <= sequence.num_computed < sequence.num_tokens <= self.shapes.ctx_len
            assert sequence.num_reused < len(sequence.prompt_ids)
            assert len(sequence.output_ids) < sequence.max_new_tokens
            assert (slot in self._prefilling) == self._wants_prefill(sequence)

    def admit(self) -> None:
        """See `InFlight.admit`."""
        if not self.waiting or (self.running and not self.shapes.continuous):
            return
        while self._free and len(self.running) < self.shapes.num_rows:
            sequence = self._next_waiting()
            if sequence is None:
                return
            known = _known(sequence)
            slot = self._best_slot(known)
            # The last token is always computed: its logits are the next one's.
            reused = min(num_common(self._free.pop(slot), known), sequence.num_tokens - 1)
            sequence.num_computed = reused
            if not sequence.num_preempted:
                sequence.num_reused = min(reused, len(sequence.prompt_ids) - 1)
            sequence.slot = slot
            self.running[slot] = sequence
            self.num_background += sequence.background
            if self._wants_prefill(sequence):
                self._prefilling[slot] = sequence
            self._steady = None

    def make_room(self) -> list[Sequence]:
        """See `InFlight.make_room`: those lose their slots that have the least to lose."""
        if not (self.waiting and self.num_background and self.shapes.continuous):
            return []
        places = min(len(self._free), self.shapes.num_rows - len(self.running))
        wanted = sum(not row.background for row in self.waiting) - places
        if wanted <= 0:
            return []
        # Of equals the one that began last. Those that began first end so, one after another.
        rows = sorted(
            (row for row in reversed(self.running.values()) if _can_be_preempted(row)),
            key=lambda row: row.num_computed,
        )[:wanted]
        for row in rows:
            self._preempt(row)
        return rows

    def _preempt(self, row: Sequence) -> None:
        """Take a row's slot; of those that wait it goes first among the background."""
        is_fruitless = len(row.output_ids) == row.num_kept
        row.num_preempted = 1 + (row.num_preempted if is_fruitless else 0)
        row.num_kept = len(row.output_ids)
        self._release(row)
        row.num_computed = 0
        self.waiting.appendleft(row)

    def _next_waiting(self) -> Sequence | None:
        """Take out the sequence that gets the next slot: one of the foreground, where any waits."""
        if not self.waiting:
            return None
        sequence = next((row for row in self.waiting if not row.background), self.waiting[0])
        if sequence.background and len(self.running) >= self.background_rows:
            return None
        self.waiting.remove(sequence)
        return sequence

    def _best_slot(self, prompt_ids: tuple[int, ...]) -> int:
        """The free slot whose cache shares the longest prefix with a prompt.

        By whole blocks: most prompts share their first few tokens, and a slot that holds a long
        conversation is not given away for those while another one is free longer.
        """
        block = self._block
        # Of equals the first, which has been free the longest.
        return max(self._free, key=lambda slot: num_common(self._free[slot], prompt_ids) // block)

    def _wants_prefill(self, sequence: Sequence) -> bool:
        return (
            bool(self.shapes.prefill_lens)
            and sequence.num_uncomputed > self._ride_len
            and sequence.num_computed < self.shapes.prefill_ctx_len
        )

    def _prefill(self) -> Step:
        rows = list(self._prefilling.items())
        if self.num_background:
            first = self._sharing([item for item in rows if not item[1].background])
            rest = self._sharing([item for item in rows if item[1].background], len(first))
            most = max(row.num_uncomputed for _, row in first or rest)
            rows = first + rest
        else:
            rows = self._sharing(rows)
            most = max(row.num_uncomputed for _, row in rows)
        seq_len = self.costs.next_len(most, free=self._ride_len)
        reach = self.shapes.prefill_ctx_len
        if len(rows) < self.shapes.prefill_rows:
            # A place that is left costs nothing, so rows that decode need not wait for it.
            rows += [
                (slot, row)
                for slot, row in self.running.items()
                if slot not in self._prefilling and row.num_computed < reach
            ][: self.shapes.prefill_rows - len(rows)]
        rows.sort()
        counts = tuple(min(seq_len, r.num_uncomputed, reach - r.num_computed) for _, r in rows)
        return Step(True, seq_len, tuple(rows), counts)

    def _sharing(
        self, rows: list[tuple[int, Sequence]], num_taken: int = 0
    ) -> list[tuple[int, Sequence]]:
        """The rows that share the next prefill, of those that want one; so many places are taken.

        A row has one chunk a step, so all of them need as many steps as the longest has chunks, or
        as there are chunks for `prefill_rows` places. A row with as many chunks as there are steps
        may miss none of them; the other places are for those that wait longest.
        """
        places = self.shapes.prefill_rows - num_taken
        if len(rows) <= places or places <= 1:
            return rows[:places]
        chunks = [self._num_chunks(row) for _, row in rows]
        steps = max(*chunks, -(-sum(chunks) // places))
        # Sorting is stable, and no more than `places` rows can have a chunk for every step.
        order = sorted(range(len(rows)), key=lambda i: chunks[i] < steps)
        return [rows[i] for i in order[:places]]

    def _num_chunks(self, sequence: Sequence) -> int:
        """How many prefills a row still takes, each of the longest shape."""
        num_tokens = min(
            sequence.num_uncomputed - self._ride_len,
            self.shapes.prefill_ctx_len - sequence.num_computed,
        )
        return -(-num_tokens // self.shapes.prefill_lens[-1])

    def _decode(self) -> Step:
        prefilling = self._prefilling
        rows = tuple(
            sorted(
                (slot, row)
                for slot, row in self.running.items()
                if row.background or slot not in prefilling
            )
        )
        most = self.shapes.decode_len
        counts = tuple(
            self._ride_columns if slot in prefilling else min(most, row.num_uncomputed)
            for slot, row in rows
        )
        return Step(False, self.shapes.decode_len, rows, counts)

    def _sort(self, step: Step) -> None:
        """Which of a step's rows want no more prefill."""
        for slot, sequence in step.rows:
            if slot in self._prefilling and not self._wants_prefill(sequence):
                del self._prefilling[slot]

    def _release(self, sequence: Sequence) -> int:
        slot = super()._release(sequence)
        self.num_background -= sequence.background
        self._prefilling.pop(slot, None)
        self._steady = None
        # The last token of an answer was never fed, and what was drafted behind it is not held.
        num_held = min(sequence.num_computed, sequence.num_tokens - 1)
        self._free[slot] = sequence.first_ids(num_held) if self._prefix_reuse else ()
        return slot


def _known(sequence: Sequence) -> tuple[int, ...]:
    """The tokens of a row that are not computed again where a slot holds them.

    What is reused has no logits, which a prompt that is scored wants of all its tokens.
    """
    scores = sequence.prompt_logprobs
    if scores is not None and len(scores) + 1 < len(sequence.prompt_ids):
        return sequence.first_ids(len(scores))
    return sequence.first_ids(sequence.num_tokens)


def _can_be_preempted(row: Sequence) -> bool:
    if not row.background:
        return False
    return row.num_preempted < MAX_PREEMPTED or len(row.output_ids) > row.num_kept


def num_common(left: tuple[int, ...], right: tuple[int, ...]) -> int:
    """Length of the common beginning of two tuples; by halving, because slices compare in C."""
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
