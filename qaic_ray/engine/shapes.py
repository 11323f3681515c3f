"""The shapes of a program, and the choice among them. Pure.

Of several prefill shapes a long one computes more in a step, a short one wastes less on the end of
a prompt; `cheapest_cover` weighs them. Of several compute-context lengths the shortest that reaches
the step's last position reads the least of the cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from qaic_ray.contract import Specialization, Specializations

STEP_TOKENS = 128
"""Until steps are measured: reading the weights costs as much as computing this many tokens."""


@dataclass(frozen=True)
class ProgramShapes:
    """The shapes of one program.

    `num_slots` KV caches, of which `num_rows` can be decoded at once; `prefill_rows` rows of
    `prefill_lens` tokens in a prefill (none for a decode-only program), `decode_len` tokens a row
    in a decode (more than 1 for speculation). A slot holds `ctx_len` tokens, of which a prefill
    reaches the first `prefill_ctx_len`. `continuous`: a slot is refilled while others run.
    """

    num_slots: int
    num_rows: int
    prefill_rows: int
    prefill_lens: tuple[int, ...]
    prefill_ctx_len: int
    ctx_len: int
    decode_len: int
    continuous: bool
    prefills: tuple[Specialization, ...] = ()
    decodes: tuple[Specialization, ...] = ()

    @classmethod
    def of(cls, specializations: Specializations) -> ProgramShapes:
        """Read off what a QPC was compiled for."""
        prefills, decodes = specializations.prefills, specializations.decodes
        ctx_len = specializations.ctx_len
        reach = [shape.reach for shape in prefills]
        return cls(
            num_slots=specializations.batch_size,
            num_rows=decodes[0].batch_size,
            prefill_rows=prefills[0].batch_size if prefills else decodes[0].batch_size,
            prefill_lens=tuple(sorted({shape.seq_len for shape in prefills})),
            prefill_ctx_len=max(reach, default=ctx_len),
            ctx_len=ctx_len,
            decode_len=specializations.decode_len,
            continuous=specializations.continuous,
            prefills=prefills,
            decodes=decodes,
        )

    def prefill_shape(self, seq_len: int, num_positions: int) -> Specialization:
        """The prefill of `seq_len` that reaches `num_positions` with the least of the cache."""
        return _least((s for s in self.prefills if s.seq_len == seq_len), num_positions)

    def decode_shape(self, seq_len: int, num_positions: int) -> Specialization:
        """The shortest decode that takes `seq_len` tokens a row and reaches `num_positions`."""
        return _least((s for s in self.decodes if s.seq_len >= seq_len), num_positions)


def _least(shapes: Iterable[Specialization], num_positions: int) -> Specialization:
    fitting = [shape for shape in shapes if shape.reach >= num_positions]
    return min(fitting, key=lambda shape: (shape.seq_len, shape.reach))


class ShapeCosts:
    """What a step of each prefill length costs; relative until measured, seconds then.

    Args:
        lens: `seq_len` of the prefill shapes, in any order; may be empty.
    """

    def __init__(self, lens: Sequence[int]) -> None:
        self.lens = tuple(sorted(lens))
        self._seconds: dict[int, float] = {}
        self._latest: dict[int, float] = {}
        self._table = tuple((length, self._guess(length)) for length in self.lens)

    def measured(self, seq_len: int, seconds: float) -> None:
        """Take in how long a step took; the quickest one of each length is its cost."""
        self._latest[seq_len] = seconds
        before = self._seconds.get(seq_len)
        if before is not None and before <= seconds:
            return
        self._seconds[seq_len] = seconds
        ratios = [known / self._guess(length) for length, known in self._seconds.items()]
        scale = sum(ratios) / len(ratios)
        self._table = tuple(
            (length, self._seconds.get(length, scale * self._guess(length))) for length in self.lens
        )

    @property
    def slowest_s(self) -> float:
        """Seconds that the slowest shape took last; 0 where nothing was measured yet."""
        return max(self._latest.values(), default=0.0)

    def next_len(self, num_tokens: int, *, free: int) -> int:
        """Length of the next step of the cheapest cover of `num_tokens`; `lens` is not empty.

        Args:
            num_tokens: tokens still to be computed.
            free: tokens at the end that cost nothing, because the decode shape takes them.
        """
        if len(self.lens) == 1:
            return self.lens[0]
        return cheapest_cover(max(num_tokens - free, 1), self._table)[0]

    @staticmethod
    def _guess(length: int) -> float:
        return STEP_TOKENS + length


@lru_cache(maxsize=4096)
def cheapest_cover(num_tokens: int, costs: tuple[tuple[int, float], ...]) -> tuple[int, ...]:
    """Lengths, longest first, that hold `num_tokens` together at the least cost.

    Of equals the one with fewer steps.

    Args:
        num_tokens: at least 1.
        costs: length and cost of a step, by rising length.
    """
    unit = costs[0][0]
    num_units = -(-num_tokens // unit)
    # best[n]: cost, steps and first length of the best cover of n units. Lengths are powers of
    # two, so every one is a whole number of units.
    best: list[tuple[float, int, int]] = [(0.0, 0, 0)]
    for units in range(1, num_units + 1):
        best.append(
            min(
                (cost + rest[0], 1 + rest[1], length)
                for length, cost in costs
                for rest in [best[max(units - length // unit, 0)]]
            )
        )
    lengths = []
    units = num_units
    while units > 0:
        length = best[units][2]
        lengths.append(length)
        units = max(units - length // unit, 0)
    return tuple(sorted(lengths, reverse=True))
