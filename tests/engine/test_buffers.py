"""The same answers through every way that a runtime takes and gives memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from answering import engine_on, outputs, rows_of, run

from qaic_ray.contract import IoContract
from qaic_ray.engine import buffers, session
from qaic_ray.engine.prompt_lookup import PromptLookup

if TYPE_CHECKING:
    from tiny_qpcs import TinyQpcs

PROMPTS = [[11 + i, 40 + 3 * i, 90, 120 + i, 7 + 2 * i] * (1 + i) for i in range(4)]


@pytest.mark.parametrize("way", ["pairs", "buffers read in place", "buffers copied"])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"next_tokens": True},
        {"num_speculative_tokens": 2},
        {"io": IoContract.CACHE_INDEX},
        {"io": IoContract.CACHE_INDEX, "prompt_len": 1},
        {"comp_ctx_lengths": (32,)},
    ],
    ids=["logits", "token ids", "speculative", "cache-index", "cache-index pl1", "contexts"],
)
def test_every_way_gives_transformers_answers(
    tiny: TinyQpcs, monkeypatch: pytest.MonkeyPatch, way: str, shape: dict[str, Any]
) -> None:
    if way != "pairs":
        monkeypatch.setattr(session, "LISTED_SINCE", (99,))
    if way == "buffers copied":
        monkeypatch.setattr(buffers, "_has_buffer_protocol", lambda runtime: False)
    proposer = PromptLookup() if "num_speculative_tokens" in shape else None
    with engine_on(tiny.sdk, tiny.qpc(batch_size=2, **shape), proposer=proposer) as engine:
        rows = rows_of(engine, PROMPTS, [7, 4, 6, 5])
        done = run(engine, rows)
    assert outputs(done) == [
        tiny.reference(ids, most, ()) for ids, most in zip(PROMPTS, [7, 4, 6, 5], strict=True)
    ]
