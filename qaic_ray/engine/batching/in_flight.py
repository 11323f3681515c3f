"""The sequences that wait and run on a card; what both batchers do alike."""

from __future__ import annotations

from collections import deque

from qaic_ray.engine.steps import ProgramShapes, Sequence, ShapeCosts
from qaic_ray.errors import RowError
from qaic_ray.rows import FinishReason


class InFlight:
    """What waits, and what has a slot.

    Args:
        shapes: what the program can run.

    Attributes:
        kept_slots: slots that rows of the background leave free where they begin, of all but one.
    """

    def __init__(self, shapes: ProgramShapes) -> None:
        self.shapes = shapes
        self.costs = ShapeCosts(shapes.prefill_lens)
        self.waiting: deque[Sequence] = deque()
        self.running: dict[int, Sequence] = {}
        self.kept_slots = 0
        self.num_background = 0  # running rows that others go before

    @property
    def busy(self) -> bool:
        """Whether any sequence waits or runs."""
        return bool(self.waiting or self.running)

    @property
    def background_rows(self) -> int:
        """Rows of any kind among which one of the background may be, where it begins."""
        most = min(self.shapes.num_slots, self.shapes.num_rows)
        return most - min(self.kept_slots, most - 1)

    def new_token_limit(self, prompt_tokens: int, wanted: int | None) -> int:
        """How many tokens a prompt may generate: what was asked for, within the context.

        Raises:
            RowError: for a prompt with no token, or with more than the context holds.
        """
        if prompt_tokens == 0:
            raise RowError("The prompt is empty: it has no token to start from.")
        # The last token of an answer is never fed back.
        room = self.shapes.ctx_len - self._padded(prompt_tokens) + 1
        if room < 1:
            raise RowError(
                f"The prompt has {prompt_tokens} tokens, more than the context of "
                f"{self.shapes.ctx_len} the QPC was compiled for: shorten it, or compile with a "
                "larger ctx_len."
            )
        return room if wanted is None else min(room, wanted)

    def admit(self) -> None:
        """Give waiting sequences slots, where a row may begin now; `plan` does it too."""

    def make_room(self) -> list[Sequence]:
        """Take slots from rows of the background for others that wait; who lost theirs.

        They wait with the tokens that they have, and are computed again.
        """
        return []

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence whose `max_new_tokens` came from `new_token_limit`."""
        self.waiting.append(sequence)

    def stop(self, sequence: Sequence, num_tokens: int) -> int:
        """End a row with the first `num_tokens` tokens of its answer; how many were dropped."""
        dropped = sequence.cut(num_tokens)
        if sequence.slot is not None:
            self._release(sequence)
        elif sequence in self.waiting:  # its slot was taken before its last tokens were read
            self.waiting.remove(sequence)
        return dropped

    def abort(self, sequence: Sequence) -> None:
        """End a row that waits or runs, without an answer."""
        if sequence.slot is None:
            self.waiting.remove(sequence)
        else:
            self._release(sequence)
        sequence.finish_reason = FinishReason.ABORT

    def _padded(self, prompt_tokens: int) -> int:
        """Places of the context that a prompt takes."""
        return prompt_tokens

    def _release(self, sequence: Sequence) -> int:
        """Take a running sequence out of its slot, which is returned."""
        slot = sequence.slot
        assert slot is not None
        sequence.slot = None
        del self.running[slot]
        return slot
