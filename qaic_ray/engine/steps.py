"""What the batchers work with: rows in flight, steps, and the shapes of a program. Pure.

Of several prefill shapes a long one computes more in a step, a short one wastes less on the end of
a prompt; `cheapest_cover` weighs them. Of several compute-context lengths the shortest that reaches
the step's last position reads the least of the cache.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Listed
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

from qaic_ray.contract import Specialization, Specializations
from qaic_ray.rows import FinishReason
from qaic_ray.sampling_params import SamplingParams, TokenLogprob

GREEDY = SamplingParams()
STEP_TOKENS = 128
"""Until steps are measured: reading the weights costs as much as computing this many tokens."""


class Guide(Protocol):
    """Where a row is in the grammar that its answer follows.

    Attributes:
        is_done: the answer is whole, and nothing may follow.
        end_ids: tokens by which the grammar's library says an end.
        num_tokens: of the model's vocabulary.
    """

    is_done: bool
    end_ids: tuple[int, ...]
    num_tokens: int

    @property
    def may_end(self) -> bool:
        """Whether the answer is whole here."""

    def allowed(self) -> bytes:
        """A bit a token, the lowest first: those that may come next. Raises RowError."""

    def forced(self) -> Listed[int]:
        """The tokens that the text must go on with; often none. Raises RowError."""

    def take(self, token: int) -> None:
        """Go on with a token. Raises RowError for one that is not allowed."""

    def try_take(self, token: int) -> bool:
        """Go on with a token if it is allowed; whether it was."""

    def go_back(self, num_tokens: int) -> None:
        """Undo the last tokens."""


@dataclass(eq=False)
class Sequence:
    """Token ids of one row in flight; compared by identity.

    `max_new_tokens` is how many tokens may be generated at most; `stop_ids` end the row and are
    kept as its last token. `num_computed` counts the tokens, prompt and answer, whose keys and
    values the card holds, `num_reused` those of the prompt that it held already. `slot` is set
    while the row runs. `num_read` tokens of the answer were looked through for stop strings.
    `guide` follows the answer's grammar, and `bad_ids` are runs of tokens that it may not have.
    Rows of the `background` give way to the others, and their slots too: `num_preempted` times
    since the row's last token, when its answer had `num_kept` tokens.
    `prompt_logprobs` is a list where the prompt's tokens are to have theirs: one for each token
    but the first, as they are computed; such a row starts from no other row's cache.
    """

    key: int
    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    stop_ids: frozenset[int] = frozenset()
    params: SamplingParams = GREEDY
    seed: int = 0
    guide: Guide | None = None
    bad_ids: tuple[tuple[int, ...], ...] = ()
    output_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] | None = None
    num_computed: int = 0
    num_reused: int = 0
    num_read: int = 0
    slot: int | None = None
    finish_reason: FinishReason | None = None
    background: bool = False
    num_preempted: int = 0
    num_kept: int = 0

    @property
    def num_tokens(self) -> int:
        """Prompt and answer so far."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def num_uncomputed(self) -> int:
        """Tokens that the card has not computed yet; at least 1 while the row runs."""
        return self.num_tokens - self.num_computed

    @property
    def newest(self) -> int:
        """The uncomputed token, where there is one; the first of several."""
        return self.next_ids(1)[0]

    def next_ids(self, count: int) -> Listed[int]:
        """The next `count` uncomputed tokens, in order."""
        start = self.num_computed - len(self.prompt_ids)
        if start >= 0:
            return self.output_ids[start : start + count]
        if start + count <= 0:
            return self.prompt_ids[self.num_computed : self.num_computed + count]
        return (*self.prompt_ids[self.num_computed :], *self.output_ids[: start + count])

    def first_ids(self, count: int) -> tuple[int, ...]:
        """The first `count` tokens of prompt and answer."""
        num_prompt = len(self.prompt_ids)
        if count <= num_prompt:
            return self.prompt_ids[:count]
        return (*self.prompt_ids, *self.output_ids[: count - num_prompt])

    def take(self, tokens: Listed[int]) -> int:
        """Append chosen tokens until one of them ends the row; how many were kept.

        The last of them ends it where the grammar is done: its guide has taken all of them.
        """
        output, stop_ids, limit = self.output_ids, self.stop_ids, self.max_new_tokens
        last = len(tokens) if self.guide is not None and self.guide.is_done else 0
        for kept, token in enumerate(tokens, start=1):
            output.append(token)
            if token in stop_ids or kept == last:
                self.finish_reason = FinishReason.STOP
                return kept
            if len(output) >= limit:
                self.finish_reason = FinishReason.LENGTH
                return kept
        return len(tokens)

    def cut(self, num_tokens: int) -> int:
        """End the row with its first `num_tokens` tokens; how many were dropped."""
        dropped = len(self.output_ids) - num_tokens
        del self.output_ids[num_tokens:]
        del self.logprobs[num_tokens:]
        self.finish_reason = FinishReason.STOP
        return dropped


@dataclass(frozen=True)
class Step:
    """One execution of the program: the rows that take part, and how many tokens each feeds.

    `seq_len` is that of the shape to run in; for a decode step the longest that any row may use.
    Row i is a slot and its sequence, and feeds `counts[i]` of its uncomputed tokens. If these are
    all of them it is answered with its next token; logits of other rows mean nothing.

    Rows in lockstep also have `padded_len`, the length that every prompt is padded to, and write
    the cache from `cache_index` on; `counts` includes the padding there.
    """

    is_prefill: bool
    seq_len: int
    rows: tuple[tuple[int, Sequence], ...]
    counts: tuple[int, ...]
    cache_index: int = 0
    padded_len: int = 0

    @property
    def ends_padded(self) -> bool:
        """Whether a step in lockstep reaches the end of the padded prompts: all are answered."""
        return self.cache_index + self.seq_len >= self.padded_len


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
            prefill_rows=specializations.prefill.batch_size,
            prefill_lens=tuple(sorted({shape.seq_len for shape in prefills})),
            prefill_ctx_len=max(reach, default=ctx_len),
            ctx_len=ctx_len,
            decode_len=specializations.decode_len,
            continuous=specializations.continuous,
            prefills=prefills,
            decodes=decodes,
        )

    @property
    def ride_columns(self) -> int:
        """Tokens of a row that a decode step takes and is no longer for it."""
        return min((shape.seq_len for shape in self.decodes), default=self.decode_len)

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

    def __init__(self, lens: Listed[int]) -> None:
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
