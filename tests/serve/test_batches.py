"""Batches over a fleet that a test holds: states, files, places, refusals."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from batch_places import (
    BROKEN,
    Clock,
    HeldFleet,
    answering,
    completion,
    content,
    ended,
    given,
    jsonl,
    lines_of,
    opened,
    text_of,
    until,
)

from qaic_ray.errors import UsageError
from qaic_ray.serve.api_errors import ApiError
from qaic_ray.serve.batches import request_lines
from qaic_ray.serve.batches.batch_record import NewBatch
from qaic_ray.serve.batches.open_batches import HELD, BatchManager
from qaic_ray.serve.batches.outputs import INPUTS_SHA256, OUTPUTS_SHA256
from qaic_ray.serve.batches.pages import Paging
from qaic_ray.worker.text import mixed_seed

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
DAY_S = 24 * 3600


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_lines, "GIVE_WAY_S", 0.0)


@pytest.fixture
def fleet() -> HeldFleet:
    return HeldFleet()


@pytest.fixture
def manager(
    tmp_path: Path, fleet: HeldFleet, caplog: pytest.LogCaptureFixture
) -> Iterator[BatchManager]:
    with opened(tmp_path / "store", fleet) as made:
        yield made
    assert "does not go on" not in caplog.text or "a bug" in caplog.text


def begun(manager: BatchManager, data: bytes, endpoint: str = COMPLETIONS, **more: object) -> str:
    asked = NewBatch(endpoint, given(manager, data), **more)  # type: ignore[arg-type]
    return manager.create(asked)["id"]


def test_a_batch_is_answered_line_by_line_in_the_order_of_its_input(
    manager: BatchManager, fleet: HeldFleet
) -> None:
    data = jsonl([completion(f"c{number}", f"text {number}", seed=number) for number in range(7)])
    batch = ended(manager, begun(manager, data, metadata={"mine": "yes"}))
    assert batch["status"] == "completed"
    assert batch["request_counts"] == {"total": 7, "completed": 7, "failed": 0}
    assert batch["error_file_id"] is None
    lines = lines_of(manager, batch["output_file_id"])
    assert [line["custom_id"] for line in lines] == [f"c{number}" for number in range(7)]
    for number, line in enumerate(lines):
        response = line["response"]
        assert line["error"] is None
        assert response["status_code"] == 200
        told = tuple(fleet_tokens(f"text {number}"))
        assert response["body"]["choices"][0]["text"] == text_of(told, number)
    assert (
        len({line["id"] for line in lines})
        == len({line["response"]["request_id"] for line in lines})
        == 7
    )
    assert batch["metadata"]["mine"] == "yes"
    assert batch["metadata"][INPUTS_SHA256] == hashlib.sha256(data).hexdigest()
    output = content(manager, batch["output_file_id"])
    assert batch["metadata"][OUTPUTS_SHA256] == hashlib.sha256(output).hexdigest()
    assert batch["usage"] == {
        "input_tokens": sum(len(f"text {number}") for number in range(7)),
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": 21,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 42 + 21,
    }


def fleet_tokens(text: str) -> list[int]:
    from batch_places import model_context

    return model_context().encoder.tokenizer.encode(text)


def test_requests_that_fail_are_in_the_error_file_with_their_status(manager: BatchManager) -> None:
    data = jsonl(
        [
            completion("good"),
            completion("long", "x" * 100),
            completion("broken", BROKEN),
            completion("two, one bad", ["fine", BROKEN]),
        ]
    )
    batch = ended(manager, begun(manager, data))
    assert batch["request_counts"] == {"total": 4, "completed": 1, "failed": 3}
    assert [line["custom_id"] for line in lines_of(manager, batch["output_file_id"])] == ["good"]
    failed = {line["custom_id"]: line for line in lines_of(manager, batch["error_file_id"])}
    assert list(failed) == ["long", "broken", "two, one bad"]
    assert failed["long"]["response"]["status_code"] == 400
    assert failed["long"]["response"]["body"]["error"]["code"] == "context_length_exceeded"
    assert failed["broken"]["response"]["status_code"] == 500
    both = content(manager, batch["output_file_id"]) + content(manager, batch["error_file_id"])
    assert batch["metadata"][OUTPUTS_SHA256] == hashlib.sha256(both).hexdigest()


def test_a_line_with_several_prompts_is_one_answer(manager: BatchManager) -> None:
    data = jsonl(
        [
            completion("a", ["one", "two", "three"], seed=1),
            completion("b", "alone", n=2, temperature=1.0, seed=5),
        ]
    )
    batch = ended(manager, begun(manager, data))
    assert batch["request_counts"] == {"total": 2, "completed": 2, "failed": 0}
    first, second = lines_of(manager, batch["output_file_id"])
    texts = [choice["text"] for choice in first["response"]["body"]["choices"]]
    assert texts == [text_of(tuple(fleet_tokens(text)), 1) for text in ("one", "two", "three")]
    texts = [choice["text"] for choice in second["response"]["body"]["choices"]]
    assert texts == [text_of(tuple(fleet_tokens("alone")), 5, sample) for sample in (0, 1)]


def test_a_prompt_without_a_seed_gets_that_of_its_batch_and_place(manager: BatchManager) -> None:
    data = jsonl([completion("a", "same"), completion("b", "same")])
    first, second = (begun(manager, data) for _ in range(2))
    texts = []
    for id_ in (first, second):
        lines = lines_of(manager, ended(manager, id_)["output_file_id"])
        texts += [line["response"]["body"]["choices"][0]["text"] for line in lines]
    tokens = tuple(fleet_tokens("same"))
    seeds = [mixed_seed("batch", id_, index) for id_ in (first, second) for index in (0, 1)]
    assert texts == [text_of(tokens, seed) for seed in seeds]
    assert len(set(texts)) == 4


def test_chat_and_responses_are_answered_too(manager: BatchManager) -> None:
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    line = {"custom_id": "a", "method": "POST", "url": CHAT, "body": chat}
    batch = ended(manager, begun(manager, jsonl([line]), CHAT))
    (out,) = lines_of(manager, batch["output_file_id"])
    assert out["response"]["body"]["object"] == "chat.completion"
    line |= {"url": "/v1/responses", "body": {"model": "tiny", "input": "hi"}}
    batch = ended(manager, begun(manager, jsonl([line]), "/v1/responses"))
    (out,) = lines_of(manager, batch["output_file_id"])
    assert out["response"]["body"]["status"] == "completed"
    assert batch["usage"]["output_tokens"] == 3


BAD_LINES = {
    b"no json": ("invalid_json_line", None),
    b'{"custom_id": "a", "custom_id": "b"}': ("invalid_json_line", None),
    b"\xff\xfe": ("invalid_json_line", None),
    b"[1]": ("invalid_json_line", None),
    json.dumps({**completion("x"), "custom_id": 5}).encode(): ("invalid_custom_id", "custom_id"),
    json.dumps({**completion("x"), "custom_id": ""}).encode(): ("invalid_custom_id", "custom_id"),
    b'{"custom_id": "\\ud800"}': ("invalid_custom_id", "custom_id"),
    json.dumps({**completion("x"), "method": "GET"}).encode(): ("invalid_method", "method"),
    json.dumps({**completion("x"), "url": CHAT}).encode(): ("invalid_url", "url"),
    json.dumps({**completion("x"), "body": "text"}).encode(): ("invalid_body", "body"),
    json.dumps(completion("x", stream=True)).encode(): ("invalid_body", "body.stream"),
    json.dumps(completion("x", temperature="hot")).encode(): (
        "invalid_request",
        "body.temperature",
    ),
    json.dumps(completion("x", sorcery=1)).encode(): ("unknown_field", "body.sorcery"),
    json.dumps(completion("x", model="other")).encode(): ("model_not_found", "body.model"),
    json.dumps(completion("first")).encode(): ("duplicate_custom_id", "custom_id"),
}


@pytest.mark.parametrize("bad", BAD_LINES, ids=[name for name, _ in BAD_LINES.values()])
def test_a_bad_line_fails_the_batch_by_its_number(
    manager: BatchManager, fleet: HeldFleet, bad: bytes
) -> None:
    code, param = BAD_LINES[bad]
    data = jsonl([completion("first")]) + b"\n" + bad + b"\n" + jsonl([completion("last")])
    batch = ended(manager, begun(manager, data))
    assert batch["status"] == "failed"
    (error,) = batch["errors"]["data"]
    assert (error["code"], error["line"], error["param"]) == (code, 3, param)
    assert error["message"].endswith((".", "?"))
    assert fleet.prompts == []


def test_many_bad_lines_are_counted_and_some_are_named(manager: BatchManager) -> None:
    batch = ended(manager, begun(manager, b"bad\n" * 150))
    errors = batch["errors"]["data"]
    assert [error["line"] for error in errors] == [*range(1, 101), None]
    assert errors[-1]["message"] == "50 more lines are wrong."


def test_a_file_of_blank_lines_has_no_request(manager: BatchManager) -> None:
    batch = ended(manager, begun(manager, b"\n  \n"))
    assert batch["errors"]["data"][0]["code"] == "empty_file"


def test_a_batch_shows_how_far_it_is(tmp_path: Path) -> None:
    fleet = HeldFleet(is_free=False)
    with opened(tmp_path, fleet) as manager:
        id_ = begun(manager, jsonl([completion(f"c{number}") for number in range(9)]))
        until(lambda: fleet.num_open == 2 * fleet.slots)
        assert manager.get(id_)["status"] == "in_progress"
        assert manager.get(id_)["request_counts"] == {"total": 9, "completed": 0, "failed": 0}
        fleet.answer(3)
        until(lambda: manager.get(id_)["request_counts"]["completed"] == 3)
        assert manager.get(id_)["usage"]["output_tokens"] == 9
        fleet.let_run()
        assert ended(manager, id_)["request_counts"]["completed"] == 9


def test_batches_never_have_more_than_two_prompts_for_each_slot(tmp_path: Path) -> None:
    fleet = HeldFleet(is_free=False)
    with opened(tmp_path, fleet) as manager:
        ids = [begun(manager, jsonl([completion(f"{n}") for n in range(9)])) for _ in range(3)]
        until(lambda: fleet.num_open == 2 * fleet.slots)
        while manager.num_open:
            fleet.answer(1)
        assert {manager.get(id_)["status"] for id_ in ids} == {"completed"}
        assert fleet.most == 2 * fleet.slots


def test_the_oldest_batch_goes_first_and_the_next_takes_what_is_left(tmp_path: Path) -> None:
    fleet = HeldFleet(is_free=False)
    with opened(tmp_path, fleet) as manager:
        old = begun(manager, jsonl([completion(f"o{n}", "old") for n in range(6)]))
        until(lambda: fleet.num_open == 4)
        new = begun(manager, jsonl([completion(f"n{n}", "new") for n in range(6)]))
        until(lambda: manager.get(new)["status"] == "in_progress")
        given_before = len(fleet.prompts)
        assert given_before == 4
        fleet.answer(3)  # two of the old one are left to be given, and one place for the new one
        until(lambda: len(fleet.prompts) == 7)
        ids = [prompt.id or "" for prompt in fleet.prompts]
        assert sorted(id_[0] for id_ in ids[4:]) == ["n", "o", "o"]
        fleet.let_run()
        assert ended(manager, old)["status"] == ended(manager, new)["status"] == "completed"


def test_a_fleet_that_is_full_is_asked_again(tmp_path: Path) -> None:
    fleet = HeldFleet(is_free=False, room=1)
    with opened(tmp_path, fleet) as manager:
        id_ = begun(manager, jsonl([completion(f"c{number}") for number in range(3)]))
        while manager.num_open:
            fleet.answer(1)
        assert manager.get(id_)["request_counts"]["completed"] == 3
        assert fleet.most == 1


def test_a_cancelled_batch_keeps_what_it_has(tmp_path: Path) -> None:
    fleet = HeldFleet(is_free=False)
    with opened(tmp_path, fleet) as manager:
        id_ = begun(manager, jsonl([completion(f"c{number}") for number in range(9)]))
        until(lambda: fleet.num_open == 4)
        fleet.answer(2)
        until(lambda: manager.get(id_)["request_counts"]["completed"] == 2)
        assert manager.cancel(id_)["status"] == "cancelling"
        batch = ended(manager, id_)
        assert batch["status"] == "cancelled"
        assert manager.cancel(id_)["status"] == "cancelled"
        assert batch["request_counts"] == {"total": 9, "completed": 2, "failed": 0}
        assert len(lines_of(manager, batch["output_file_id"])) == 2
        assert batch["error_file_id"] is None
        until(lambda: fleet.num_open == 0)


def test_a_batch_whose_time_is_over_says_which_requests_have_no_answer(tmp_path: Path) -> None:
    fleet, clock = HeldFleet(is_free=False), Clock()
    with opened(tmp_path, fleet, clock=clock) as manager:
        id_ = begun(manager, jsonl([completion(f"c{number}") for number in range(6)]))
        until(lambda: fleet.num_open == 4)
        fleet.answer(1)
        until(lambda: manager.get(id_)["request_counts"]["completed"] == 1)
        clock.now_s += DAY_S
        batch = ended(manager, id_)
        assert batch["status"] == "expired"
        assert batch["expired_at"] == int(clock.now_s)
        assert batch["request_counts"] == {"total": 6, "completed": 1, "failed": 5}
        errors = lines_of(manager, batch["error_file_id"])
        assert {line["error"]["code"] for line in errors} == {"batch_expired"}
        assert {line["response"] for line in errors} == {None}
        assert len(errors) == 5


def test_a_batch_that_has_ended_cannot_be_cancelled(manager: BatchManager) -> None:
    id_ = begun(manager, jsonl([completion("a")]))
    ended(manager, id_)
    with pytest.raises(ApiError, match="is completed, and can be cancelled no more") as caught:
        manager.cancel(id_)
    assert caught.value.status == 400


def test_a_batch_goes_on_with_the_next_server(tmp_path: Path) -> None:
    fleet = HeldFleet(is_free=False)
    with opened(tmp_path, fleet) as manager:
        data = jsonl([completion(f"c{number}", f"text {number}") for number in range(9)])
        id_ = begun(manager, data)
        until(lambda: fleet.num_open == 4)
        fleet.answer(2)
        until(lambda: manager.get(id_)["request_counts"]["completed"] == 2)
        told = manager.get(id_)
    fleet = HeldFleet()
    with opened(tmp_path, fleet, starts=False) as manager:
        assert manager.get(id_) == told
        manager.start(answering())
        batch = ended(manager, id_)
        assert batch["request_counts"]["completed"] == 9
        assert len(fleet.prompts) == 7
        lines = lines_of(manager, batch["output_file_id"])
        for number, line in enumerate(lines):
            seed = mixed_seed("batch", id_, number)
            text = text_of(tuple(fleet_tokens(f"text {number}")), seed)
            assert line["response"]["body"]["choices"][0]["text"] == text


def test_a_fleet_that_ends_leaves_its_batches_for_the_next_server(tmp_path: Path) -> None:
    fleet = HeldFleet(is_free=False)
    with opened(tmp_path, fleet) as manager:
        id_ = begun(manager, jsonl([completion(f"c{number}") for number in range(9)]))
        until(lambda: fleet.num_open == 4)
        fleet.answer(1)
        until(lambda: manager.get(id_)["request_counts"]["completed"] == 1)
        fleet.close()
        until(lambda: HELD in (manager.get(id_)["metadata"] or {}))
        assert manager.get(id_)["metadata"][HELD] in (
            "Every card was lost.",
            "The fleet was closed.",
        )
        assert manager.get(id_)["status"] == "in_progress"
    with opened(tmp_path, HeldFleet()) as manager:
        assert ended(manager, id_)["request_counts"]["completed"] == 9


def test_rows_that_the_end_of_the_fleet_cancels_are_made_by_the_next_one(tmp_path: Path) -> None:
    fleet = HeldFleet(is_free=False)
    with opened(tmp_path, fleet) as manager:
        id_ = begun(manager, jsonl([completion(f"c{number}") for number in range(9)]))
        until(lambda: fleet.num_open == 4)
        fleet.close(is_drained=True)
        until(lambda: HELD in (manager.get(id_)["metadata"] or {}))
        assert manager.get(id_)["request_counts"] == {"total": 9, "completed": 0, "failed": 0}
    with opened(tmp_path, HeldFleet()) as manager:
        assert ended(manager, id_)["request_counts"]["completed"] == 9


def test_another_program_lets_a_batch_wait_for_its_own(tmp_path: Path) -> None:
    clock = Clock()
    fleet = HeldFleet(is_free=False)
    with opened(tmp_path, fleet, clock=clock) as manager:
        id_ = begun(manager, jsonl([completion(f"c{number}") for number in range(5)]))
        until(lambda: fleet.num_open == 4)
        fleet.answer(2)
        until(lambda: manager.get(id_)["request_counts"]["completed"] == 2)
    clock.now_s += 10
    other = HeldFleet()
    with opened(tmp_path, other, clock=clock, program="another") as manager:
        until(lambda: HELD in (manager.get(id_)["metadata"] or {}))
        said = manager.get(id_)["metadata"][HELD]
        assert "qpc" in said
        assert "start the server with that one" in said
        mine = begun(manager, jsonl([completion("mine")]))
        assert ended(manager, mine)["status"] == "completed"
        assert manager.get(id_)["status"] == "in_progress"
        assert [prompt.id for prompt in other.prompts] == ["mine"]
    with opened(tmp_path, HeldFleet(), clock=clock) as manager:
        batch = ended(manager, id_)
        assert batch["request_counts"] == {"total": 5, "completed": 5, "failed": 0}
        assert HELD not in batch["metadata"]


def test_two_servers_do_not_share_a_folder(tmp_path: Path, manager: BatchManager) -> None:
    with pytest.raises(UsageError, match="Another server keeps its files and batches in"):
        opened(tmp_path / "store", HeldFleet())


def test_a_folder_that_cannot_be_used_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be the folder of files and batches"):
        opened(tmp_path / "file" / "store", HeldFleet())


def test_a_full_disk_is_said_and_the_batch_goes_on_after_it(
    tmp_path: Path, fleet: HeldFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    with opened(tmp_path, fleet) as manager:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", full)
            id_ = begun(manager, jsonl([completion(f"c{number}") for number in range(3)]))
            until(lambda: HELD in (manager.get(id_)["metadata"] or {}))
            said = manager.get(id_)["metadata"][HELD]
            assert "No space left on device" in said
            assert "qaic-ray run" not in said
            assert manager.get(id_)["status"] == "in_progress"
        assert ended(manager, id_)["request_counts"]["completed"] == 3


def test_a_full_disk_refuses_a_file(manager: BatchManager, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ApiError, match="No space left on device") as caught:
            given(manager, b"x\n")
    assert caught.value.status == 507
    assert manager.files.list(Paging(10))["data"] == []
    assert os.listdir(manager.files.folder) == []


def test_an_answer_that_cannot_be_written_costs_no_other_one(
    manager: BatchManager, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qaic_ray.serve.protocol import answers

    before = answers._completion_choice

    def bug(asked: object, *rest: object, row: object, sample: object) -> object:
        if getattr(row, "id", "") == "bad":
            raise KeyError("a bug")
        return before(asked, *rest, row=row, sample=sample)  # type: ignore[arg-type]

    monkeypatch.setattr(answers, "_completion_choice", bug)
    batch = ended(manager, begun(manager, jsonl([completion("good"), completion("bad")])))
    assert batch["request_counts"] == {"total": 2, "completed": 1, "failed": 1}
    (line,) = lines_of(manager, batch["error_file_id"])
    assert line["response"]["status_code"] == 500
    assert "a bug" in caplog.text


def test_a_bug_over_one_batch_is_told_and_costs_no_other_one(
    manager: BatchManager, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug(*_: object, **more: object) -> object:
        raise KeyError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr("qaic_ray.serve.batches.runner.write_outputs", bug)
        id_ = begun(manager, jsonl([completion("a")]))
        until(lambda: HELD in (manager.get(id_)["metadata"] or {}))
        assert "KeyError" in manager.get(id_)["metadata"][HELD]
        assert manager.get(id_)["status"] == "finalizing"
    assert "a bug" in caplog.text
    assert ended(manager, id_)["status"] == "completed"


def test_what_is_kept_is_its_owners_alone(tmp_path: Path) -> None:
    fleet = HeldFleet(is_free=False)
    with opened(tmp_path / "store", fleet) as manager:
        id_ = begun(manager, jsonl([completion("a")]))
        until(lambda: fleet.num_open)
        for parent, folders, files in os.walk(tmp_path / "store"):
            assert {stat.S_IMODE(os.stat(Path(parent, name)).st_mode) for name in folders} <= {
                0o700
            }
            if Path(parent).name != "journal":
                modes = {
                    stat.S_IMODE(os.stat(Path(parent, n)).st_mode) for n in files if n != ".lock"
                }
                assert modes <= {0o600}
        fleet.let_run()
        ended(manager, id_)
        until(lambda: os.listdir(tmp_path / "store" / "batches" / id_) == ["batch.json"])


def test_a_batch_outlives_its_input_file(tmp_path: Path) -> None:
    fleet = HeldFleet(is_free=False)
    with opened(tmp_path, fleet) as manager:
        file_id = given(manager, jsonl([completion("a"), completion("b")]))
        id_ = manager.create(NewBatch(COMPLETIONS, file_id))["id"]
        manager.files.delete(file_id)
        fleet.let_run()
        assert ended(manager, id_)["request_counts"]["completed"] == 2


def test_output_files_expire_when_they_were_asked_to(tmp_path: Path, fleet: HeldFleet) -> None:
    clock = Clock()
    with opened(tmp_path, fleet, clock=clock) as manager:
        id_ = begun(manager, jsonl([completion("a")]), output_kept_s=3600)
        file_id = ended(manager, id_)["output_file_id"]
        assert manager.files.get(file_id).expires_at == int(clock.now_s) + 3600
        clock.now_s += 3600
        with pytest.raises(ApiError, match="There is no file"):
            manager.files.get(file_id)
        assert file_id not in [each["id"] for each in manager.files.list(Paging(9))["data"]]
        manager.files.remove_expired()
    assert not (tmp_path / "files" / file_id).exists()


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        (NewBatch("/v1/embeddings", "file"), "endpoint"),
        (NewBatch(COMPLETIONS, "file-unknown"), "input_file_id"),
        (NewBatch(COMPLETIONS, "../../etc/passwd"), "input_file_id"),
    ],
)
def test_a_batch_that_cannot_be_is_refused(
    manager: BatchManager, asked: NewBatch, param: str
) -> None:
    with pytest.raises(ApiError) as caught:
        manager.create(asked)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_an_output_file_is_no_input(manager: BatchManager) -> None:
    batch = ended(manager, begun(manager, jsonl([completion("a")])))
    with pytest.raises(ApiError, match="a batch reads a file whose purpose is batch"):
        manager.create(NewBatch(COMPLETIONS, batch["output_file_id"]))


def test_so_many_batches_may_be_open(tmp_path: Path) -> None:
    with opened(tmp_path, HeldFleet(is_free=False), max_open=1) as manager:
        begun(manager, jsonl([completion("a")]))
        with pytest.raises(ApiError, match="1 batches are open") as caught:
            begun(manager, jsonl([completion("a")]))
        assert (caught.value.status, caught.value.retry_after_s) == (429, 60)


def test_before_a_card_is_ready_files_are_taken_and_batches_told(tmp_path: Path) -> None:
    with opened(tmp_path, HeldFleet(is_free=False)) as manager:
        id_ = begun(manager, jsonl([completion("a")]))
        until(lambda: manager.get(id_)["status"] == "in_progress")
    with opened(tmp_path, HeldFleet(), starts=False) as manager:
        given(manager, jsonl([completion("a")]))
        with pytest.raises(ApiError, match="The cards are opening") as caught:
            begun(manager, jsonl([completion("a")]))
        assert caught.value.status == 503
        assert manager.cancel(id_)["status"] == "cancelling"
        manager.start(answering())
        assert ended(manager, id_)["status"] == "cancelled"


def test_a_batch_is_read_as_on_the_day_on_which_it_was_made(tmp_path: Path) -> None:
    """A chat template may show the date; the prompts of a batch must not change at midnight."""
    clock, days = Clock(), []

    def dated(endpoint: str, body: object, at: int) -> object:
        days.append(at)
        return whole.read(endpoint, body, at)  # type: ignore[arg-type]

    whole = answering()
    with opened(tmp_path, HeldFleet(is_free=False), clock=clock) as manager:
        id_ = begun(manager, jsonl([completion("a")]))
        made_at = int(clock.now_s)
        until(lambda: manager.get(id_)["status"] == "in_progress")
    clock.now_s += DAY_S // 2
    with opened(tmp_path, HeldFleet(), clock=clock, starts=False) as manager:
        manager.start(dataclasses.replace(whole, read=dated))  # type: ignore[arg-type]
        ended(manager, id_)
    assert set(days) == {made_at}


def test_damage_of_one_batch_or_file_is_said_and_leaves_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(tmp_path, HeldFleet()) as manager:
        good = begun(manager, jsonl([completion("a")]))
        bad = begun(manager, jsonl([completion("a")]))
        file_id = ended(manager, bad)["output_file_id"]
        ended(manager, good)
    (tmp_path / "batches" / bad / "batch.json").write_text("{")
    (tmp_path / "files" / file_id / "file.json").write_text("[]")
    with caplog.at_level(logging.WARNING), opened(tmp_path, HeldFleet()) as manager:
        assert manager.get(good)["status"] == "completed"
        for lost in (lambda: manager.get(bad), lambda: manager.files.get(file_id)):
            with pytest.raises(ApiError):
                lost()
    assert "A batch is left out" in caplog.text
    assert "A file is left out" in caplog.text
