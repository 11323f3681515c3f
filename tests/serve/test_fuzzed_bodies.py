"""Any bytes at any route: the answer is what was asked for, or says what is wrong with it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from json_bodies import bodies, damaged, dumped
from served_app import Told, ask, until
from thread_cards import formula_fleet, service_of

from qaic_ray.serve.http.app import create_app
from qaic_ray.serve.protocol.models import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    ResponseBody,
    TokenizeBody,
)

ROUTES = {
    "/v1/completions": CompletionBody,
    "/v1/chat/completions": ChatBody,
    "/v1/responses": ResponseBody,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
}
KINDS = ["application/json", "application/json; charset=latin-1", "text/plain", "", "x", "é", None]
EXAMPLES = 50 if settings().max_examples <= 25 else 1000
"""Of each of the ten tests: 500 bodies of the fast tier in all, 10,000 of the slow one."""


class Asker:
    """An app, and a loop to ask it in."""

    def __init__(self, app: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._app = app
        self._loop = loop

    def __call__(self, *arguments: Any, **how: Any) -> Told:
        return self._loop.run_until_complete(ask(self._app, *arguments, **how))


@pytest.fixture(scope="module")
def asked() -> Iterator[Asker]:
    with formula_fleet(slots=4, ctx_len=64) as (fleet, cards):
        service = service_of(fleet, max_body_mib=1)
        loop = asyncio.new_event_loop()
        yield Asker(create_app(service), loop)
        until(lambda: fleet.num_open == 0)
        until(lambda: cards.num_in_slots == 0)
        assert service.num_running() == 0
        loop.close()


def check(told: Told) -> None:
    """An answer, or an error in the interface's shape; a stream may end with one."""
    assert told.is_whole
    assert 200 <= told.status < 300 or 400 <= told.status < 500, (told.status, told.body)
    if told.status >= 400:
        check_error(told.json())
    elif told.headers["content-type"].startswith("text/event-stream"):
        *before, last = told.events()
        for one in before:
            assert "error" not in json.loads(one)
        if last != "[DONE]" and not json.loads(last).get("type", "").startswith("response."):
            check_error(json.loads(last))
    else:
        assert "error" not in told.json() or told.json()["error"] is None


def check_error(document: Any) -> None:
    assert set(document) == {"error"}
    error = document["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"].endswith((".", ".)", "?")), error
    assert 5 < len(error["message"]) < 1000, error
    assert error["type"] in TYPES, error
    assert isinstance(error["param"], str | None)
    assert isinstance(error["code"], str | None)


TYPES = {
    "invalid_request_error",
    "not_found_error",
    "rate_limit_error",
    "timeout_error",
}


@pytest.mark.parametrize("route", ROUTES)
@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_a_body_of_the_schemas_fields_is_answered_or_refused(
    asked: Asker, route: str, data: st.DataObject
) -> None:
    body = data.draw(bodies(ROUTES[route].model_json_schema()))
    check(asked(route, dumped(body, 3)))


@pytest.mark.parametrize("route", ROUTES)
@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_any_bytes_are_answered_or_refused(asked: Asker, route: str, data: st.DataObject) -> None:
    body = data.draw(damaged(ROUTES[route].model_json_schema()))
    kind = data.draw(st.just("application/json") | st.sampled_from(KINDS))
    check(asked(route, body, kind=kind))


@pytest.mark.parametrize(
    ("route", "body", "said"),
    [
        ("/tokenize", b'{"prompt": "a", "\\ud800": 1}', "half of a surrogate pair"),
        ("/v1/responses", b'{"input": "a", "text": {"\\uDC00": null}}', "half of a surrogate"),
        ("/v1/responses", b'{"input": "\xed\xa0\x80"}', "no JSON of UTF-8: 'utf-8' codec"),
        ("/v1/completions", '{"prompt": "a"}'.encode("utf-16"), "no JSON of UTF-8"),
        ("/v1/completions", b'{"prompt": "a", "n": NaN}', "NaN is no number of JSON"),
    ],
)
def test_what_was_found_is_refused_in_a_sentence(
    asked: Asker, route: str, body: bytes, said: str
) -> None:
    told = asked(route, body)
    assert told.status == 400
    assert said in told.json()["error"]["message"]


@pytest.mark.parametrize(
    ("limits", "code"),
    [
        ({"logit_bias": {"999": 1}}, 400),
        ({"structured_outputs": {"regex": "("}}, 400),
        ({"structured_outputs": {"json": {"type": "no type"}}}, 400),
    ],
)
def test_what_a_card_refuses_has_its_status_streamed_too(
    asked: Asker, limits: dict[str, Any], code: int
) -> None:
    for stream in (False, True):
        body = {"prompt": "a", "stream": stream, "max_tokens": 3, **limits}
        told = asked("/v1/completions", json.dumps(body).encode())
        assert told.status == code, told.body
        check(told)


def test_pairs_of_surrogates_are_characters(asked: Asker) -> None:
    told = asked("/tokenize", b'{"prompt": "\\ud83d\\ude00 \\\\ud800"}')
    assert told.status == 200
    assert told.json()["count"] == 4 + 1 + 6
