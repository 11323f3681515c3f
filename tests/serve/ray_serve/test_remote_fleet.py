"""The fleet of an interface's replica, over replicas that a test plays: no Ray, no sockets."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qaic_ray.errors import FleetClosed
from qaic_ray.fleet.pending_row import PendingRow
from qaic_ray.rows import ErrorClass, FinishReason, Prompt, Row
from qaic_ray.runs.token_streams import TokenDelta
from qaic_ray.serve.ray_serve.question import Inbox, Question
from qaic_ray.serve.ray_serve.remote_fleet import MAX_LOSSES, RemoteFleet, ReplicaLost
from qaic_ray.serve.ray_serve.replica_choice import ReplicaChoice
from qaic_ray.serve.ray_serve.token_mail import Told

INBOX = Inbox("127.0.0.1", 1, "secret")


def row_of(prompt: Prompt, text: str) -> Row:
    """As a replica answers: its index is the replica's own."""
    ids = tuple(text.encode())
    return Row(prompt.index + 100, prompt.text, text, FinishReason.STOP, token_ids=ids)


def told(question: Question, text: str, *, restarted: bool = False) -> Told:
    delta = TokenDelta(-1, 0, text, tuple(text.encode()), restarted=restarted)
    return Told(question.call, delta)


class Replicas:
    """Answers questions when the test says so."""

    def __init__(self) -> None:
        self.asked: list[Question] = []
        self.answers: list[asyncio.Future[Row]] = []
        self.fleet = RemoteFleet(self.ask, INBOX, ReplicaChoice())

    async def ask(self, question: Question) -> Row:
        self.asked.append(question)
        self.answers.append(asyncio.get_running_loop().create_future())
        return await self.answers[-1]

    async def asked_again(self, number: int) -> Question:
        async with asyncio.timeout(30):
            while len(self.asked) < number:
                await asyncio.sleep(0)
        return self.asked[-1]

    def lose(self) -> None:
        self.answers[-1].set_exception(ReplicaLost("it died"))

    def answer(self, text: str) -> None:
        self.answers[-1].set_result(row_of(self.asked[-1].prompt, text))


def run(work: Callable[[Replicas], Awaitable[None]]) -> None:
    async def main() -> None:
        replicas = Replicas()
        await work(replicas)
        await replicas.fleet.close()
        assert replicas.fleet.num_open == 0

    asyncio.run(main())


async def text_of(pending: PendingRow) -> str:
    """What a reader of the stream has in the end."""
    text = ""
    async for delta in pending.async_deltas():
        text = delta.text if delta.restarted else text + delta.text
    return text


def prompt(*, stream: bool = False) -> Prompt:
    return Prompt(7, "a", stream=stream, token_ids=(1,))


def test_a_row_comes_under_the_index_that_its_prompt_got_here() -> None:
    async def work(replicas: Replicas) -> None:
        first, second = replicas.fleet.submit(prompt()), replicas.fleet.submit(prompt())
        await replicas.asked_again(2)
        for answer, question in zip(replicas.answers, replicas.asked, strict=True):
            answer.set_result(row_of(question.prompt, "x"))
        assert [(await p.async_row()).index for p in (first, second)] == [0, 1]

    run(work)


def test_tokens_come_before_the_row_and_join_to_its_text() -> None:
    async def work(replicas: Replicas) -> None:
        pending = replicas.fleet.submit(prompt(stream=True))
        question = await replicas.asked_again(1)
        replicas.fleet.told([told(question, "he")])
        assert [delta.text for delta in pending.take_deltas()] == ["he"]
        replicas.fleet.told([told(question, "l")])
        replicas.answer("hello")
        assert await text_of(pending) == "llo"
        assert (await pending.async_row()).text == "hello"

    run(work)


def test_a_replica_that_dies_before_the_first_token_is_replaced_unseen() -> None:
    async def work(replicas: Replicas) -> None:
        pending = replicas.fleet.submit(prompt(stream=True))
        dead = await replicas.asked_again(1)
        replicas.lose()
        await replicas.asked_again(2)
        replicas.fleet.told([told(dead, "late words of the dead")])
        replicas.answer("right")
        assert await text_of(pending) == "right"
        assert (await pending.async_row()).attempts == 2

    run(work)


def test_a_replica_that_dies_after_the_first_token_ends_the_stream_with_an_error() -> None:
    async def work(replicas: Replicas) -> None:
        pending = replicas.fleet.submit(prompt(stream=True))
        replicas.fleet.told([told(await replicas.asked_again(1), "be")])
        replicas.lose()
        with pytest.raises(FleetClosed, match="ask again"):
            await pending.async_row()
        assert len(replicas.asked) == 1

    run(work)


def test_an_answer_that_nobody_has_seen_any_of_is_made_again_at_any_time() -> None:
    async def work(replicas: Replicas) -> None:
        pending = replicas.fleet.submit(prompt())
        await replicas.asked_again(1)
        replicas.lose()
        await replicas.asked_again(2)
        replicas.answer("right")
        assert (await pending.async_row()).text == "right"

    run(work)


def test_a_prompt_that_kills_replicas_is_given_up() -> None:
    async def work(replicas: Replicas) -> None:
        pending = replicas.fleet.submit(prompt())
        for number in range(1, MAX_LOSSES + 1):
            await replicas.asked_again(number)
            replicas.lose()
        row = await pending.async_row()
        assert row.error_class is ErrorClass.DEVICE
        assert len(replicas.asked) == MAX_LOSSES

    run(work)


def test_a_cancelled_prompt_is_cancelled_where_it_runs() -> None:
    async def work(replicas: Replicas) -> None:
        pending = replicas.fleet.submit(prompt(stream=True))
        await replicas.asked_again(1)
        pending.cancel()
        assert (await pending.async_row()).finish_reason is FinishReason.ABORT
        assert replicas.answers[0].cancelled()

    run(work)


def test_a_fault_is_told_to_who_waits() -> None:
    async def work(replicas: Replicas) -> None:
        pending = replicas.fleet.submit(prompt())
        await replicas.asked_again(1)
        replicas.answers[0].set_exception(ValueError("a fault"))
        row = await pending.async_row()
        assert row.error is not None
        assert "ValueError" in row.error

    run(work)


def test_any_thread_may_submit_and_a_closed_fleet_takes_nothing() -> None:
    async def work(replicas: Replicas) -> None:
        waiting = asyncio.ensure_future(
            asyncio.to_thread(lambda: replicas.fleet.submit(prompt()).row(30).text)
        )
        await replicas.asked_again(1)
        replicas.answer("x")
        assert await waiting == "x"
        open_one = replicas.fleet.submit(prompt())
        await replicas.asked_again(2)
        await replicas.fleet.close()
        assert (await open_one.async_row()).finish_reason is FinishReason.ABORT
        with pytest.raises(FleetClosed):
            replicas.fleet.submit(prompt())

    run(work)


@given(
    answers=st.lists(st.text("ab", max_size=4), min_size=1, max_size=3),
    cuts=st.lists(st.integers(0, 5), max_size=4),
    is_lost=st.booleans(),
)
def test_a_stream_is_its_row_or_an_error_whatever_happens(
    answers: list[str], cuts: list[int], is_lost: bool
) -> None:
    """A replica heals cards of its own: an attempt begins anew, with another answer or the same."""

    async def work(replicas: Replicas) -> None:
        pending = replicas.fleet.submit(prompt(stream=True))
        question = await replicas.asked_again(1)
        has_told = False
        for number, answer in enumerate(answers):
            for begin, end in zip([0, *cuts], [*cuts, 9], strict=True):
                piece = answer[begin:end] if begin <= end else ""
                has_told = has_told or bool(piece)
                if begin <= end and answer[:begin] + piece == answer[:end]:
                    replicas.fleet.told([told(question, piece, restarted=number > 0 and not begin)])
                else:
                    break
        if is_lost:
            replicas.lose()
            if has_told:
                with pytest.raises(FleetClosed):
                    await text_of(pending)
                return
            await replicas.asked_again(2)
        replicas.answer(answers[-1])
        assert await text_of(pending) == answers[-1]

    run(work)
