"""The command line of `benchmarks/cpu_decode.py`, what it measures, and the prompts."""

from __future__ import annotations

import argparse
import os

import pytest
from benchmark_modules import benchmark_module

cpu_decode = benchmark_module("cpu_decode")


def options(monkeypatch: pytest.MonkeyPatch, *words: str) -> argparse.Namespace:
    monkeypatch.setattr("sys.argv", ["cpu_decode.py", *words])
    found: argparse.Namespace = cpu_decode.arguments()
    return found


def test_a_whole_run_and_a_quick_one(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, quick = options(monkeypatch), options(monkeypatch, "--quick")
    assert whole.batches == [1, 2, 4, 8, 16, 32]
    assert whole.peers == ["llama.cpp", "transformers", "openvino"]
    assert whole.numerics == ["exact", "fast"]
    assert whole.threads == len(os.sched_getaffinity(0))
    assert (quick.batches, quick.peers, quick.precision) == ([1, 8, 16], ["llama.cpp"], ["mx6"])
    assert quick.rounds < whole.rounds
    assert options(monkeypatch, "--quick", "--rounds", "7").rounds == 7
    assert options(monkeypatch, "--peers").peers == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--batches 0", "--batches are from 1 to 512"),
        ("--batches 8 513", "--batches are from 1 to 512"),
        ("--rounds 0", "--threads and --rounds are at least 1"),
        ("--threads 0", "--threads and --rounds are at least 1"),
        ("--new-tokens 0", "--new-tokens is from 2 to 384"),
        ("--new-tokens 385", "--new-tokens is from 2 to 384"),
        ("--numerics precise", "--numerics takes exact, fast, or both with a comma"),
        ("--numerics exact,", "--numerics takes exact, fast, or both with a comma"),
        ("--peers vllm", "invalid choice: 'vllm'"),
    ],
)
def test_a_wrong_line_is_one_sentence(
    words: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        options(monkeypatch, *words.split())
    assert ended.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_every_case_fits_its_context(monkeypatch: pytest.MonkeyPatch) -> None:
    said = options(monkeypatch)
    for _, group in cpu_decode.cases(said):
        for case in group:
            new_tokens = 1 if case.part == "prefill" else said.new_tokens
            assert case.prompt_tokens + new_tokens <= case.ctx_len


def test_contexts_are_compared_side_by_side_and_busy_with_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    groups = dict(cpu_decode.cases(options(monkeypatch, "--quick", "--batches", "1")))
    assert [(case.ctx_len, case.copy) for case in groups["context"]] == [(512, 0), (8192, 1)]
    assert [case.beside_busy for case in groups["busy"]] == [False, True]
    only = cpu_decode.cases(options(monkeypatch, "--parts", "prefill"))
    assert [part for part, _ in only] == ["prefill"]


@pytest.mark.parametrize("batch", [1, 2, 32, 512])
def test_rows_have_different_prompts_of_one_length(batch: int) -> None:
    # SmolLM2's tokenizer makes 1,973 tokens of the text.
    case = cpu_decode.Case("decode", batch, 128, 512)
    prompts = cpu_decode.prompts_of(list(range(1973)), case)
    assert len({tuple(prompt) for prompt in prompts}) == batch
    assert {len(prompt) for prompt in prompts} == {128}


def test_ours_are_told_threads_and_numerics(monkeypatch: pytest.MonkeyPatch) -> None:
    said = options(monkeypatch, "--threads", "3")
    kinds = {kind.name: kind.environment for kind in cpu_decode.our_kinds(said)}
    assert list(kinds) == ["qaic_ray mx6 exact", "qaic_ray mx6 fast", "qaic_ray fp16 exact"]
    assert {env["QAIC_EMULATOR_THREADS"] for env in kinds.values()} == {"3"}
    assert kinds["qaic_ray mx6 fast"]["QAIC_EMULATOR_NUMERICS"] == "fast"
    assert "QAIC_EMULATOR_KERNELS" not in kinds["qaic_ray mx6 exact"]


def test_ours_on_onnxruntime_is_one_more(monkeypatch: pytest.MonkeyPatch) -> None:
    said = options(monkeypatch, "--onnxruntime", "--precision", "mx6", "--numerics", "exact")
    exact, plain = cpu_decode.our_kinds(said)
    assert exact.name == "qaic_ray mx6 exact"
    assert plain.precision == exact.precision
    assert plain.environment == exact.environment | {"QAIC_EMULATOR_KERNELS": "onnxruntime"}
