"""Clients that vanish, stall and send too much: nothing of theirs is left, others get theirs."""

from __future__ import annotations

import asyncio
import gc
import json
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from benchmark_modules import benchmark_module
from served_app import JSON, Told, ask, scope_of, serving, until
from thread_cards import formula_fleet, service_of, text_of

from qaic_ray.serve.http.app import create_app

rude = benchmark_module("serving.rude")
COMPLETIONS = "/v1/completions"


def num_open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def bodies(count: int, max_tokens: int) -> list[dict[str, Any]]:
    return [
        {"prompt": f"client {number}", "max_tokens": max_tokens, "temperature": 0}
        for number in range(count)
    ]


@pytest.mark.parametrize(
    ("count", "at_once"), [(150, 50), pytest.param(1000, 100, marks=pytest.mark.slow)]
)
def test_clients_that_go_at_any_moment_leave_nothing(
    count: int, at_once: int, caplog: pytest.LogCaptureFixture
) -> None:
    with formula_fleet(num_cards=2, slots=4, step_s=0.001) as (fleet, cards):
        service = service_of(fleet, max_body_mib=1)
        with serving(service) as url:
            asked = bodies(count, 40)
            where = urlsplit(url)
            before = num_open_files()
            counts, answers = asyncio.run(
                rude.crowd(
                    where.hostname, where.port, path=COMPLETIONS, bodies=asked, at_once=at_once
                )
            )
            until(lambda: service.num_running() == 0, 5.0)
            until(lambda: fleet.num_open == 0, 5.0)
            until(lambda: cards.num_in_slots == 0, 5.0)
            until(lambda: num_open_files() <= before, 5.0)
            assert len(counts) == len(set(rude.KINDS))
            assert answers
            for number, body in answers.items():
                (choice,) = json.loads(body)["choices"]
                assert choice["text"] == text_of(asked[number]["prompt"], 40)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


# -- the app alone, where a client can be as slow as a test wants


async def streamed(app: Any, stop_after: int) -> list[dict[str, Any]]:
    """A request whose client reads so many messages, and no more; those it got."""
    body = {"prompt": "slow", "max_tokens": 400, "stream": True}
    pieces = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
    got: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if pieces:
            return pieces.pop()
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: dict[str, Any]) -> None:
        got.append(message)
        if len(got) > stop_after:
            await asyncio.Event().wait()

    scope = scope_of("POST", COMPLETIONS, [(b"content-type", JSON.encode())])
    async with asyncio.timeout(30):
        await app(scope, receive, send)
    return got


def test_a_client_that_reads_no_more_is_given_up() -> None:
    with formula_fleet(step_s=0.002) as (fleet, cards):
        service = service_of(fleet, client_stall_s=0.2)
        got = asyncio.run(streamed(create_app(service), 5))
        assert len(got) == 6
        until(lambda: fleet.num_open == 0, 2.0)
        until(lambda: cards.num_in_slots == 0, 2.0)
        assert service.num_running() == 0


async def sent(app: Any, pieces: list[bytes], *, more: bool) -> Told:
    """A request whose body comes in pieces; with `more` its end never comes."""
    told = Told()
    left = list(pieces)

    async def receive() -> dict[str, Any]:
        if left:
            piece = left.pop(0)
            return {"type": "http.request", "body": piece, "more_body": more or bool(left)}
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: dict[str, Any]) -> None:
        told.status = message.get("status", told.status)
        told.body += message.get("body", b"")

    scope = scope_of("POST", COMPLETIONS, [(b"content-type", JSON.encode())])
    async with asyncio.timeout(30):
        await app(scope, receive, send)
    return told


def test_bodies_that_are_too_slow_or_too_long_are_refused() -> None:
    with formula_fleet() as (fleet, _):
        service = service_of(fleet, client_stall_s=0.1, max_body_mib=1)
        app = create_app(service)
        slow = asyncio.run(sent(app, [b'{"prompt": '], more=True))
        assert (slow.status, slow.json()["error"]["type"]) == (408, "timeout_error")
        long = asyncio.run(sent(app, [b" " * 2**18] * 5, more=True))
        assert (long.status, long.json()["error"]["type"]) == (413, "invalid_request_error")
        whole = json.dumps({"prompt": "a", "max_tokens": 2, "temperature": 0}).encode()
        padded = asyncio.run(sent(app, [b" " * (2**20 - len(whole)), whole], more=False))
        assert padded.json()["choices"][0]["text"] == text_of("a", 2)


def test_an_answer_that_takes_too_long_ends_streamed_and_not() -> None:
    with formula_fleet(step_s=0.02) as (fleet, cards):
        app = create_app(service_of(fleet, request_timeout_s=0.3))
        asked = {"prompt": "a", "max_tokens": 400}

        async def both() -> tuple[Told, Told]:
            plain = await ask(app, COMPLETIONS, json.dumps(asked).encode())
            return plain, await ask(app, COMPLETIONS, json.dumps(asked | {"stream": True}).encode())

        plain, told = asyncio.run(both())
        assert (plain.status, plain.json()["error"]["code"]) == (408, "request_timeout")
        assert told.status == 200
        assert json.loads(told.events()[-1])["error"]["code"] == "request_timeout"
        until(lambda: cards.num_in_slots == 0 and fleet.num_open == 0, 2.0)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the kernel's own accounting")
def test_memory_is_flat_over_many_requests() -> None:
    """Its growth in the last three quarters, by a line through all samples."""

    def rss_mb() -> float:
        gc.collect()
        return (
            int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
        )

    samples: list[tuple[int, float]] = []
    with formula_fleet(num_cards=2, slots=8) as (fleet, _):
        service = service_of(fleet, max_body_mib=1)
        with serving(service) as url:
            where = urlsplit(url)
            for turn in range(24):
                asyncio.run(
                    rude.crowd(
                        where.hostname, where.port, path=COMPLETIONS, bodies=bodies(250, 6),
                        at_once=40, seed=turn, is_quick=True,
                    )
                )  # fmt: skip
                until(lambda: service.num_running() == 0 and fleet.num_open == 0, 5.0)
                samples.append((turn * 250, rss_mb()))
    kept = samples[len(samples) // 4 :]
    mean_x = sum(x for x, _ in kept) / len(kept)
    mean_y = sum(y for _, y in kept) / len(kept)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in kept)
    slope /= sum((x - mean_x) ** 2 for x, _ in kept)
    assert slope * 10_000 < 10.0, samples  # MB for 10,000 requests
