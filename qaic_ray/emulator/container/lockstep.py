"""Runs inferences of rows in lockstep, padded on the left, on a lowered graph.

All rows write the same slots of the cache, from `cache_index` on, and a retained mask says which
slots of a row are tokens. The lowered graph knows neither: it takes the tokens of a row at
positions 0, 1, ... of its cache. So the cache of a row is kept rolled, its first token in front and
its padding behind the last slot, and padding is not computed. Who reads or replaces the cache gets
it as the reference graph leaves it (`LockstepState.settle`).
"""

from __future__ import annotations

from typing import Any, Callable, Dict, Mapping, NamedTuple, Optional

import numpy as np

from ..lowering.attention import ATTENTION_MASK, CACHE_INDEX, INPUT_IDS, POSITION_IDS

Run = Callable[[Mapping[str, Any]], Optional[Dict[str, Any]]]
Reference = Callable[[Mapping[str, Any]], Mapping[str, Any]]


class _Rows(NamedTuple):
    """The rows of one inference: each is padding up to its own slot, and tokens from there on.

    `seen` [rows, ctx_len] is the mask with the last token, `where` [rows, tokens] the positions,
    negative for padding, and `counts` the tokens of each row.
    """

    start: int
    stop: int
    seen: Any
    pads: Any
    where: Any
    counts: Any


class LockstepState:
    """The states of one activation whose rows go in lockstep.

    Args:
        run: runs tokens at positions of their own over the caches, padding behind them.
        states: retained input -> array; the caches are [rows, heads, ctx_len, dim].
        reference: runs the reference graph on inputs, and returns the new states by retained input;
            it changes none.
    """

    def __init__(self, run: Run, states: Mapping[str, Any], reference: Reference) -> None:
        self._run = run
        self._reference = reference
        self._mask = states[ATTENTION_MASK]
        self._caches = {name: array for name, array in states.items() if name != ATTENTION_MASK}
        num_rows, self._ctx_len = self._mask.shape
        # How far each row is rolled; slots that may hold something; slots of padding that hold
        # what the reference graph would not have left there, and the inferences that would have.
        self._pads = np.zeros(num_rows, np.int64)
        self._reach = 0
        self._is_open = np.zeros(self._mask.shape, bool)
        self._padded: Dict[int, Dict[str, Any]] = {}

    def run(self, inputs: Mapping[str, Any]) -> Optional[Dict[str, Any]]:
        """Run one inference; None where its rows need the reference graph.

        What there is for padding is zero.
        """
        rows = self._rows(inputs)
        if rows is None:
            self.settle()
            self._reach = max(self._reach, self._stop(inputs))
            return None
        self._roll(rows.pads)
        made = self._run(self._aligned(inputs, rows))
        assert made is not None, "positions of tokens in a row follow each other"
        self._remember(inputs, rows)
        np.copyto(self._mask, rows.seen)
        return {name: self._placed(array, rows) for name, array in made.items()}

    def settle(self) -> None:
        """Leave the caches as the reference graph does: not rolled, with padding computed."""
        self._roll(np.zeros_like(self._pads))
        for start, feeds in sorted(self._padded.items()):
            made = self._reference(feeds)
            stop = start + feeds[INPUT_IDS].shape[1]
            missing = self._is_open[:, start:stop]
            for name, array in self._caches.items():
                slots, computed = array[:, :, start:stop], made[name][:, :, start:stop]
                np.copyto(slots, computed, where=missing[:, None, :, None])
        self._padded.clear()
        self._is_open.fill(False)

    def replaced(self) -> None:
        """Say that the caches now hold what a caller gave, in every slot."""
        self._reach = self._ctx_len

    def _stop(self, inputs: Mapping[str, Any]) -> int:
        start = int(inputs[CACHE_INDEX].reshape(()))
        length = int(inputs[INPUT_IDS].shape[1])
        return int(min(max(start, 0) + length, self._ctx_len))

    def _rows(self, inputs: Mapping[str, Any]) -> Optional[_Rows]:
        length = inputs[INPUT_IDS].shape[1]
        start = int(inputs[CACHE_INDEX].reshape(()))
        stop = start + length
        if start < 0 or stop > self._ctx_len:
            return None
        seen = self._mask.copy()
        seen[:, stop - 1] = 1
        tokens = seen[:, :stop] != 0
        pads = tokens.argmax(axis=1)
        where = np.arange(start, stop) - pads[:, None]
        is_token = where >= 0
        if (
            not np.array_equal(tokens.sum(axis=1), stop - pads)
            or not np.array_equal(inputs[POSITION_IDS][is_token], where[is_token])
            or (self._is_open[:, :start] & tokens[:, :start]).any()
        ):
            return None
        return _Rows(start, stop, seen, pads, where, is_token.sum(axis=1))

    def _aligned(self, inputs: Mapping[str, Any], rows: _Rows) -> Dict[str, Any]:
        """Token ids and positions with the tokens of each row in front."""
        ids, length = inputs[INPUT_IDS], rows.where.shape[1]
        if rows.counts.min() == length:
            return {INPUT_IDS: ids, POSITION_IDS: rows.where}
        columns = np.arange(length) + (length - rows.counts)[:, None]
        columns[columns >= length] = 0
        where = np.take_along_axis(rows.where, columns, axis=1)
        where[np.arange(length) >= rows.counts[:, None]] = -1
        return {INPUT_IDS: np.take_along_axis(ids, columns, axis=1), POSITION_IDS: where}

    def _placed(self, array: Any, rows: _Rows) -> Any:
        """A result that there is for every token, with padding in front again."""
        length = rows.where.shape[1]
        is_per_token = array.ndim > 2 and array.shape[1] == length
        if rows.counts.min() == length or not is_per_token:
            return array
        placed = np.zeros_like(array)
        for row, count in enumerate(rows.counts):
            placed[row, length - count :] = array[row, :count]
        return placed

    def _remember(self, inputs: Mapping[str, Any], rows: _Rows) -> None:
        self._reach = max(self._reach, rows.stop)
        if rows.start == 0:
            self._padded.clear()
        padding = rows.where < 0
        self._is_open[:, rows.start : rows.stop] = padding
        if padding.any():
            self._padded[rows.start] = {
                ATTENTION_MASK: self._mask.copy(),
                **{name: array.copy() for name, array in inputs.items()},
            }

    def _roll(self, pads: Any) -> None:
        """Have position p of row b's cache hold slot p + pads[b]."""
        slots = np.arange(self._reach)
        for row in np.flatnonzero(pads != self._pads):
            source = (slots - self._pads[row]) % self._ctx_len
            target = (slots - pads[row]) % self._ctx_len
            for array in self._caches.values():
                kept = array[row][:, source]
                array[row][:, source] = 0
                array[row][:, target] = kept
        self._pads = pads.copy()
