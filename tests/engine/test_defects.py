"""What the public generation loop gets wrong, each as a test that it must be right here.

The seven were found in QEfficient by running its loop against transformers; each test's name says
which one it is. All run on emulated cards in exact mode, so that transformers' answer is the truth.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from answering import engine_on, outputs, rows_of, run

from qaic_ray.compile.compiler import Variant
from qaic_ray.compile.store import BuildRequest, build
from qaic_ray.contract import Specialization, Specializations
from qaic_ray.metrics import Span, tokens_per_s
from qaic_ray.option_types import Precision
from qaic_ray.options import ExportOptions
from qaic_ray.pipeline.compile_step import open_folder
from qaic_ray.rows import FinishReason

if TYPE_CHECKING:
    from tiny_qpcs import TinyQpcs


def prompt(length: int, first: int = 11) -> list[int]:
    """Some token ids, none of them special."""
    return [(first + 37 * i) % 280 + 10 for i in range(length)]


@pytest.mark.parametrize("lengths", [(5, 20), (3, 9), (5, 7), (12, 14)])
def test_1_rows_of_a_static_batch_that_need_different_numbers_of_chunks(
    tiny: TinyQpcs, lengths: tuple[int, int]
) -> None:
    """There the short row's first token came from a chunk of padding."""
    prompts = [prompt(length) for length in lengths]
    with engine_on(tiny.sdk, tiny.qpc(continuous=False, batch_size=2)) as engine:
        done = run(engine, rows_of(engine, prompts, [6, 6]))
    assert outputs(done) == [tiny.reference(ids, 6) for ids in prompts]


def test_2_a_refilled_slot_leaves_earlier_answers_alone(tiny: TinyQpcs) -> None:
    """There a later prompt's first token was written into the answer of the row before it."""
    prompts = [prompt(4 + i, 20 * i) for i in range(5)]
    with engine_on(tiny.sdk, tiny.qpc(batch_size=2)) as engine:
        done = run(engine, rows_of(engine, prompts, [7, 3, 5, 2, 6]))
    assert outputs(done) == [
        tiny.reference(ids, most) for ids, most in zip(prompts, [7, 3, 5, 2, 6], strict=True)
    ]


@pytest.mark.parametrize("lengths", [(4, 30), (30, 4)])
def test_3_without_a_limit_every_row_fills_its_own_context(
    tiny: TinyQpcs, lengths: tuple[int, int]
) -> None:
    """There the first prompt's limit was everybody's: past the context, or far too short."""
    prompts = [prompt(length) for length in lengths]
    with engine_on(tiny.sdk, tiny.qpc(batch_size=2, ctx_len=48)) as engine:
        done = run(engine, rows_of(engine, prompts, [None, None]))
    most = [48 - length + 1 for length in lengths]
    assert outputs(done) == [
        tiny.reference(ids, limit, ()) for ids, limit in zip(prompts, most, strict=True)
    ]
    assert [item.sequence.finish_reason for item in done] == [FinishReason.LENGTH] * 2


def test_4_fewer_rows_decoded_at_once_than_there_are_slots(tiny: TinyQpcs, tmp_path: Path) -> None:
    """There a batch of four was fed to a decode of two."""
    shapes = Specializations((Specialization(1, 8, 64, 4), Specialization(2, 1, 64, 4)))
    source = open_folder(tiny.exported(ExportOptions(continuous_batching=True))).source
    variant = Variant(source, Precision.FP32, 14, shapes)
    qpc = build(BuildRequest(variant, tiny.sdk, tmp_path)).path
    prompts = [prompt(5 + i, 30 * i) for i in range(5)]
    with engine_on(tiny.sdk, qpc) as engine:
        done = run(engine, rows_of(engine, prompts, [6, 4, 9, 1, 5]))
    assert outputs(done) == [
        tiny.reference(ids, most) for ids, most in zip(prompts, [6, 4, 9, 1, 5], strict=True)
    ]


def test_5_nothing_after_the_stop_token_is_kept_or_counted(tiny: TinyQpcs) -> None:
    """There a row that ended early ran on beside the others, into the text and the tokens/s."""
    prompts = [prompt(5), prompt(6, 90)]
    whole = [tiny.reference(ids, 12, ()) for ids in prompts]
    stop = whole[0][2]
    ends = [ids.index(stop) + 1 if stop in ids else 12 for ids in whole]
    assert ends[0] <= 3 < ends[1]
    with engine_on(tiny.sdk, tiny.qpc(continuous=False, batch_size=2)) as engine:
        done = run(engine, rows_of(engine, prompts, [12, 12], [stop]))
        work = engine.measurement
    assert outputs(done) == [ids[:end] for ids, end in zip(whole, ends, strict=True)]
    assert work.generated_tokens == sum(ends)
    # Each row's first token is of its prefill; no other token is counted as decoded.
    assert work.decode_tokens == sum(ends) - 2


def test_6_the_time_of_several_batches_is_all_of_their_time(tiny: TinyQpcs) -> None:
    """There the time of a run of two batches was the mean of their times."""
    ticks = iter(range(10_000))
    qpc = tiny.qpc(continuous=False, batch_size=2)
    with engine_on(tiny.sdk, qpc, clock=lambda: float(next(ticks))) as engine:
        rows = rows_of(engine, [prompt(4 + i) for i in range(4)], [5] * 4)
        start_s = float(next(ticks))
        run(engine, rows)
        end_s = float(next(ticks))
        work = engine.measurement
    assert work.prefill_steps == 2  # two batches
    # Every step takes one tick, and the engine's steps are nearly all that ticks.
    assert work.prefill_s + work.decode_s == work.prefill_steps + work.decode_steps == 10
    assert tokens_per_s(work.generated_tokens, Span(start_s, end_s)) == 20 / (end_s - start_s)


def test_7_refilling_slot_0_leaves_the_other_slots_alone(tiny: TinyQpcs) -> None:
    """There slot 0, being falsy, stood for every slot when it was refilled."""
    prompts = [prompt(6), prompt(9, 50), prompt(7, 140)]
    with engine_on(tiny.sdk, tiny.qpc(batch_size=2)) as engine:
        rows = rows_of(engine, prompts, [2, 12, 5])
        done = run(engine, rows)
    assert outputs(done) == [
        tiny.reference(ids, most) for ids, most in zip(prompts, [2, 12, 5], strict=True)
    ]
