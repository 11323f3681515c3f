"""Token selection by the compiled kernels: the same tokens as numpy's, bit for bit.

Importing this file imports numba, and compiles or loads the kernels: `loader.py` does so
where it pays.
"""

from __future__ import annotations

from collections.abc import Sequence as Listed

import numpy as np

from qaic_ray.engine.categorical import BLOCK_LEN, NUM_GROUPS, SLACK, Rules
from qaic_ray.engine.compiled import kernels, tail
from qaic_ray.engine.compiled.jit import IS_COMPILED
from qaic_ray.engine.compiled.kernels import Draw, Heads, Past, RowRules
from qaic_ray.engine.compiled.tail import Line
from qaic_ray.engine.past import Pasts
from qaic_ray.engine.unsettled import UNITS, Floats, Ints, Logits, Unsettled
from qaic_ray.sampling_params import SamplingParams

__all__ = ["IS_COMPILED", "Compiled", "can_choose"]

_PAGE = 4096
_MOST_KEPT = NUM_GROUPS // 2  # beyond, the groups tell too little of the head


def can_choose(params: Listed[SamplingParams], vocab: int) -> bool:
    """Whether rows that ask for this are for the kernels."""
    kept = [asked.top_k for asked in params if not asked.is_greedy and asked.top_k < vocab]
    is_for_kernels = BLOCK_LEN * NUM_GROUPS <= vocab <= kernels.MOST_TOKENS
    return is_for_kernels and max(kept, default=0) <= _MOST_KEPT


class Compiled:
    """Chooses the tokens of one group of rows; keeps its buffers from one call to the next.

    Args:
        params: of each row.
        slots: of each row, where `uniforms` and the past tokens are.
        vocab: tokens of a row of logits.
        uniforms: float64 [slots, tokens of a span, NUMBERS] in [0, 1).
        numbers: int64 [rows], the next token's number in its span; the caller counts on.
        address: where logits begin in memory.
    """

    def __init__(
        self,
        params: Listed[SamplingParams],
        slots: Listed[int],
        vocab: int,
        *,
        uniforms: Floats,
        numbers: Ints,
        address: int = 0,
    ) -> None:
        is_greedy = np.array([asked.is_greedy for asked in params])
        rules = self._rules = Rules([_rule(asked) for asked in params], vocab)
        has_tail = ~(rules.limited | is_greedy)
        num_tails, num_blocks = int(has_tail.sum()), vocab // BLOCK_LEN
        num_steps = self._num_steps = -(-vocab // num_blocks)
        ints = np.zeros((len(params), 6), np.int64)
        ints[:, kernels.GREEDY] = is_greedy
        ints[:, kernels.LIMITED] = ~has_tail
        ints[:, kernels.ONLY_MIN_P] = rules.only_min_p
        ints[:, kernels.NUM_HEAD] = rules.num_head
        ints[:, kernels.NUM_KEPT] = np.where(is_greedy, 1, rules.num_kept)
        ints[:, kernels.CELLS] = np.where(has_tail, has_tail.cumsum() - 1, num_tails)
        limits = np.stack([rules.temperature, rules.top_p, rules.log_min_p], axis=1)
        self._asked = RowRules(limits, ints, np.array(slots, np.int64))
        self._heads = _heads(len(params), _far_from(address, (num_tails + 1, num_blocks)))
        self._draw = Draw(
            uniforms=uniforms,
            numbers=numbers,
            scale=np.array([UNITS, num_steps * (1 + SLACK) * UNITS, (1 - 2 * SLACK) / num_steps]),
            tokens=np.zeros(len(params), np.int64),
            certain=np.zeros(len(params), np.int64),
            reach=np.zeros(len(params)),
        )
        self._copy = np.zeros(vocab, np.float32)

    def choose(self, logits: Logits, pasts: Pasts) -> tuple[Ints, list[int]]:
        """A token for each row, and the rows of which only numpy can tell it.

        Args:
            logits: float32 [rows, vocab], C-contiguous; only read.
            pasts: what changes the rows' logits.
        """
        heads, draw = self._heads, self._draw
        past = Past(
            *(pasts.seen, pasts.counts, pasts.stops, pasts.num, pasts.penalties),
            self._copy,
        )
        num_tokens = kernels.find_heads(logits, self._asked, past, heads)
        exponents = heads.exponents[:num_tokens]
        np.exp(exponents, out=exponents)
        if not kernels.settle(self._asked, heads, draw):
            return draw.tokens, []
        states = heads.bounds[:, kernels.STATE]
        self._measure_tails(np.flatnonzero(states == kernels.OPEN))
        kernels.settle(self._asked, heads, draw)
        for row in np.flatnonzero(states == kernels.OPEN).tolist():
            draw.tokens[row] = self._find_token(row, logits[row], pasts)
        odd: list[int] = np.flatnonzero(states == kernels.ODD).tolist()
        return draw.tokens, odd

    def _measure_tails(self, rows: Ints) -> None:
        """Find the lengths of tails, as `CategoricalSampler._line`."""
        heads = self._heads
        at = self._asked.ints[rows, kernels.CELLS]
        cells = heads.maxima[at]
        cells -= heads.levels[rows, kernels.BEST, None]
        cells *= self._rules.scale[rows, None]
        np.exp2(cells, out=cells)
        heads.maxima[at] = cells
        heads.tails[rows] = cells.sum(axis=1)[:, None]

    def _find_token(self, row: int, logits: Logits, pasts: Pasts) -> int:
        """The token of a row whose first uniform number does not tell it."""
        asked, heads, draw = self._asked, self._heads, self._draw
        slot = int(asked.slots[row])
        if pasts.changes(slot):
            logits = logits.copy()
            pasts.change(slot, logits)
        first, stop, _ = heads.bounds[row].tolist()
        temperature, top_p, _ = asked.numbers[row].tolist()
        best, floor = heads.levels[row]
        ids, ends = heads.ids[first:stop], heads.ends[first:stop]
        cells: Logits = heads.maxima[asked.ints[row, kernels.CELLS]]
        uniforms = draw.uniforms[slot, draw.numbers[row]]
        certain, reach = int(draw.certain[row]), float(draw.reach[row])
        line = Line(
            *(ids, ends, cells, uniforms),
            *(temperature, top_p, float(best), float(floor)),
            *(certain, reach, self._num_steps, UNITS),
        )
        token = tail.find_token(logits, line)
        if token >= 0:
            return token
        unsettled = Unsettled(
            *(logits, temperature, top_p, best, floor), *(ids, ends, cells, self._num_steps)
        )
        return unsettled.token(uniforms.tolist(), certain, reach)


def _rule(asked: SamplingParams) -> tuple[float, int, float, float]:
    """As `Rules` has it; a greedy row's is any."""
    if asked.is_greedy:
        return 1.0, 0, 1.0, 0.0
    return asked.temperature, asked.top_k, asked.top_p, asked.min_p


def _far_from(address: int, shape: tuple[int, int]) -> Logits:
    """float32 zeros that begin half a page from an address, counted within pages.

    Written beside reads whose addresses end alike, they would cost a quarter of a step: a processor
    takes such a read for one of what was just written.
    """
    memory = np.zeros(4 * shape[0] * shape[1] + _PAGE, np.uint8)
    first = (address + _PAGE // 2 - memory.ctypes.data) % _PAGE // 4 * 4
    return memory[first : first + 4 * shape[0] * shape[1]].view(np.float32).reshape(shape)


def _heads(num_rows: int, maxima: Logits) -> Heads:
    """Room for the heads of so many rows."""
    room = num_rows * kernels.MOST_OF_HEAD
    return Heads(
        maxima=maxima,
        groups=np.zeros(NUM_GROUPS, np.float32),
        bits=np.zeros(NUM_GROUPS, np.int32),
        values=np.zeros(kernels.MOST_OF_HEAD, np.float32),
        keys=np.zeros(kernels.MOST_OF_HEAD, np.int64),
        ids=np.zeros(room, np.int64),
        exponents=np.zeros(room),
        ends=np.zeros(room, np.int64),
        bounds=np.zeros((num_rows, 3), np.int64),
        levels=np.zeros((num_rows, 2), np.float32),
        tails=np.zeros((num_rows, 2), np.float32),
    )
