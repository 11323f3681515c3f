"""What `benchmarks/cpu_decode.py` asks of our engine is answered with transformers' tokens."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import pytest
from benchmark_modules import benchmark_module

if TYPE_CHECKING:
    from tiny_qpcs import TinyQpcs

contender = benchmark_module("cpu.contender")

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [20] * 9, [31, 30, 29, 28, 27, 26, 25, 24, 23]]
NEW_TOKENS = 12


def test_our_engine_answers_as_transformers_and_counts_steady_tokens(tiny: TinyQpcs) -> None:
    command = [sys.executable, contender.script("ours.py")]
    wanted = [tiny.reference(prompt, NEW_TOKENS, stop_ids=())[:8] for prompt in PROMPTS]
    with contender.Contender("ours", command, os.environ, sdk=str(tiny.sdk.root)) as ours:
        with pytest.raises(contender.ContenderError, match="no program is open"):
            ours.ask("decode", prompts=PROMPTS, new_tokens=2)
        ours.open(qpc=str(tiny.qpc(batch_size=3)), device=3)
        for _ in range(2):  # the second time from the slots' caches
            answer = ours.ask("decode", prompts=PROMPTS, new_tokens=NEW_TOKENS)
            assert answer["ids"] == wanted
            # The first token of each row is prefill's.
            assert answer["tokens"] == len(PROMPTS) * (NEW_TOKENS - 1)
            assert 0 < answer["seconds"] < answer["wall_s"]
        read = ours.ask("prefill", prompt=PROMPTS[0])
        assert read["tokens"] == len(PROMPTS[0])
        # Another engine had the slots: nothing may be taken for what they held before.
        assert ours.ask("decode", prompts=PROMPTS, new_tokens=NEW_TOKENS)["ids"] == wanted
