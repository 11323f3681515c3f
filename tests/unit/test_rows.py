"""The row as it is documented."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace

from qaic_ray.metrics import Tally
from qaic_ray.rows import FinishReason, Prompt, Row, Sample
from qaic_ray.sampling_params import SamplingParams, TokenLogprob

DOCUMENTED_KEYS = [
    "index",
    "id",
    "prompt",
    "text",
    "token_ids",
    "finish_reason",
    "prompt_tokens",
    "generated_tokens",
    "ttft_s",
    "decode_s",
    "worker",
    "attempts",
]


def make_row() -> Row:
    return Row(
        index=3,
        id="x",
        prompt="My name is",
        text=" Ethan",
        finish_reason=FinishReason.LENGTH,
        token_ids=(5, 6, 2),
        prompt_tokens=4,
        ttft_s=0.12345678,
        decode_s=2.0,
        worker="card 3",
        attempts=2,
    )


def test_json_has_the_documented_keys_in_the_documented_order() -> None:
    document = make_row().to_json()
    assert list(document) == DOCUMENTED_KEYS
    assert json.loads(json.dumps(document)) == {
        "index": 3,
        "id": "x",
        "prompt": "My name is",
        "text": " Ethan",
        "token_ids": [5, 6, 2],
        "finish_reason": "length",
        "prompt_tokens": 4,
        "generated_tokens": 3,
        "ttft_s": 0.123457,
        "decode_s": 2.0,
        "worker": "card 3",
        "attempts": 2,
    }


def test_an_error_row_says_why() -> None:
    row = Row.failed(Prompt(7, "p", id="y"), "too long", worker="card 1", attempts=3)
    document = row.to_json()
    assert not row.ok
    assert list(document) == [*DOCUMENTED_KEYS, "error", "error_class"]
    assert document["error_class"] == "refused"
    assert document["error"] == "too long"
    assert document["finish_reason"] == "error"
    assert (row.index, row.id, row.prompt, row.text) == (7, "y", "p", "")
    assert (row.worker, row.attempts, row.generated_tokens) == ("card 1", 3, 0)


def test_times_of_day_are_there_where_a_worker_had_the_row() -> None:
    row = replace(make_row(), queue_s=0.25, started_at=1764396395.12349, ended_at=1764396398.5)
    document = row.to_json()
    assert list(document) == [
        *DOCUMENTED_KEYS[: DOCUMENTED_KEYS.index("worker")],
        *("queue_s", "started_at", "ended_at"),
        *DOCUMENTED_KEYS[DOCUMENTED_KEYS.index("worker") :],
    ]
    times = [document[key] for key in ("queue_s", "started_at", "ended_at")]
    assert times == [0.25, 1764396395.123, 1764396398.5]


MESSAGES = ({"role": "system", "content": "s"}, {"role": "user", "content": "My name is"})
LOGPROBS = (
    TokenLogprob(5, -0.12345678, ((5, -0.12345678), (9, -2.5))),
    TokenLogprob(6, float("-inf")),
)


def full_row() -> Row:
    samples = (
        Sample(" Ethan", (5, 6), FinishReason.STOP, "\n", LOGPROBS),
        Sample(" Bo", (7, 8, 2), FinishReason.LENGTH),
    )
    return replace(
        make_row(),
        messages=MESSAGES,
        token_ids=(5, 6),
        finish_reason=FinishReason.STOP,
        stop_reason="\n",
        logprobs=LOGPROBS,
        choices=samples,
    )


def test_keys_of_what_was_asked_for_are_there_where_it_was() -> None:
    document = json.loads(json.dumps(full_row().to_json(), allow_nan=False))
    assert list(document) == [
        *("index", "id", "prompt", "messages", "text", "token_ids", "finish_reason"),
        *("stop_reason", "prompt_tokens", "generated_tokens", "ttft_s", "decode_s", "worker"),
        *("attempts", "logprobs", "choices"),
    ]
    assert document["messages"] == list(MESSAGES)
    assert document["stop_reason"] == "\n"
    assert document["generated_tokens"] == 5
    logprobs = [
        {
            "token_id": 5,
            "logprob": -0.123457,
            "top": [{"token_id": 5, "logprob": -0.123457}, {"token_id": 9, "logprob": -2.5}],
        },
        {"token_id": 6, "logprob": -9999.0, "top": []},
    ]
    assert document["logprobs"] == logprobs
    assert document["choices"] == [
        {
            "index": 0,
            "text": " Ethan",
            "token_ids": [5, 6],
            "finish_reason": "stop",
            "stop_reason": "\n",
            "logprobs": logprobs,
        },
        {"index": 1, "text": " Bo", "token_ids": [7, 8, 2], "finish_reason": "length"},
    ]


def test_every_answer_of_a_row_is_counted() -> None:
    tally = Tally()
    tally.add(full_row())
    tally.add(Row.failed(Prompt(0, "p"), "e"))
    assert tally.length_counts == {2: 1, 3: 1}
    assert tally.measurement("card 3").generated_tokens == 5


def test_a_stop_token_is_a_number() -> None:
    assert replace(make_row(), stop_reason=0).to_json()["stop_reason"] == 0


def test_a_conversation_that_failed_is_kept() -> None:
    prompt = Prompt(0, "My name is", messages=MESSAGES)
    assert Row.failed(prompt, "e").to_json()["messages"] == list(MESSAGES)


def test_prompts_and_rows_cross_processes() -> None:
    prompt = Prompt(0, "p", messages=MESSAGES, sampling=SamplingParams(stop=("a",)))
    for value in (make_row(), full_row(), prompt):
        assert pickle.loads(pickle.dumps(value)) == value
    assert make_row().ok


def test_a_logprob_that_is_no_number_is_null() -> None:
    token = TokenLogprob(5, float("nan"), ((9, float("nan")),))
    (written,) = replace(make_row(), logprobs=(token,)).to_json()["logprobs"]
    assert written == {"token_id": 5, "logprob": None, "top": [{"token_id": 9, "logprob": None}]}
