"""Where a stop string ends an answer while its tokens come. Knows no engine and no card."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from qaic_ray.model.detokenizer import IncrementalText
from qaic_ray.model.tokenizer import Tokenizer
from qaic_ray.sampling_params import SamplingParams


class StopReader:
    """Reads a row's tokens for the engine and ends the row at the first stop string.

    A stop string is found wherever its characters meet the borders of tokens. The one whose last
    character comes first wins; of several that end with the same character, the longest. One that
    ends within the row's first `min_tokens - 1` tokens does not count.

    Special tokens are no part of the text, but a stop string that has them written out is found
    where they are: `<|im_end|>` ends the row at the token of this name.

    Args:
        tokenizer: the checkpoint's.
        params: of the row.
    """

    stop: str | None = None
    """The stop string that ended the row."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self._text = IncrementalText(tokenizer)
        self._params = params
        self._overlap = max(map(len, params.stop), default=1) - 1
        self._num_read = 0
        self._num_certain = 0
        self._tail = ""  # of the certain text, as long as a stop string could still reach back
        self._loose = ""
        self._plain_stops = [stop for stop in params.stop if not tokenizer.writes_special(stop)]
        self._special = None
        if len(self._plain_stops) < len(params.stop):
            self._special = _SpecialStops(tokenizer, set(params.stop) - set(self._plain_stops))
        self._stopped_text = ""

    @property
    def text(self) -> str:
        """The answer so far, half characters left out; cut at the stop string once there is one
        (behind it with `include_stop_str_in_output`)."""
        return self._text.text + self._loose if self.stop is None else self._stopped_text

    @property
    def certain(self) -> str:
        """The beginning of the answer that neither a token nor a stop string can take back."""
        if self.stop is not None:
            return self._stopped_text
        text, num_held = self._text.text, 0
        for length in range(min(self._overlap, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._plain_stops):
                num_held = length
                break
        if self._special is not None:
            held = self._special.begun(self._tail, self._num_certain - len(self._tail))
            num_held = max(num_held, held)
        return text[: len(text) - num_held]

    def read(self, token_ids: Sequence[int]) -> int | None:
        """Take the row's new tokens.

        Returns:
            None, or how many of the row's tokens are kept: the fewest whose text holds the stop
            string.
        """
        for token_id in token_ids:
            if self.stop is not None:
                break
            self._num_read += 1
            self._look_at(self._text.push((token_id,)), token_id)
        return None if self.stop is None else self._num_read

    def _look_at(self, certain: str, token_id: int) -> None:
        before = self._tail + self._loose
        self._loose = self._text.loose
        now = self._tail + certain + self._loose
        num_seen = len(before) if now.startswith(before) else len(self._tail)
        start = self._num_certain - len(self._tail)
        if self._special is not None:
            self._special.read(token_id, start + len(now))
        if self._num_read >= self._params.min_tokens:
            self._look_for_stop(now, num_seen, start)
        self._num_certain += len(certain)
        tail = self._tail + certain
        self._tail = tail[max(0, len(tail) - self._overlap) :]

    def _look_for_stop(self, window: str, num_seen: int, start: int) -> None:
        """Find a stop string that ends behind the first `num_seen` characters of the window, which
        is the text from its character `start` on, to its end."""
        found = []
        for stop in self._plain_stops:
            at = window.find(stop, max(0, num_seen - len(stop) + 1))
            if at >= 0:
                found.append((at + len(stop), at, stop))
        if self._special is not None:
            found += self._special.found(window, num_seen, start)
        if not found:
            return
        _, at, self.stop = min(found)
        kept = (self._text.text + self._loose)[: start + at]
        self._stopped_text = kept + (self.stop if self._params.include_stop_str_in_output else "")


class _SpecialStops:
    """Finds stop strings in the text as it would be with its special tokens written out.

    Places are the text's own, so that a special token takes none.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Collection[str]) -> None:
        self._tokenizer = tokenizer
        self._stops = stops
        self._marks: list[tuple[int, str]] = []  # place in the text, what is written there
        self._is_new = False

    def read(self, token_id: int, place: int) -> None:
        """Take a token, and how long the text is with it."""
        special = self._tokenizer.special_text(token_id)
        self._is_new = special is not None
        if special is not None:
            self._marks.append((place, special))

    def found(self, window: str, num_seen: int, start: int) -> list[tuple[int, int, str]]:
        """End and beginning in the window, and the stop string, of those that the last token ends;
        see `StopReader._look_for_stop`."""
        written, places = self._written(window, start)
        if self._is_new:
            num_seen = len(written) - len(self._marks[-1][1])
        else:
            num_seen += sum(len(text) for place, text in self._marks if place - start <= num_seen)
        found = []
        for stop in self._stops:
            at = written.find(stop, max(0, num_seen - len(stop) + 1))
            if at >= 0:
                found.append((places[at + len(stop)], places[at], stop))
        return found

    def begun(self, tail: str, start: int) -> int:
        """How many of the last characters of the text a stop string may have begun with."""
        written, places = self._written(tail, start)
        for at in range(len(written)):
            if any(stop.startswith(written[at:]) for stop in self._stops):
                return len(tail) - places[at]
        return 0

    def _written(self, window: str, start: int) -> tuple[str, list[int]]:
        """The window with its special tokens, and for each character its place in the window; one
        place more is the end's."""
        self._marks = [mark for mark in self._marks if mark[0] >= start]
        written, done = "", 0
        places: list[int] = []
        for place, special in self._marks:
            at = min(place - start, len(window))
            written += window[done:at] + special
            places += [*range(done, at), *[at] * len(special)]
            done = at
        return written + window[done:], [*places, *range(done, len(window) + 1)]
