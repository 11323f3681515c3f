"""No more cards are opened than the prompts fill."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qaic_ray.errors import DeviceError, UsageError
from qaic_ray.options import EmulatorOptions, RayOptions, RunOptions
from qaic_ray.pipeline.local_cards import on_local_cards, slots_of
from qaic_ray.pipeline.request import RunRequest, SdkChoice, with_typed_bound
from qaic_ray.sampling_params import SamplingParams
from qaic_ray.sdk import Device


def cards(*statuses: str) -> SdkChoice:
    devices = [Device(qid, status, "PCIe", 14, 14, 1, 1) for qid, status in enumerate(statuses)]
    here: Any = SimpleNamespace(devices=lambda: devices)
    return SdkChoice(here, "auto", EmulatorOptions())


def chosen(
    run: RunOptions, slots: int | None = 8, sdk: SdkChoice | None = None, **more: Any
) -> Any:
    """Ids of the cards, and what was said."""
    notes: list[str] = []
    listener: Any = SimpleNamespace(note=notes.append)
    request = RunRequest("r", "m", Path(), run, **more)
    request, number = on_local_cards(request, sdk or cards(*["Ready"] * 4), slots, listener)
    assert request.ray.address or len(request.run.devices) == number
    return request.run.devices, notes


def pipes(number: int) -> str:
    return "|".join("a" * number)


@given(
    num_prompts=st.integers(1, 60),
    n=st.integers(1, 3),
    slots=st.integers(1, 9),
    num_cards=st.integers(1, 6),
)
def test_a_slot_for_each_answer_and_no_card_more(
    num_prompts: int, n: int, slots: int, num_cards: int
) -> None:
    sampling = SamplingParams(n=n, temperature=1.0)
    run = RunOptions(prompt=pipes(num_prompts), sampling=sampling)
    ids, notes = chosen(run, slots, cards(*["Ready"] * num_cards))
    assert len(ids) == min(num_cards, math.ceil(num_prompts * n / slots))
    assert bool(notes) == (len(ids) < num_cards)


def test_parts_and_groups_count_as_workers() -> None:
    assert chosen(RunOptions(prompt=pipes(9), partitions=2), 8)[0] == (0,)
    assert chosen(RunOptions(prompt=pipes(17), partitions=2), 8)[0] == (0, 1)
    assert chosen(RunOptions(prompt=pipes(3), group_size=2), 8)[0] == (0, 1)
    assert chosen(RunOptions(prompt=pipes(9), group_size=2), 8)[0] == (0, 1, 2, 3)


def test_a_file_is_counted_as_far_as_it_matters(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps([{"prompt": f"{i}"} for i in range(10)]))  # on one line
    assert chosen(RunOptions(prompts=str(path)), 4)[0] == (0, 1, 2)
    assert chosen(RunOptions(prompts=str(path), max_prompts=4), 4)[0] == (0,)
    own = [{"prompt": "a", "n": 4, "temperature": 1}, {"prompt": "b"}, {"no": "prompt"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in own))
    run = RunOptions(prompts=str(path), prompts_format="jsonl")
    assert chosen(run, 4)[0] == (0, 1)
    path.write_text('{"prompt": "a"}\n' * 100_000)
    assert chosen(RunOptions(prompts=str(path)), 4)[0] == (0, 1, 2, 3)


def test_an_input_without_one_good_prompt_needs_a_card_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"no": "prompt"}\n')
    assert chosen(RunOptions(prompts=str(path)))[0] == (0,)


def test_what_nobody_can_count_gets_every_card(tmp_path: Path) -> None:
    every = (0, 1, 2, 3)
    assert chosen(RunOptions(prompts="-"))[0] == every
    assert chosen(RunOptions(prompt="a"), None)[0] == every
    assert chosen(RunOptions(prompt="a"), resume=tmp_path)[0] == every


def test_cards_that_are_named_are_the_cards() -> None:
    assert chosen(RunOptions(prompt="a", devices=(3, 1)))[0] == (3, 1)
    with pytest.raises(UsageError, match="no device 7"):
        chosen(RunOptions(prompt="a", devices=(7,)))


def test_cards_that_are_not_ready_are_passed_over() -> None:
    sdk = cards("Error", "Ready", "Ready")
    assert chosen(RunOptions(prompt="a"), 8, sdk)[0] == (1,)
    with pytest.raises(DeviceError, match="No card is ready"):
        chosen(RunOptions(prompt="a"), 8, cards("Error"))


def test_a_cluster_has_cards_of_its_own() -> None:
    assert chosen(RunOptions(prompt="a"), ray=RayOptions(address="auto"))[0] == "all"


def test_slots_are_read_from_the_program_s_folder(tmp_path: Path) -> None:
    assert slots_of(tmp_path) is None
    shapes = [
        {"batch_size": "1", "seq_len": "32", "ctx_len": "64", "full_batch_size": "5"},
        {"batch_size": "5", "seq_len": "1", "ctx_len": "64", "full_batch_size": "5"},
    ]
    (tmp_path / "specializations.json").write_text(json.dumps({"specializations": shapes}))
    assert slots_of(tmp_path) == 5
    (tmp_path / "specializations.json").write_text("{")
    assert slots_of(tmp_path) is None


def test_only_answers_to_typed_prompts_without_a_bound_get_one() -> None:
    assert with_typed_bound(RunOptions(prompt="a")).generation_len == 256
    assert with_typed_bound(RunOptions(prompt="a", generation_len=9)).generation_len == 9
    own = RunOptions(prompt="a", sampling=SamplingParams(max_tokens=7))
    assert with_typed_bound(own).defaults.max_tokens == 7
    assert with_typed_bound(RunOptions(prompts="p.txt")).generation_len is None
