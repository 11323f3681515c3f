"""`qaic_ray.LLM` on a real Ray and emulated cards: transformers' answers, and every way to ask."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from awaited import joined
from byte_tokens import with_byte_tokenizer
from one_ray import OneRay, four_cards
from tiny_qpcs import TinyQpcs

from qaic_ray import (
    LLM,
    AsyncEngineArgs,
    AsyncLLM,
    FleetClosed,
    GenerationError,
    ParameterError,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
    UsageError,
)
from qaic_ray.fleet.pending_row import PendingRow
from qaic_ray.rows import Prompt
from qaic_ray.sampling_params import SamplingParams as Params

pytestmark = pytest.mark.cluster

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def where(
    one_ray: OneRay, tiny: TinyQpcs, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """The arguments of an LLM on the shared Ray."""
    one_ray.use("four cards", four_cards)
    model = with_byte_tokenizer(tiny.checkpoint, tmp_path_factory.mktemp("llm") / "words")
    (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    defaults = {"temperature": 0.5, "max_new_tokens": 5, "eos_token_id": 2}
    (model / "generation_config.json").write_text(json.dumps(defaults))
    qpc = tiny.qpc()
    return {"model": str(model), "qpc": qpc, "sdk": tiny.sdk.root, "metrics": False}


@pytest.fixture(scope="module")
def llm(where: dict[str, Any]) -> Iterator[LLM]:
    with LLM(**where, devices=(0, 1), seed=7) as opened:
        until(lambda: len(opened.fleet.workers) == 2)  # one is enough to begin with
        yield opened


def until(condition: Callable[[], bool], timeout_s: float = 120.0) -> None:
    """Poll, because nothing tells us."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come true in time"
        time.sleep(0.02)


def ids_of(output: RequestOutput) -> list[int]:
    return output.outputs[0].token_ids


def test_answers_are_those_of_transformers_in_the_order_of_the_prompts(
    llm: LLM, tiny: TinyQpcs
) -> None:
    prompts = ["ab", {"prompt": "abc"}, [3, 4, 5], {"prompt_token_ids": [6, 7], "prompt": "shown"}]
    outputs = llm.generate(prompts * 3, GREEDY)
    assert [output.prompt for output in outputs[:4]] == ["ab", "abc", None, "shown"]
    assert outputs[1].prompt_token_ids == llm.get_tokenizer()("abc")["input_ids"]
    for output in outputs:
        assert ids_of(output) == tiny.reference(output.prompt_token_ids, 8, stop_ids=())
        assert output.outputs[0].finish_reason == "length"
        assert output.outputs[0].text == llm.encoder.tokenizer.decode(ids_of(output))
    assert len({output.request_id for output in outputs}) == 12
    assert {output.metrics.worker for output in outputs if output.metrics} == {"card 0", "card 1"}


def test_logprobs_are_those_of_transformers(llm: LLM, tiny: TinyQpcs) -> None:
    how = SamplingParams(temperature=0.0, max_tokens=4, logprobs=3, ignore_eos=True)
    (output,) = llm.generate([[3, 4, 5]], how)
    logits = tiny.reference_logits((3, 4, 5), 4).astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    found = output.outputs[0].logprobs
    assert found is not None
    for step, token in enumerate(found):
        best = np.argsort(-expected[step])[:3]
        assert list(token) == list(best)
        assert [token[i].logprob for i in best] == pytest.approx(expected[step][best], abs=1e-4)
        assert [token[i].rank for i in best] == [1, 2, 3]


def test_several_answers_each_with_parameters_of_its_own(llm: LLM) -> None:
    drawn = SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=6, detokenize=False)
    one, three = llm.generate(["ab", "ab"], [GREEDY, drawn])
    assert len(one.outputs) == 1
    assert [completion.index for completion in three.outputs] == [0, 1, 2]
    assert {completion.text for completion in three.outputs} == {""}
    assert len({tuple(completion.token_ids) for completion in three.outputs}) == 3
    (again,) = llm.generate("ab", drawn)
    assert [c.token_ids for c in again.outputs] == [c.token_ids for c in three.outputs]


def test_the_models_own_defaults_hold_where_nothing_is_said(llm: LLM) -> None:
    defaults = llm.get_default_sampling_params()
    assert defaults == SamplingParams(temperature=0.5, max_tokens=5)
    assert len(ids_of(llm.generate("ab")[0])) <= 5


def test_a_stream_joins_to_the_answer_and_may_be_left(llm: LLM, tiny: TinyQpcs) -> None:
    outputs = list(llm.stream("ab", GREEDY))
    assert outputs[-1].finished
    assert ids_of(outputs[-1]) == tiny.reference(outputs[-1].prompt_token_ids, 8, stop_ids=())
    lengths = [len(ids_of(output)) for output in outputs]
    assert lengths == sorted(lengths)
    new = [
        output.outputs[0].text
        for output in llm.stream(
            "ab",
            SamplingParams(
                temperature=0.0,
                max_tokens=8,
                ignore_eos=True,
                output_kind=RequestOutputKind.DELTA,
            ),
        )
    ]
    assert "".join(new) == outputs[-1].outputs[0].text
    long = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)
    for _ in llm.stream("ab", long):
        break
    until(lambda: llm.fleet.num_open == 0)


def test_a_conversation_goes_through_the_template(llm: LLM, tiny: TinyQpcs) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    text = llm.get_tokenizer().apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    (output,) = llm.chat(messages, GREEDY, use_tqdm=False)
    assert output.prompt == text == "<user>Hi<a>"
    assert ids_of(output) == tiny.reference(output.prompt_token_ids, 8, stop_ids=())
    outputs = llm.chat(
        [messages, messages], GREEDY, chat_template="{{ messages[0].content }}!", use_tqdm=False
    )
    assert [output.prompt for output in outputs] == ["Hi!", "Hi!"]
    goes_on = [*messages, {"role": "assistant", "content": "Well"}]
    (output,) = llm.chat(goes_on, GREEDY, add_generation_prompt=False, continue_final_message=True)
    assert output.prompt == "<user>Hi<assistant>Well"
    *_, streamed = llm.stream(messages, GREEDY)
    assert streamed.prompt == "<user>Hi<a>"


def test_a_prompt_that_is_too_long_loses_no_other_answer(llm: LLM) -> None:
    prompts = ["ab", "x" * 500, "cd"]
    with pytest.raises(ValueError, match=r"Prompt 1 .*more than the context") as caught:
        llm.generate(prompts, GREEDY)
    assert isinstance(caught.value, GenerationError)
    assert [len(output.outputs[0].token_ids) for output in caught.value.outputs] == [8, 0, 8]
    outputs = llm.generate(prompts, GREEDY, errors="return")
    assert [output.outputs[0].finish_reason for output in outputs] == ["length", "error", "length"]
    with pytest.raises(GenerationError, match="Prompt 0"):
        list(llm.stream("x" * 500, GREEDY))


def test_wrong_arguments_run_nothing(llm: LLM) -> None:
    for wrong in (
        lambda: llm.generate("ab", GREEDY, lora_request=object()),  # type: ignore[arg-type]
        lambda: llm.generate(["ab", ""], GREEDY),
        lambda: llm.generate(["ab"], [GREEDY, GREEDY]),
        lambda: llm.generate("ab", GREEDY, errors="ignore"),  # type: ignore[arg-type]
        lambda: list(llm.stream("ab", GREEDY, add_generation_prompt=False)),
    ):
        with pytest.raises(ParameterError):
            wrong()
    assert llm.fleet.num_open == 0


def test_a_bar_of_the_programs_own_counts_every_prompt(llm: LLM) -> None:
    counted: list[int] = []

    class Bar:
        def __init__(self, total: int, desc: str) -> None:
            counted.append(-total)

        def update(self, number: int) -> None:
            counted.append(number)

        def close(self) -> None:
            counted.append(0)

    llm.generate(["ab", "cd", "ef"], GREEDY, use_tqdm=Bar)
    assert counted == [-3, 1, 1, 1, 0]


def test_many_threads_ask_at_once(llm: LLM, tiny: TinyQpcs) -> None:
    found: dict[int, list[int]] = {}

    def ask(number: int) -> None:
        found[number] = ids_of(llm.generate([[number, 5]], GREEDY)[0])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(3, 13)]
    for thread in threads:
        thread.start()
    for thread in threads:
        joined(thread)
    assert found == {n: tiny.reference((n, 5), 8, stop_ids=()) for n in range(3, 13)}


def test_a_batch_is_answered_beside_others_and_a_conversation_stays_on_its_card(
    llm: LLM, tiny: TinyQpcs
) -> None:
    fleet = llm.fleet

    def ask(ids: tuple[int, ...], *, background: bool = False, most: int = 4) -> PendingRow:
        params = Params(max_tokens=most, ignore_eos=True)
        prompt = Prompt(0, "", token_ids=ids, sampling=params, background=background)
        return fleet.submit(prompt)

    late = {n: ask((n, 11), background=True) for n in range(3, 13)}
    assert ask((5, 7)).row(120.0).token_ids == tuple(tiny.reference((5, 7), 4, stop_ids=()))
    for n, pending in late.items():
        right = tuple(tiny.reference((n, 11), 4, stop_ids=()))
        assert pending.row(120.0).token_ids == right
    # Each slot is the batch's when twice as many prompts come; they need not wait for it.
    late = {n: ask((*range(40, 60), n), background=True, most=24) for n in range(3, 15)}
    others = {n: ask((n, 9)) for n in range(3, 15)}
    for n, pending in others.items():
        assert pending.row(120.0).token_ids == tuple(tiny.reference((n, 9), 4, stop_ids=()))
    for n, pending in late.items():
        right = tuple(tiny.reference((*range(40, 60), n), 24, stop_ids=()))
        assert pending.row(120.0).token_ids == right
    ids, homes = tuple(range(3, 23)), set()
    for turn in range(5):
        row = ask(ids).row(120.0)
        assert row.token_ids == tuple(tiny.reference(ids, 4, stop_ids=()))
        homes.add(row.worker)
        ids = (*ids, *row.token_ids, 30 + turn, 3, 4)
    assert len(homes) == 1
    until(lambda: fleet.engine_totals.reused_tokens >= 4 * 20)
    assert set(fleet.engines) == {info.name for info in fleet.workers}


def test_a_card_that_dies_loses_no_answer(llm: LLM, tiny: TinyQpcs) -> None:
    rows = [llm.begin([n, 9], GREEDY).pending for n in range(3, 23)]
    os.kill(llm.fleet.workers[0].pid, signal.SIGKILL)
    expected = [tuple(tiny.reference((n, 9), 8, stop_ids=())) for n in range(3, 23)]
    assert [row.row(120.0).token_ids for row in rows] == expected


# -- asyncio


def test_coroutines_share_the_cards(where: dict[str, Any], tiny: TinyQpcs) -> None:
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**where, devices=(2,), enforce_eager=True))

    async def whole(number: int) -> list[int]:
        last = [output async for output in engine.generate([number, 5], GREEDY, f"r{number}")][-1]
        assert last.request_id == f"r{number}"
        return ids_of(last)

    async def aborted() -> str | None:
        long = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)
        reason = None
        async for output in engine.generate("ab", long, "gone"):
            if not output.finished:
                await engine.abort("gone")
            reason = output.outputs[0].finish_reason
        return reason

    async def left() -> int:
        long = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)
        outputs = engine.generate("ab", long)
        await anext(outputs)
        await outputs.aclose()
        return engine.llm.fleet.num_open

    async def all_of_it() -> None:
        async with engine:
            found = await asyncio.gather(*map(whole, range(3, 9)))
            assert found == [tiny.reference((n, 5), 8, stop_ids=()) for n in range(3, 9)]
            assert await aborted() == "abort"
            assert await left() <= 1  # it is on its way out
            only = SamplingParams(max_tokens=3, output_kind=RequestOutputKind.FINAL_ONLY)
            finals = [output.finished async for output in engine.generate("ab", only)]
            assert finals == [True]
            assert engine.is_running
        assert engine.errored

    asyncio.run(all_of_it())


# -- its beginning and its end


def test_a_folder_has_the_answers_when_the_program_is_started_again(
    where: dict[str, Any], tmp_path: Path
) -> None:
    drawn = SamplingParams(max_tokens=6)
    folder = tmp_path / "kept"
    with LLM(**where, devices=(3,), folder=folder) as llm:
        first = llm.generate(["ab", "cd", "ef"], drawn)
        assert folder.stat().st_mode & 0o077 == 0
    with LLM(**where, devices=(3,), folder=folder) as llm:
        again = llm.generate(["ef", "gh", "ab"], drawn)
        assert [ids_of(again[0]), ids_of(again[2])] == [ids_of(first[2]), ids_of(first[0])]
        assert llm.fleet._follower.view().num_ended == 1
    with pytest.raises(UsageError, match="not of this program: run_seed"):
        LLM(**where, devices=(3,), folder=folder, seed=1)
    with LLM(**where, devices=(3,), folder=tmp_path / "other"):
        pass
    with LLM(**where, devices=(3,), folder=tmp_path / "other", seed=1):
        pass  # nothing was answered: the folder is bound to nothing


def test_an_llm_that_nobody_has_any_more_gives_its_card_back(where: dict[str, Any]) -> None:
    forgotten = LLM(**where, devices=(3,))
    fleet = forgotten.fleet
    del forgotten
    gc.collect()
    assert fleet.is_closed
    with LLM(**where, devices=(3,)) as llm:
        llm.generate("ab", GREEDY)
        llm.close()
        llm.close()
        with pytest.raises(FleetClosed, match="closed"):
            llm.generate("ab", GREEDY)


def test_what_does_not_fit_is_said_by_the_constructor(where: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="no device 9"):
        LLM(**where, devices=9)
    with pytest.raises(UsageError, match="compiled for"):
        LLM(**where, devices=(3,), max_model_len=128)
    with pytest.raises(UsageError, match="nowhere"):
        LLM(**{**where, "qpc": "/nowhere"}, devices=(3,))


# -- the calls of public programs for vLLM: examples/offline_inference at the commits named


def test_calls_of_basic(where: dict[str, Any], llm: LLM) -> None:
    """basic/basic.py (d5c9555) and basic_with_model_default_sampling.py (5c2a670)."""
    how = SamplingParams(temperature=0.8, top_p=0.95)
    outputs = llm.generate(["ab", "cd", "ef", "gh"], how)
    assert [output.prompt for output in outputs] == ["ab", "cd", "ef", "gh"]
    assert all(isinstance(output.outputs[0].text, str) for output in outputs)
    own = llm.get_default_sampling_params()
    own.temperature = 0.5
    assert len(llm.generate(["ab"], own)) == 1


def test_calls_of_chat(llm: LLM) -> None:
    """chat.py (a4c1a2c)."""
    how = SamplingParams(temperature=0.5)
    talk = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "v"},
    ]
    assert len(llm.chat(talk, sampling_params=how, use_tqdm=False)) == 1
    outputs = llm.chat(messages=[talk for _ in range(10)], sampling_params=how, use_tqdm=True)
    assert {output.prompt for output in outputs} == {"<system>s<user>u<assistant>a<user>v<a>"}


def test_calls_of_prefix_caching(where: dict[str, Any], llm: LLM) -> None:
    """prefix_caching.py (2b506aa): two LLMs, one after the other."""
    how = SamplingParams(temperature=0.0)
    prompts = ["the same beginning: " + letter for letter in "abcd"]
    first = LLM(**where, devices=(3,), gpu_memory_utilization=0.4)
    regular = [output.outputs[0].text for output in first.generate(prompts, how)]
    del first
    second = LLM(**where, devices=(3,), enable_prefix_caching=True, gpu_memory_utilization=0.4)
    second.generate(prompts[0], how)
    assert [output.outputs[0].text for output in second.generate(prompts, how)] == regular
    second.close()


def test_calls_of_async_llm_streaming(where: dict[str, Any]) -> None:
    """async_llm_streaming.py (11af6a5)."""

    async def main() -> None:
        engine = AsyncLLM.from_engine_args(
            AsyncEngineArgs(**where, devices=(2,), enforce_eager=True)
        )
        how = SamplingParams(
            max_tokens=10,
            temperature=0.8,
            top_p=0.95,
            seed=42,
            output_kind=RequestOutputKind.DELTA,
        )
        try:
            is_finished = False
            outputs = engine.generate(request_id="one", prompt="ab", sampling_params=how)
            async for output in outputs:
                assert all(isinstance(c.text, str) for c in output.outputs)
                if output.finished:
                    is_finished = True
                    break
            assert is_finished
        finally:
            engine.shutdown()

    asyncio.run(main())
