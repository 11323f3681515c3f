"""The token loop against a program whose every answer follows from a formula."""

from __future__ import annotations

from collections.abc import Sequence as Listed

import pytest
from formula_program import EOS, VOCAB, FormulaProgram, answer, run_all
from hypothesis import given
from hypothesis import strategies as st

from qaic_ray.contract import IoContract, Specialization, Specializations
from qaic_ray.engine.engine import Engine
from qaic_ray.engine.steps import Sequence
from qaic_ray.errors import RowError
from qaic_ray.rows import FinishReason
from qaic_ray.sampling_params import SamplingParams

SLOW = SamplingParams(temperature=1.0)


def shapes(
    slots: int, prompt_len: int | tuple[int, ...] = 4, ctx_len: int = 32, *, continuous: bool = True
) -> Specializations:
    return Specializations.build(
        batch_size=slots, prompt_len=prompt_len, ctx_len=ctx_len, continuous=continuous
    )


def row(
    key: int, prompt: Listed[int], limit: int, params: SamplingParams | None = None
) -> Sequence:
    return Sequence(
        key, tuple(prompt), limit, frozenset({EOS}), params or SamplingParams(), seed=key
    )


Rows = list[tuple[int, list[int], int]]
ROWS = st.lists(
    st.tuples(
        st.integers(0, 12),
        st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=32),
        st.integers(1, 40),
    ),
    min_size=1,
    max_size=8,
)


def check_every_row(engine: Engine, rows: Rows, memory: int | None = None) -> None:
    """Each row has the answer that it would have alone."""
    arrivals = []
    for key, (step, prompt, wanted) in enumerate(rows):
        limit = engine.new_token_limit(len(prompt), wanted)
        arrivals.append((step, row(key, prompt, limit)))
    expected = {s.key: answer(s.prompt_ids, s.max_new_tokens, memory) for _, s in arrivals}
    done = run_all(engine, arrivals)
    assert {key: f.sequence.output_ids for key, f in done.items()} == expected
    for finished in done.values():
        stopped = finished.sequence.output_ids[-1] == EOS
        assert (finished.sequence.finish_reason is FinishReason.STOP) == stopped
        assert finished.ttft_s > 0
        assert finished.decode_s >= 0
    work = engine.measurement
    assert work.rows == len(rows)
    assert work.generated_tokens == sum(map(len, expected.values()))
    assert work.prompt_tokens == sum(len(prompt) for _, prompt, _ in rows)
    assert len(work.ttft) == len(rows)


@given(
    slots=st.integers(1, 4),
    prompt_len=st.sampled_from([1, 2, 8, (2, 8)]),
    continuous=st.booleans(),
    every_token=st.booleans(),
    emits_tokens=st.booleans(),
    prefix_reuse=st.booleans(),
    rows=ROWS,
)
def test_every_row_gets_its_own_answer_whatever_runs_beside_it(
    slots: int,
    prompt_len: int | tuple[int, ...],
    continuous: bool,
    every_token: bool,
    emits_tokens: bool,
    prefix_reuse: bool,
    rows: Rows,
) -> None:
    program = FormulaProgram(
        shapes(slots, prompt_len, continuous=continuous),
        every_token=every_token,
        emits_tokens=emits_tokens,
    )
    check_every_row(Engine(program, prefix_reuse=prefix_reuse), rows)


@given(slots=st.integers(1, 3), prompt_len=st.sampled_from([1, 4]), rows=ROWS)
def test_rows_in_lockstep_get_their_own_answers_too(
    slots: int, prompt_len: int, rows: Rows
) -> None:
    program = FormulaProgram(
        shapes(slots, prompt_len, continuous=False), io_contract=IoContract.CACHE_INDEX
    )
    check_every_row(Engine(program), rows)


@given(rows=ROWS, contexts=st.sets(st.sampled_from([8, 16, 24]), max_size=3))
def test_every_step_computes_with_no_more_context_than_it_needs(
    rows: Rows, contexts: set[int]
) -> None:
    prefill = Specialization(1, 4, 32, 2, comp_ctx_lengths=28)
    decodes = [Specialization(2, 1, 32, 2, comp_ctx_lengths=n) for n in sorted({*contexts, 32})]
    program = FormulaProgram(Specializations((prefill, *decodes)))
    check_every_row(Engine(program), rows)
    if max(len(prompt) + limit for _, prompt, limit in rows) <= min([*contexts, 32]):
        assert {shape.reach for shape, _ in program.calls} <= {28, min([*contexts, 32])}


def test_more_slots_than_rows_serve_as_memory() -> None:
    """A decode of 2 rows over 4 slots, as QEfficient's kv_cache_batch_size makes."""
    entries = (Specialization(1, 4, 32, 4), Specialization(2, 1, 32, 4))
    engine = Engine(FormulaProgram(Specializations(entries)))
    prompts = [[7, 8, 9, 10, 11, key] for key in (1, 2, 3, 4)]
    check_every_row(engine, [(0, prompt, 6) for prompt in prompts])
    assert engine.measurement.reused_tokens == 5 + 5


def test_decode_tokens_are_those_of_decode_steps() -> None:
    ticks = iter(range(100))
    engine = Engine(FormulaProgram(shapes(2)), clock=lambda: float(next(ticks)))
    prompts = [[1, 2, 3], [4, 6, 8]]
    run_all(engine, [(0, row(i, prompt, 3)) for i, prompt in enumerate(prompts)])
    work = engine.measurement
    # Each first token comes from its prefill; the other two from decode steps shared by both.
    assert (work.prefill_steps, work.decode_steps, work.decode_tokens) == (2, 2, 4)
    assert (work.prefill_s, work.decode_s) == (2.0, 2.0)
    assert work.decode_tokens_per_s == 2.0
    assert work.occupancy == 1.0


class SteppingClock:
    """Every execution takes as long as it is told; nothing else takes any time."""

    def __init__(self, program: FormulaProgram, prefill_s: float, decode_s: float) -> None:
        self.now_s = 0.0
        run = program.run

        def timed(shape, inputs, meanwhile=None):  # type: ignore[no-untyped-def]
            self.now_s += decode_s if shape.is_decode else prefill_s
            return run(shape, inputs, meanwhile)

        program.run = timed  # type: ignore[method-assign]

    def __call__(self) -> float:
        return self.now_s


@pytest.mark.parametrize(("max_stall_s", "in_a_row"), [(0.0, 1), (0.55, 5), (60.0, 6)])
def test_running_rows_wait_no_longer_than_their_budget(max_stall_s: float, in_a_row: int) -> None:
    """A long prompt of six chunks arrives beside a row that decodes."""
    program = FormulaProgram(shapes(2, ctx_len=64))
    engine = Engine(program, clock=SteppingClock(program, 0.1, 0.01), max_stall_s=max_stall_s)
    engine.add(Sequence(0, (1, 2, 3, 4), 40))
    engine.step()
    engine.add(Sequence(1, tuple(range(6, 30)), 1))
    while engine.busy:
        engine.step()
    kinds = "".join("d" if shape.is_decode else "p" for shape, _ in program.calls[1:])
    assert max(map(len, kinds.split("d"))) == in_a_row


class KeepsUntil:
    """A reader that ends its row behind a token, as a stop string does."""

    def __init__(self, token: int) -> None:
        self.token = token
        self.seen: list[int] = []

    def read(self, token_ids: Listed[int]) -> int | None:
        assert self.token not in self.seen, "read after the end"
        self.seen.extend(token_ids)
        return self.seen.index(self.token) + 1 if self.token in self.seen else None


@given(rows=ROWS, at=st.integers(0, 39), lockstep=st.booleans())
def test_a_reader_ends_its_row_with_the_token_it_says(rows: Rows, at: int, lockstep: bool) -> None:
    kind = IoContract.CACHE_INDEX if lockstep else IoContract.POSITION_IDS
    program = FormulaProgram(shapes(3, continuous=not lockstep), io_contract=kind)
    engine = Engine(program)
    arrivals, readers, expected = [], {}, {}
    for key, (step, prompt, wanted) in enumerate(rows):
        sequence = row(key, prompt, engine.new_token_limit(len(prompt), wanted))
        whole = answer(sequence.prompt_ids, sequence.max_new_tokens)
        token = whole[min(at, len(whole) - 1)]
        readers[key] = KeepsUntil(token)
        expected[key] = whole[: whole.index(token) + 1]
        arrivals.append((step, sequence))
    done = run_all(engine, arrivals, readers)
    assert {key: f.sequence.output_ids for key, f in done.items()} == expected
    assert all(f.sequence.finish_reason is FinishReason.STOP for f in done.values())
    work = engine.measurement
    assert work.generated_tokens == sum(map(len, expected.values()))
    assert work.decode_tokens <= work.generated_tokens


@given(rows=ROWS, slots=st.integers(1, 4), continuous=st.booleans(), data=st.data())
def test_sampled_text_follows_from_seed_and_prompt_alone(
    rows: Rows, slots: int, continuous: bool, data: st.DataObject
) -> None:
    choices = (SLOW, SamplingParams(), SamplingParams(temperature=0.7, top_k=9, top_p=0.9))
    params = [data.draw(st.sampled_from(choices)) for _ in rows]

    def outputs(engine: Engine, chosen: list[int]) -> dict[int, list[int]]:
        arrivals = []
        for key in chosen:
            step, prompt, wanted = rows[key]
            limit = engine.new_token_limit(len(prompt), wanted)
            arrivals.append((step, row(key, prompt, limit, params[key])))
        return {key: f.sequence.output_ids for key, f in run_all(engine, arrivals).items()}

    together = outputs(
        Engine(FormulaProgram(shapes(slots, continuous=continuous))), list(range(len(rows)))
    )
    for key in range(len(rows)):
        alone = outputs(Engine(FormulaProgram(shapes(1))), [key])
        assert together[key] == alone[key]


def test_logprobs_come_with_every_kept_token() -> None:
    engine = Engine(FormulaProgram(shapes(2)))
    sequence = row(0, [1, 2, 3], 5, SamplingParams(temperature=1.0, logprobs=3))
    run_all(engine, [(0, sequence), (1, row(1, [4, 6], 7))])
    assert [item.token_id for item in sequence.logprobs] == sequence.output_ids
    assert all(len(item.top) == 3 for item in sequence.logprobs)


@pytest.mark.parametrize("params", [SLOW, SamplingParams(logprobs=1), SamplingParams(min_tokens=2)])
def test_a_program_of_token_ids_cannot_sample(params: SamplingParams) -> None:
    engine = Engine(FormulaProgram(shapes(1), emits_tokens=True))
    engine.refuse_unanswerable(SamplingParams())
    with pytest.raises(RowError, match="without it"):
        engine.refuse_unanswerable(params)
