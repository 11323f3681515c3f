"""The load of the server's benchmark: what it counts is what the server sent."""

from __future__ import annotations

import asyncio
import json
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from typing import Any

import pytest
from benchmark_modules import benchmark_module
from hypothesis import given
from hypothesis import strategies as st
from served_app import serving
from thread_cards import formula_fleet, service_of

load = benchmark_module("serving.load")
latency = benchmark_module("serving.latency")
picture = benchmark_module("serving.picture")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with formula_fleet(num_cards=1, slots=4) as (fleet, _), serving(service_of(fleet)) as url:
        yield url


def body(number: int, **more: Any) -> dict[str, Any]:
    return {"prompt": f"p{number}", "max_tokens": 7, "temperature": 0, "ignore_eos": True, **more}


def test_tokens_times_and_errors_are_counted(address: str) -> None:
    bodies = [body(0), body(1, max_tokens=3), body(2, temperature=-1), body(3)]
    found = asyncio.run(load.run(address, load.Plan("/v1/completions", bodies, clients=2)))
    figures = load.measured(found, 0.0)
    assert (figures["requests"], figures["errors"], figures["tokens"]) == (4, 1, 17)
    assert figures["first_error"].startswith("400: ")
    assert figures["ttft_ms"]["p50"] > 0.0
    for request in found:
        assert request.begun_s < request.ended_s
        if not request.error:
            # An event a token that ends a character, at most; then usage.
            assert 2 <= len(request.events_s) <= request.tokens + 2
            assert request.events_s == sorted(request.events_s)


def test_requests_begin_at_their_times(address: str) -> None:
    plan = load.Plan("/v1/completions", [body(n) for n in range(4)], at_s=[0.0, 0.05, 0.05, 0.2])
    found = asyncio.run(load.run(address, plan))
    begun = [request.begun_s - found[0].begun_s for request in found]
    for at_s, planned_s in zip(begun, plan.at_s, strict=True):
        assert at_s >= planned_s - 0.02
    assert load.measured(found, 0.1)["requests"] == 4
    assert len([r for r in found if r.begun_s - found[0].begun_s >= 0.1]) == 1


class Wire:
    """A connection that is closed, and sends nothing."""

    def write(self, data: bytes) -> None:
        pass

    def close(self) -> None:
        pass


@given(st.lists(st.integers(0, 600), max_size=12))
def test_events_are_counted_wherever_the_wire_cuts_them(cuts: list[int]) -> None:
    events = [f"data: {json.dumps({'n': n, 'text': 'data: {'})}\n\n" for n in range(5)]
    events[-1] = 'data: {"choices":[],"usage":{"prompt_tokens":2,"completion_tokens":4}}\n\n'
    payload = "".join([*events, "data: [DONE]\n\n"]).encode()
    raw = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    raw += b"%x\r\n%s\r\n0\r\n\r\n" % (len(payload), payload)
    ends = sorted({min(cut, len(raw)) for cut in cuts} | {len(raw)})

    async def told() -> Any:
        connection, request = load.Connection(), load.Request(0.0)
        connection.connection_made(Wire())
        done = connection.ask(b"", request)
        begin = 0
        for end in ends:
            connection.data_received(raw[begin:end])
            begin = end
        assert done.done()
        return request

    request = asyncio.run(told())
    assert (request.status, request.error, request.tokens) == (200, "", 4)
    assert len(request.events_s) == 5


def test_what_is_offered_is_the_share_that_was_asked_for() -> None:
    bodies, at_s = latency.arrivals(0.5, 400.0)
    needed = sum(latency.card_s(one["max_tokens"]) for one in bodies)
    assert needed / (latency.CARDS * 400.0) == pytest.approx(0.5, rel=0.1)
    assert at_s == sorted(at_s)
    assert len({one["prompt"] for one in bodies}) == len(bodies)


def test_the_picture_has_a_point_a_load_and_every_name() -> None:
    lines = {"one & two": {0.2: 20.0, 0.8: 22.0}, "three": {0.2: 30.0, 0.8: 90.0}}
    root = ET.fromstring(picture.draw(lines, {"limit": 44.0}, "Load", ["note", "below"]))
    svg = "{http://www.w3.org/2000/svg}"
    texts = {element.text for element in root.iter(f"{svg}text")}
    assert {"Load", "note", "below", "one & two", "three", "limit", "20%", "80%"} <= texts
    circles = [c.findtext(f"{svg}title") for c in root.iter(f"{svg}circle")]
    assert len(circles) == 4
    assert "three: 90.0 ms at 80%" in circles
