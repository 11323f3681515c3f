"""The batcher for `cache-index`, where all rows of a wave are at one place of the cache. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Listed

from qaic_ray.engine.batching.in_flight import InFlight
from qaic_ray.engine.steps import ProgramShapes, Sequence, Step


class LockstepBatcher(InFlight):
    """Gathers sequences into waves and plans their steps; none of a wave goes before another.

    One cache index counts for the whole batch, so rows start together, as a wave, and each is
    padded on the left to the wave's length:

        padded_len    prompt_len x chunks, the same for every row of the wave
        prefill       chunk 0, 1, ... of all rows at once; only the last answers, in its last column
        decode        one token a row, written at padded_len, padded_len + 1, ... for all of them

    A row that ends early keeps its place and is no longer counted; the next wave starts when the
    last row has ended. Places without a row are padding.

    Args:
        shapes: what the program can run; it is static, with one prefill length at most.
    """

    def __init__(self, shapes: ProgramShapes) -> None:
        super().__init__(shapes)
        self._prompt_len = max(shapes.prefill_lens, default=1)
        self._padded_len = 0
        self._cache_index = 0

    decodes_foreground = prefills_foreground = True

    @property
    def num_decoding(self) -> int:
        """See `Batcher.num_decoding`."""
        return len(self.running) if self._cache_index >= self._padded_len else 0

    def plan(self, *, decode_first: bool = False) -> Step | None:
        """See `Batcher.plan`; no row of a wave is ahead of the others, to decode first."""
        if not self.running:
            self._begin()
        if not self.running:
            return None
        is_prefill = self._cache_index < self._padded_len
        seq_len = self._prompt_len if is_prefill else 1
        rows = tuple(self.running.items())
        counts = (seq_len,) * len(rows)
        return Step(is_prefill, seq_len, rows, counts, self._cache_index, self._padded_len)

    def commit(self, step: Step, chosen: Listed[Listed[int]]) -> list[Sequence]:
        """See `Batcher.commit`."""
        self._cache_index += step.seq_len
        if not step.ends_padded:
            return []
        finished = []
        for (_, sequence), tokens in zip(step.rows, chosen, strict=True):
            sequence.num_computed = sequence.num_tokens
            sequence.take(tokens)
            if sequence.finish_reason is not None:
                self._release(sequence)
                finished.append(sequence)
        return finished

    def check(self) -> None:
        """Invariants, for tests: the wave fits its places and the context."""
        assert len(self.running) <= self.shapes.num_slots
        for slot, sequence in self.running.items():
            assert sequence.slot == slot
            assert sequence.finish_reason is None
            assert self._padded(len(sequence.prompt_ids)) <= self._padded_len
            assert max(self._cache_index, self._padded_len) <= self.shapes.ctx_len
            assert len(sequence.output_ids) < sequence.max_new_tokens

    def _padded(self, prompt_tokens: int) -> int:
        """Whole chunks, because the prompt is padded to them."""
        return -(-prompt_tokens // self._prompt_len) * self._prompt_len

    def _begin(self) -> None:
        """Choose the next wave: the row that waits longest, and rows of as many chunks.

        Free places go to shorter rows whose answers still fit behind the longer padding.
        """
        if not self.waiting:
            return
        self._cache_index = 0
        self._padded_len = self._padded(len(self.waiting[0].prompt_ids))
        same = [s for s in self.waiting if self._padded(len(s.prompt_ids)) == self._padded_len]
        shorter = [s for s in self.waiting if self._fits_with_padding(s)]
        wave = (same + shorter)[: self.shapes.num_slots]
        for slot, sequence in enumerate(wave):
            sequence.slot = slot
            self.running[slot] = sequence
        self.waiting = deque(s for s in self.waiting if s.slot is None)

    def _fits_with_padding(self, sequence: Sequence) -> bool:
        shorter = self._padded(len(sequence.prompt_ids)) < self._padded_len
        end = self._padded_len + sequence.max_new_tokens - 1
        return shorter and end <= self.shapes.ctx_len
