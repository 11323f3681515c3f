"""Single tokens as text and as bytes, for the log-probabilities of the interface."""

from __future__ import annotations

from functools import lru_cache

from qaic_ray.model.detokenizer import piece_bytes
from qaic_ray.model.tokenizer import Tokenizer

_KEPT = 2**16


class TokenTexts:
    """Texts of one tokenizer's tokens; threads may share it.

    Args:
        tokenizer: the model's.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.raw = lru_cache(_KEPT)(self._raw)

    def _raw(self, token_id: int) -> bytes:
        """The bytes that a token puts into a text; of a special token its name."""
        special = self._tokenizer.special.get(token_id)
        if special is not None:
            return special.encode()
        piece = self._tokenizer.piece(token_id)
        return b"" if piece is None else piece_bytes(self._tokenizer, piece)

    def text(self, token_id: int) -> str:
        """The same as text; bytes that are no whole character are replacement characters."""
        return self.raw(token_id).decode(errors="replace")
