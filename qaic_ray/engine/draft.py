"""Drafts of a second, smaller program on the same card: an engine of its own, asked for guesses.

Every time it is asked, it gets each row's tokens as a prompt. Its slots remember what they hold, so
only what is new is computed: the tokens that were accepted or put right since the last time.
"""

from __future__ import annotations

from collections.abc import Sequence as Listed

from qaic_ray.engine.batcher import Sequence
from qaic_ray.engine.engine import Engine, Program
from qaic_ray.errors import UsageError
from qaic_ray.metrics import Measurement

RIDE_LEN = 4
"""New tokens that a row feeds one by one, together with the other rows, rather than in a prefill
step of its own: after a draft that was all right there are two."""


class DraftProgram:
    """Drafts by greedy decoding on a draft QPC.

    Args:
        program: opened; of the `position-ids` contract, of the same tokenizer as the main one.
        num_rows: rows of the main program, all of which are asked for at once.

    Raises:
        UsageError: where the draft program has fewer slots than that.
    """

    def __init__(self, program: Program, num_rows: int) -> None:
        slots = program.specializations.batch_size
        if slots < num_rows:
            raise UsageError(
                f"The draft QPC has {slots} slots and the main one decodes {num_rows} rows at "
                f"once: compile the draft with --batch-size {num_rows}."
            )
        self._engine = Engine(program, ride_len=RIDE_LEN)
        self._ctx_len = program.specializations.ctx_len

    @property
    def measurement(self) -> Measurement:
        """The draft engine's own work."""
        return self._engine.measurement

    def propose(self, rows: Listed[Sequence], room: Listed[int]) -> list[list[int]]:
        """At most `room[i]` tokens for row i; none for a row beyond the draft's context."""
        asked: dict[int, Sequence] = {}
        for key, (sequence, most) in enumerate(zip(rows, room, strict=True)):
            tokens = (*sequence.prompt_ids, *sequence.output_ids)
            most = min(most, self._ctx_len - len(tokens) + 1)
            if most > 0:
                asked[key] = Sequence(key, tokens, most)
                self._engine.add(asked[key])
        while self._engine.busy:
            self._engine.step()
        return [asked[key].output_ids if key in asked else [] for key in range(len(rows))]

    def release(self, sequence: Sequence) -> None:
        """Nothing to do: its slot's memory serves until another row needs the place."""
