"""What happens in a run, as its folder keeps it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from awaited import joined
from hypothesis import given
from hypothesis import strategies as st
from simulated_cards import DirectReader, SimulatedCards

from qaic_ray.errors import DeviceError
from qaic_ray.metrics import Durations, Measurement
from qaic_ray.rows import Prompt
from qaic_ray.runs.driver import Audience, Driver
from qaic_ray.runs.history import (
    EVENTS_NAME,
    PowerWatch,
    RunHistory,
    engine_work,
    read_history,
)
from qaic_ray.runs.result import FleetResult, WorkerResult


def told(folder: Path) -> list[tuple[str, str | None]]:
    return [(h["event"], h.get("worker")) for h in read_history(folder)]


def test_a_card_that_dies_and_comes_back_is_in_the_history(tmp_path: Path) -> None:
    dead: list[Prompt] = []

    def dies(card: str, prompt: Prompt) -> bool:
        is_first = card == "card 1" and prompt.index > 5 and not dead
        dead.extend([prompt] * is_first)
        return is_first

    cards = SimulatedCards([0.0, 0.0], slots=2, dies=dies)
    with RunHistory(tmp_path, pytest.fail, clock=cards.clock) as history:
        history.write("session_started")
        result = Driver(
            cards,
            [Prompt(index, "p") for index in range(40)],
            Audience(on_worker_ready=history.worker_ready, on_event=history.happened),
            clock=cards.clock,
            reader=DirectReader,
        ).run()
        history.ended(result)
    events = told(tmp_path)
    assert events[:3] == [
        ("session_started", None),
        ("worker_ready", "card 0"),
        ("worker_ready", "card 1"),
    ]
    assert events[-1] == ("session_ended", None)
    of_card = [event for event, worker in events if worker == "card 1"]
    assert of_card[:2] == ["worker_ready", "worker_lost"]
    retried = [h for h in read_history(tmp_path) if h["event"] == "retried"]
    assert sum(h["prompts"] for h in retried) >= 1
    assert len(events) < 15  # rows and shards that go well leave none
    times = [h["at"] for h in read_history(tmp_path)]
    assert times == sorted(times)


COUNTS = st.integers(0, 10**9)


@given(
    st.builds(
        Measurement,
        prefill_steps=st.integers(1, 10**6),
        prefill_s=st.sampled_from([0.5, 12.25]),
        decode_steps=COUNTS,
        decode_slots=COUNTS,
        drafted_tokens=COUNTS,
        inter_token=st.builds(Durations, st.dictionaries(st.integers(-9999, 9999), COUNTS)),
    )
)
def test_an_engines_counts_come_back(work: Measurement) -> None:
    class Lines:
        text = ""

        def write(self, event: str, **about: object) -> None:
            self.text = json.dumps(about)

    history, lines = RunHistory.__new__(RunHistory), Lines()
    history.write = lines.write  # type: ignore[method-assign]
    worker = WorkerResult("card 0", None, work)
    RunHistory.ended(history, FleetResult((worker,), Measurement(), None, {}))
    assert engine_work(json.loads(lines.text)["engines"]["card 0"]) == work


def test_each_session_adds_and_a_torn_line_costs_itself_alone(tmp_path: Path) -> None:
    for number in range(2):
        with RunHistory(tmp_path, pytest.fail) as history:
            history.write("session_started", number=number)
        with (tmp_path / EVENTS_NAME).open("ab") as stream:
            stream.write(b'{"at": 17')  # killed in the middle of a line
    events = [event for event, _ in told(tmp_path)]
    assert events == ["session_started", "session_ended"] * 2


def test_why_a_session_was_stopped_is_kept(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), RunHistory(tmp_path, pytest.fail):
        raise KeyboardInterrupt
    (ended,) = read_history(tmp_path)
    assert (ended["event"], ended["error"]) == ("session_ended", "KeyboardInterrupt")
    assert "engines" not in ended


def test_a_disk_that_refuses_is_said_once_and_ends_no_run(tmp_path: Path) -> None:
    (tmp_path / EVENTS_NAME).mkdir()
    said: list[str] = []
    with RunHistory(tmp_path, said.append) as history:
        history.write("session_started")
        history.write("retried")
    (sentence,) = said
    assert "the report will lack" in sentence


def test_power_is_written_until_the_sdk_fails(tmp_path: Path) -> None:
    readings = iter([{"B1": 40.0}, {"B1": 41.5}])
    said: list[str] = []

    def watts() -> dict[str, float]:
        try:
            return next(readings)
        except StopIteration:
            raise DeviceError("qaic-util failed: gone") from None

    with RunHistory(tmp_path, pytest.fail) as history:
        with PowerWatch(watts, history, 0.0, said.append) as watch:
            joined(watch._thread)
        powers = [h["watts"] for h in read_history(tmp_path)]
    assert powers == [{"B1": 40.0}, {"B1": 41.5}]
    assert said == ["The cards' power is no longer read: qaic-util failed: gone"]
