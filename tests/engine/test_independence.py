"""Greedy text is transformers', whatever the batch size, slot, order of arrival, shape or card."""

from __future__ import annotations

import threading
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from answering import engine_on, outputs, rows_of, run
from awaited import joined
from hypothesis import given, settings
from hypothesis import strategies as st

from qaic_ray.contract import IoContract
from qaic_ray.engine.drafts import DraftProgram, PromptLookup
from qaic_ray.engine.session import Session
from qaic_ray.engine.steps import Sequence

if TYPE_CHECKING:
    from tiny_qpcs import TinyQpcs

CTX_LEN = 64
EVERY_SHAPE: dict[str, dict[str, Any]] = {
    "continuous": {},
    "two prefill lengths": {"prompt_len": (4, 16)},
    "decode only": {"prompt_len": 1},
    "two rows a prefill": {"prefill_rows": 2},
    "three rows a prefill of two lengths": {"prefill_rows": 3, "prompt_len": (4, 16)},
    "two rows a prefill, speculative": {"prefill_rows": 2, "num_speculative_tokens": 3},
    "two rows a prefill, compute-context": {"prefill_rows": 2, "comp_ctx_lengths": (16, 32)},
    "compute-context lengths": {"comp_ctx_lengths": (16, 32)},
    "static": {"continuous": False},
    "static, decode only": {"continuous": False, "prompt_len": 1},
    "logits of every token": {"logits": "all"},
    "token ids": {"next_tokens": True},
    "speculative": {"num_speculative_tokens": 3},
    "speculative, token ids": {"num_speculative_tokens": 3, "next_tokens": True},
    "cache-index": {"io": IoContract.CACHE_INDEX},
    "cache-index, decode only": {"io": IoContract.CACHE_INDEX, "prompt_len": 1},
}


def prompt(key: int) -> tuple[int, ...]:
    """One of a fixed choice of prompts, 1 to 40 tokens; some begin alike."""
    length = 1 + (key * 17) % 40
    family = key % 3
    shared = [(family * 71 + 13 * i) % 280 + 10 for i in range(length // 2)]
    return (*shared, *[(key * 53 + 29 * i) % 280 + 10 for i in range(length - len(shared))])


Rows = list[tuple[int, int, int]]
ROWS = st.lists(
    st.tuples(st.integers(0, 23), st.integers(1, 20), st.integers(0, 12)), min_size=1, max_size=8
)


@settings(max_examples=settings().max_examples // 4)
@given(slots=st.sampled_from([1, 2, 4]), device=st.integers(0, 3), rows=ROWS, reuse=st.booleans())
@pytest.mark.parametrize("name", EVERY_SHAPE)
def test_every_row_has_transformers_answer(
    tiny: TinyQpcs, name: str, slots: int, device: int, rows: Rows, reuse: bool
) -> None:
    shape = {**EVERY_SHAPE[name], "batch_size": slots, "ctx_len": CTX_LEN}
    if "prefill_rows" in shape:
        shape["prefill_rows"] = min(shape["prefill_rows"], slots)
    qpc = tiny.qpc(**shape)
    proposer = PromptLookup() if "speculative" in name else None
    options: dict[str, Any] = {"device": device, "prefix_reuse": reuse, "proposer": proposer}
    with engine_on(tiny.sdk, qpc, **options) as engine:
        sequences = rows_of(engine, [prompt(key) for key, _, _ in rows], [n for _, n, _ in rows])
        for late in sequences[::2]:  # rides, and gives its slot to the others
            late.background = True
        done = run(engine, sequences, [step for _, _, step in rows])
    assert outputs(done) == [
        tiny.reference(prompt(key), row.max_new_tokens, ())
        for (key, _, _), row in zip(rows, sequences, strict=True)
    ]


def test_a_draft_qpc_beside_the_main_one_on_a_card_changes_no_token(tiny: TinyQpcs) -> None:
    """Each on some of the card's cores; the draft here is the model itself, so all is accepted."""
    main = tiny.qpc(batch_size=2, num_speculative_tokens=3, num_cores=8)
    draft = tiny.qpc(batch_size=2, num_cores=4)
    session = Session(tiny.sdk, draft, [0])
    try:
        proposer = DraftProgram(session, 2)
        with engine_on(tiny.sdk, main, proposer=proposer) as engine:
            rows = rows_of(engine, [prompt(key) for key in range(5)], [16] * 5)
            done = run(engine, rows)
            work = engine.measurement
    finally:
        session.close()
    assert outputs(done) == [tiny.reference(prompt(key), 16, ()) for key in range(5)]
    assert work.acceptance == 1.0
    assert work.decode_steps < 16 * 5 // 2


def test_four_cards_at_once_give_what_one_gives(tiny: TinyQpcs) -> None:
    qpc = tiny.qpc(batch_size=2)
    found: dict[int, list[list[int]]] = {}

    def answer_on(device: int) -> None:
        with engine_on(tiny.sdk, qpc, device=device) as engine:
            keys = range(device, 24, 4)
            rows = rows_of(engine, [prompt(key) for key in keys], [8] * len(keys))
            found[device] = outputs(run(engine, rows))

    threads = [threading.Thread(target=partial(answer_on, device)) for device in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        joined(thread)
    for device in range(4):
        assert found[device] == [tiny.reference(prompt(key), 8, ()) for key in range(device, 24, 4)]


def test_a_slots_cache_serves_the_next_prompt_that_begins_alike(tiny: TinyQpcs) -> None:
    shared = tuple((7 * i) % 280 + 10 for i in range(30))
    prompts = [(*shared, 20 + key, 30 + key) for key in range(6)]
    work = {}
    for reuse in (True, False):
        with engine_on(tiny.sdk, tiny.qpc(batch_size=2), prefix_reuse=reuse) as engine:
            rows: list[Sequence] = rows_of(engine, prompts, [6] * 6)
            assert outputs(run(engine, rows)) == [tiny.reference(ids, 6, ()) for ids in prompts]
            work[reuse] = engine.measurement
    # 32 tokens are four chunks; two slots compute the shared part, four rows begin behind it.
    assert work[False].prefill_steps == 6 * 4
    assert work[True].prefill_steps == 2 * 4 + 4 * 1
    assert work[True].reused_tokens == 4 * 30
