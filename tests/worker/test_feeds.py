"""Tokens from the engine's thread to who sends them on: what is taken joins to the rows."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from formula_program import EOS, VOCAB, FormulaProgram
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from qaic_ray.contract import Specializations
from qaic_ray.engine.engine import Engine
from qaic_ray.errors import RowError
from qaic_ray.model.tokenizer import Tokenizer
from qaic_ray.options import Generation
from qaic_ray.rows import FinishReason, Prompt, Row, TokenChunk
from qaic_ray.runs.token_streams import RowStream, TokenDelta
from qaic_ray.sampling_params import SamplingParams
from qaic_ray.worker import feeds
from qaic_ray.worker.feeds import StreamedSequence, TokenFeed
from qaic_ray.worker.text import Answer, Answerer

LETTERS = [chr(ord("A") + index) for index in range(VOCAB)]


def tokenizer() -> Tokenizer:
    backend = Backend(
        models.WordLevel(dict(zip(LETTERS, range(VOCAB), strict=True)), unk_token="A")
    )
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return Tokenizer(backend, {}, (EOS,))


def taken(feed: TokenFeed) -> list[TokenChunk]:
    """What is there; nothing is waited for."""
    return (feed.take() or []) if feed._is_new else []


def engine_and_answerer() -> tuple[Engine, Answerer]:
    shapes = Specializations.build(batch_size=2, prompt_len=4, ctx_len=24, continuous=True)
    engine = Engine(FormulaProgram(shapes, memory=2))  # type: ignore[arg-type]
    return engine, Answerer(tokenizer(), Generation(), engine=engine, vocab_size=VOCAB)


STOPS = st.lists(st.text(st.sampled_from(LETTERS[:40]), min_size=1, max_size=3), max_size=3)
PROMPT = st.tuples(
    st.text(st.sampled_from(LETTERS), min_size=1, max_size=6),
    st.builds(
        SamplingParams,
        max_tokens=st.integers(1, 12),
        n=st.integers(1, 2),
        temperature=st.just(1.5),
        stop=STOPS.map(tuple),
        stop_token_ids=st.lists(st.integers(0, VOCAB - 1), max_size=3).map(tuple),
        include_stop_str_in_output=st.booleans(),
        logprobs=st.sampled_from([None, 1]),
    ),
)


@given(prompts=st.lists(PROMPT, min_size=1, max_size=4), data=st.data())
def test_any_order_of_steps_reads_and_cancels_joins_to_the_rows(
    prompts: list[tuple[str, SamplingParams]], data: st.DataObject
) -> None:
    engine, answerer = engine_and_answerer()
    feed = TokenFeed()
    answers: list[Answer] = []
    for index, (text, params) in enumerate(prompts):
        answers.append(answerer.begin(Prompt(index, text, sampling=params, stream=True)))
        feed.add(answers[-1].streamed)
        for sequence, reader in zip(answers[-1].sequences, answers[-1].readers, strict=True):
            engine.add(sequence, reader)
    chunks: list[TokenChunk] = []
    aborted: set[int] = set()
    while engine.busy:
        if data.draw(st.integers(0, 9)) == 0:
            index = data.draw(st.integers(0, len(prompts) - 1))
            left = [s for s in answers[index].sequences if s.finish_reason is None]
            feed.drop(left)
            for sequence in left:
                engine.abort(sequence)
            engine.batcher.check()
            aborted |= {index} if left else set()
        done = engine.step()
        feed.step_made(done)
        for finished in done:
            answers[finished.sequence.key].finished.append(finished)
        if data.draw(st.booleans()):
            chunks += taken(feed)
    chunks += taken(feed)
    assert not feed._running, "it is held for nothing"
    for index, answer in enumerate(answers):
        stream = RowStream(index)
        deltas = [stream.take("card 0", chunk) for chunk in chunks if chunk.index == index]
        row = answerer.row(answer, worker="card 0", attempts=1)
        assert (row.finish_reason is FinishReason.ABORT) == (index in aborted)
        told = [*filter(None, deltas), *stream.end(row)]
        assert not any(delta.restarted for delta in told)
        if row.ok:
            check(row, told)


def check(row: Row, told: list[TokenDelta]) -> None:
    for number, choice in enumerate(row.choices or [row]):
        of_choice = [delta for delta in told if delta.choice == number]
        assert "".join(delta.text for delta in of_choice) == choice.text
        ids = [token_id for delta in of_choice for token_id in delta.token_ids]
        assert tuple(ids) == choice.token_ids
        logprobs = [entry for delta in of_choice for entry in delta.logprobs]
        assert tuple(logprobs) == (choice.logprobs or ())


def test_everything_but_a_stop_string_is_told_before_the_row_is_there() -> None:
    engine, answerer = engine_and_answerer()
    answer = answerer.begin(Prompt(0, "HELLO", stream=True))
    feed = TokenFeed()
    feed.add(answer.streamed)
    engine.add(answer.sequences[0])
    texts = []
    while engine.busy:
        done = engine.step()
        feed.step_made(done)
        texts += [chunk.text for chunk in taken(feed)]
        answer.finished += done
    row = answerer.row(answer, worker="", attempts=1)
    assert "".join(texts) == row.text
    assert len(row.token_ids) - texts.count("") == len(row.text), "a step gave two tokens"


def test_ended_rows_that_nobody_takes_are_not_held_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(feeds, "MAX_ENDED", 2)
    engine, answerer = engine_and_answerer()
    feed = TokenFeed()
    params = SamplingParams(max_tokens=2)
    for index in range(5):
        answer = answerer.begin(Prompt(index, "HI", sampling=params, stream=True))
        feed.add(answer.streamed)
        engine.add(answer.sequences[0])
    while engine.busy:
        feed.step_made(engine.step())
    assert [chunk.index for chunk in taken(feed)] == [3, 4]


def test_a_row_that_cannot_be_read_is_told_no_more() -> None:
    engine, answerer = engine_and_answerer()
    answer = answerer.begin(Prompt(0, "HI", stream=True))

    def refuse(_: object) -> None:
        raise ValueError("no")

    (streamed,) = answer.streamed
    broken = StreamedSequence(streamed.sequence, 0, SimpleNamespace(read=refuse, stop=None))  # type: ignore[arg-type]
    feed = TokenFeed()
    feed.add([broken])
    engine.add(answer.sequences[0])
    engine.step()
    engine.step()
    with pytest.raises(RowError, match="ValueError"):
        broken.read()
    feed.step_made([])
    assert taken(feed) == []
    feed.step_made([])
    assert not feed._is_new, "it costs something"


def test_a_closed_feed_has_an_end() -> None:
    feed = TokenFeed()
    feed.close()
    assert feed.take() is None


def test_what_came_before_the_end_is_told() -> None:
    engine, answerer = engine_and_answerer()
    answer = answerer.begin(Prompt(3, "abc", stream=True))
    feed = TokenFeed()
    feed.add(answer.streamed)
    engine.add(answer.sequences[0], None)
    for _ in range(3):
        feed.step_made(engine.step())
    feed.close()
    told = tuple(token_id for chunk in feed.take() or () for token_id in chunk.token_ids)
    assert told
    assert told == tuple(answer.sequences[0].output_ids)
    assert feed.take() is None
