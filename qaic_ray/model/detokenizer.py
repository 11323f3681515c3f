"""Token ids to text while they come. Knows no engine and no card.

A token need not be a text: a character may be spread over several tokens, and what a token reads
as may depend on those around it. Text is *certain* when no later token can change it. Nothing is
decoded twice: what waits for its next token is at most a character, except where a decoder says
that more depends on it (see `_BytePieces` and `_AnyPieces`).
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Protocol

from qaic_ray.model.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
"""What a decoder writes for bytes that are no character."""


class IncrementalText:
    """The text of an answer, piece by piece: what all `push` and `finish` gave is exactly
    `tokenizer.decode` of all the ids.

    Args:
        tokenizer: the checkpoint's.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pieces = _pieces(tokenizer)
        self._certain: list[str] = []

    @property
    def text(self) -> str:
        """All that was given so far."""
        return "".join(self._certain)

    @property
    def loose(self) -> str:
        """What would follow if the answer ended here, without half a character at its end.

        A later token may still change it.
        """
        return self._pieces.loose

    def push(self, token_ids: Sequence[int]) -> str:
        """Take tokens; return the text that is certain now, and was not before."""
        pieces = filter(None, map(self._tokenizer.piece, token_ids))
        return self._give("".join([self._pieces.take(piece) for piece in pieces]))

    def finish(self) -> str:
        """The rest: no token follows."""
        return self._give(self._pieces.end())

    def _give(self, text: str) -> str:
        self._certain.append(text)
        return text


class _Pieces(Protocol):
    """Vocabulary pieces to text, as one kind of decoder does it."""

    @property
    def loose(self) -> str:
        """See `IncrementalText.loose`."""

    def take(self, piece: str) -> str:
        """Take a piece; return what is certain now."""

    def end(self) -> str:
        """What is left."""


class _ByteLevelPieces:
    """Each character of a piece stands for a byte (GPT-2's table); the bytes are UTF-8."""

    loose = ""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def take(self, piece: str) -> str:
        return self._utf8.decode(_byte_level(piece))

    def end(self) -> str:
        return self._utf8.decode(b"", final=True)


class _MetaspacePieces:
    """A mark in a piece stands for a space, but for nothing in the first piece of a text."""

    loose = ""

    def __init__(self, mark: str, *, drops_first: bool) -> None:
        self._mark = mark
        self._drops = drops_first

    def take(self, piece: str) -> str:
        text = piece.replace(self._mark, "" if self._drops else " ")
        self._drops = False
        return text

    def end(self) -> str:
        return ""


class _BytePieces:
    """SentencePiece's: marks are spaces, `<0xE2>` is a byte, some first spaces are dropped.

    One byte that is no UTF-8 turns the whole run of byte pieces around it into replacement
    characters. So the characters of a run are loose until the run ends.

    Args:
        steps: the decoder's, of a form that `_SENTENCEPIECE` matches.
    """

    def __init__(self, steps: Sequence[dict[str, Any]]) -> None:
        kinds = [step["type"] for step in steps]
        by_kind: dict[str, Any] = dict(zip(kinds, steps, strict=True))
        replace = by_kind.get("Replace", {"pattern": {"String": ""}, "content": ""})
        strip = by_kind.get("Strip", {"content": "", "start": 0})
        self._mark: str = replace["pattern"]["String"]
        self._space: str = replace["content"]
        self._has_bytes = "ByteFallback" in kinds
        self._marks_in_runs = kinds[0] == "ByteFallback"
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
        """`text` without what is still to be dropped at the answer's start, and how much is then
        left to drop."""
        num_drops = self._num_drops
        while num_drops and text:
            if text[0] != self._dropped:
                return text, 0
            text, num_drops = text[1:], num_drops - 1
        return text, num_drops


class _AnyPieces:
    """A decoder of a form we do not know: any piece may change any text, to the very end."""

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
    """Whether a step changes single characters, and none at the text's end."""
    match step:
        case {"type": "Replace", "pattern": pattern}:
            return len(pattern.get("String", "")) == 1
        case {"type": "Strip", "stop": num_last}:
            return bool(num_last == 0)
    return True


@lru_cache(maxsize=2**16)
def _byte_level(piece: str) -> bytes:
    """The bytes that a byte-level piece stands for; an added token may be plain text instead."""
    try:
        return bytes([_BYTE_OF[character] for character in piece])
    except KeyError:
        return piece.encode()


def _byte_table() -> dict[str, int]:
    """Bytes that Latin-1 can show stand for themselves, the others for characters from 256 on."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {
        chr(0x100 + index): byte for index, byte in enumerate(others)
    }


_BYTE_OF = _byte_table()
