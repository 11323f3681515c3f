"""Tokens of streamed rows as a reader gets them, under any order of what workers say."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from hypothesis import given
from hypothesis import strategies as st
from simulated_cards import DirectReader, SimulatedCards, answer

from qaic_ray.dispatch.dispatcher import RunShard, TokensGenerated
from qaic_ray.rows import FinishReason, Prompt, Row, Sample, TokenChunk
from qaic_ray.runs.driver import Audience, Driver
from qaic_ray.runs.token_streams import RowStream, TokenDelta


class Reader:
    """Joins what it is told, as the documentation says."""

    def __init__(self) -> None:
        self.text: dict[tuple[int, int], str] = {}
        self.token_ids: dict[tuple[int, int], tuple[int, ...]] = {}
        self.restarts = 0
        self.rows: dict[tuple[int, int], Row] = {}

    def hear(self, deltas: Iterable[TokenDelta]) -> None:
        for delta in deltas:
            at = delta.index, delta.choice
            assert at not in self.rows, "something came after the end"
            if delta.restarted:
                self.restarts += 1
                self.text[at], self.token_ids[at] = "", ()
            self.text[at] = self.text.get(at, "") + delta.text
            self.token_ids[at] = self.token_ids.get(at, ()) + delta.token_ids
            if delta.row is not None:
                self.rows[at] = delta.row


def text_of(token_ids: Iterable[int]) -> str:
    return "".join(chr(ord("a") + token_id) for token_id in token_ids)


def chunks_of(token_ids: list[int], sizes: list[int], *, lag: int) -> list[TokenChunk]:
    """An answer in chunks; its text is `lag` tokens behind."""
    chunks, at, num_chars = [], 0, 0
    for size in sizes:
        end = min(len(token_ids), at + size)
        if end > at:
            text = text_of(token_ids[: max(0, end - lag)])
            ids = tuple(token_ids[at:end])
            chunks.append(TokenChunk(7, 0, num_chars, text[num_chars:], at, ids))
            at, num_chars = end, len(text)
    return chunks


def row_of(token_ids: list[int]) -> Row:
    return Row(7, "p", text_of(token_ids), FinishReason.STOP, token_ids=tuple(token_ids))


ANSWER = st.lists(st.integers(0, 2), min_size=1, max_size=8)
SIZES = st.lists(st.integers(1, 3), max_size=8)


@given(
    answers=st.lists(ANSWER, min_size=1, max_size=3),
    attempts=st.lists(st.tuples(st.integers(0, 2), st.sampled_from("AB"), SIZES), max_size=5),
    lag=st.integers(0, 2),
    data=st.data(),
)
def test_any_order_of_attempts_joins_to_the_row(
    answers: list[list[int]],
    attempts: list[tuple[int, str, list[int]]],
    lag: int,
    data: st.DataObject,
) -> None:
    """Attempts of one worker follow each other, those of two interleave; each may break off."""
    queues: dict[str, list[TokenChunk]] = {"A": [], "B": []}
    for number, worker, sizes in attempts:
        queues[worker] += chunks_of(answers[number % len(answers)], sizes, lag=lag)
    stream, reader = RowStream(7), Reader()
    while queues["A"] or queues["B"]:
        worker = data.draw(st.sampled_from([name for name, queue in queues.items() if queue]))
        delta = stream.take(worker, queues[worker].pop(0))
        reader.hear([] if delta is None else [delta])
    row = row_of(data.draw(st.sampled_from(answers)))
    reader.hear(stream.end(row))
    assert reader.text == {(7, 0): row.text}
    assert reader.token_ids == {(7, 0): row.token_ids}
    assert reader.rows == {(7, 0): row}
    if len(answers) == 1:
        assert reader.restarts == 0, "the same answer was told anew"


def test_another_answer_of_a_later_attempt_is_told_at_once() -> None:
    stream = RowStream(7)
    assert stream.take("A", TokenChunk(7, 0, 0, "ab", 0, (0, 1))) == TokenDelta(7, 0, "ab", (0, 1))
    assert stream.take("B", TokenChunk(7, 0, 0, "a", 0, (0,))) is None
    later = stream.take("B", TokenChunk(7, 0, 1, "c", 1, (2,)))
    assert later == TokenDelta(7, 0, "ac", (0, 2), restarted=True)
    assert stream.take("A", TokenChunk(7, 0, 2, "a", 2, (0,))) is None


def test_every_choice_and_a_row_without_an_answer_have_an_end() -> None:
    stream = RowStream(0)
    stream.take("A", TokenChunk(0, 1, 0, "a", 0, (0,)))
    failed = stream.end(Row.failed(Prompt(0, "p"), "no"))
    assert [(delta.choice, delta.finish_reason) for delta in failed] == [
        (0, FinishReason.ERROR),
        (1, FinishReason.ERROR),
    ]
    samples = tuple(Sample(text, (1,), FinishReason.LENGTH) for text in "xy")
    row = Row(0, "p", "x", FinishReason.STOP, choices=samples)
    assert [(delta.text, delta.finish_reason) for delta in RowStream(0).end(row)] == [
        ("x", FinishReason.LENGTH),
        ("y", FinishReason.LENGTH),
    ]


# -- through the driver


class StreamingCards(SimulatedCards):
    """Each prompt with `stream` gets its first letter at once, before its row comes."""

    def run(self, shard: RunShard) -> None:
        chunks = []
        for prompt in shard.prompts:
            if prompt.stream:
                text = answer(prompt).text[:1]
                chunks.append(TokenChunk(prompt.index, 0, 0, text, 0, (0,)))
        if chunks:
            self._later(0.0, TokensGenerated(shard.worker, tuple(chunks)))
        super().run(shard)


def drive(cards: SimulatedCards, prompts: list[Prompt], **audience: object) -> list[Row]:
    rows: list[Row] = []
    told = Audience(on_row=rows.append, **audience)  # type: ignore[arg-type]
    Driver(cards, prompts, told, clock=cards.clock, reader=DirectReader).run()
    return rows


def test_the_driver_tells_what_was_asked_for_and_nothing_else() -> None:
    reader = Reader()
    prompts = [Prompt(i, "same", stream=i % 3 == 0) for i in range(20)]
    dying = StreamingCards([0.0, 0.0], dies=lambda card, prompt: card == "card 1")
    rows = drive(dying, prompts, on_tokens=reader.hear)
    streamed = {(row.index, 0): row.text for row in rows if row.index % 3 == 0}
    assert reader.text == streamed
    assert reader.rows.keys() == streamed.keys()


def test_rows_are_cancelled_where_they_are() -> None:
    """One that runs, one that waits, one that is not read yet, one that is done, and no row."""
    reader = Reader()
    cards = StreamingCards([0.0], slots=2)
    cancel: list[Callable[[Iterable[int]], None]] = []
    prompts = [Prompt(i, "same", stream=i == 9) for i in range(6000)]

    def on_row(row: Row) -> None:
        rows.append(row)
        if row.index == 1:
            cancel[0]([0, 2, 9, 5500, 10**6])

    rows: list[Row] = []
    audience = Audience(on_row=on_row, on_tokens=reader.hear, on_begin=cancel.append)
    result = Driver(cards, prompts, audience, clock=cards.clock, reader=DirectReader).run()
    aborted = [row.index for row in rows if row.finish_reason is FinishReason.ABORT]
    assert aborted == [2, 9, 5500]
    assert [row.index for row in rows] == list(range(6000))
    ((worker, indexes),) = cards.cancelled
    assert worker == "card 0"
    assert 2 in indexes
    assert reader.rows[9, 0].finish_reason is FinishReason.ABORT
    assert result.total.rows == 6000
    assert result.total.failed_rows == 3
