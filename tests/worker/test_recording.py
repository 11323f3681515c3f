"""What a worker on a card of formulas records while it answers: values by formula from its rows."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from memory_sink import MemorySink
from test_worker import FormulaSession, answers, held, letters, prompt

from qaic_ray.contract import Specializations
from qaic_ray.errors import DeviceError, DeviceLost
from qaic_ray.options import Generation
from qaic_ray.sampling_params import SamplingParams
from qaic_ray.sdk import parse_lines
from qaic_ray.telemetry import names
from qaic_ray.timeouts import Timeouts
from qaic_ray.worker import recording
from qaic_ray.worker.recording import WorkerRecording
from qaic_ray.worker.worker import CardWorker, WorkerSpec

SLOTS, CTX_LEN = 3, 40
CARDS = parse_lines("QID 0\n\tStatus:Ready\nQID 1\n\tStatus:Error\n")


class Recorded:
    """A worker on a card of formulas, and what was recorded of it."""

    def __init__(self, folder: Path, name: str = "card 0") -> None:
        shapes = Specializations.build(
            batch_size=SLOTS, prompt_len=4, ctx_len=CTX_LEN, continuous=True
        )
        self.session = FormulaSession(shapes)

        class FormulaWorker(CardWorker):
            open_checkpoint = staticmethod(  # type: ignore[assignment]
                lambda *_, **__: SimpleNamespace(eos_ids=(5,), config={}, folder=Path())
            )
            load_tokenizer = staticmethod(lambda _: letters())
            open_sdk = staticmethod(  # type: ignore[assignment]
                lambda _: SimpleNamespace(description="formulas")
            )
            open_session = staticmethod(  # type: ignore[assignment]
                lambda *_, **__: held(self.session)
            )

        generation = Generation(sampling=SamplingParams(ignore_eos=True))
        timeouts = Timeouts(record_engine_s=0.02, record_cards_s=0.02)
        spec = WorkerSpec(
            name=name,
            device_ids=(0,),
            sdk_root="",
            qpc="",
            model="formula",
            generation=generation,
            timeouts=timeouts,
        )
        self.worker = FormulaWorker(spec)
        self.sink = MemorySink()
        self.recording = WorkerRecording(self.worker, self.sink, lambda: folder / "cards.lock")
        self.worker.open()

    def close(self) -> None:
        self.recording.close()
        self.worker.close()


Make = Callable[..., Recorded]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    monkeypatch.setattr(recording, "open_sdk", lambda _: SimpleNamespace(card_lines=lambda: CARDS))
    made: list[Recorded] = []

    def one(name: str = "card 0") -> Recorded:
        made.append(Recorded(tmp_path, name))
        return made[-1]

    yield one
    for recorded in made:
        recorded.close()


def until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come true in time"
        time.sleep(0.01)


def test_lengths_reasons_and_tokens_are_those_of_the_rows(make: Make) -> None:
    recorded = make()
    start_s = time.perf_counter()
    rows = answers(
        recorded.worker,
        *(prompt("HELLO" + "A" * i, i, max_tokens=2 + i, ignore_eos=True) for i in range(7)),
        prompt("STOP", 7, stop=("Z",), max_tokens=6, ignore_eos=True),
        prompt("", 8),
    )
    took_s = time.perf_counter() - start_s
    recorded.recording.look_at_engine()
    sink = recorded.sink
    answered = [row for row in rows if row.ok]
    assert sorted(sink.all(names.PROMPT_LENS)) == sorted(row.prompt_tokens for row in answered)
    assert sorted(sink.all(names.ANSWER_LENS)) == sorted(row.generated_tokens for row in answered)
    for reason in ("stop", "length", "error"):
        count = sum(row.finish_reason.value == reason for row in rows)
        assert sink.value(names.SUCCESS, finished_reason=reason) == count
    assert sink.value(names.GENERATION_TOKENS) == sum(row.generated_tokens for row in answered)
    assert sink.value(names.PROMPT_TOKENS) == sum(row.prompt_tokens for row in answered)
    assert sink.value(names.PREFIX_QUERIES) == sink.value(names.PROMPT_TOKENS)
    assert sink.value(names.PREFIX_HITS) == recorded.worker.measurement().reused_tokens > 0
    assert max(sink.all(names.E2E)) <= took_s
    assert sink.tags(names.E2E) == {("formula", "card 0", "")}


def test_times_of_a_request_add_up_and_are_the_rows_own(make: Make) -> None:
    recorded = make()
    some = [prompt("HELLO", i, max_tokens=5, ignore_eos=True) for i in range(3 * SLOTS)]
    rows = answers(recorded.worker, *some)
    seen = recorded.sink.all
    of_each = zip(
        seen(names.QUEUE_TIME),
        seen(names.PREFILL_TIME),
        seen(names.DECODE_TIME),
        seen(names.TTFT),
        seen(names.E2E),
        seen(names.TIME_PER_TOKEN),
        strict=True,
    )
    for queue_s, prefill_s, decode_s, ttft_s, e2e_s, token_s in of_each:
        assert min(queue_s, prefill_s, decode_s) > 0
        assert ttft_s == pytest.approx(queue_s + prefill_s)
        assert e2e_s == pytest.approx(ttft_s + decode_s)
        assert token_s == pytest.approx(decode_s / 4)
    assert sorted(seen(names.DECODE_TIME)) == pytest.approx(sorted(row.decode_s for row in rows))
    # A row's own begins when it enters the engine, and this one when it comes to the worker.
    assert all(
        mine >= own
        for mine, own in zip(sorted(seen(names.TTFT)), sorted(r.ttft_s for r in rows), strict=True)
    )
    # Those that found no free slot waited for the rows before them.
    assert sorted(seen(names.QUEUE_TIME))[SLOTS] > min(seen(names.PREFILL_TIME))


def test_a_sample_is_a_request(make: Make) -> None:
    recorded = make()
    asked = prompt(n=4, max_tokens=3, ignore_eos=True, temperature=1.0)
    answers(recorded.worker, asked)
    assert recorded.sink.all(names.ANSWER_LENS) == [3] * 4


def test_gauges_show_a_full_engine_and_an_idle_one(make: Make) -> None:
    recorded = make()
    seen: list[tuple[float, ...]] = []
    run = recorded.session.run

    def watched(*arguments: object) -> object:
        recorded.recording.look_at_engine()
        gauges = (names.RUNNING, names.WAITING, names.KV_USAGE)
        seen.append(tuple(map(recorded.sink.value, gauges)))
        return run(*arguments)  # type: ignore[arg-type]

    recorded.session.run = watched  # type: ignore[assignment]
    some = [prompt("HELLO", i, max_tokens=9, ignore_eos=True) for i in range(10)]
    answers(recorded.worker, *some)
    assert max(running for running, _, _ in seen) == SLOTS
    assert max(waiting for _, waiting, _ in seen) == len(some) - SLOTS
    # Of three rows with 5 + 9 tokens each, all but the newest of each are in the cache at the end.
    assert SLOTS * 10 / (SLOTS * CTX_LEN) < max(usage for *_, usage in seen) <= 1
    until(lambda: recorded.sink.value(names.RUNNING) == 0)
    assert recorded.sink.value(names.KV_USAGE) == 0


@pytest.mark.parametrize("error", [DeviceError("no", status="QS_ERROR"), DeviceLost("gone")])
def test_rows_that_a_card_loses_are_aborts(make: Make, error: DeviceError) -> None:
    recorded = make()

    def fail(*_: object) -> None:
        raise error

    recorded.session.run = fail  # type: ignore[assignment,method-assign]
    with pytest.raises(DeviceError):
        answers(recorded.worker, prompt(), prompt(index=1))
    assert recorded.sink.value(names.SUCCESS, finished_reason="abort") == 2


def test_tokens_of_an_engine_made_anew_are_counted_on(make: Make) -> None:
    recorded = make()
    rows = answers(recorded.worker, prompt(max_tokens=6, ignore_eos=True))
    run = recorded.session.run

    def fail(*_: object) -> None:
        recorded.session.run = run  # type: ignore[method-assign]
        raise DeviceError("no", status="QS_ERROR")

    recorded.session.run = fail  # type: ignore[assignment,method-assign]
    recorded.recording.look_at_engine()
    with pytest.raises(DeviceError):
        answers(recorded.worker, prompt())
    rows += answers(recorded.worker, prompt(max_tokens=3, ignore_eos=True))
    recorded.recording.look_at_engine()
    made = sum(row.generated_tokens for row in rows)
    assert recorded.sink.value(names.GENERATION_TOKENS) == made == 9


def test_one_worker_of_a_node_records_its_cards_and_another_goes_on(make: Make) -> None:
    first = make("card 0")
    until(lambda: bool(first.sink.tags(names.CARD_STATUS)))
    second = make("card 1")
    # All cards of the node, one that no worker can have among them.
    assert first.sink.tags(names.CARD_STATUS) == {("0",), ("1",)}
    assert first.sink.value(names.CARD_STATUS, qid="1") == 2
    assert not second.sink.tags(names.CARD_STATUS)
    first.recording.close()
    until(lambda: second.sink.tags(names.CARD_STATUS) == {("0",), ("1",)})


def test_a_query_that_fails_is_said_once_and_the_worker_answers(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[int] = []

    def card_lines() -> None:
        asked.append(1)
        raise DeviceError("qaic-util did not answer within 30 s.")

    monkeypatch.setattr(recording, "open_sdk", lambda _: SimpleNamespace(card_lines=card_lines))
    recorded = make()
    until(lambda: len(asked) > 3)
    assert answers(recorded.worker, prompt())[0].ok
    said = [r.getMessage() for r in caplog.records if "record" in r.getMessage()]
    assert said == ["record cards by card 0: qaic-util did not answer within 30 s."]


def test_a_lock_of_somebody_else_is_left_alone(make: Make, tmp_path: Path) -> None:
    held = os.open(tmp_path / "cards.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(held, fcntl.LOCK_EX)
    recorded = make()
    recorded.recording.look_at_cards()
    assert not recorded.sink.tags(names.CARD_STATUS)
    os.close(held)
    until(lambda: bool(recorded.sink.tags(names.CARD_STATUS)))
