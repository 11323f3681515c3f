"""The server as an application of Ray Serve, on a real Ray: openai-python's client before it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import httpx
import openai
import psutil
import pytest
from byte_tokens import with_byte_tokenizer
from one_ray import OneRay, four_cards
from tiny_qpcs import TinyQpcs

from qaic_ray.options import EmulatorOptions, RunOptions, ServeOptions
from qaic_ray.pipeline.request import RunRequest, SdkChoice, resolved
from qaic_ray.serve.http.server import listening_socket
from qaic_ray.serve.ray_serve.application import Application, cards_plan
from qaic_ray.serve.serving import Served

pytestmark = pytest.mark.cluster

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 20, "extra_body": {"ignore_eos": True}}
CTX_LEN = 256
SLOTS = 4


@pytest.fixture(scope="module")
def served(
    one_ray: OneRay, tiny: TinyQpcs, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Served, SdkChoice]:
    one_ray.use("four cards", four_cards)
    model = with_byte_tokenizer(tiny.checkpoint, tmp_path_factory.mktemp("ray-serve") / "words")
    with listening_socket("127.0.0.1", 0) as opened:
        port = opened.getsockname()[1]
    folder = str(tmp_path_factory.mktemp("serving"))
    options = ServeOptions(
        port=port, min_replicas=2, served_model_name=("tiny",), drain_s=5, folder=folder
    )
    run = resolved(RunOptions(metrics=False, max_stall_s=0.0))
    qpc = tiny.qpc(ctx_len=CTX_LEN, batch_size=SLOTS)
    sdk = SdkChoice(tiny.sdk, str(tiny.sdk.root), EmulatorOptions())
    return Served(RunRequest("tiny", str(model), qpc, run), options), sdk


@pytest.fixture(scope="module")
def application(served: tuple[Served, SdkChoice]) -> Iterator[Application]:
    what, sdk = served
    with Application(what, cards_plan(what, sdk, 0), keys=None) as deployed:
        yield deployed


@pytest.fixture(scope="module")
def client(application: Application) -> openai.OpenAI:
    url = f"http://127.0.0.1:{application.port}/v1"
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120)


@pytest.fixture
def whole(application: Application) -> Application:
    """With both replicas, also after a test that killed one."""
    until(lambda: len(replicas()) == 2 and len(workers()) == 2)
    return application


def until(condition: Callable[[], bool], timeout_s: float = 120.0) -> None:
    """Poll, because nothing tells us."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come true in time"
        time.sleep(0.05)


def processes(title: str) -> list[int]:
    """Processes of this test's Ray, by their titles."""
    found = []
    for one in psutil.Process().children(recursive=True):
        try:
            words = " ".join(one.cmdline())
        except psutil.Error:
            continue
        if words.startswith(title) and one.is_running():
            found.append(one.pid)
    return sorted(found)


def replicas() -> list[int]:
    return processes("ray::ServeReplica:tiny:Cards")


def workers() -> list[int]:
    return processes("ray::card")


def answered_by(application: Application) -> Counter[str]:
    """Requests that each card has answered, as /metrics tells."""
    text = httpx.get(f"http://127.0.0.1:{application.port}/metrics", timeout=30).text
    found = re.findall(
        r'^vllm:request_success_total\{[^}]*engine="(card \d)"[^}]*\} ([\d.]+)', text, re.MULTILINE
    )
    counted: Counter[str] = Counter()
    for card, number in found:
        counted[card] += int(float(number))
    return counted


def text_of(client: openai.OpenAI, prompt: str | Sequence[int], **changes: Any) -> str:
    asked: dict[str, Any] = {**GREEDY, **changes}
    return client.completions.create(model="tiny", prompt=prompt, **asked).choices[0].text


def streamed(client: openai.OpenAI, prompt: str | Sequence[int], **changes: Any) -> Iterator[str]:
    asked: dict[str, Any] = {**GREEDY, **changes}
    for chunk in client.completions.create(model="tiny", prompt=prompt, stream=True, **asked):
        yield from (choice.text for choice in chunk.choices)


def expected(tiny: TinyQpcs, prompt: Sequence[int], num_tokens: int = 20) -> list[int]:
    return tiny.reference(prompt, num_tokens, stop_ids=())


def test_answers_are_those_of_transformers_streamed_and_not(
    client: openai.OpenAI, tiny: TinyQpcs
) -> None:
    prompts = [[3 + i, 4, 5, 6 + i] for i in range(12)]

    def ask(prompt: list[int]) -> tuple[list[int], str, str]:
        asked: dict[str, Any] = {**GREEDY}
        asked["extra_body"] = {"ignore_eos": True, "return_token_ids": True}
        whole = client.completions.create(model="tiny", prompt=prompt, **asked).choices[0]
        ids: list[int] = whole.token_ids  # type: ignore[attr-defined]
        return ids, whole.text, "".join(streamed(client, prompt))

    with ThreadPoolExecutor(12) as threads:
        for prompt, (ids, text, joined) in zip(prompts, threads.map(ask, prompts), strict=True):
            assert ids == expected(tiny, prompt)
            assert joined == text


def test_requests_at_once_are_shared_and_a_beginning_goes_where_it_is(
    whole: Application, client: openai.OpenAI
) -> None:
    before = answered_by(whole)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda i: text_of(client, f"{i} is a number", max_tokens=60), range(8)))
    shared = answered_by(whole) - before
    assert shared.total() == 8
    assert min(shared["card 0"], shared["card 1"]) >= 2

    before = answered_by(whole)
    conversation = "This beginning is longer than some blocks of sixteen tokens. "
    for _ in range(4):
        conversation += text_of(client, conversation, max_tokens=8)
    alone = answered_by(whole) - before
    assert alone.total() == 4
    assert len(alone) == 1


def test_a_replica_that_is_killed_before_the_first_token_is_replaced_unseen(
    whole: Application, client: openai.OpenAI
) -> None:
    prompts = ["one prompt", "and another"]
    right = [text_of(client, prompt) for prompt in prompts]
    held = workers()
    for pid in held:
        os.kill(pid, signal.SIGSTOP)
    victim, _ = replicas()
    try:
        with ThreadPoolExecutor(2) as threads:
            asked = [threads.submit(lambda p: "".join(streamed(client, p)), p) for p in prompts]
            until(lambda: running(whole) == 2)
            time.sleep(0.5)  # they are at the replicas: nothing tells when
            os.kill(victim, signal.SIGKILL)
            until(lambda: len(workers()) < 2 or set(workers()) != set(held))
            for pid in held:
                if psutil.pid_exists(pid):
                    os.kill(pid, signal.SIGCONT)
            assert [one.result(timeout=120) for one in asked] == right
    finally:
        for pid in workers():
            os.kill(pid, signal.SIGCONT)


def running(application: Application) -> int:
    return application.num_running(drain=False)


def test_a_stream_whose_replica_is_killed_after_its_first_token_ends_with_an_error(
    whole: Application, client: openai.OpenAI
) -> None:
    long = {"max_tokens": CTX_LEN - 20}
    right = text_of(client, "a long story", **long)
    for _ in range(5):  # until one is killed in the midst of it
        until(lambda: len(replicas()) == 2 and len(workers()) == 2)
        text, said = "", ""
        try:
            for piece in streamed(client, "a long story", **long):
                if not text:
                    for pid in replicas():
                        os.kill(pid, signal.SIGKILL)
                text += piece
        except openai.APIError as error:
            said = str(error)
        if said:
            break
        assert text == right
    assert "ask again" in said
    assert right.startswith(text)
    assert text != right
    assert text_of(client, "a long story", **long) == right


def test_a_client_that_goes_frees_its_slot(whole: Application, client: openai.OpenAI) -> None:
    for pid in workers():
        os.kill(pid, signal.SIGSTOP)
    try:
        impatient = client.with_options(timeout=0.5)
        with pytest.raises(openai.APITimeoutError):
            text_of(impatient, "for nobody")
        until(lambda: running(whole) == 0)
    finally:
        for pid in workers():
            os.kill(pid, signal.SIGCONT)
    assert text_of(client, "for somebody")


def test_a_batch_goes_on_in_another_replica_when_its_own_is_killed(
    whole: Application, client: openai.OpenAI
) -> None:
    bodies = [
        {"model": "tiny", "prompt": f"line {i}", "max_tokens": 100, "temperature": 0}
        for i in range(60)
    ]
    lines = [
        {"custom_id": f"id {i}", "method": "POST", "url": "/v1/completions", "body": body}
        for i, body in enumerate(bodies)
    ]
    file = client.files.create(
        file=("in.jsonl", "\n".join(map(json.dumps, lines)).encode()), purpose="batch"
    )
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
    )
    until(lambda: in_progress(client, batch.id) > 0)
    (desk,) = processes("ray::ServeReplica:tiny:Batches")
    os.kill(desk, signal.SIGKILL)
    until(lambda: status(client, batch.id) == "completed")
    done = client.batches.retrieve(batch.id)
    assert done.output_file_id is not None
    answers = client.files.content(done.output_file_id).text.splitlines()
    found = {one["custom_id"]: one["response"]["body"] for one in map(json.loads, answers)}
    assert found.keys() == {f"id {i}" for i in range(60)}
    for i in (0, 59):
        alone = text_of(client, f"line {i}", max_tokens=100, extra_body={})
        assert found[f"id {i}"]["choices"][0]["text"] == alone


def status(client: openai.OpenAI, batch_id: str) -> str:
    """Of a batch; while its replica is made anew nobody knows."""
    try:
        return client.batches.retrieve(batch_id).status
    except openai.InternalServerError as error:
        return str(error.status_code)


def in_progress(client: openai.OpenAI, batch_id: str) -> int:
    counts = client.batches.retrieve(batch_id).request_counts
    return 0 if counts is None else counts.completed


def test_errors_are_the_interfaces_and_a_server_that_drains_takes_nothing(
    whole: Application, client: openai.OpenAI
) -> None:
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        client.completions.create(model="other", prompt="a")
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="tiny", prompt="a" * 2 * CTX_LEN, max_tokens=1)
    assert application_is_ready(whole)
    assert whole.num_running(drain=True) == 0
    assert not application_is_ready(whole)
    with pytest.raises(openai.InternalServerError) as refused:
        text_of(client, "too late")
    assert refused.value.status_code == 503
    assert json.loads(refused.value.response.text)["error"]["type"] == "service_unavailable_error"


def application_is_ready(application: Application) -> bool:
    url = f"http://127.0.0.1:{application.port}/ready"
    return httpx.get(url, timeout=30).status_code == 200


@pytest.mark.slow
def test_an_application_that_is_deployed_anew_goes_on_answering_and_is_the_new_ones(
    application: Application, client: openai.OpenAI, served: tuple[Served, SdkChoice]
) -> None:
    def deployed(kept_slots: int) -> Application:
        what, sdk = served
        options = what.options.model_copy(update={"kept_slots": kept_slots})
        changed = replace(what, options=options)
        return Application(changed, cards_plan(changed, sdk, 0), keys=None)

    is_over = threading.Event()

    def ask_on() -> set[str]:
        found = set()
        while not is_over.is_set():
            found.add(text_of(client, "a long story", max_tokens=100))
        return found

    with deployed(2) as first, ThreadPoolExecutor(1) as thread:
        before = replicas()
        right = text_of(client, "a long story", max_tokens=100)
        asking = thread.submit(ask_on)
        try:
            with deployed(3):
                is_over.set()
                assert asking.result() == {right}
                assert not set(before) & set(replicas())
                for older in (application, first):
                    asyncio.run(older.watch())  # ends at once, and takes nothing away
                assert text_of(client, "a long story", max_tokens=100) == right
        finally:
            is_over.set()
