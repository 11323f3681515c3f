"""CardPredictor around a worker that answers by rule: columns in, columns out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rule_worker import NUM_CARDS, RulePredictor, RuleWorker, cards_only

from qaic_ray import CardPredictor
from qaic_ray.cards.lease import LOCKS_VARIABLE, CardLocks, Part
from qaic_ray.cluster.ray_data import MAX_ATTEMPTS, Grant, places, plain
from qaic_ray.errors import DeviceBusy, DeviceError, UsageError


class Surprise(Exception):
    """Not one of ours."""


Make = Callable[..., CardPredictor]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Make]:
    monkeypatch.setenv(LOCKS_VARIABLE, str(tmp_path))
    monkeypatch.setattr(RuleWorker, "opened", [])
    monkeypatch.setattr(RuleWorker, "broken", set())
    made: list[CardPredictor] = []

    def make_one(**options: Any) -> CardPredictor:
        made.append(RulePredictor("model", "qpc", **{"sdk": cards_only(), **options}))
        return made[-1]

    yield make_one
    for one in made:
        one.close()


def column(*values: object) -> Any:
    return np.array(values, object)


def test_a_batch_comes_back_with_answers_and_error_rows_beside_it(make: Make) -> None:
    batch = {"prompt": column("abc", "bad", "", "xy"), "mine": np.arange(4)}
    answered = make()(batch)
    assert {name: list(answered[name]) for name in batch} == {k: list(v) for k, v in batch.items()}
    assert list(answered["text"]) == ["cba", "", "", "yx"]
    assert list(answered["finish_reason"]) == ["stop", "error", "error", "stop"]
    assert list(answered["error"]) == ["", "It is bad.", "The prompt is empty.", ""]
    assert answered["token_ids"][0] == [99, 98, 97]
    assert list(answered["generated_tokens"]) == [3, 0, 0, 2]
    for name, values in answered.items():
        assert len(values) == 4, name
        assert not any(value is None for value in values), name


def test_columns_are_found_by_name_and_never_written_over(make: Make) -> None:
    one = make(prompt_column="text", prefix="answer_")
    answered = one({"text": column("ab", "cd")})
    assert list(answered["text"]) == ["ab", "cd"]
    assert list(answered["answer_text"]) == ["ba", "dc"]
    with pytest.raises(UsageError, match="prefix"):
        make()({"prompt": column("a"), "text": column("b")})
    with pytest.raises(UsageError, match="there are: question"):
        make()({"question": column("a")})
    with pytest.raises(UsageError, match='write "max_tokens"'):
        make()({"prompt": column("a"), "max_token": column(3)})


def test_rows_have_their_own_sampling_and_a_seed_of_their_prompt(make: Make) -> None:
    one = make(sampling={"temperature": 0.5, "max_tokens": 9})
    messages = np.empty(3, object)
    messages[2] = np.array([{"role": "user", "content": "hi", "name": None}], object)
    texts, most, temperatures = ["a", "a", None], [3.0, np.nan, 4.0], [np.nan, np.nan, 0.0]
    batch = {"prompt": column(*texts), "messages": messages, "max_tokens": np.array(most)}
    answered = one(batch | {"temperature": np.array(temperatures)})
    assert list(answered["error"]) == ["", "", ""]
    asked = {prompt.index: prompt for prompt in RuleWorker.opened[-1].asked}
    params = {index: prompt.sampling for index, prompt in asked.items()}
    assert [params[at].max_tokens for at in range(3)] == [3, 9, 4]  # type: ignore[union-attr]
    seeds = [params[at].seed for at in range(3)]  # type: ignore[union-attr]
    assert seeds[0] == seeds[1] is not None  # the same prompt, wherever it stands
    assert seeds[2] is None  # greedy
    assert asked[2].messages == ({"role": "user", "content": "hi"},)
    with pytest.raises(UsageError, match="temperature is -1"):
        make(sampling={"temperature": -1})


def test_a_card_that_fails_is_opened_anew_and_only_what_kills_it_is_given_up(make: Make) -> None:
    one = make()
    answered = one({"prompt": column("ab", "kill", "cd")})
    assert list(answered["text"]) == ["ba", "", "dc"]
    assert list(answered["finish_reason"]) == ["stop", "error", "stop"]
    assert "card 0 failed" in answered["error"][1]
    assert list(answered["attempts"]) == [2, MAX_ATTEMPTS, 1]
    assert [worker.spec.incarnation for worker in RuleWorker.opened] == [0, 1, 2, 3]
    assert [worker.is_open for worker in RuleWorker.opened] == [False] * 3 + [True]
    assert list(one({"prompt": column("ef")})["text"]) == ["fe"]


def test_a_card_that_does_not_come_back_is_left_for_another(make: Make) -> None:
    one = make()
    RuleWorker.broken |= {0}
    assert list(one({"prompt": column("ab", "kill")})["text"]) == ["ba", ""]
    assert one.info.name == "card 1"
    RuleWorker.broken |= set(range(NUM_CARDS))
    with pytest.raises(DeviceError, match="is in error"):
        one({"prompt": column("kill")})


def test_predictors_take_cards_that_nobody_holds(make: Make) -> None:
    elsewhere = CardLocks([1], what="a run")
    elsewhere.acquire()
    names = [make().info.name for _ in range(NUM_CARDS - 1)]
    assert names == ["card 0", "card 2", "card 3"]
    with pytest.raises(DeviceBusy, match="in use"):
        make()
    elsewhere.release()
    assert make().info.name == "card 1"


@pytest.mark.parametrize(
    ("grant", "expected"),
    [
        (Grant(), [((0,), None), ((2,), None), ((3,), None)]),
        (Grant(1.0, (1,)), [((2,), None), ((0,), None), ((3,), None)]),  # unit 1 is the second
        (Grant(2.0), [((0, 2), None)]),
        (Grant(0.5, (2,)), [((q,), Part(n, 2)) for q in (3, 0, 2) for n in (1, 2)]),
        (Grant(8.0), []),
    ],
)
def test_a_grant_says_how_much_and_where_ray_chooses_which(grant: Grant, expected: object) -> None:
    assert places(cards_only(not_ready=[1]), grant) == expected


def test_only_named_cards_are_taken() -> None:
    assert places(cards_only(), Grant(), (3, 1)) == [((1,), None), ((3,), None)]


@given(st.recursive(st.integers() | st.text() | st.booleans(), st.lists, max_leaves=8))
def test_values_of_columns_are_those_of_json(value: object) -> None:
    assert plain(value) == value
    assert type(plain(np.float64(2))) is int
    assert plain(np.nan) is None


@pytest.mark.parametrize(
    ("columns", "answers"),
    [
        ({"n": [2, 1], "temperature": [1, 1]}, {"choices": [["cba"] * 2, ["yx"]]}),
        ({"num_return_sequences": [2, None], "temperature": [1, 1]}, None),
        ({"sampling_params": [{"n": 2, "temperature": 1, "logprobs": 0}, None]}, None),
        ({"options": [{"num_return_sequences": 2, "temperature": 1}, None]}, None),
        ({"logprobs": [None, 0]}, {"logprobs": [[], [-1.0, -1.0]]}),
        ({"n_probs": [3, 0]}, {"logprobs": [[-1.0] * 3, []]}),
        ({"logprobs": [True, False], "top_logprobs": [2, 0]}, {"logprobs": [[-1.0] * 3, []]}),
    ],
)
def test_what_a_rows_own_columns_ask_for_comes_back(
    make: Make, columns: dict[str, list[Any]], answers: dict[str, list[Any]] | None
) -> None:
    batch = {name: column(*values) for name, values in columns.items()}
    answered = make(prefix="a_")({"prompt": column("abc", "xy"), **batch})
    assert list(answered["a_error"]) == ["", ""]
    for name, values in (answers or {"choices": [["cba"] * 2, ["yx"]]}).items():
        assert list(answered[f"a_{name}"]) == values


def test_rows_of_other_programs_are_read_as_in_files(make: Make) -> None:
    batch = {"prompt": column("a", "b", "c"), "num_beams": column(1, 4, None)}
    answered = make()(batch | {"n_predict": np.array([5.0, np.nan, np.nan])})
    assert list(answered["finish_reason"]) == ["stop", "error", "stop"]
    assert answered["error"][1].startswith('"num_beams" is not offered')
    asked = {prompt.index: prompt for prompt in RuleWorker.opened[-1].asked}
    assert asked[0].sampling is not None
    assert asked[0].sampling.max_tokens == 5


def test_a_bad_sampling_field_of_a_row_is_its_error(make: Make) -> None:
    answered = make()({"prompt": column("a", "b"), "top_p": np.array([2.0, 0.5])})
    assert list(answered["finish_reason"]) == ["error", "stop"]
    assert "top_p is 2" in answered["error"][0]


@pytest.mark.parametrize(
    "error", [UsageError("No such template."), Surprise(), KeyboardInterrupt()]
)
def test_a_constructor_that_fails_lets_its_card_go(
    make: Make, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fails(_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(RuleWorker, "open", fails)
        with pytest.raises(type(error)) as caught:
            make(device_ids=[0])
    assert caught.value is error  # and its traceback keeps the predictor alive
    make(device_ids=[0])


@pytest.mark.parametrize("error", [UsageError("No."), Surprise()])
def test_a_batch_that_fails_lets_the_card_go_and_the_next_one_opens_it_anew(
    make: Make, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fails(*_: object) -> None:
        raise error

    one = make(device_ids=[0])
    with monkeypatch.context() as patch:
        patch.setattr(RuleWorker, "answer", fails)
        with pytest.raises(type(error)):
            one({"prompt": column("ab")})
    assert not RuleWorker.opened[0].is_open
    with make(device_ids=[0]) as other:  # the card is free
        assert list(other({"prompt": column("ab")})["text"]) == ["ba"]
    assert list(one({"prompt": column("cd")})["text"]) == ["dc"]
    assert len(RuleWorker.opened) == 3


def test_many_threads_share_a_card_and_whoever_kills_it_is_given_up_alone(make: Make) -> None:
    one = make(device_ids=[0])
    texts = [["ab", "cd"], ["kill", "ef"], *[[f"x{at}", "gh"] for at in range(20)]]
    with ThreadPoolExecutor(8) as pool:
        documents = [[{"prompt": text} for text in some] for some in texts]
        answered = list(pool.map(one.answer, documents))
    expected = [["" if text == "kill" else text[::-1] for text in some] for some in texts]
    assert [[row.text for row in rows] for rows in answered] == expected
    (killer,) = [row for rows in answered for row in rows if not row.ok]
    assert killer.prompt == "kill"
    assert len({row.index for rows in answered for row in rows}) == 2 * len(texts)
