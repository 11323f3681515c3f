"""openai-python's own client at every route of the interface, over whole workers of formulas.

The client's types are the truth about shapes (each answer is validated, which the client itself
does not do), the formula that about texts.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import openai
import pytest
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response
from pydantic import BaseModel
from served_app import serving, until
from thread_cards import CTX_LEN, MODEL, ThreadCards, formula_fleet, service_of, text_of, tokenizer

from qaic_ray.fleet.open_fleet import OpenFleet
from qaic_ray.serve.http.keys import ApiKeys, new_key
from qaic_ray.serve.http.service import Service

T = TypeVar("T", bound=BaseModel)
USER = [{"role": "user", "content": "Hi"}]
RENDERED = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "boolean"}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}


class Served:
    """A server, and what is behind it."""

    def __init__(self, url: str, service: Service, fleet: OpenFleet, cards: ThreadCards) -> None:
        self.url, self.service, self.fleet, self.cards = url, service, fleet, cards

    def is_idle(self) -> bool:
        return not (self.fleet.num_open or self.cards.num_in_slots or self.service.num_running())


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with formula_fleet(num_cards=2, slots=4) as (fleet, cards):
        service = service_of(fleet)
        with serving(service) as url:
            served = Served(url, service, fleet, cards)
            yield served
            until(served.is_idle)


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def valid(kind: type[T], given: BaseModel) -> T:
    """The same as the type says it must be; the client takes everything."""
    document = given.model_dump(exclude_unset=True)
    if kind is Completion:  # the interface's chunks have null there, and its type forgets them
        for choice in document["choices"]:
            choice["finish_reason"] = choice["finish_reason"] or "length"
    return kind.model_validate(document)


# -- models


def test_the_model_is_listed_and_found_and_no_other(client: openai.OpenAI) -> None:
    (listed,) = client.models.list().data
    assert valid(Model, listed) == valid(Model, client.models.retrieve(MODEL))
    assert (listed.id, listed.owned_by) == (MODEL, "qaic-ray")
    assert listed.max_model_len == CTX_LEN  # type: ignore[attr-defined]  # vLLM's field
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-4")
    assert caught.value.code == "model_not_found"


# -- completions


def complete(client: openai.OpenAI, prompt: Any, **more: Any) -> Completion:
    given = {"model": MODEL, "temperature": 0, "max_tokens": 9, "prompt": prompt} | more
    return valid(Completion, client.completions.create(**given))


def test_a_text_is_completed_and_counted(client: openai.OpenAI) -> None:
    answer = complete(client, "Hi")
    (choice,) = answer.choices
    assert (choice.text, choice.index, choice.finish_reason) == (text_of("Hi", 9), 0, "length")
    assert answer.object == "text_completion"
    assert answer.usage is not None
    assert answer.usage.model_dump(include={"prompt_tokens", "completion_tokens", "total_tokens"}) \
        == {"prompt_tokens": 2, "completion_tokens": 9, "total_tokens": 11}  # fmt: skip


def test_lists_of_texts_and_of_token_ids_are_numbered_by_their_prompt(
    client: openai.OpenAI,
) -> None:
    ids = [tokenizer().encode(text) for text in ("a", "bc", "def")]
    for prompts in (["a", "bc", "def"], ids):
        answer = complete(client, prompts)
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        assert [choice.text for choice in answer.choices] == [text_of(one, 9) for one in ids]
    assert complete(client, ids[2]).choices[0].text == text_of("def", 9)
    drawn = complete(client, ["a", "bc"], n=3, temperature=1, seed=5)
    assert [choice.index for choice in drawn.choices] == list(range(6))
    assert len({choice.text for choice in drawn.choices}) == 6
    again = complete(client, ["a", "bc"], n=3, temperature=1, seed=5)
    assert [choice.text for choice in again.choices] == [choice.text for choice in drawn.choices]


def test_logprobs_and_ids_are_of_the_text(client: openai.OpenAI) -> None:
    answer = complete(client, "Hi", logprobs=2, extra_body={"return_token_ids": True})
    (choice,) = answer.choices
    found = choice.logprobs
    assert found is not None
    assert found.tokens is not None and found.text_offset is not None  # noqa: PT018
    assert found.token_logprobs is not None and found.top_logprobs is not None  # noqa: PT018
    assert found.text_offset == list(range(9))
    for token, logprob, top in zip(
        found.tokens, found.token_logprobs, found.top_logprobs, strict=True
    ):
        # Parts of characters are one key, as they read the same.
        assert max(top.values()) <= 0.0
        assert token in top
        assert logprob == max(top.values())  # it was greedy
    ids = choice.model_extra["token_ids"]  # type: ignore[index]
    assert tokenizer().decode(ids) == choice.text
    named = complete(client, "Hi", logprobs=0, extra_body={"return_tokens_as_token_ids": True})
    assert named.choices[0].logprobs is not None
    assert named.choices[0].logprobs.tokens == [f"token_id:{one}" for one in ids]


def test_what_ends_an_answer_is_said(client: openai.OpenAI) -> None:
    text = text_of("Hi", 9)
    stop = next(letter for letter in text[2:] if letter.isprintable() and letter != "\ufffd")
    (choice,) = complete(client, "Hi", stop=[stop, "zz"]).choices
    assert (choice.text, choice.finish_reason) == (text[: text.index(stop)], "stop")
    assert choice.model_extra == {"stop_reason": stop}
    (echoed,) = complete(client, "Hi", echo=True).choices
    assert echoed.text == f"Hi{text}"


def test_a_stream_is_the_answer_in_pieces(client: openai.OpenAI) -> None:
    whole = complete(client, ["Hi", "Ho"], n=1)
    chunks = list(
        client.completions.create(
            model=MODEL,
            temperature=0,
            max_tokens=9,
            prompt=["Hi", "Ho"],
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    reasons = [(one.index, one.finish_reason) for chunk in chunks for one in chunk.choices]
    assert sorted(each for each in reasons if each[1]) == [(0, "length"), (1, "length")]
    *texts, last = [valid(Completion, chunk) for chunk in chunks]
    assert len({chunk.id for chunk in chunks}) == 1
    for index in (0, 1):
        own = [one for chunk in texts for one in chunk.choices if one.index == index]
        assert "".join(one.text for one in own) == whole.choices[index].text
    assert last.choices == []
    assert all(chunk.usage is None for chunk in texts)
    assert last.usage is not None and whole.usage is not None  # noqa: PT018
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert getattr(last.usage, name) == getattr(whole.usage, name)


# -- chat


def chat(client: openai.OpenAI, messages: Any = USER, **more: Any) -> ChatCompletion:
    given = {"model": MODEL, "temperature": 0, "max_tokens": 9, "messages": messages} | more
    return valid(ChatCompletion, client.chat.completions.create(**given))


def streamed(client: openai.OpenAI, **more: Any) -> list[ChatCompletionChunk]:
    given = {"model": MODEL, "temperature": 0, "max_tokens": 9, "messages": USER} | more
    chunks = client.chat.completions.create(**given, stream=True)
    return [valid(ChatCompletionChunk, chunk) for chunk in chunks]


def test_a_conversation_is_answered_streamed_and_not(client: openai.OpenAI) -> None:
    whole = chat(client)
    (choice,) = whole.choices
    assert choice.message.content == text_of(tokenizer().chat(USER), 9)
    assert tokenizer().chat(USER) == tokenizer().encode(RENDERED)
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    assert chat(client, parts).choices[0].message.content == choice.message.content
    chunks = streamed(client, stream_options={"include_usage": True})
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == choice.message.content
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage is not None and whole.usage is not None  # noqa: PT018
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 9


def test_a_limit_of_either_name_holds_and_the_rest_of_the_context_is_the_default(
    client: openai.OpenAI,
) -> None:
    short = chat(client, max_tokens=9, max_completion_tokens=2)
    assert short.usage is not None
    assert short.usage.completion_tokens == 2
    ends = text_of(tokenizer().chat(USER), CTX_LEN)
    longest = chat(client, max_tokens=openai.omit)
    assert longest.choices[0].message.content == ends


def test_chat_logprobs_give_the_bytes_of_the_text(client: openai.OpenAI) -> None:
    (choice,) = chat(client, logprobs=True, top_logprobs=3).choices
    assert choice.logprobs is not None
    content = choice.logprobs.content
    assert content is not None
    raw = b"".join(bytes(entry.bytes or ()) for entry in content)
    assert raw.decode(errors="replace") == choice.message.content
    assert all(len(entry.top_logprobs) == 3 for entry in content)
    assert all(entry.top_logprobs[0].bytes == entry.bytes for entry in content)
    several = [
        entry
        for chunk in streamed(client, logprobs=True, top_logprobs=3)
        for one in chunk.choices
        if one.logprobs is not None
        for entry in one.logprobs.content or ()
    ]
    assert [entry.model_dump() for entry in several] == [entry.model_dump() for entry in content]


def test_several_answers_come_as_if_each_came_alone(client: openai.OpenAI) -> None:
    how = {"n": 3, "temperature": 1, "seed": 7}
    texts = [choice.message.content for choice in chat(client, **how).choices]
    assert len(set(texts)) == 3
    found = ["", "", ""]
    for chunk in streamed(client, **how):
        for one in chunk.choices:
            found[one.index] += one.delta.content or ""
    assert found == texts


def test_a_tool_that_must_be_called_is_called_streamed_and_not(client: openai.OpenAI) -> None:
    how: Any = {
        "tools": [TOOL],
        "tool_choice": "required",
        "max_tokens": 150,
        "parallel_tool_calls": False,
    }
    (choice,) = chat(client, **how).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    (call,) = choice.message.tool_calls or ()
    assert call.type == "function"
    assert call.function.name == "weather"
    arguments = json.loads(call.function.arguments)
    assert arguments["city"] in ("Rome", "Oslo")
    with client.chat.completions.stream(
        model=MODEL,
        messages=USER,
        temperature=0,
        **how,  # type: ignore[arg-type]
    ) as stream:
        last = stream.get_final_completion().choices[0]
    (streamed_call,) = last.message.tool_calls or ()
    assert json.loads(streamed_call.function.arguments) == arguments
    assert last.finish_reason == "tool_calls"
    # What was called goes back, with its result.
    more: Any = [*USER, choice.message.model_dump(exclude_none=True),
                 {"role": "tool", "tool_call_id": call.id, "content": "rain"}]  # fmt: skip
    assert chat(client, more, tools=[TOOL]).choices[0].message.role == "assistant"


class Weather(BaseModel):
    """Parsed by the client."""

    city: str
    is_raining: bool


def test_an_answer_has_the_form_that_a_client_asks_for(client: openai.OpenAI) -> None:
    parsed = client.chat.completions.parse(
        model=MODEL, messages=USER, temperature=0, response_format=Weather, max_tokens=400,  # type: ignore[arg-type]
        extra_body={"bad_words": ["\\"]},
    )  # fmt: skip
    choice = parsed.choices[0]
    if choice.finish_reason == "stop":  # else the formula's city is too long
        assert isinstance(choice.message.parsed, Weather)
    said = chat(client, response_format={"type": "json_object"}, max_tokens=60).choices[0].message
    assert (said.content or "").lstrip().startswith("{")
    for form, fits in (
        ({"regex": "[a-c]{4}"}, lambda text: len(text) == 4 and set(text) <= set("abc")),
        ({"choice": ["yes", "no"]}, lambda text: text in ("yes", "no")),
    ):
        (choice_,) = chat(client, extra_body={"structured_outputs": form}).choices
        assert fits(choice_.message.content)
        assert choice_.finish_reason == "stop"


# -- responses


def test_a_response_is_answered_streamed_and_not(client: openai.OpenAI) -> None:
    how: Any = {"model": MODEL, "input": "Hi", "max_output_tokens": 9, "temperature": 0}
    whole = valid(Response, client.responses.create(**how))
    text = text_of(tokenizer().chat(USER), 9)
    assert (whole.output_text, whole.status) == (text, "incomplete")
    assert whole.incomplete_details is not None
    assert whole.incomplete_details.reason == "max_output_tokens"
    assert whole.usage is not None
    assert (whole.usage.output_tokens, whole.usage.total_tokens) == (
        9,
        len(tokenizer().encode(RENDERED)) + 9,
    )
    listed = client.responses.create(**how | {"input": USER, "instructions": "Be brief."})
    system = {"role": "system", "content": "Be brief."}
    assert listed.output_text == text_of(tokenizer().chat([system, *USER]), 9)
    with client.responses.stream(**how) as stream:
        events = list(stream)
    last = events[-1]
    assert last.type == "response.incomplete"
    assert last.response.output_text == text
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == text
    assert [event.type for event in events if "delta" not in event.type] == [
        *("response.created", "response.in_progress", "response.output_item.added"),
        *("response.content_part.added", "response.output_text.done"),
        *("response.content_part.done", "response.output_item.done", "response.incomplete"),
    ]


# -- routes of vLLM's


def test_texts_become_tokens_and_tokens_texts(client: openai.OpenAI) -> None:
    told: Any = client.post(
        f"{str(client.base_url).removesuffix('v1/')}tokenize",
        body={"prompt": "Hi é", "return_token_strs": True},
        cast_to=object,
    )
    assert told["tokens"] == tokenizer().encode("Hi é")
    assert (told["count"], told["max_model_len"]) == (5, CTX_LEN)
    url = str(client.base_url).removesuffix("v1/")
    back: Any = client.post(f"{url}detokenize", body={"tokens": told["tokens"]}, cast_to=object)
    assert back == {"prompt": "Hi é"}
    rendered: Any = client.post(f"{url}tokenize", body={"messages": USER}, cast_to=object)
    assert rendered["tokens"] == tokenizer().encode(RENDERED)


# -- errors, as the client raises them


@pytest.mark.parametrize(
    ("body", "kind", "param", "code"),
    [
        ({"model": "gpt-4"}, openai.NotFoundError, "model", "model_not_found"),
        ({"temperature": -1}, openai.BadRequestError, "temperature", None),
        ({"n": 2}, openai.BadRequestError, "n", None),
        ({"max_tokens": CTX_LEN}, openai.BadRequestError, "messages", "context_length_exceeded"),
        ({"temprature": 1}, openai.BadRequestError, "temprature", "unknown_field"),
        ({"audio": {"voice": "a"}}, openai.BadRequestError, "audio", None),
        ({"messages": "Hi"}, openai.BadRequestError, "messages", None),
        ({"logit_bias": {"999": 1}}, openai.BadRequestError, None, None),
        ({"logprobs": True, "top_logprobs": 21}, openai.BadRequestError, "top_logprobs", None),
    ],
)
def test_a_wrong_request_is_the_clients_own_error(
    client: openai.OpenAI, body: Any, kind: Any, param: str | None, code: str | None
) -> None:
    given = {"model": MODEL, "messages": USER, "temperature": 0, **body}
    for stream in (False, True):
        with pytest.raises(kind) as caught:
            client.chat.completions.create(**{}, model=given.pop("model", MODEL),
                                           messages=given.pop("messages", USER),
                                           extra_body=given, stream=stream)  # fmt: skip
        given = {"model": MODEL, "messages": USER, "temperature": 0, **body}
        error = caught.value
        assert (error.param, error.code) == (param, code)
        assert error.type in ("invalid_request_error", "not_found_error")
        assert error.request_id


def test_fields_that_change_nothing_pass(client: openai.OpenAI) -> None:
    plain = chat(client).choices[0].message.content
    for more in ({"user": "me"}, {"store": False}, {"metadata": {"a": "b"}}):
        assert chat(client, **more).choices[0].message.content == plain


def test_keys_and_limits_are_the_clients_own_errors() -> None:
    made, line = new_key("ann")
    name, _, digest = line.partition(" sha256:")
    keys = ApiKeys({name: bytes.fromhex(digest)})
    with formula_fleet(slots=1, step_s=0.01) as (fleet, _):
        service = service_of(fleet, keys=keys, max_per_key=2)
        with serving(service) as url:
            stranger = openai.OpenAI(base_url=f"{url}/v1", api_key="qr-wrong", max_retries=0)
            with pytest.raises(openai.AuthenticationError):
                stranger.models.list()
            ann = openai.OpenAI(base_url=f"{url}/v1", api_key=made, max_retries=0)
            with ThreadPoolExecutor(2) as pool:
                running = [pool.submit(chat, ann, max_tokens=60) for _ in range(2)]
                until(lambda: service.num_running() == 2)
                with pytest.raises(openai.RateLimitError) as caught:
                    chat(ann)
                assert caught.value.response.headers["retry-after"] == "1"
                service.is_draining = True
                with pytest.raises(openai.InternalServerError) as ending:
                    chat(ann)
                assert ending.value.status_code == 503
                # Those that run end as if nothing had been.
                texts = {answer.result().choices[0].message.content for answer in running}
            assert texts == {text_of(tokenizer().chat(USER), 60)}


# -- beside each other


def test_greedy_texts_are_the_same_whatever_runs_beside_them(served: Served) -> None:
    """Every third one is dropped in its middle, and a card dies meanwhile."""
    prompts = [f"{number} of {'many ' * (number % 5)}" for number in range(48)]

    async def one(client: openai.AsyncOpenAI, number: int) -> str:
        how: Any = {"model": MODEL, "prompt": prompts[number], "max_tokens": 40, "temperature": 0}
        if number % 3 == 0:
            return (await client.completions.create(**how)).choices[0].text
        stream = await client.completions.create(**how, stream=True)
        text = ""
        async for chunk in stream:
            text += chunk.choices[0].text
            if number % 3 == 2 and len(text) > number % 30:
                await stream.close()
                break
            if number == 4 and len(text) == 5:
                served.cards.lose("card 1")
        return text

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=f"{served.url}/v1", api_key="none", max_retries=0
        ) as client:
            return await asyncio.gather(*(one(client, n) for n in range(len(prompts))))

    for number, text in enumerate(asyncio.run(all_of_them())):
        whole = text_of(prompts[number], 40)
        if number % 3 == 2:
            assert whole.startswith(text)
        else:
            assert text == whole
    until(served.is_idle)


def test_clients_that_go_free_their_slots() -> None:
    async def go(url: str, service: Service) -> None:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            begun = [
                asyncio.create_task(
                    client.completions.create(
                        model=MODEL, prompt=f"p{number}", max_tokens=400, stream=True
                    )
                )
                for number in range(64)
            ]
            # Whichever came first: they are not asked in the order in which they were begun.
            first, _ = await asyncio.wait(begun, return_when=asyncio.FIRST_COMPLETED)
            await anext(aiter(first.pop().result()))
            # All of them, unless the machine is so slow that some have ended.
            while service.num_running() < 64 and sum(one.done() for one in begun) <= 16:
                await asyncio.sleep(0.01)
            for one in begun:
                one.cancel()  # some wait for a slot, others have their first tokens
            for one in await asyncio.gather(*begun, return_exceptions=True):
                if isinstance(one, openai.AsyncStream):
                    await one.close()

    with formula_fleet(num_cards=2, slots=8, step_s=0.2) as (fleet, cards):
        service = service_of(fleet)
        with serving(service) as url:
            asyncio.run(go(url, service))
            until(lambda: not (service.num_running() or fleet.num_open or cards.num_in_slots))
            num_tokens = sum(worker.progress()[1] for worker in cards.workers.values())
            assert num_tokens < 64 * 400 / 4  # nobody's answer was made to its end
