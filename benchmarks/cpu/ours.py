"""qaic_ray as a contender: the engine of a run, on one emulated card with all its doors.

No Ray, and no tokenizer: prompts are token ids. See `contender.py` for the requests.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from answer_lines import answer_lines

from qaic_ray.engine.engine import Engine
from qaic_ray.engine.session import Session, load_runtime
from qaic_ray.engine.steps import Sequence
from qaic_ray.sdk import open_sdk


class Card:
    """One emulated card, which runs one program after the other."""

    def __init__(self) -> None:
        self._session: Session | None = None
        self._engine: Engine | None = None

    def open(self, sdk: str, qpc: str, device: int) -> dict[str, Any]:
        """Load a program in place of the one before.

        Returns:
            `import_s` of the runtime's modules, and `seconds` from there to an activated program.
        """
        self.close()
        begun_s = time.perf_counter()
        opened = open_sdk(Path(sdk))
        runtime = load_runtime(opened)
        imported_s = time.perf_counter()
        self._session = Session(opened, qpc, [device], runtime=runtime)
        seconds = time.perf_counter() - imported_s
        return {"import_s": imported_s - begun_s, "seconds": seconds}

    def close(self) -> None:
        """Unload the program."""
        self._engine = None
        if self._session is not None:
            self._session.close()
        self._session = None

    def decode(self, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        """Answer the prompts together; `seconds` are of the steps in which every row had one token.

        A prompt that the slot's cache holds already is not computed again.
        """
        if self._engine is None:
            # Nothing may decode before all have their first token, so that rows end together.
            self._engine = Engine(self._opened, max_stall_s=math.inf)
        engine = self._engine
        rows = [Sequence(key, tuple(ids), new_tokens) for key, ids in enumerate(prompts)]
        begun_s = time.perf_counter()
        for row in rows:
            engine.add(row)
        while min(len(row.output_ids) for row in rows) < 1:
            engine.step()
        steady_s = time.perf_counter()
        before = sum(len(row.output_ids) for row in rows)
        while engine.busy:
            engine.step()
        ended_s = time.perf_counter()
        return {
            "tokens": sum(len(row.output_ids) for row in rows) - before,
            "seconds": ended_s - steady_s,
            "wall_s": ended_s - begun_s,
            "ids": [row.output_ids[:8] for row in rows],
        }

    def prefill(self, prompt: list[int]) -> dict[str, Any]:
        """Seconds to the first token of a prompt of which nothing is in the cache."""
        self._engine = None  # another engine's rows take its slots
        engine = Engine(self._opened, prefix_reuse=False)
        row = Sequence(0, tuple(prompt), 1)
        begun_s = time.perf_counter()
        engine.add(row)
        while engine.busy:
            engine.step()
        return {"tokens": len(prompt), "seconds": time.perf_counter() - begun_s}

    @property
    def _opened(self) -> Session:
        assert self._session is not None, "no program is open"
        return self._session


if __name__ == "__main__":
    card = Card()
    answer_lines(
        {"open": card.open, "close": card.close, "decode": card.decode, "prefill": card.prefill}
    )
