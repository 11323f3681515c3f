"""Tokens between two replicas: what is sent arrives, in order, and of nobody else."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from qaic_ray.runs.token_streams import TokenDelta
from qaic_ray.sampling_params import TokenLogprob
from qaic_ray.serve.ray_serve.question import Inbox
from qaic_ray.serve.ray_serve.token_mail import TokenInbox, TokenOutbox, Told, packed, unpacked

FLOATS = st.floats(allow_nan=False)
IDS = st.integers(0, 2**31)
LOGPROBS = st.builds(
    TokenLogprob, IDS, FLOATS, st.lists(st.tuples(IDS, FLOATS), max_size=2).map(tuple)
)
DELTAS = st.builds(
    TokenDelta,
    st.just(-1),
    st.integers(0, 5),
    st.text(st.characters(exclude_categories=[])),
    st.lists(IDS, max_size=3).map(tuple),
    st.lists(LOGPROBS, max_size=2).map(tuple),
    restarted=st.booleans(),
)
TOLD = st.lists(st.builds(Told, IDS, DELTAS), max_size=4)


@given(TOLD)
def test_a_message_is_read_as_it_was_written(told: list[Told]) -> None:
    whole = packed(told)
    assert int.from_bytes(whole[:4], "big") == len(whole) - 4
    assert unpacked(whole[4:]) == told


def test_a_delta_of_probability_zero_survives() -> None:
    delta = TokenDelta(-1, 0, "", (1,), (TokenLogprob(1, -math.inf),))
    assert unpacked(packed([Told(0, delta)])[4:]) == [Told(0, delta)]


def told_of(number: int, text: str) -> Told:
    return Told(number, TokenDelta(-1, 0, text, (number,)))


def run(work: Callable[[TokenInbox, Inbox, list[list[Told]]], Awaitable[None]]) -> list[list[Told]]:
    came: list[list[Told]] = []

    async def main() -> None:
        def take(told: Sequence[Told]) -> None:
            came.append(list(told))

        inbox = TokenInbox(take)
        where = await inbox.open("127.0.0.1")
        await work(inbox, where, came)
        await inbox.close()

    asyncio.run(main())
    return came


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.001)


def test_everything_that_is_put_arrives_in_order_and_a_step_in_one_message() -> None:
    async def work(inbox: TokenInbox, where: Inbox, came: list[list[Told]]) -> None:
        outbox = TokenOutbox(where)
        outbox.put([told_of(1, "a"), told_of(2, "b")])
        await until(lambda: len(came) == 1)
        outbox.put([told_of(3, "c")])
        outbox.put([told_of(4, "d")])
        await until(lambda: sum(map(len, came)) == 4)
        await outbox.close()

    came = run(work)
    assert [one.call for message in came for one in message] == [1, 2, 3, 4]
    assert came == [[told_of(1, "a"), told_of(2, "b")], [told_of(3, "c"), told_of(4, "d")]]


def test_two_replicas_of_cards_have_a_connection_each() -> None:
    async def work(inbox: TokenInbox, where: Inbox, came: list[list[Told]]) -> None:
        first, second = TokenOutbox(where), TokenOutbox(where)
        first.put([told_of(1, "a")])
        second.put([told_of(2, "b")])
        await until(lambda: len(came) == 2)
        await first.close()
        second.put([told_of(2, "c")])
        await until(lambda: len(came) == 3)
        await second.close()

    assert {one.call for message in run(work) for one in message} == {1, 2}


def test_who_does_not_show_the_secret_is_not_heard() -> None:
    async def work(inbox: TokenInbox, where: Inbox, came: list[list[Told]]) -> None:
        stranger = TokenOutbox(replace(where, secret="0" * 64))
        stranger.put([told_of(1, "a")])
        await until(lambda: stranger.is_broken)

    assert run(work) == []


def test_an_outbox_is_broken_when_its_inbox_is_gone_and_takes_nothing_more() -> None:
    async def work(inbox: TokenInbox, where: Inbox, came: list[list[Told]]) -> None:
        outbox = TokenOutbox(where)
        outbox.put([told_of(1, "a")])
        await until(lambda: len(came) == 1)
        await inbox.close()
        await until(lambda: outbox.is_broken)
        outbox.put([told_of(2, "b")])
        nobody = TokenOutbox(where)
        await until(lambda: nobody.is_broken)

    assert [one.call for message in run(work) for one in message] == [1]


def test_a_message_that_is_too_long_ends_its_connection() -> None:
    async def work(inbox: TokenInbox, where: Inbox, came: list[list[Told]]) -> None:
        reader, writer = await asyncio.open_connection(where.host, where.port)
        writer.write(where.secret.encode() + b"\xff\xff\xff\xff")
        assert await reader.read() == b""
        writer.close()

    assert run(work) == []
