"""Chat requests with tools, from body to answer and to chunks, as a client reads them."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from byte_tokens import byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from tool_templates import HERMES, NAMED, TOOLS

from qaic_ray.model import chat
from qaic_ray.model.tokenizer import Tokenizer
from qaic_ray.options import Generation
from qaic_ray.rows import FinishReason, Row
from qaic_ray.runs.token_streams import TokenDelta
from qaic_ray.sampling_params import SamplingParams
from qaic_ray.serve.protocol.answers import answer_body
from qaic_ray.serve.protocol.asked import CHAT, Asked
from qaic_ray.serve.protocol.chunks import chunk_writer
from qaic_ray.serve.protocol.context import ModelContext
from qaic_ray.serve.protocol.requests import read_request
from qaic_ray.serve.tools.calling import support_of
from qaic_ray.worker.prompt_encoder import PromptEncoder

ASK = {"role": "user", "content": "How is the weather?"}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'


@pytest.fixture(autouse=True)
def _no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "_why_never", lambda *_: None)


def context_of(template: str) -> ModelContext:
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    backend = byte_tokenizer("<s>", "</s>", "[TOOL_CALLS]", "[ARGS]")
    settings = {"chat_template": template, "special_tokens_map": special}
    tokenizer = Tokenizer(backend, settings, ())
    return ModelContext(
        names=("m",),
        encoder=PromptEncoder(tokenizer, Generation()),
        ctx_len=4096,
        vocab_size=tokenizer.vocab_size,
        defaults=SamplingParams(),
        tools=support_of("auto", tokenizer),
    )


CONTEXT = context_of(HERMES)


def asked_for(context: ModelContext = CONTEXT, **body: Any) -> Asked:
    return read_request(CHAT, {"messages": [ASK], "tools": TOOLS} | body, context)


def row_of(text: str, finish: FinishReason = FinishReason.STOP) -> Row:
    return Row(index=0, id=None, prompt="", text=text, finish_reason=finish, token_ids=(1, 2))


def streamed(asked: Asked, pieces: list[str], row: Row) -> list[ChatCompletionChunk]:
    writer = chunk_writer(asked, CONTEXT, request_id="r", created=1)
    sent = writer.begin()
    for piece in pieces:
        sent += writer.take(0, TokenDelta(0, 0, piece, (1,)))
    sent += writer.take(0, TokenDelta(0, 0, "", row=row))
    sent += writer.end([row])
    lines = sent.decode().strip().split("\n\n")
    assert lines.pop() == "data: [DONE]"
    return [
        ChatCompletionChunk.model_validate_json(line.removeprefix("data: "), strict=True)
        for line in lines
    ]


def gathered(chunks: list[ChatCompletionChunk]) -> tuple[str, list[dict[str, Any]], str | None]:
    """What a client puts together: content, calls, and why it ended."""
    content, calls, finish = "", {}, None
    for chunk in chunks:
        (choice,) = chunk.choices
        content += choice.delta.content or ""
        finish = choice.finish_reason or finish
        for call in choice.delta.tool_calls or ():
            assert call.function is not None
            one = calls.setdefault(
                call.index, {"id": call.id, "name": call.function.name, "said": ""}
            )
            one["said"] += call.function.arguments or ""
    return content, list(calls.values()), finish


@given(cuts=st.lists(st.integers(0, 90), max_size=8), before=st.sampled_from(["", "I look.\n"]))
def test_a_stream_is_the_answer_in_pieces(cuts: list[int], before: str) -> None:
    text = before + CALL
    places = sorted({0, len(text), *(cut % len(text) for cut in cuts)})
    pieces = [text[a:b] for a, b in pairwise(places)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat, "_why_never", lambda *_: None)
        content, calls, finish = gathered(streamed(asked_for(stream=True), pieces, row_of(text)))
        whole = answer_body(asked_for(), [row_of(text)], CONTEXT, request_id="r", created=1)
    (choice,) = ChatCompletion.model_validate(whole, strict=True).choices
    assert content == (choice.message.content or "") == before.strip()
    (call,) = choice.message.tool_calls or ()
    assert call.type == "function"
    assert calls == [{"id": call.id, "name": "weather", "said": call.function.arguments}]
    assert json.loads(call.function.arguments) == {"city": "Köln"}
    assert finish == choice.finish_reason == "tool_calls"


def test_tools_are_in_the_prompt_and_a_forced_call_in_the_sampling() -> None:
    tokenizer = CONTEXT.encoder.tokenizer
    free, none = asked_for(), asked_for(tool_choice="none")
    assert '"name": "weather"' in tokenizer.decode(free.prompts[0].token_ids or ())
    assert "weather" not in tokenizer.decode(none.prompts[0].token_ids or ()).split("How is")[0]
    forced = asked_for(tool_choice="required").prompts[0].sampling
    assert forced is not None
    assert forced.structured_outputs is not None
    assert free.prompts[0].sampling == SamplingParams(max_tokens=None)


def test_calls_marked_by_special_tokens_are_read() -> None:
    context = context_of(NAMED)
    asked = asked_for(context)
    sampling = asked.prompts[0].sampling
    assert sampling is not None
    assert not sampling.skip_special_tokens
    ids = context.encoder.tokenizer.encode('[TOOL_CALLS]now[ARGS]{"a": 1}</s>', adds_special=False)
    text = context.encoder.tokenizer.decode(ids, skips_special=sampling.skip_special_tokens)
    body = answer_body(asked, [row_of(text)], context, request_id="r", created=1)
    (choice,) = ChatCompletion.model_validate(body, strict=True).choices
    (call,) = choice.message.tool_calls or ()
    assert call.type == "function"
    assert (call.function.name, call.function.arguments) == ("now", '{"a": 1}')
    assert choice.message.content is None


def test_an_answer_that_was_cut_says_so() -> None:
    text = CALL[: CALL.index("Köln")]
    row = row_of(text, FinishReason.LENGTH)
    _, calls, finish = gathered(streamed(asked_for(stream=True), [text], row))
    assert calls[0]["said"] == '{"city": "'
    assert finish == "length"


def test_ids_differ_from_turn_to_turn_of_one_request_id() -> None:
    first = asked_for()
    body = answer_body(first, [row_of(CALL)], CONTEXT, request_id="mine", created=1)
    message = body["choices"][0]["message"]
    (call,) = message["tool_calls"]
    result = {"role": "tool", "tool_call_id": call["id"], "content": "rain"}
    second = asked_for(messages=[ASK, message, result])
    again = answer_body(second, [row_of(CALL)], CONTEXT, request_id="mine", created=2)
    assert again["choices"][0]["message"]["tool_calls"][0]["id"] != call["id"]
