"""Token selection against a float64 reference that does everything the long way."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qaic_ray.engine.categorical import NUMBERS, CategoricalSampler, Rules
from qaic_ray.engine.sampler import Selector, greedy
from qaic_ray.sampling_params import SamplingParams

Array = npt.NDArray[Any]

SMALL, LARGE = 61, 12_301  # one without blocks, one whose last block is not full


@dataclass
class Asked:
    """A sequence as the selector sees it."""

    params: SamplingParams
    seed: int = 0
    prompt_ids: tuple[int, ...] = ()
    output_ids: list[int] = field(default_factory=list)
    stop_ids: frozenset[int] = frozenset()


def logits_of(kind: str, vocab: int, rows: int = 1, seed: int = 0) -> Array:
    rng = np.random.default_rng(seed)
    flat = rng.normal(0, 1, (rows, vocab))
    if kind == "peaked":  # a language model's: a bulk far below a few likely tokens
        few = max(3, vocab // 100)
        flat = flat * 3 - 18
        flat[:, rng.permutation(vocab)[:few]] = -rng.exponential(4, (rows, few))
    elif kind == "equal":
        flat = np.zeros((rows, vocab))
    elif kind == "tied":
        flat = np.round(flat)
    return flat.astype(np.float32)


def probabilities(
    logits: Array,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Array:
    """What a row's tokens are drawn with: min_p, top_k, top_p, in this order."""
    exact = logits.astype(np.float64)
    weights = np.exp((exact - exact.max()) / temperature)
    kept = weights >= min_p
    if 0 < top_k < exact.size:
        kept &= exact >= np.sort(exact)[-top_k]
    order = [token for token in np.lexsort((np.arange(exact.size), -exact)) if kept[token]]
    ends = np.cumsum(weights[order])
    num = min(int(np.searchsorted(ends, top_p * ends[-1])) + 1, len(order))
    allowed = np.zeros(exact.size)
    allowed[order[:num]] = weights[order[:num]]
    return allowed / allowed.sum()


def check_draws(tokens: list[int], expected: Array) -> None:
    """No token that is not allowed, and frequencies within chi-square's four sigma."""
    counts = np.bincount(tokens, minlength=expected.size)
    assert not counts[expected == 0].any()
    often = expected * len(tokens) >= 5
    observed, wanted = counts[often], expected[often] * len(tokens)
    rest = len(tokens) - wanted.sum()
    if rest >= 5:
        observed, wanted = np.append(observed, counts[~often].sum()), np.append(wanted, rest)
    chi_square = ((observed - wanted) ** 2 / wanted).sum()
    freedom = max(wanted.size - 1, 1)
    assert chi_square <= freedom + 4 * math.sqrt(2 * freedom)


def choose_many(params: SamplingParams, logits: Array, rows: int, steps: int) -> list[int]:
    selector = Selector(rows)
    for slot in range(rows):
        selector.enter(slot, Asked(params, seed=slot))
    batch = np.repeat(logits[None], rows, axis=0)
    batch.flags.writeable = False
    slots = list(range(rows))
    return [token for _ in range(steps) for token in selector.choose(batch, slots).tokens]


def test_greedy_takes_the_first_of_the_largest() -> None:
    assert greedy(np.array([[1, 3, 3], [5, 5, 0]], np.float32)).tolist() == [1, 0]


RULES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.6},
    {"temperature": 1.7},
    {"top_k": 7},
    {"top_p": 0.9},
    {"top_p": 0.2},
    {"min_p": 0.1},
    {"top_k": 20, "top_p": 0.7},
    {"temperature": 0.8, "min_p": 0.02, "top_k": 40, "top_p": 0.95},
    {"top_p": 0.5, "min_p": 0.3},
]


@pytest.mark.parametrize("rules", RULES, ids=str)
@pytest.mark.parametrize("kind", ["peaked", "flat", "tied", "equal"])
def test_tokens_are_drawn_with_their_exact_probabilities(kind: str, rules: dict[str, Any]) -> None:
    logits = logits_of(kind, SMALL)[0]
    params = SamplingParams(**({"temperature": 1.0} | rules))
    check_draws(choose_many(params, logits, 64, 8), probabilities(logits, **rules))


@pytest.mark.parametrize("rules", RULES, ids=str)
@pytest.mark.parametrize("kind", ["peaked", "flat"])
def test_blocks_change_nothing_about_the_probabilities(kind: str, rules: dict[str, Any]) -> None:
    logits = logits_of(kind, LARGE)[0]
    params = SamplingParams(**({"temperature": 1.0} | rules))
    check_draws(choose_many(params, logits, 24, 5), probabilities(logits, **rules))


def test_the_tail_has_its_exact_share() -> None:
    # Half of the mass in one token, the other half over all others, with weights from 1 to 4 in
    # every block.
    groups = np.arange(LARGE) // 768 % 4
    weights = groups + 1.0
    weights[5] = weights.sum()
    groups[5] = 4
    logits = np.log(weights).astype(np.float32)
    tokens = choose_many(SamplingParams(temperature=1.0), logits, 64, 12)
    check_draws(groups[tokens].tolist(), np.bincount(groups, weights) / weights.sum())


def test_top_p_allows_tokens_of_the_tail_wherever_they_are() -> None:
    logits = logits_of("flat", LARGE)[0]
    expected = probabilities(logits, top_p=0.6)
    tokens = choose_many(SamplingParams(temperature=1.0, top_p=0.6), logits, 64, 8)
    assert (expected[tokens] > 0).all()
    quarters = np.arange(LARGE) % 768 // 192
    check_draws(quarters[tokens].tolist(), np.bincount(quarters, expected))
    in_head = np.zeros(LARGE, int)
    in_head[np.argsort(-logits)[:48]] = 1
    check_draws(in_head[tokens].tolist(), np.bincount(in_head, expected))


def test_the_tail_reaches_the_last_tokens() -> None:
    # The vocabulary is 16 x 768 and 13 more: these are the only ones in the last row of cells.
    weights = np.zeros(LARGE)
    weights[:768] = 1 + np.arange(768) / 1000
    weights[16 * 768 :] = 1.8
    with np.errstate(divide="ignore"):
        logits = np.log(weights).astype(np.float32)
    tokens = choose_many(SamplingParams(temperature=1.0), logits, 64, 10)
    groups = np.arange(LARGE) // 768
    check_draws(groups[tokens].tolist(), np.bincount(groups, weights) / weights.sum())


def test_places_on_the_line_are_the_inverse_of_the_distribution() -> None:
    """Along the first uniform number tokens come from the most likely one on."""
    grid = np.linspace(0, 1, 501)[:-1] + 1 / 1000
    rows = np.repeat(logits_of("peaked", SMALL), grid.size, axis=0)
    expected = probabilities(rows[0], top_k=10)
    uniforms = np.repeat(grid[:, None], NUMBERS, axis=1)
    tokens = CategoricalSampler().draw(
        rows, Rules([(1.0, 10, 1.0, 0.0)] * grid.size, SMALL), uniforms
    )
    drawn = expected[tokens]
    assert (np.diff(drawn) <= 0).all()
    share = np.bincount(tokens, minlength=SMALL) / grid.size
    assert np.abs(share - expected).max() <= 1 / grid.size


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.4])
def test_where_every_number_is_refused_the_last_one_is_a_place_among_the_allowed_tokens(
    top_p: float,
) -> None:
    """The end of the longest line that may be is no token's place."""
    grid = np.linspace(0, 1, 201)[:-1] + 1 / 400
    logits = logits_of("peaked", LARGE)
    logits[0, [4, 5]] = 3.0, 2.0
    rows = np.repeat(logits, grid.size, axis=0)
    uniforms = np.full((grid.size, NUMBERS), 1 - 2.0**-53)
    uniforms[:, -1] = grid
    rules = Rules([(1.5, 0, top_p, 0.0)] * grid.size, LARGE)
    tokens = CategoricalSampler().draw(rows, rules, uniforms)
    expected = probabilities(logits[0], 1.5, top_p=top_p)
    assert (expected[tokens] > 0).all()
    often = np.argsort(-expected)[:10]
    share = np.bincount(tokens, minlength=LARGE) / grid.size
    assert np.abs(share - expected)[often].max() <= 1 / grid.size
    assert abs((share - expected)[often].sum()) <= 5 / grid.size


def test_more_rows_than_are_drawn_at_once() -> None:
    num_rows = 4100  # of 6 bits for a token 4,096 rows fit
    rows = logits_of("tied", SMALL, rows=num_rows)
    uniforms = np.random.default_rng(1).random((num_rows, NUMBERS))
    asked = [(1.0, row % 3 * 9, 1 - row % 2 / 10, 0.0) for row in range(num_rows)]
    tokens = CategoricalSampler().draw(rows, Rules(asked, SMALL), uniforms)
    some = np.arange(0, num_rows, 41)
    alone = CategoricalSampler().draw(
        rows[some], Rules([asked[row] for row in some], SMALL), uniforms[some]
    )
    assert tokens[some].tolist() == alone.tolist()


def test_top_k_1_and_tiny_temperatures_are_greedy() -> None:
    for kind in ("peaked", "flat"):
        logits = logits_of(kind, LARGE, rows=8)
        best = greedy(logits).tolist()
        for fields in ({"temperature": 2.0, "top_k": 1}, {"temperature": 1.1e-5}, {"top_k": 3}):
            selector = Selector(8)
            for slot in range(8):
                selector.enter(slot, Asked(SamplingParams(**fields), seed=slot))
            assert selector.choose(logits, list(range(8))).tokens == best


def test_top_k_beyond_the_groups_and_beyond_the_vocabulary() -> None:
    logits = logits_of("flat", LARGE)[0]
    tokens = choose_many(SamplingParams(temperature=1.0, top_k=3000), logits, 32, 4)
    check_draws(tokens, probabilities(logits, top_k=3000))
    assert len(set(tokens)) > 48
    small = logits_of("flat", SMALL)[0]
    every = SamplingParams(temperature=1.0)
    assert choose_many(
        SamplingParams(temperature=1.0, top_k=SMALL + 5), small, 8, 4
    ) == choose_many(every, small, 8, 4)


def test_impossible_tokens_are_never_chosen() -> None:
    logits = np.full((1, LARGE), -np.inf, np.float32)
    logits[0, [17, 12_300]] = [1.0, 1.5]
    for fields in ({}, {"top_k": 5}, {"top_p": 0.99}, {"min_p": 0.01}):
        params = SamplingParams(temperature=1.0, **fields)
        check_draws(choose_many(params, logits[0], 16, 8), probabilities(logits[0]))


def test_a_row_without_a_finite_largest_logit_gets_its_argmax_and_disturbs_no_other() -> None:
    logits = logits_of("flat", SMALL, rows=4)
    alone = Selector(1)
    alone.enter(0, Asked(SamplingParams(temperature=1.0), seed=9))
    wanted = alone.choose(logits[3:], [0]).tokens[0]
    logits[0] = -np.inf
    logits[1, 7] = np.inf
    logits[2, 8] = np.nan
    selector = Selector(4)
    for slot in range(4):
        selector.enter(slot, Asked(SamplingParams(temperature=1.0), seed=9))
    assert selector.choose(logits, [0, 1, 2, 3]).tokens == [0, 7, 8, wanted]


def test_logits_are_never_written() -> None:
    logits = logits_of("peaked", LARGE, rows=3)
    before = logits.copy()
    logits.flags.writeable = False
    selector = Selector(3)
    selector.enter(0, Asked(SamplingParams(temperature=1.0, top_p=0.9, logprobs=3)))
    selector.enter(1, Asked(SamplingParams(repetition_penalty=2.0), prompt_ids=(1, 2)))
    selector.enter(2, Asked(SamplingParams(min_tokens=4), stop_ids=frozenset({1, 10**6})))
    for _ in range(3):
        selector.choose(logits, [0, 1, 2])
    np.testing.assert_array_equal(logits, before)


def penalized(logits: Array, asked: Asked, output: list[int]) -> Array:
    """The documented formula, token by token."""
    params, changed = asked.params, logits.astype(np.float64)
    for token in set(asked.prompt_ids) | set(output):
        if params.repetition_penalty != 1:
            by = params.repetition_penalty
            changed[token] = changed[token] / by if changed[token] > 0 else changed[token] * by
        count = output.count(token)
        changed[token] -= params.frequency_penalty * count + params.presence_penalty * (count > 0)
    if len(output) < params.min_tokens:
        changed[[token for token in asked.stop_ids if token < changed.size]] = -np.inf
    return changed


@given(
    repetition=st.sampled_from([1.0, 0.5, 1.3, 5.0]),
    presence=st.sampled_from([0.0, 0.7, -2.0]),
    frequency=st.sampled_from([0.0, 0.3, -0.4]),
    min_tokens=st.integers(0, 6),
    prompt=st.lists(st.integers(0, 10), max_size=8),
    output=st.lists(st.integers(0, 10), max_size=4),
    seed=st.integers(0, 99),
)
def test_penalties_and_min_tokens_are_the_formulas(
    repetition: float,
    presence: float,
    frequency: float,
    min_tokens: int,
    prompt: list[int],
    output: list[int],
    seed: int,
) -> None:
    params = SamplingParams(
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        min_tokens=min_tokens,
    )
    asked = Asked(params, 0, tuple(prompt), list(output), frozenset({0, 3, 99}))
    selector = Selector(1)
    selector.enter(0, asked)
    for logits in logits_of("flat", 11, rows=8, seed=seed):
        wanted = penalized(logits, asked, output)
        token = selector.choose(logits[None], [0]).tokens[0]
        assert wanted[token] >= wanted.max() - 1e-5
        output.append(token)


def test_penalties_and_min_tokens_act_before_the_draw() -> None:
    logits = logits_of("flat", SMALL)[0]
    params = SamplingParams(temperature=0.7, frequency_penalty=1.5, min_tokens=9, top_k=9)
    tokens = []
    for seed in range(120):
        asked = Asked(params, seed, output_ids=[3, 3, 4], stop_ids=frozenset({1, 5}))
        selector = Selector(1)
        selector.enter(0, asked)
        tokens += selector.choose(logits[None], [0]).tokens
    wanted = penalized(logits, asked, asked.output_ids)
    check_draws(tokens, probabilities(wanted, 0.7, top_k=9))


def test_min_tokens_end_with_the_last_of_them() -> None:
    logits = np.array([[0.0, 5.0, 1.0]], np.float32)
    selector = Selector(1)
    selector.enter(0, Asked(SamplingParams(min_tokens=2), stop_ids=frozenset({1})))
    assert [selector.choose(logits, [0]).tokens[0] for _ in range(4)] == [2, 2, 1, 1]


@pytest.mark.parametrize("vocab", [SMALL, LARGE])
def test_logprobs_are_of_the_raw_logits(vocab: int) -> None:
    logits = logits_of("peaked", vocab, rows=2)
    exact = logits.astype(np.float64)
    wanted = exact - exact.max(axis=1, keepdims=True)
    wanted -= np.log(np.exp(wanted).sum(axis=1, keepdims=True))
    selector = Selector(2)
    changing = {"temperature": 0.3, "repetition_penalty": 3.0, "min_tokens": 2, "top_k": 30}
    selector.enter(0, Asked(SamplingParams(logprobs=20, **changing), prompt_ids=(1, 2)))
    selector.enter(1, Asked(SamplingParams(logprobs=0)))
    choice = selector.choose(logits, [0, 1])
    for row, token, given_one in zip((0, 1), choice.tokens, choice.logprobs, strict=True):
        assert given_one is not None
        assert given_one.token_id == token
        assert given_one.logprob == pytest.approx(wanted[row, token], abs=1e-5)
    first, second = choice.logprobs
    assert first is not None
    assert second is not None
    best = np.argsort(-exact[0], kind="stable")[:20]
    assert [token for token, _ in first.top] == best.tolist()
    assert [value for _, value in first.top] == pytest.approx(wanted[0, best].tolist(), abs=1e-5)
    assert second.top == ()


def test_logprobs_of_a_small_vocabulary_and_of_equal_tokens() -> None:
    logits = np.array([[1.0, 2.0, 2.0, -np.inf]], np.float32)
    selector = Selector(1)
    selector.enter(0, Asked(SamplingParams(logprobs=5)))
    (given_one,) = selector.choose(logits, [0]).logprobs
    assert given_one is not None
    assert [token for token, _ in given_one.top] == [1, 2, 0]
    assert sum(math.exp(value) for _, value in given_one.top) == pytest.approx(1)


def test_a_plain_row_has_no_logprobs() -> None:
    selector = Selector(2)
    selector.enter(1, Asked(SamplingParams()))
    assert selector.choose(logits_of("flat", SMALL), [1]).logprobs == [None]


ROWS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 0.5, 1.5]),
        "top_k": st.sampled_from([0, 3, 20]),
        "top_p": st.sampled_from([1.0, 0.9, 0.3]),
        "min_p": st.sampled_from([0.0, 0.05]),
        "repetition_penalty": st.sampled_from([1.0, 1.5]),
        "frequency_penalty": st.sampled_from([0.0, 0.5]),
        "min_tokens": st.sampled_from([0, 2]),
        "logprobs": st.sampled_from([None, 2]),
    },
)


@given(rows=st.lists(ROWS, min_size=2, max_size=6), data=st.data())
def test_a_row_is_the_same_in_any_batch_slot_and_order(
    rows: list[dict[str, Any]], data: st.DataObject
) -> None:
    asked = [
        Asked(SamplingParams(**fields), 70 + row, (row, 5), stop_ids=frozenset({2}))
        for row, fields in enumerate(rows)
    ]
    steps = 4
    logits = logits_of("tied", SMALL, rows=len(rows) * steps).reshape(len(rows), steps, SMALL)
    alone = []
    for row, sequence in enumerate(asked):
        selector = Selector(1)
        selector.enter(0, sequence)
        choices = [selector.choose(logits[row, step][None], [0]) for step in range(steps)]
        alone.append([(choice.tokens[0], choice.logprobs[0]) for choice in choices])
    slots = data.draw(st.permutations(range(len(rows) + 2)))[: len(rows)]
    selector = Selector(len(rows) + 2)
    for slot, sequence in zip(slots, asked, strict=True):
        selector.enter(slot, sequence)
    done = [0] * len(rows)
    together: list[list[Any]] = [[] for _ in rows]
    while unfinished := [row for row in range(len(rows)) if done[row] < steps]:
        some = data.draw(st.permutations(unfinished))
        some = some[: data.draw(st.integers(1, len(some)))]
        batch = np.stack([logits[row, done[row]] for row in some])
        choice = selector.choose(batch, [slots[row] for row in some])
        for row, token, logprob in zip(some, choice.tokens, choice.logprobs, strict=True):
            together[row].append((token, logprob))
            done[row] += 1
    assert together == alone


@pytest.mark.parametrize("kind", ["peaked", "flat"])
def test_a_row_of_a_large_vocabulary_is_the_same_alone(kind: str) -> None:
    logits = logits_of(kind, LARGE, rows=6)
    fields: list[dict[str, Any]] = [
        {"top_p": 0.9},
        {},
        {"top_k": 9},
        {"min_p": 0.2},
        {"top_p": 0.5},
        {"top_k": 500},
    ]
    asked = [Asked(SamplingParams(temperature=1.2, **f), i) for i, f in enumerate(fields)]
    together = Selector(6)
    for slot, sequence in enumerate(asked):
        together.enter(slot, sequence)
    tokens = [together.choose(logits, list(range(6))).tokens for _ in range(5)]
    for row, sequence in enumerate(asked):
        alone = Selector(1)
        alone.enter(0, sequence)
        assert [alone.choose(logits[[row]], [0]).tokens[0] for _ in range(5)] == [
            step[row] for step in tokens
        ]


def test_a_seed_gives_the_same_tokens_again_and_another_seed_others() -> None:
    logits = logits_of("flat", SMALL)

    def tokens(seed: int, known: int = 0) -> list[int]:
        asked = Asked(SamplingParams(temperature=1.0), seed, output_ids=[0] * known)
        selector = Selector(3)
        selector.enter(2, asked)
        return [selector.choose(logits, [2]).tokens[0] for _ in range(140 - known)]

    whole = tokens(5)
    assert tokens(5) == whole
    assert tokens(6) != whole
    # A row taken up again goes on where it was: within a span of uniform numbers, and at its edge.
    for known in (63, 64, 100):
        assert tokens(5, known) == whole[known:]


def test_a_slot_taken_again_knows_nothing_of_the_row_before() -> None:
    logits = np.array([[1.0, 1.5, 0.0]], np.float32)
    selector = Selector(1)
    for _ in range(2):
        selector.enter(0, Asked(SamplingParams(presence_penalty=2.0)))
        assert [selector.choose(logits, [0]).tokens[0] for _ in range(3)] == [1, 0, 2]
        selector.leave(0)


def test_logprobs_of_a_row_without_a_finite_largest_logit_are_no_numbers() -> None:
    selector = Selector(1)
    selector.enter(0, Asked(SamplingParams(logprobs=1)))
    for value in (np.nan, np.inf, -np.inf):
        logits = np.full((1, SMALL), value, np.float32)
        (given_one,) = selector.choose(logits, [0]).logprobs
        assert given_one is not None
        assert math.isnan(given_one.logprob)
