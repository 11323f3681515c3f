"""The row as it is documented."""

from __future__ import annotations

import json
import pickle

from qaic_ray.rows import FinishReason, Prompt, Row

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
    assert list(document) == [*DOCUMENTED_KEYS, "error"]
    assert document["error"] == "too long"
    assert document["finish_reason"] == "error"
    assert (row.index, row.id, row.prompt, row.text) == (7, "y", "p", "")
    assert (row.worker, row.attempts, row.generated_tokens) == ("card 1", 3, 0)


def test_rows_cross_processes() -> None:
    row = make_row()
    assert pickle.loads(pickle.dumps(row)) == row
    assert row.ok
