"""Outputs of rows, and of what rows tell while they come: both say the same in the end."""

from __future__ import annotations

import pickle
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from qaic_ray.api.outputs import GenerationError, Logprob, RequestOutput, StreamedOutput, output_of
from qaic_ray.rows import FinishReason, Prompt, Row, Sample, TokenChunk
from qaic_ray.runs.token_streams import RowStream, TokenDelta
from qaic_ray.sampling_params import TokenLogprob

PROMPT = Prompt(3, "Hi", token_ids=(1, 2))


def decode(ids: tuple[int, ...]) -> str:
    return "".join(chr(97 + i) for i in ids)


ENCODER: Any = SimpleNamespace(
    ids=lambda prompt: list(prompt.token_ids or ()),
    text=lambda prompt: prompt.text,
    tokenizer=SimpleNamespace(decode=decode),
)


def logprob_of(token: int) -> TokenLogprob:
    return TokenLogprob(token, -float(token), ((9, -0.5), (token, -float(token))))


@st.composite
def rows(draw: st.DrawFn) -> tuple[Row, list[TokenDelta]]:
    """A row of one or several choices, and the deltas in which it was told."""
    tokens = st.lists(st.integers(0, 8), min_size=1, max_size=12).map(tuple)
    choices = draw(st.lists(tokens, min_size=1, max_size=3))
    has_logprobs = draw(st.booleans())

    def sample(ids: tuple[int, ...]) -> Sample:
        logprobs = tuple(map(logprob_of, ids)) if has_logprobs else None
        return Sample(decode(ids), ids, FinishReason.LENGTH, None, logprobs)

    samples = tuple(map(sample, choices))
    first = samples[0]
    row = Row(
        index=3,
        prompt="Hi",
        text=first.text,
        finish_reason=first.finish_reason,
        token_ids=first.token_ids,
        logprobs=first.logprobs,
        choices=samples if len(samples) > 1 else (),
        worker="card 0",
        started_at=1000.0,
        ended_at=1004.0,
        queue_s=0.5,
        decode_s=2.0,
    )
    stream, deltas = RowStream(3), []
    for number, ids in enumerate(choices):
        at = 0
        while at < len(ids) and draw(st.booleans()):
            end = draw(st.integers(at + 1, len(ids)))
            logprobs = tuple(map(logprob_of, ids[at:end])) if has_logprobs else ()
            text = decode(ids[at:end])
            chunk = TokenChunk(3, number, at, text, at, ids[at:end], logprobs)
            deltas.append(stream.take("card 0", chunk))
            at = end
    told = [delta for delta in deltas if delta is not None]
    return row, [*told, *stream.end(row)]


@given(rows())
def test_a_stream_ends_with_the_output_of_its_row(made: tuple[Row, list[TokenDelta]]) -> None:
    row, deltas = made
    stream = StreamedOutput("7", PROMPT, ENCODER)
    outputs = [stream.take(delta) for delta in deltas]
    whole = output_of("7", PROMPT, ENCODER, row)
    assert outputs[-1].outputs == whole.outputs
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    assert (outputs[-1].metrics, outputs[-1].error) == (whole.metrics, None)


def test_logprobs_of_a_prompt_are_by_token_and_go_into_other_processes() -> None:
    row = Row(3, "Hi", "a", FinishReason.LENGTH, prompt_logprobs=(None, logprob_of(2)))
    output = output_of("7", PROMPT, ENCODER, row)
    scored = {9: Logprob(-0.5, 1, "j"), 2: Logprob(-2.0, 2, "c")}
    assert output.prompt_logprobs == [None, scored]
    assert pickle.loads(pickle.dumps(output)).prompt_logprobs == [None, scored]
    assert (
        output_of("7", PROMPT, ENCODER, replace(row, prompt_logprobs=None)).prompt_logprobs is None
    )


@given(rows())
def test_deltas_of_a_stream_join_to_its_row(made: tuple[Row, list[TokenDelta]]) -> None:
    row, deltas = made
    stream = StreamedOutput("7", PROMPT, ENCODER, is_delta=True)
    texts: dict[int, str] = {}
    ids: dict[int, list[int]] = {}
    for delta in deltas:
        (completion,) = stream.take(delta).outputs
        texts[completion.index] = texts.get(completion.index, "") + completion.text
        ids.setdefault(completion.index, []).extend(completion.token_ids)
    answers = row.choices or (row,)
    assert texts == {number: answer.text for number, answer in enumerate(answers)}
    assert ids == {number: list(answer.token_ids) for number, answer in enumerate(answers)}


def test_logprobs_are_by_token_id_with_their_ranks() -> None:
    row = Row(3, "Hi", "b", FinishReason.LENGTH, token_ids=(1,), logprobs=(logprob_of(1),))
    (completion,) = output_of("0", PROMPT, ENCODER, row).outputs
    assert completion.cumulative_logprob == -1.0
    assert completion.logprobs is not None
    (token,) = completion.logprobs
    assert list(token) == [1, 9]
    assert (token[1].rank, token[9].rank) == (2, 1)
    assert (token[1].decoded_token, token[9].logprob) == ("b", -0.5)


def test_times_are_those_of_the_row() -> None:
    row = Row(
        3, "Hi", "b", FinishReason.STOP, worker="card 1", attempts=2, started_at=100.0,
        ended_at=110.0, queue_s=1.5, ttft_s=3.0, decode_s=4.0,
    )  # fmt: skip
    metrics = output_of("0", PROMPT, ENCODER, row).metrics
    assert metrics is not None
    assert (metrics.arrival_time, metrics.first_scheduled_time) == (100.0, 101.5)
    assert (metrics.first_token_time, metrics.finished_time) == (106.0, 110.0)
    assert (metrics.worker, metrics.attempts) == ("card 1", 2)


def test_an_output_goes_to_another_process_with_its_tokens() -> None:
    row = Row(3, "Hi", "b", FinishReason.STOP, token_ids=(1,))
    sent: RequestOutput = pickle.loads(pickle.dumps(output_of("5", PROMPT, ENCODER, row)))
    assert (sent.request_id, sent.prompt, sent.prompt_token_ids) == ("5", "Hi", [1, 2])
    assert sent.outputs[0].finished()
    failed = output_of("6", PROMPT, ENCODER, Row.failed(PROMPT, "Too long."))
    assert pickle.loads(pickle.dumps(failed)).error == "Too long."


def test_the_error_of_some_prompts_has_the_answers_of_the_others() -> None:
    fine = output_of("0", PROMPT, ENCODER, Row(0, "Hi", "b", FinishReason.STOP))
    failed = output_of("1", PROMPT, ENCODER, Row.failed(PROMPT, "Too long."))
    error = GenerationError([fine, failed, failed])
    assert "Prompt 1 (counted from 0) of 3 has no answer: Too long. So have 1 others" in str(error)
    assert isinstance(error, ValueError)
    again = pickle.loads(pickle.dumps(error))
    assert [output.error for output in again.outputs] == [None, "Too long.", "Too long."]


def test_a_stream_that_begins_anew_says_so() -> None:
    stream = StreamedOutput("7", PROMPT, ENCODER)
    stream.take(TokenDelta(3, 0, "ab", (0, 1)))
    output = stream.take(TokenDelta(3, 0, "c", (2,), restarted=True))
    assert output.outputs[0].text == "c"
    assert output.outputs[0].restarted
