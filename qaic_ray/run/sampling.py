"""Logits to tokens. Greedy: the first of the largest logits, as transformers and torch do."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def greedy(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """The most likely token of each row.

    Args:
        logits: float32 [rows, vocab].

    Returns:
        int64 [rows].
    """
    tokens: npt.NDArray[np.int64] = logits.argmax(axis=-1)
    return tokens
