"""How a stream ends that does not end well: a status before its first token, an event after it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from served_app import Told, ask
from thread_cards import MODEL, model_context

from qaic_ray.errors import FleetClosed
from qaic_ray.fleet.pending_row import PendingRow
from qaic_ray.options import ServeOptions
from qaic_ray.rows import ErrorClass, FinishReason, Prompt, Row
from qaic_ray.runs.token_streams import TokenDelta
from qaic_ray.serve.http.app import create_app
from qaic_ray.serve.http.service import Service

BODY = {"prompt": "a", "max_tokens": 9, "temperature": 0}
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/completions": BODY,
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 9},
    "/v1/responses": {"input": "a", "max_output_tokens": 9},
}


class ToldFleet:
    """Gives every prompt to a function of the test, which says what becomes of it."""

    is_closed = False
    engines: dict[str, Any] = {}  # noqa: RUF012
    num_waiting = 0

    def __init__(self, tell: Callable[[PendingRow], None]) -> None:
        self._tell = tell

    def submit(self, prompt: Prompt, *, wait: bool = True) -> PendingRow:
        pending = PendingRow(prompt, lambda _: None)
        asyncio.get_running_loop().call_later(0.01, self._tell, pending)
        return pending


def answered(tell: Callable[[PendingRow], None], route: str, *, stream: bool) -> Told:
    service = Service(ServeOptions(), (MODEL,), ToldFleet(tell))
    service.became_ready(model_context())
    body = json.dumps({**ROUTES[route], "stream": stream}).encode()
    return asyncio.run(ask(create_app(service), route, body))


def row(text: str) -> Row:
    return Row(0, "", text, FinishReason.STOP, token_ids=tuple(text.encode()), prompt_tokens=1)


def text_of(told: Told) -> str:
    events = [json.loads(event) for event in told.events() if event != "[DONE]"]
    choices = [choice for event in events for choice in event.get("choices", ())]
    return "".join(
        choice["text"] if "text" in choice else choice["delta"].get("content", "")
        for choice in choices
    ) + "".join(event["delta"] for event in events if isinstance(event.get("delta"), str))


@pytest.mark.parametrize("route", ROUTES)
def test_another_answer_after_the_first_token_is_an_error_event(route: str) -> None:
    def again(pending: PendingRow) -> None:
        pending.told(TokenDelta(0, 0, "xy", (3, 4), restarted=True))
        pending.finish(row("xyz"))

    def tell(pending: PendingRow) -> None:
        pending.told(TokenDelta(0, 0, "ab", (1, 2)))
        asyncio.get_running_loop().call_later(0.02, again, pending)

    told = answered(tell, route, stream=True)
    *_, last = told.events()
    error = json.loads(last)["error"]
    assert (error["code"], error["type"]) == ("answer_restarted", "internal_error")
    assert "xy" not in text_of(told)


@pytest.mark.parametrize("route", ROUTES)
def test_another_answer_before_the_first_token_is_the_answer(route: str) -> None:
    whole = row("xyz")

    def tell(pending: PendingRow) -> None:
        pending.told(TokenDelta(0, 0, "", (), restarted=True))
        pending.told(TokenDelta(0, 0, "xy", (3, 4), restarted=True))
        pending.told(TokenDelta(0, 0, "z", (5,), row=whole))
        pending.finish(whole)

    told = answered(tell, route, stream=True)
    assert (told.status, text_of(told)) == (200, "xyz")
    assert "error" not in told.events()[-1] or route == "/v1/responses"


@pytest.mark.parametrize("route", ROUTES)
def test_a_fleet_that_ends_says_so_by_its_status_or_by_an_event(route: str) -> None:
    def at_once(pending: PendingRow) -> None:
        pending.fail(FleetClosed("Every card was lost."))

    def later(pending: PendingRow) -> None:
        pending.told(TokenDelta(0, 0, "ab", (1, 2)))
        asyncio.get_running_loop().call_later(0.02, at_once, pending)

    for stream in (False, True):
        told = answered(at_once, route, stream=stream)
        assert (told.status, told.headers["retry-after"]) == (503, "5")
        assert told.json()["error"]["code"] == "fleet_closed"
    assert answered(later, route, stream=False).status == 503
    told = answered(later, route, stream=True)
    assert (told.status, text_of(told)) == (200, "ab")
    assert json.loads(told.events()[-1])["error"]["code"] == "fleet_closed"


@pytest.mark.parametrize(
    ("error_class", "status"), [(ErrorClass.DEVICE, 500), (ErrorClass.REFUSED, 400)]
)
def test_a_row_without_an_answer_has_its_status_streamed_or_not(
    error_class: ErrorClass, status: int
) -> None:
    def tell(pending: PendingRow) -> None:
        failed = Row.failed(pending.prompt, "It went wrong.", error_class=error_class)
        pending.told(TokenDelta(0, 0, "", row=failed))
        pending.finish(failed)

    for stream in (False, True):
        told = answered(tell, "/v1/completions", stream=stream)
        assert (told.status, told.json()["error"]["message"]) == (status, "It went wrong.")
