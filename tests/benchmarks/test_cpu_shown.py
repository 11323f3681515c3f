"""Tables, footnotes and the picture of a made-up document of `benchmarks/cpu_decode.py`."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from typing import Any

import pytest
from benchmark_modules import benchmark_module

figures = benchmark_module("cpu.figures")
shown = benchmark_module("cpu.shown")
memory_benchmark = benchmark_module("cpu_memory")

OURS, PEER = "qaic_ray mx6 exact", figures.PEER


def result(contender: str, speed: float, **fields: Any) -> dict[str, Any]:
    case = {"part": "decode", "batch": 1, "prompt_tokens": 128, "ctx_len": 512}
    rounds = [{"tokens_per_s": speed, "others_cores": 0.9 if speed == 77.0 else 0.0}]
    found = {"contender": contender, **case, "beside_busy": False, **fields, "rounds": rounds}
    return {**found, "tokens_per_s": figures.summary(rounds)}


@pytest.fixture
def document() -> dict[str, Any]:
    results = [
        result(OURS, 50.0),
        result(PEER, 100.0),
        result(OURS, 300.0, batch=8),
        result(PEER, 200.0, batch=8),
        result(OURS, 600.0, part="prefill", prompt_tokens=300),
        result(PEER, 400.0, part="prefill", prompt_tokens=300),
        result(OURS, 80.0, part="busy", batch=8),
        result(OURS, 77.0, part="busy", batch=8, beside_busy=True),
    ]
    kept = figures.promises(results, {OURS: "exact"}, cores=2, threads=2)
    return {
        "model": "smollm2-135m",
        "at": "2026-11-29T12:00:00+00:00",
        "processor": {"name": "A CPU", "cores": 2, "instruction_sets": ["avx2"]},
        "threads": 2,
        "contenders": [OURS, PEER],
        "ratios_to": PEER,
        "weights": 134_479_872,
        "cache_values": 11_520,
        "prompt_tokens": 128,
        "new_tokens": 64,
        "limits": {"read_gb_s": 30.0, "gemm_gflop_s": 200.0},
        "waited_s": 3.5,
        "results": results,
        "promises": [promise.as_json() for promise in kept],
        "notes": ["openvino is left out: pip failed"],
    }


def lines(document: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    shown.show(document)
    text = capsys.readouterr().out
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines()]


def test_speeds_ratios_and_limits_stand_side_by_side(
    document: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = lines(document, capsys)
    assert [OURS, "50 (50-50)", "300 (300-300)"] in rows
    assert [f"{OURS}, x {PEER}", "0.50", "1.50"] in rows
    assert ["limit: float32 at 200 GFLOP/s", "744", "744"] in rows
    assert ["prefill of 300 tokens", OURS, "600 (600-600)", "500 ms", "1.50", ""] in rows


def test_what_others_disturbed_is_marked(
    document: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = lines(document, capsys)
    busy = ["decode, batch 8, beside a busy process", OURS, "77* (77-77)", "", "", "0.96* of alone"]
    assert busy in rows
    about = f"{OURS}: decode at batch 8 beside a busy process, x alone"
    assert [about, "0.96", "0.50", "disturbed*"] in rows
    assert [f"{OURS}: decode at batch 1, x {PEER}", "0.50", "0.80", "MISSED"] in rows


def test_who_is_left_out_and_the_machine_are_named(document: dict[str, Any]) -> None:
    notes = shown.footnotes(document)
    assert notes[0] == "openvino is left out: pip failed"
    assert notes[-1] == "A CPU, 2 cores, avx2"
    assert any(note.startswith("* disturbed") for note in notes)


def test_without_a_peer_there_are_speeds_and_no_ratios(
    document: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    document["contenders"] = [OURS]
    document["results"] = [r for r in document["results"] if r["contender"] == OURS]
    document["promises"] = []
    rows = lines(document, capsys)
    assert [OURS, "50 (50-50)", "300 (300-300)"] in rows
    assert not [row for row in rows if row and row[0].startswith(f"{OURS}, x")]


def test_the_picture_has_the_limits_of_the_run(document: dict[str, Any]) -> None:
    root = ET.fromstring(shown.picture_of(document))
    texts = {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}
    limits = {"8-bit weights read at 30 GB/s", "float32 at 200 GFLOP/s"}
    assert {OURS, PEER, *limits} <= texts


@pytest.mark.parametrize(
    ("four", "later_s", "peak", "holds"),
    [(1.5e9, 0.29, 2.9e9, [True] * 3), (1.7e9, 0.31, 3.1e9, [False] * 3)],
)
def test_promises_on_memory(four: float, later_s: float, peak: float, holds: list[bool]) -> None:
    measured = [
        {"cards": 1, "pss_bytes": 1e9, "activation_s": [5.0]},
        {"cards": 4, "pss_bytes": four, "activation_s": [5.0, 0.1, later_s, 0.1]},
    ]
    found = memory_benchmark.promises({"cards": measured, "demo": {"peak_bytes": peak}})
    assert [figure <= most for _, figure, most in found] == holds


def test_a_part_that_was_not_measured_promises_nothing() -> None:
    one = {"cards": 1, "pss_bytes": 1e9, "activation_s": [5.0]}
    assert memory_benchmark.promises({"cards": [one], "demo": None}) == []
