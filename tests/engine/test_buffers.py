"""The same answers through every way that a runtime takes and gives memory."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from answering import changed, engine_on, outputs, rows_of, run

from qaic_ray.contract import IoContract
from qaic_ray.engine.drafts import PromptLookup
from qaic_ray.engine.session import load_runtime

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
    tiny: TinyQpcs, way: str, shape: dict[str, Any]
) -> None:
    rt, api = load_runtime(tiny.sdk)
    sdk = tiny.sdk if way == "pairs" else replace(tiny.sdk, apps_version="1.19")
    if way == "buffers copied":
        buffer = rt.QBuffer
        # What asks for the buffer protocol of one byte gets an object that has none.
        rt = changed(rt, QBuffer=lambda data: object() if data == b"\0" else buffer(data))
    proposer = PromptLookup() if "num_speculative_tokens" in shape else None
    with engine_on(
        sdk, tiny.qpc(batch_size=2, **shape), runtime=(rt, api), proposer=proposer
    ) as engine:
        rows = rows_of(engine, PROMPTS, [7, 4, 6, 5])
        done = run(engine, rows)
    assert outputs(done) == [
        tiny.reference(ids, most, ()) for ids, most in zip(PROMPTS, [7, 4, 6, 5], strict=True)
    ]
