"""Token ids to text while they come, up to the first stop string.

A character may be spread over several tokens, and the text of a token may depend on its neighbours.
Text is *certain* when no later token can change it. Nothing is decoded twice, and at most one
character waits for its next token, except with two kinds of decoders (`_BytePieces`, `_AnyPieces`).
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from typing import Any

from qaic_ray.model.tokenizer import Tokenizer
from qaic_ray.sampling_params import SamplingParams

REPLACEMENT = "\ufffd"
"""What a decoder writes for bytes that are no character."""


class IncrementalText:
    """The text of an answer in parts, which together are exactly `tokenizer.decode` of all ids."""

    def __init__(self, tokenizer: Tokenizer, *, skips_special: bool = True) -> None:
        self._piece = partial(tokenizer.piece, skips_special=skips_special)
        self._pieces = _pieces(tokenizer)
        self._certain: list[str] = []

    @property
    def text(self) -> str:
        """All parts so far."""
        if len(self._certain) > 1:
            self._certain = ["".join(self._certain)]  # each part is joined once
        return "".join(self._certain)

    @property
    def loose(self) -> str:
        """What would follow if the answer ended here, without half a character at its end."""
        return self._pieces.loose

    def push(self, token_ids: Sequence[int]) -> str:
        """Take tokens; return the text that has become certain."""
        pieces = filter(None, map(self._piece, token_ids))
        return self._give("".join([self._pieces.take(piece) for piece in pieces]))

    def finish(self) -> str:
        """The rest, when no token follows."""
        return self._give(self._pieces.end())

    def _give(self, text: str) -> str:
        self._certain.append(text)
        return text


class _Pieces:
    """Vocabulary pieces to text, as one kind of decoder does it."""

    @property
    def loose(self) -> str:
        """See `IncrementalText.loose`."""
        return ""

    def take(self, piece: str) -> str:
        """Take a piece; return what has become certain."""
        return ""

    def end(self) -> str:
        """The rest."""
        return ""


class _ByteLevelPieces(_Pieces):
    """Each character of a piece stands for a byte (GPT-2's table); the bytes are UTF-8."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def take(self, piece: str) -> str:
        return self._utf8.decode(_byte_level(piece))

    def end(self) -> str:
        return self._utf8.decode(b"", final=True)


class _MetaspacePieces(_Pieces):
    """A mark in a piece stands for a space, but for nothing in the first piece of a text."""

    def __init__(self, mark: str, *, drops_first: bool) -> None:
        self._mark = mark
        self._drops = drops_first

    def take(self, piece: str) -> str:
        text = piece.replace(self._mark, "" if self._drops else " ")
        self._drops = False
        return text


class _BytePieces(_Pieces):
    """SentencePiece: marks are spaces, `<0xE2>` is a byte, leading spaces may be dropped.

    One byte that is not UTF-8 turns the whole run of byte pieces around it into replacement
    characters. So the characters of a run are loose until the run ends.
    The decoder's steps are of a form that `_SENTENCEPIECE` matches.
    """

    def __init__(self, steps: Sequence[dict[str, Any]]) -> None:
        by_kind: dict[str, Any] = {step["type"]: step for step in steps}
        replace = by_kind.get("Replace", {"pattern": {"String": ""}, "content": ""})
        strip = by_kind.get("Strip", {"content": "", "start": 0})
        self._mark: str = replace["pattern"]["String"]
        self._space: str = replace["content"]
        self._has_bytes = "ByteFallback" in by_kind
        self._marks_in_runs = steps[0]["type"] == "ByteFallback"
        self._dropped: str = strip["content"]
        self._num_drops: int = strip["start"]
        self._begin_run()

    @property
    def loose(self) -> str:
        return "" if self._broken else self._dropping(self._run_text)[0]

    def take(self, piece: str) -> str:
        byte = _BYTE.fullmatch(piece) if self._has_bytes else None
        if byte is not None:
            return self._give(self._take_byte(bytes.fromhex(byte[1])))
        text = self._end_run()
        return self._give(text + piece.replace(self._mark, self._space))

    def end(self) -> str:
        return self._give(self._end_run())

    def _begin_run(self) -> None:
        self._run_len = 0
        self._run_text = ""
        self._broken = False
        self._utf8 = codecs.getincrementaldecoder("utf-8")("strict")

    def _take_byte(self, byte: bytes) -> str:
        self._run_len += 1
        if self._broken:
            return REPLACEMENT
        try:
            text = self._utf8.decode(byte)
        except UnicodeDecodeError:
            self._broken = True
            return REPLACEMENT * self._run_len
        self._run_text += text.replace(self._mark, self._space) if self._marks_in_runs else text
        return ""

    def _end_run(self) -> str:
        text = "" if self._broken else self._run_text
        if not self._broken and self._utf8.getstate()[0]:
            text = REPLACEMENT * self._run_len
        if self._run_len:
            self._begin_run()
        return text

    def _give(self, text: str) -> str:
        text, self._num_drops = self._dropping(text)
        return text

    def _dropping(self, text: str) -> tuple[str, int]:
        """`text` without what the answer's start drops, and how much is then left to drop."""
        num_drops = self._num_drops
        while num_drops and text.startswith(self._dropped):
            text, num_drops = text[1:], num_drops - 1
        return text, 0 if text else num_drops


class _AnyPieces(_Pieces):
    """A decoder of an unknown kind: any piece may change any text, until the end."""

    def __init__(self, join: Callable[[list[str]], str]) -> None:
        self._join = join
        self._taken: list[str] = []

    @property
    def loose(self) -> str:
        return self._join(self._taken).rstrip(REPLACEMENT)

    def take(self, piece: str) -> str:
        self._taken.append(piece)
        return ""

    def end(self) -> str:
        text = self._join(self._taken)
        self._taken = []
        return text


_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")
_SENTENCEPIECE = re.compile("(R?B?|BR)(FS?)?|BFRS?")
_INITIALS = {"Replace": "R", "ByteFallback": "B", "Fuse": "F", "Strip": "S"}


def _pieces(tokenizer: Tokenizer) -> _Pieces:
    steps = tokenizer.decoder_steps
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return _ByteLevelPieces()
    if kinds == ["Metaspace"]:
        (step,) = steps
        return _MetaspacePieces(
            step["replacement"], drops_first=step.get("prepend_scheme") != "never"
        )
    form = "".join(_INITIALS.get(kind, "?") for kind in kinds)
    if form and _SENTENCEPIECE.fullmatch(form) and all(map(_is_simple, steps)):
        return _BytePieces(steps)
    return _AnyPieces(tokenizer.join)


def _is_simple(step: dict[str, Any]) -> bool:
    """Whether a step changes single characters only, and none at the text's end."""
    match step:
        case {"type": "Replace", "pattern": pattern}:
            return len(pattern.get("String", "")) == 1
        case {"type": "Strip", "stop": num_last}:
            return bool(num_last == 0)
    return True


def piece_bytes(tokenizer: Tokenizer, piece: str) -> bytes:
    """The bytes that a piece of the vocabulary puts into the middle of a text.

    Of a byte-level or SentencePiece vocabulary these are exact, half characters too; of any other
    they are those of the piece's text alone.
    """
    steps = tokenizer.decoder_steps
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return _byte_level(piece)
    byte = _BYTE.fullmatch(piece) if "ByteFallback" in kinds else None
    if byte is not None:
        return bytes.fromhex(byte[1])
    for step in steps:
        if step["type"] == "Metaspace":
            piece = piece.replace(step["replacement"], " ")
        elif step["type"] == "Replace" and "String" in step["pattern"]:
            piece = piece.replace(step["pattern"]["String"], step["content"])
    return piece.encode() if steps else tokenizer.join([piece]).encode()


@lru_cache(maxsize=2**16)
def _byte_level(piece: str) -> bytes:
    """The bytes that a byte-level piece stands for; an added token may be plain text instead."""
    try:
        return bytes([_BYTE_OF[character] for character in piece])
    except KeyError:
        return piece.encode()


_SHOWN_BYTES = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHER_BYTES = [byte for byte in range(0x100) if byte not in _SHOWN_BYTES]
_BYTE_OF = {chr(byte): byte for byte in _SHOWN_BYTES} | {
    chr(0x100 + index): byte for index, byte in enumerate(_OTHER_BYTES)
}
"""GPT-2's table: bytes that Latin-1 can show are themselves, the others 256 and up."""


class StopFinder:
    """Reads a row's tokens for the engine and ends the row at the first stop string.

    The stop string whose last character comes first wins; of several that end with the same
    character, the longest. One that ends within the row's first `min_tokens - 1` tokens does not
    count.

    Special tokens are not in the text, unless the row wants them there. But a stop string that has
    them written out is found where they are: `<|im_end|>` ends the row at the token of this name.
    """

    stop: str | None = None
    """The stop string that ended the row."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        skips = params.skip_special_tokens
        self._special = tokenizer.special if skips else {}
        self._text = IncrementalText(tokenizer, skips_special=skips)
        self._params = params
        written = self._special.values()
        self._written_stops = [s for s in params.stop if any(token in s for token in written)]
        self._plain_stops = [stop for stop in params.stop if stop not in self._written_stops]
        self._overlap = max(map(len, params.stop), default=1) - 1
        self._num_read = 0
        self._num_certain = 0
        self._tail = ""  # of the certain text, where a stop string may have begun
        self._loose = ""
        # Special tokens: where each stands in the text, in which it takes no room.
        self._marks: list[tuple[int, str]] = []
        self._stopped_text = ""

    @property
    def text(self) -> str:
        """The answer so far, without half characters; cut at the stop string once there is one, or
        behind it with `include_stop_str_in_output`."""
        return self._text.text + self._loose if self.stop is None else self._stopped_text

    @property
    def certain(self) -> str:
        """The beginning of the answer that no later token or stop string can change."""
        if self.stop is not None:
            return self._stopped_text
        num_held = _num_begun(self._tail, range(len(self._tail) + 1), self._plain_stops)
        if self._written_stops:
            written = self._written(self._tail, self._num_certain - len(self._tail))
            num_held = max(num_held, _num_begun(*written, self._written_stops))
        text = self._text.text
        return text[: len(text) - num_held]

    def read(self, token_ids: Sequence[int]) -> int | None:
        """Take the row's new tokens; once a stop string is found, return how many are kept."""
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
        special = self._special.get(token_id) if self._written_stops else None
        if special is not None:
            self._marks.append((start + len(now), special))
        if self._num_read >= self._params.min_tokens:
            found = _found(now, range(len(now) + 1), num_seen, self._plain_stops)
            if self._written_stops:
                written, places = self._written(now, start)
                if special is not None:
                    num_seen = len(written) - len(special)
                else:
                    num_seen += sum(len(s) for at, s in self._marks if at - start <= num_seen)
                found += _found(written, places, num_seen, self._written_stops)
            if found:
                _, at, self.stop = min(found)
                kept = (self._text.text + self._loose)[: start + at]
                is_kept = self._params.include_stop_str_in_output
                self._stopped_text = kept + (self.stop if is_kept else "")
        self._num_certain += len(certain)
        tail = self._tail + certain
        self._tail = tail[max(0, len(tail) - self._overlap) :]

    def _written(self, window: str, start: int) -> tuple[str, Sequence[int]]:
        """A part of the text with its special tokens written out, from the character `start` on.

        Also the place in the part of each character, and of the end.
        """
        self._marks = [mark for mark in self._marks if mark[0] >= start]
        written, done = "", 0
        places: list[int] = []
        for place, special in self._marks:
            at = min(place - start, len(window))
            written += window[done:at] + special
            places += [*range(done, at), *[at] * len(special)]
            done = at
        return written + window[done:], [*places, *range(done, len(window) + 1)]


def _found(
    text: str, places: Sequence[int], num_seen: int, stops: Iterable[str]
) -> list[tuple[int, int, str]]:
    """The stop strings that end behind the first `num_seen` characters: end, start, and itself."""
    found = []
    for stop in stops:
        at = text.find(stop, max(0, num_seen - len(stop) + 1))
        if at >= 0:
            found.append((places[at + len(stop)], places[at], stop))
    return found


def _num_begun(text: str, places: Sequence[int], stops: Iterable[str]) -> int:
    """How many of the last characters may be the beginning of a stop string."""
    for at in range(len(text)):
        if any(stop.startswith(text[at:]) for stop in stops):
            return places[-1] - places[at]
    return 0
