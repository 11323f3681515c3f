"""Logprobs of prompts: the formula's, however a prompt is computed; and transformers'."""

from __future__ import annotations

from collections.abc import Sequence as Listed
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from answering import engine_on, run
from formula_program import VOCAB, FormulaProgram, logits_of, run_all
from hypothesis import given
from hypothesis import strategies as st

from qaic_ray.contract import IoContract, Specialization, Specializations
from qaic_ray.engine.drafts import PromptLookup
from qaic_ray.engine.engine import Engine
from qaic_ray.engine.steps import Sequence
from qaic_ray.errors import RowError
from qaic_ray.model.checkpoint import load_torch_model
from qaic_ray.sampling_params import SamplingParams, TokenLogprob

if TYPE_CHECKING:
    from tiny_qpcs import TinyQpcs

CTX_LEN = 40
TOP = 3
TOKENS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20)


def scored(key: int, prompt: Listed[int], limit: int = 4, **asked: Any) -> Sequence:
    params = SamplingParams(prompt_logprobs=TOP, **asked)
    return Sequence(key, tuple(prompt), limit, params=params, seed=key, prompt_logprobs=[])


def log_softmax(logits: Any) -> Any:
    wide = np.asarray(logits, np.float64)
    wide = wide - wide.max()
    return wide - np.log(np.exp(wide).sum())


def check(
    found: Listed[TokenLogprob] | None, prompt: Listed[int], wanted: Any, within: float
) -> None:
    """Compare with log-probabilities [tokens, vocab]: row i is of token i + 1."""
    assert found is not None
    assert [token.token_id for token in found] == list(prompt[1:])
    for token, truth in zip(found, wanted, strict=True):
        assert token.logprob == pytest.approx(truth[token.token_id], abs=within)
        assert len(token.top) == TOP
        likeliest = np.sort(truth)[::-1][:TOP]
        assert [logprob for _, logprob in token.top] == pytest.approx(likeliest, abs=within)
        for token_id, logprob in token.top:
            assert logprob == pytest.approx(truth[token_id], abs=within)


def check_formula(row: Sequence) -> None:
    prompt = row.prompt_ids
    wanted = [log_softmax(logits_of(prompt[:end])) for end in range(1, len(prompt))]
    check(row.prompt_logprobs, prompt, wanted, 1e-5)


WAYS: dict[str, tuple[Specializations, dict[str, Any]]] = {
    "continuous": (
        Specializations.build(batch_size=3, prompt_len=4, ctx_len=CTX_LEN, continuous=True),
        {"every_token": True},
    ),
    "shared prefill": (
        Specializations.build(
            batch_size=3, prompt_len=[4, 8], ctx_len=CTX_LEN, continuous=True
        ).with_prefill_rows(2),
        {"every_token": True},
    ),
    "static": (
        Specializations.build(batch_size=2, prompt_len=4, ctx_len=CTX_LEN, continuous=False),
        {"every_token": True},
    ),
    "decode only": (
        Specializations.build(batch_size=2, prompt_len=1, ctx_len=CTX_LEN, continuous=True),
        {},
    ),
    "decode only, several tokens": (
        Specializations((
            Specialization(2, 3, CTX_LEN, 2, num_logits_to_keep=3),
            Specialization(2, 1, CTX_LEN, 2, num_logits_to_keep=1),
        )),
        {},
    ),
    "lockstep": (
        Specializations.build(batch_size=3, prompt_len=4, ctx_len=CTX_LEN, continuous=False),
        {"every_token": True, "io_contract": IoContract.CACHE_INDEX},
    ),
}  # fmt: skip


@given(
    way=st.sampled_from(sorted(WAYS)),
    prompts=st.lists(TOKENS, min_size=1, max_size=5),
    asks=st.lists(st.booleans(), min_size=5, max_size=5),
    arrivals=st.lists(st.integers(0, 5), min_size=5, max_size=5),
)
def test_every_token_of_a_prompt_has_the_formulas_logprob(
    way: str, prompts: list[list[int]], asks: list[bool], arrivals: list[int]
) -> None:
    specializations, options = WAYS[way]
    rows = [
        scored(key, prompt) if asks[key] else Sequence(key, tuple(prompt), 4)
        for key, prompt in enumerate(prompts)
    ]
    engine = Engine(FormulaProgram(specializations, **options), proposer=PromptLookup())
    done = run_all(engine, list(zip(arrivals, rows, strict=False)))
    for key, row in enumerate(rows):
        alone = Sequence(key, tuple(prompts[key]), 4)
        run_all(Engine(FormulaProgram(specializations, **options)), [(0, alone)])
        assert done[key].sequence.output_ids == alone.output_ids
        if asks[key]:
            check_formula(row)
        else:
            assert row.prompt_logprobs is None


def test_a_scored_row_reuses_nothing_and_later_rows_reuse_it() -> None:
    specializations, options = WAYS["continuous"]
    engine = Engine(FormulaProgram(specializations, **options))
    prompt = list(range(1, 14))
    rows = [Sequence(0, tuple(prompt), 2), scored(1, prompt), Sequence(2, tuple(prompt), 2)]
    for row in rows:
        run_all(engine, [(0, row)])
    assert [row.num_reused for row in rows] == [0, 0, 12]
    check_formula(rows[1])
    # Nor does it take the slot whose cache the next row wants.
    again = [scored(3, [50, 51, 52]), Sequence(4, tuple(prompt), 2)]
    for row in again:
        run_all(engine, [(0, row)])
    assert again[1].num_reused == 12


def test_a_program_that_keeps_the_last_logits_refuses_with_what_to_do() -> None:
    specializations, options = WAYS["continuous"]
    asked = SamplingParams(prompt_logprobs=0)
    Engine(FormulaProgram(specializations, **options)).refuse_unanswerable(asked)
    for program in (
        FormulaProgram(specializations),
        FormulaProgram(WAYS["decode only"][0], emits_tokens=True),
    ):
        with pytest.raises(RowError, match=r"`qaic-ray export MODEL --logits all`"):
            Engine(program).refuse_unanswerable(asked)


# -- on an emulated card, against transformers

PROMPTS = ([5, 9, 11], list(range(20, 43)), [7] * 8 + [100, 3, 250], [299])
SHAPES: dict[str, dict[str, Any]] = {
    "continuous": {"logits": "all"},
    "shared prefill": {"logits": "all", "prefill_rows": 2, "prompt_len": [8, 16]},
    "static": {"logits": "all", "continuous": False},
    "cache-index": {"logits": "all", "io": IoContract.CACHE_INDEX},
    "decode only": {"prompt_len": 1},
    "short contexts": {"logits": "all", "comp_ctx_lengths": (16, 48)},
}


@pytest.fixture(scope="module")
def truths(tiny: TinyQpcs) -> list[Any]:
    import torch

    model = load_torch_model(tiny.checkpoint)
    with torch.inference_mode():
        whole = [model(torch.tensor([prompt])).logits[0].numpy() for prompt in PROMPTS]
    return [[log_softmax(row) for row in logits[:-1]] for logits in whole]


@pytest.mark.parametrize("way", SHAPES)
def test_logprobs_of_prompts_are_those_of_transformers(
    tiny: TinyQpcs, truths: list[Any], way: str
) -> None:
    with engine_on(tiny.sdk, tiny.qpc(**SHAPES[way])) as engine:
        engine.refuse_unanswerable(SamplingParams(prompt_logprobs=TOP))
        rows = [scored(key, prompt, 3) for key, prompt in enumerate(PROMPTS)]
        drawn = Sequence(9, tuple(PROMPTS[1]), 3, params=SamplingParams(temperature=1.0), seed=4)
        run(engine, [*rows, drawn], [0, 0, 0, 2, 1])
    for row, truth in zip(rows, truths, strict=True):
        check(row.prompt_logprobs, row.prompt_ids, truth, 1e-3)
        assert row.output_ids == tiny.reference(row.prompt_ids, 3, ())


def test_a_qpc_of_last_logits_says_so(tiny: TinyQpcs) -> None:
    with (
        engine_on(tiny.sdk, tiny.qpc()) as engine,
        pytest.raises(RowError, match="prompt_logprobs needs the logits of all tokens"),
    ):
        engine.refuse_unanswerable(SamplingParams(prompt_logprobs=1))
