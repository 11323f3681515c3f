"""Rows that a journal has of earlier sessions, for prompts that come again in any order."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from qaic_ray.runs.intake import long_digest

if TYPE_CHECKING:
    from qaic_ray.rows import Prompt, Row
    from qaic_ray.runs.journal import Journal


class KeptRows:
    """Answers by the content of their prompts, each used once.

    Only answers: a prompt whose row was an error, or cancelled, is tried again. About a hundred
    bytes are held for each row; the rows stay on the disk.

    Attributes:
        next_index: above that of every row there.

    Args:
        journal: open; read through now.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._lock = threading.Lock()
        self._places: dict[int, list[tuple[int, int]]] = {}
        self._num_left = 0
        self.next_index = 0
        for entry in journal.replay():
            self.next_index = max(self.next_index, entry.row.index + 1)
            if entry.row.ok:
                place = entry.place.segment, entry.place.offset
                self._places.setdefault(entry.digest, []).append(place)
                self._num_left += 1

    def __len__(self) -> int:
        return self._num_left

    def take(self, prompt: Prompt) -> tuple[int, Row | None]:
        """The digest of a prompt, and the earliest answer to one that is the same, if there is any.

        The same: everything but its index and whether it streams.

        Raises:
            QaicRayError: the journal has changed on the disk.
        """
        digest = long_digest(prompt)
        with self._lock:
            places = self._places.get(digest)
            if places is None:
                return digest, None
            row = self._journal.read(*places.pop(0))
            if not places:
                del self._places[digest]
            self._num_left -= 1
        return digest, row
