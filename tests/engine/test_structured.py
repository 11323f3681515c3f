"""Answers that follow a grammar: every one matches it, and nothing beside it is touched.

The truths are `re`, jsonschema and a walk of the same formula with `re`'s own prefixes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence as Listed
from typing import Any

import jsonschema
import pytest
from byte_tokens import byte_tokenizer
from formula_program import FormulaProgram, logits_of, run_all
from hypothesis import example, given
from hypothesis import strategies as st

from qaic_ray.contract import IoContract, Specialization, Specializations
from qaic_ray.engine.drafts import PromptLookup
from qaic_ray.engine.engine import Engine, Finished
from qaic_ray.engine.limits.grammars import GrammarGuide, Grammars
from qaic_ray.engine.steps import Sequence
from qaic_ray.errors import RowError
from qaic_ray.rows import FinishReason
from qaic_ray.sampling_params import SamplingParams
from qaic_ray.sampling_params.structured_outputs import StructuredOutputs

TOKENIZER = byte_tokenizer("<eos>", "<other>")
EOS, OTHER, VOCAB = 256, 257, 300
GRAMMARS = Grammars(TOKENIZER.to_str, [EOS], VOCAB)
CTX_LEN = 96


def shapes(slots: int, decode_len: int = 1) -> Specializations:
    entries = [
        Specialization(1, 4, CTX_LEN, slots, num_logits_to_keep=1),
        Specialization(slots, decode_len, CTX_LEN, slots, num_logits_to_keep=decode_len),
    ]
    return Specializations(tuple(entries))


def row(
    key: int,
    form: dict[str, Any] | None,
    *,
    prompt: Listed[int] = (3, 1, 4, 1, 5),
    limit: int = 40,
    stop_ids: Listed[int] = (EOS,),
    bad_ids: tuple[tuple[int, ...], ...] = (),
    **asked: Any,
) -> Sequence:
    structured = StructuredOutputs.read(form)
    params = SamplingParams(structured_outputs=structured, **asked)
    return Sequence(
        key,
        tuple(prompt),
        limit,
        frozenset(stop_ids),
        params,
        seed=11 + key,
        guide=None if structured is None else GRAMMARS.guide(structured),
        bad_ids=bad_ids,
    )


def answered(
    rows: Listed[Sequence],
    *,
    slots: int = 3,
    decode_len: int = 1,
    arrivals: Listed[int] | None = None,
    **options: Any,
) -> dict[int, Finished]:
    program = FormulaProgram(shapes(slots, decode_len), vocab=VOCAB)
    engine = Engine(program, **options)
    return run_all(engine, list(zip(arrivals or [0] * len(rows), rows, strict=True)))


def text(tokens: Listed[int]) -> str:
    return TOKENIZER.decode([token for token in tokens if token < EOS])


def body(done: Finished) -> str:
    """The text of an answer, which is whole where the row was not cut."""
    output = list(done.sequence.output_ids)
    if output and output[-1] in done.sequence.stop_ids:
        output.pop()
    assert all(token < EOS for token in output)
    return TOKENIZER.decode(output)


REGEXES = [
    r"[a-c]{2,5}x?", r"(yes|no|maybe)", r"[0-9]{3}-[0-9]{4}", r"a*b", r"", r"(ab)*", r"é+😀",
    r"[0-9]+(\.[0-9]{1,2})?", r"(a|b){3}[^a]", r"x{20}",
]  # fmt: skip
SCHEMAS: list[dict[str, Any]] = [
    {"type": "integer", "minimum": 0, "maximum": 120},
    {"enum": ["red", "green", 3, None]},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 5},
            "age": {"type": "integer", "minimum": 0, "maximum": 99},
            "tags": {"type": "array", "items": {"enum": ["x", "yy"]}, "maxItems": 2},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    {"anyOf": [{"type": "null"}, {"type": "string", "pattern": "^[a-z]{1,3}$"}]},
]
SAMPLING = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 1.0, 5.0]),
        "top_k": st.sampled_from([0, 3]),
        "top_p": st.sampled_from([1.0, 0.8]),
        "repetition_penalty": st.sampled_from([1.0, 1.3]),
        "min_tokens": st.sampled_from([0, 0, 3]),
    }
)
PROMPTS = st.lists(st.integers(0, 255), min_size=1, max_size=9)
CHOICES = st.lists(
    st.text(st.sampled_from('ab ü"\\\n😀'), min_size=1, max_size=4), min_size=1, max_size=4
)


@given(
    pattern=st.sampled_from(REGEXES), asked=SAMPLING, prompt=PROMPTS, decode_len=st.integers(1, 4)
)
def test_every_answer_matches_its_regex(
    pattern: str, asked: dict[str, Any], prompt: list[int], decode_len: int
) -> None:
    one = row(0, {"regex": pattern}, prompt=prompt, **asked)
    done = answered([one], decode_len=decode_len, proposer=PromptLookup())[0]
    if done.error is not None:  # nothing but the end may come, and min_tokens forbids it
        assert asked["min_tokens"] > len(done.sequence.output_ids)
        assert "No token may come next" in str(done.error)
    elif one.finish_reason is FinishReason.STOP:
        assert re.fullmatch(pattern, body(done))
    else:
        assert len(one.output_ids) == 40


@given(choice=CHOICES, asked=SAMPLING, prompt=PROMPTS)
@example(choice=["a", "ab", "abb"], asked={}, prompt=[7])
def test_every_answer_is_one_of_its_choices(
    choice: list[str], asked: dict[str, Any], prompt: list[int]
) -> None:
    asked = {**asked, "min_tokens": 0}
    done = answered([row(0, {"choice": choice}, prompt=prompt, **asked)])[0]
    assert done.error is None
    assert done.sequence.finish_reason is FinishReason.STOP
    assert body(done) in choice


@given(
    number=st.integers(0, len(SCHEMAS) - 1),
    asked=SAMPLING,
    prompt=PROMPTS,
    decode_len=st.integers(1, 4),
    drafts=st.booleans(),
)
def test_every_answer_is_of_its_schema(
    number: int, asked: dict[str, Any], prompt: list[int], decode_len: int, *, drafts: bool
) -> None:
    schema = SCHEMAS[number]
    form = {"json": schema, "whitespace_pattern": " ?"}
    asked = {**asked, "min_tokens": 0}
    one = row(0, form, prompt=prompt, limit=80, **asked)
    proposer = PromptLookup() if drafts else None
    done = answered([one], decode_len=decode_len, proposer=proposer)[0]
    assert done.error is None
    if one.finish_reason is FinishReason.STOP:
        jsonschema.validate(json.loads(body(done)), schema)
    else:
        assert len(one.output_ids) == 80


def test_a_greedy_row_takes_the_likeliest_token_that_its_pattern_allows() -> None:
    # Two letters that the formula chooses freely: the truth is a walk of the formula itself.
    done = answered([row(0, {"regex": "[a-z]{12}"})])[0]
    ids = [3, 1, 4, 1, 5]
    letters = [TOKENIZER.token_to_id(letter) for letter in "abcdefghijklmnopqrstuvwxyz"]
    for _ in range(12):
        logits = logits_of(tuple(ids), VOCAB)
        ids.append(max(letters, key=lambda token: logits[token]))
    assert done.sequence.output_ids == ids[5:]
    assert done.sequence.finish_reason is FinishReason.STOP


@given(
    forms=st.lists(
        st.sampled_from(
            [
                None,
                None,
                {"regex": "[a-f]{3,9}"},
                {"choice": ["one", "two", "three"]},
                {"json": SCHEMAS[3], "disable_any_whitespace": True},
            ]
        ),
        min_size=2,
        max_size=5,
    ),
    asked=st.lists(SAMPLING, min_size=5, max_size=5),
    arrivals=st.lists(st.integers(0, 6), min_size=5, max_size=5),
    slots=st.integers(1, 4),
    decode_len=st.integers(1, 3),
)
def test_a_row_has_the_same_tokens_alone_and_beside_others(
    forms: list[Any],
    asked: list[dict[str, Any]],
    arrivals: list[int],
    slots: int,
    decode_len: int,
) -> None:
    def made(key: int) -> Sequence:
        fields = {**asked[key], "min_tokens": 0}
        return row(key, forms[key], prompt=[key, 7, key], limit=24, **fields)

    together = answered(
        [made(key) for key in range(len(forms))],
        slots=slots,
        decode_len=decode_len,
        arrivals=arrivals[: len(forms)],
        proposer=PromptLookup(),
    )
    for key in range(len(forms)):
        alone = answered([made(key)])[key].sequence
        assert together[key].sequence.output_ids == alone.output_ids
        assert together[key].sequence.finish_reason == alone.finish_reason


def test_in_lockstep_a_grammar_ends_its_row_and_the_others_go_on() -> None:
    specializations = Specializations.build(
        batch_size=2, prompt_len=4, ctx_len=32, continuous=False
    )
    program = FormulaProgram(specializations, io_contract=IoContract.CACHE_INDEX, vocab=VOCAB)
    rows = [row(0, {"choice": ["abc"]}, limit=9), row(1, None, limit=9, stop_ids=())]
    done = run_all(Engine(program), [(0, one) for one in rows])
    assert body(done[0]) == "abc"
    assert done[0].sequence.finish_reason is FinishReason.STOP
    assert len(done[1].sequence.output_ids) == 9


@given(
    form=st.sampled_from(
        [
            {"regex": "abcdef[xyz]{2}(ghi)?"},
            {"choice": ["abcdef", "abcxyz"]},
            {"json": SCHEMAS[3], "disable_any_whitespace": True},
        ]
    ),
    asked=SAMPLING,
    prompt=PROMPTS,
    decode_len=st.integers(2, 5),
)
def test_forced_tokens_are_drafts_that_are_never_wrong(
    form: dict[str, Any], asked: dict[str, Any], prompt: list[int], decode_len: int
) -> None:
    class Nothing(PromptLookup):
        def propose(self, rows: Any, room: Any, known: Any) -> list[list[int]]:
            return [[] for _ in rows]

    def made() -> Sequence:
        return row(0, form, prompt=prompt, **{**asked, "min_tokens": 0})

    program = FormulaProgram(shapes(1, decode_len), vocab=VOCAB)
    engine = Engine(program, proposer=Nothing())
    speculated = run_all(engine, [(0, made())])[0].sequence
    # A row that ends with a drafted token has none chosen beyond its drafts.
    work = engine.measurement
    assert work.accepted_tokens in (work.drafted_tokens, work.drafted_tokens - 1)
    plain = FormulaProgram(shapes(1, decode_len), vocab=VOCAB)
    alone = run_all(Engine(plain), [(0, made())])[0].sequence
    assert speculated.output_ids == alone.output_ids
    assert len(program.calls) < len(plain.calls)


def test_the_end_of_the_grammar_takes_no_step_of_its_own() -> None:
    one = row(0, {"choice": ["ab"]}, ignore_eos=True, stop_ids=())
    program = FormulaProgram(shapes(1), vocab=VOCAB)
    run_all(Engine(program), [(0, one)])
    assert text(one.output_ids) == "ab"
    assert one.finish_reason is FinishReason.STOP
    assert len(program.calls) == 3  # two of the prompt, and one


def test_a_stop_token_is_for_the_end_only() -> None:
    # A letter of the pattern is a stop token: it cannot come amid the answer.
    a, b = (TOKENIZER.token_to_id(letter) for letter in "ab")
    one = row(0, {"regex": "[ab]{4}"}, stop_ids=(b, EOS), stop_token_ids=(b,))
    done = answered([one])[0]
    assert one.output_ids == [a] * 4
    assert body(done) == "aaaa"
    longer = row(0, {"regex": "a+"}, stop_ids=(OTHER,), limit=60, temperature=3.0)
    answered([longer])
    if longer.finish_reason is FinishReason.STOP:
        assert longer.output_ids[-1] == OTHER
    assert set(longer.output_ids[:-1]) == {a}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_min_tokens_keeps_an_answer_from_ending_where_it_could(temperature: float) -> None:
    one = row(0, {"regex": "[a-z]*"}, min_tokens=20, limit=30, temperature=temperature)
    done = answered([one])[0]
    assert done.error is None
    assert len(body(done)) >= 20


def test_what_leaves_nothing_to_say_is_the_rows_error_and_nobody_elses() -> None:
    only = [TOKENIZER.token_to_id(letter) for letter in "xyz"]
    rows = [
        row(0, {"regex": "[a-c]+"}, allowed_token_ids=tuple(only)),
        row(1, {"regex": "[a-c]{3}"}),
        row(2, None, limit=5),
    ]
    done = answered(rows)
    assert "No token may come next in this answer" in str(done[0].error)
    assert rows[0].output_ids == []
    assert re.fullmatch("[a-c]{3}", body(done[1]))
    alone = answered([row(2, None, limit=5)])[2]
    assert rows[2].output_ids == alone.sequence.output_ids


def test_logprobs_are_those_of_the_model() -> None:
    one = row(0, {"choice": ["zz"]}, logprobs=2)
    answered([one])
    import numpy as np

    ids = [3, 1, 4, 1, 5]
    for token, logprob in zip(one.output_ids, one.logprobs, strict=True):
        logits = logits_of(tuple(ids), VOCAB).astype(np.float64)
        log_softmax = logits - np.log(np.exp(logits).sum())
        assert logprob.token_id == token
        assert logprob.logprob == pytest.approx(log_softmax[token], abs=1e-5)
        assert [i for i, _ in logprob.top] == np.argsort(-logits)[:2].tolist()
        ids.append(token)


# -- limits without a grammar


@given(asked=SAMPLING, only=st.sets(st.integers(0, VOCAB - 1), min_size=1, max_size=200))
def test_no_other_token_than_the_allowed_ones_comes(asked: dict[str, Any], only: set[int]) -> None:
    one = row(0, None, limit=12, allowed_token_ids=tuple(only), **asked)
    done = answered([one, row(1, None, limit=12)])
    if done[0].error is None:
        assert set(one.output_ids) <= only
        assert one.finish_reason is FinishReason.LENGTH or one.output_ids[-1] == EOS
    else:
        assert only == {EOS}


def test_biases_move_logits_as_the_formula_says() -> None:
    import numpy as np

    biases = ((5, 4.0), (17, -100.0), (99, 6.5), (250, 2.0))
    one = row(0, None, limit=15, logit_bias=biases, stop_ids=())
    answered([one, row(1, None, limit=15)])
    ids = [3, 1, 4, 1, 5]
    for token in one.output_ids:
        logits = logits_of(tuple(ids), VOCAB).copy()
        for moved, bias in biases:
            logits[moved] += np.float32(bias)
        assert token == int(logits.argmax())
        ids.append(token)
    everything = row(0, None, limit=9, logit_bias=((42, 100.0),), stop_ids=(), temperature=1.0)
    answered([everything])
    assert everything.output_ids == [42] * 9


def test_bad_words_never_come() -> None:
    free = row(0, None, limit=16, stop_ids=())
    answered([free])
    output = free.output_ids
    bad = ((output[0],), tuple(output[4:6]), tuple(output[9:12]))
    one = row(0, None, limit=16, stop_ids=(), bad_words=("a",), bad_ids=bad)
    answered([one])
    for word in bad:
        runs = [tuple(one.output_ids[i : i + len(word)]) for i in range(16)]
        assert word not in runs
    # Where no bad word is near its end, the answer is the free one's.
    late = row(0, None, limit=16, stop_ids=(), bad_words=("a",), bad_ids=(tuple(output[9:12]),))
    answered([late])
    assert late.output_ids[:11] == output[:11]
    assert late.output_ids[11] != output[11]


@given(decode_len=st.integers(2, 4), prompt=PROMPTS, temperature=st.sampled_from([0.0, 1.0]))
def test_limits_hold_for_drafted_tokens_too(
    decode_len: int, prompt: list[int], temperature: float
) -> None:
    def made() -> Sequence:
        return row(
            *(0, None),
            prompt=prompt,
            limit=20,
            temperature=temperature,
            logit_bias=((7, 5.0),),
            bad_words=("a",),
            bad_ids=((7, 7), (9,)),
            allowed_token_ids=tuple(range(40)),
        )

    checked, plain = made(), made()
    answered([checked], decode_len=decode_len, proposer=PromptLookup())
    answered([plain])
    assert checked.output_ids == plain.output_ids


# -- grammars that cannot be followed


class FailingGuide(GrammarGuide):
    """A grammar that becomes too complex behind some tokens, as llguidance's limits have it."""

    def __init__(self, made: GrammarGuide, method: str, num_tokens: int) -> None:
        vars(self).update(vars(made))
        self._method, self._left = method, num_tokens

    def _fail_in(self, method: str) -> None:
        if method == self._method and self._left <= 0:
            raise RowError("structured_outputs cannot be followed: ParserTooComplex.")

    def allowed(self) -> bytes:
        self._fail_in("allowed")
        return super().allowed()

    def take(self, token: int) -> None:
        self._fail_in("take")
        self._left -= 1
        super().take(token)


@pytest.mark.parametrize("method", ["allowed", "take"])
@pytest.mark.parametrize("decode_len", [1, 3])
def test_a_grammar_that_becomes_too_complex_ends_its_row_alone(
    method: str, decode_len: int
) -> None:
    def made() -> list[Sequence]:
        free = row(2, None, limit=9, stop_ids=(), temperature=1.0)
        return [row(0, {"regex": "[a-f]{9}"}), row(1, {"regex": "[a-f]{9}"}), free]

    rows = made()
    rows[0].guide = FailingGuide(GRAMMARS.guide(StructuredOutputs(regex="[a-f]{9}")), method, 3)
    done = answered(rows, decode_len=decode_len, proposer=PromptLookup())
    assert str(done[0].error) == "structured_outputs cannot be followed: ParserTooComplex."
    undisturbed = answered(made(), decode_len=decode_len)
    for key in (1, 2):
        assert done[key].error is None
        assert rows[key].output_ids == undisturbed[key].sequence.output_ids


def test_a_tokenizer_that_is_none_is_said() -> None:
    grammars = Grammars(lambda: '{"model": {}}', [0], 10)
    with pytest.raises(RowError, match="llguidance cannot read its tokenizer"):
        grammars.guide(StructuredOutputs(regex="a"))


def test_logits_may_be_wider_than_the_vocabulary_and_narrower() -> None:
    for num_tokens in (None, 258, 300, 4000):
        guide = Grammars(TOKENIZER.to_str, [EOS], num_tokens).guide(StructuredOutputs(regex="a"))
        assert guide.num_tokens == (num_tokens or 258)
        assert guide.forced() == [TOKENIZER.token_to_id("a")]


def test_a_grammar_is_read_once_and_its_rows_are_apart() -> None:
    first = GRAMMARS.guide(StructuredOutputs(regex="ab|cd"))
    second = GRAMMARS.guide(StructuredOutputs(regex="ab|cd"))
    first.take(TOKENIZER.token_to_id("a"))
    assert first.forced() == [TOKENIZER.token_to_id("b")]
    assert second.try_take(TOKENIZER.token_to_id("c"))
    assert not second.try_take(TOKENIZER.token_to_id("b"))
    assert second.forced() == [TOKENIZER.token_to_id("d")]
    with pytest.raises(RowError, match="structured_outputs cannot be followed"):
        second.take(TOKENIZER.token_to_id("x"))
