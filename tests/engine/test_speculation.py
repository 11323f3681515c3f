"""Speculative decoding: whatever is drafted, the text is that of plain decoding."""

from __future__ import annotations

from collections.abc import Sequence as Listed

import pytest
from formula_program import EOS, VOCAB, FormulaProgram, answer, run_all
from hypothesis import given
from hypothesis import strategies as st

from qaic_ray.contract import Specialization, Specializations
from qaic_ray.engine.drafts import DraftProgram, PromptLookup
from qaic_ray.engine.engine import Engine, Proposer
from qaic_ray.engine.step_io import Drafts
from qaic_ray.engine.steps import Sequence
from qaic_ray.errors import UsageError
from qaic_ray.sampling_params import SamplingParams


def speculative(
    slots: int, length: int, ctx_len: int = 48, *, both: bool = False
) -> Specializations:
    """A prefill, a decode of `length` tokens a row, and where `both` one of a single token."""
    entries = [
        Specialization(1, 4, ctx_len, slots, num_logits_to_keep=1),
        Specialization(slots, length, ctx_len, slots, num_logits_to_keep=length),
    ]
    if both:
        entries.append(Specialization(slots, 1, ctx_len, slots, num_logits_to_keep=1))
    return Specializations(tuple(entries))


def plain(slots: int, ctx_len: int = 48) -> Specializations:
    return Specializations.build(batch_size=slots, prompt_len=4, ctx_len=ctx_len, continuous=True)


class Oracle:
    """Drafts what `right` says is coming, with every n-th token wrong."""

    def __init__(self, wrong_every: int, memory: int) -> None:
        self._wrong_every, self._memory = wrong_every, memory

    def propose(self, rows: Listed[Sequence], room: Listed[int], known: Drafts) -> list[list[int]]:
        return [self._draft(row, most) for row, most in zip(rows, room, strict=True)]

    def release(self, sequence: Sequence) -> None:
        pass

    def _draft(self, row: Sequence, most: int) -> list[int]:
        tokens = (*row.prompt_ids, *row.output_ids)
        draft = answer(tokens, max(most, 0), self._memory)
        return [
            (token + 1) % VOCAB if (len(tokens) + i) % self._wrong_every == 0 else token
            for i, token in enumerate(draft)
        ]


PROPOSERS = st.sampled_from(["lookup", "oracle", "draft", "other draft", "none"])


def proposer(name: str, slots: int, memory: int) -> Proposer | None:
    if name == "lookup":
        return PromptLookup()
    if name == "oracle":
        return Oracle(3, memory)
    if name == "none":
        return None
    return DraftProgram(
        FormulaProgram(plain(slots), memory=memory if name == "draft" else 1), slots
    )


@given(
    name=PROPOSERS,
    slots=st.integers(1, 3),
    length=st.integers(2, 5),
    both=st.booleans(),
    emits_tokens=st.booleans(),
    sampled=st.booleans(),
    rows=st.lists(
        st.tuples(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.integers(1, 30)),
        min_size=1,
        max_size=5,
    ),
)
def test_speculation_changes_no_token(
    name: str,
    slots: int,
    length: int,
    both: bool,
    emits_tokens: bool,
    sampled: bool,
    rows: list[tuple[list[int], int]],
) -> None:
    sampled = sampled and not emits_tokens
    params = (
        SamplingParams(temperature=0.6, repetition_penalty=1.2) if sampled else SamplingParams()
    )

    def outputs(engine: Engine) -> dict[int, list[int]]:
        arrivals = [
            (
                key,
                Sequence(
                    key,
                    tuple(prompt),
                    engine.new_token_limit(len(prompt), wanted),
                    frozenset({EOS}),
                    params,
                    seed=key,
                ),
            )
            for key, (prompt, wanted) in enumerate(rows)
        ]
        return {key: f.sequence.output_ids for key, f in run_all(engine, arrivals).items()}

    program = FormulaProgram(
        speculative(slots, length, both=both), emits_tokens=emits_tokens, memory=2
    )
    engine = Engine(program, proposer=proposer(name, slots, 2))
    found = outputs(engine)
    assert found == outputs(Engine(FormulaProgram(plain(slots), memory=2)))
    work = engine.measurement
    assert work.accepted_tokens <= work.drafted_tokens
    assert work.generated_tokens == sum(map(len, found.values()))
    assert work.decode_tokens <= work.generated_tokens


def test_right_drafts_save_steps() -> None:
    """The draft program computes the same formula: every guess is right."""
    prompt = tuple(range(6, 12))
    wanted = len(answer(prompt, 40, 2))
    assert wanted > 12  # no early EOS in the formula's answer
    engine = Engine(
        FormulaProgram(speculative(1, 4), memory=2),
        proposer=DraftProgram(FormulaProgram(plain(1), memory=2), 1),
    )
    run_all(engine, [(0, Sequence(0, prompt, wanted))])
    work = engine.measurement
    assert work.acceptance == 1.0
    # The first decode takes the end of the prompt; then four tokens a step.
    assert work.decode_steps == -(-wanted // 4) or work.decode_steps == 1 + -(-(wanted - 1) // 4)


def test_a_draft_program_computes_only_what_is_new() -> None:
    program = FormulaProgram(plain(2), memory=2)
    draft = DraftProgram(program, 2)
    rows = [Sequence(0, tuple(range(6, 30)), 40), Sequence(1, tuple(range(30, 50)), 40)]
    draft.propose(rows, [3, 3], [(), ()])
    for row in rows:
        row.output_ids += answer(row.prompt_ids, 4, 2)
    program.calls.clear()
    draft.propose(rows, [3, 3], [(), ()])
    # Two tokens each are new (the last guess was never fed), then two more steps; no prefill.
    assert [shape.is_decode for shape, _ in program.calls] == [True] * 4


@pytest.mark.parametrize(
    ("tokens", "guess"),
    [
        ((1, 2, 3, 9, 1, 2, 3), [9, 1, 2, 3]),  # three in a row are known
        ((7, 1, 8, 7, 1), [8, 7, 1, 8]),
        ((1, 2, 1, 3, 1), [3, 1, 3, 1]),  # of two occurrences the later one; it goes on repeating
        ((4, 4), [4, 4, 4, 4]),
        ((1, 2, 3), []),
    ],
)
def test_lookup_guesses_what_followed_before(tokens: tuple[int, ...], guess: list[int]) -> None:
    assert PromptLookup().propose([Sequence(0, tokens, 9)], [4], [()]) == [guess]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(1, 29))
def test_lookup_knows_the_same_whenever_it_is_asked(tokens: list[int], split: int) -> None:
    split = min(split, len(tokens))
    grown, whole = PromptLookup(), PromptLookup()
    row = Sequence(0, tuple(tokens[:split]), 99)
    for token in tokens[split:]:
        grown.propose([row], [2], [()])
        row.output_ids.append(token)
    again = whole.propose([Sequence(1, tuple(tokens), 99)], [5], [()])
    assert grown.propose([row], [5], [()]) == again


def test_a_draft_with_too_few_slots_is_refused() -> None:
    with pytest.raises(UsageError, match="--batch-size 4"):
        DraftProgram(FormulaProgram(plain(2)), 4)


@pytest.mark.parametrize(
    ("tokens", "ahead", "guess"),
    [
        ((1, 2, 3, 4, 5, 6), (2, 3), [4, 5, 6]),  # what is known ahead is looked up too
        ((1, 2, 3, 4, 1), (2,), [3, 4, 1]),
        ((7, 8), (9,), []),
        ((7, 8, 7), (8, 7), [8, 7, 8]),
    ],
)
def test_lookup_goes_on_behind_what_is_known_ahead(
    tokens: tuple[int, ...], ahead: tuple[int, ...], guess: list[int]
) -> None:
    assert PromptLookup().propose([Sequence(0, tokens, 9)], [3], [ahead]) == [guess]
