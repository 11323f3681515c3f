"""What the benchmarks of the CPU read of a machine and of what was made before."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmark_modules import benchmark_module

machine = benchmark_module("cpu.machine")
memory = benchmark_module("cpu.memory")
preparation = benchmark_module("cpu.preparation")


def test_busy_is_all_but_idle_and_waiting_for_disks() -> None:
    # user nice system idle iowait irq softirq steal guest guest_nice, as proc(5) lists them
    times = machine.parse_cpu_line("cpu  100 20 30 5000 700 4 6 40 90 10", 7.0)
    tick_s = 1 / os.sysconf("SC_CLK_TCK")
    assert times.busy_s == pytest.approx(200 * tick_s)
    assert times.stolen_s == pytest.approx(40 * tick_s)
    assert times.at_s == 7.0


def test_a_process_has_the_cpu_time_that_the_kernel_tells_it() -> None:
    before = machine.process_s([os.getpid()])
    own = os.times()
    assert before == pytest.approx(own.user + own.system, abs=0.2)
    assert machine.process_s([2**22 + 1]) == 0.0


def test_nobody_is_waited_for_longer_than_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def busy() -> Any:
        return machine.CpuTimes(now[0], 2 * now[0], 0.0)

    monkeypatch.setattr(machine, "cpu_times", busy)
    monkeypatch.setattr(machine.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(machine.time, "sleep", lambda s: now.__setitem__(0, now[0] + s))
    seen = machine.wait_until_quiet(3.0)
    assert seen["busy_cores"] == pytest.approx(2.0)
    assert 3.0 <= seen["waited_s"] < 3.5


def test_patience_ends_and_is_given_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float] = []

    def waited(limit_s: float) -> dict[str, float]:
        limits.append(limit_s)
        return {"waited_s": limit_s, "busy_cores": 2.0}

    monkeypatch.setattr(machine, "wait_until_quiet", waited)
    patience = machine.Patience(5.0)
    patience.give(7.0)
    for _ in range(3):
        patience.wait()
    patience.give(10.0)
    patience.spend(8.0)
    patience.wait()
    assert limits == [5.0, 2.0, 0.0, 2.0]
    assert patience.spent_s == 17.0


def test_pss_is_the_whole_and_not_its_parts() -> None:
    rollup = "55d000-7ff000 ---p 00000000 00:00 0  [rollup]\nRss:  2000 kB\nPss:  1500 kB\n"
    assert memory.parse_pss(f"{rollup}Pss_Dirty:  900 kB\nPss_Anon:  800 kB\n") == 1500 * 1024
    assert memory.parse_pss("") == 0
    assert memory.pss_bytes(2**22 + 1) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's own accounting")
def test_memory_that_is_written_is_counted() -> None:
    before = memory.pss_bytes(os.getpid())
    held = bytearray(b"\1") * (64 * 2**20)
    assert memory.pss_bytes(os.getpid()) - before == pytest.approx(len(held), rel=0.1)


@pytest.mark.parametrize(
    ("line", "name"),
    [
        (b"ray::CardActor.rows\0", "ray::CardActor.rows"),
        (b"/usr/bin/python3\0-m\0qaic_ray\0demo\0", "python -m qaic_ray"),
        (b"/usr/bin/python3.11\0-u\0/x/dashboard.py\0--host\0a\0", "python dashboard.py"),
        (b"/x/ray/core/src/ray/gcs/gcs_server\0--log_dir=/tmp\0", "gcs_server"),
        (b"python3\0-c\0pass\0", "python3"),
        (b"", "?"),
    ],
)
def test_a_process_has_a_name_in_the_table(line: bytes, name: str) -> None:
    assert memory.command_name(line) == name


def test_the_largest_sum_is_kept_with_processes_of_one_name_added() -> None:
    watch = memory.PeakWatch(dict)
    watch.take([("worker", 10), ("worker", 20), ("raylet", 5)])
    watch.take([("worker", 34)])
    watch.take([])
    assert (watch.peak_bytes, watch.samples) == (35, 3)
    assert watch.at_peak == {"worker": 30, "raylet": 5}


def test_a_vocabulary_is_written_in_the_order_of_its_ids() -> None:
    tokenizer = {
        "model": {"type": "BPE", "vocab": {"b": 1, "a": 0, "ab": 3}, "merges": [["a", "b"], "b a"]},
        "added_tokens": [
            {"id": 2, "content": "<end>", "special": True},
            {"id": 4, "content": "<word>", "special": False},
        ],
    }
    keys = preparation.vocabulary_keys(tokenizer)
    assert keys["tokenizer.ggml.tokens"] == ["a", "b", "<end>", "ab", "<word>"]
    # llama.cpp's types of tokens: 1 normal, 3 control, 4 user defined
    assert keys["tokenizer.ggml.token_type"] == [1, 1, 3, 1, 4]
    assert keys["tokenizer.ggml.merges"] == ["a b", "b a"]


def test_another_kind_of_vocabulary_is_refused() -> None:
    with pytest.raises(preparation.PeerMissing, match="the tokenizer is Unigram"):
        preparation.vocabulary_keys({"model": {"type": "Unigram"}})


def test_an_environment_is_made_once_and_anew_for_other_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def ran(command: list[str]) -> None:
        commands.append(command)
        if "venv" in command:
            Path(command[-1]).mkdir()

    monkeypatch.setattr(preparation, "_run", ran)
    folder = tmp_path / "peer"
    python = preparation.peer_python(folder, ("one",))
    assert python == folder / "bin" / "python"
    # Whatever is installed is installed by the peer's own Python.
    assert [command[0] for command in commands] == [sys.executable, str(python)]
    assert commands[1][-1] == "one"
    assert preparation.peer_python(folder, ("one",)) == python
    assert len(commands) == 2
    preparation.peer_python(folder, ("one", "two"))
    assert commands[3][-2:] == ["one", "two"]
    assert json.loads((folder / "made.json").read_text())["packages"] == ["one", "two"]


def test_an_environment_that_was_not_finished_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(command: list[str]) -> None:
        if "venv" in command:
            Path(command[-1]).mkdir()
            return
        raise preparation.PeerMissing("pip failed")

    monkeypatch.setattr(preparation, "_run", fails)
    folder = tmp_path / "peer"
    for _ in range(2):
        with pytest.raises(preparation.PeerMissing, match="pip failed"):
            preparation.peer_python(folder, ("one",))
    assert not (folder / "made.json").exists()
