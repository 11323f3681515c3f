"""Ratios, limits and promises of `benchmarks/cpu_decode.py`, from made-up rounds."""

from __future__ import annotations

from typing import Any

import pytest
from benchmark_modules import benchmark_module
from hypothesis import given
from hypothesis import strategies as st

figures = benchmark_module("cpu.figures")

# SmolLM2-135M; its MatMul weights were counted in the exported graph.
SMOLLM2 = {
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
}
OURS, EXACT = "qaic_ray mx6 fast", {"qaic_ray mx6 fast": "fast"}


def result(
    contender: str, speeds: list[float], others_cores: list[float] | None = None, **fields: Any
) -> dict[str, Any]:
    case = {"part": "decode", "batch": 1, "prompt_tokens": 128, "ctx_len": 512}
    others = others_cores or [0.0] * len(speeds)
    rounds = [
        {"tokens_per_s": speed, "others_cores": cores}
        for speed, cores in zip(speeds, others, strict=True)
    ]
    return {"contender": contender, **case, "beside_busy": False, **fields, "rounds": rounds}


def held(results: list[dict[str, Any]], cores: int = 2, threads: int = 2) -> dict[str, bool]:
    found = figures.promises(results, EXACT, cores=cores, threads=threads)
    return {promise.about: promise.holds for promise in found}


def test_the_size_of_smollm2() -> None:
    size = figures.ModelSize.of(SMOLLM2)
    assert size.weights == 134_479_872
    assert size.cache_values == 30 * 2 * 3 * 64


def test_a_head_dim_that_is_not_said_is_the_hidden_size_by_the_heads() -> None:
    unsaid = {key: value for key, value in SMOLLM2.items() if key != "head_dim"}
    assert figures.ModelSize.of(unsaid) == figures.ModelSize.of(SMOLLM2)


def test_limits_are_bytes_and_operations_a_token() -> None:
    size = figures.ModelSize(weights=32_000_000, cache_values=1000)
    limits = figures.Limits(read_gb_s=33.0, gemm_gflop_s=64.0)
    # A byte a weight and one a block of 32 are 33 MB; 33 GB/s read them 1,000 times a second.
    assert limits.read_tokens_per_s(size, 1, 0) == pytest.approx(1000)
    assert limits.read_tokens_per_s(size, 8, 0) == pytest.approx(8000)
    # 8 rows of 2,062.5 tokens of 1,000 float16 values are 33 MB more: half as fast.
    assert limits.read_tokens_per_s(size, 8, 2062.5) == pytest.approx(4000)
    assert limits.gemm_tokens_per_s(size) == pytest.approx(1000)


def test_a_ratio_is_the_median_of_neighbours_and_not_of_medians() -> None:
    # The machine slowed down for all in the second round.
    results = [
        result(OURS, [100.0, 30.0, 110.0]),
        result(figures.PEER, [50.0, 10.0, 60.0]),
    ]
    assert figures.ratio(results, OURS, part="decode", batch=1).value == pytest.approx(2.0)
    assert figures.ratio(results, figures.PEER, part="decode", batch=1).value == 1.0


def test_rounds_that_others_disturbed_are_left_out_where_some_remain() -> None:
    ours = result(OURS, [100.0, 90.0, 40.0], others_cores=[0.0, 0.1, 0.9])
    peer = result(figures.PEER, [50.0, 5.0, 5.0], others_cores=[0.2, 0.9, 0.9])
    assert figures.ratio([ours, peer], OURS) == figures.Quotient(2.0, disturbed=False)
    assert figures.summary(ours["rounds"]) == {"median": 95.0, "least": 90.0, "most": 100.0}
    assert not figures.is_disturbed(ours)


def test_a_figure_of_disturbed_rounds_alone_says_so() -> None:
    ours = result(OURS, [100.0, 90.0], others_cores=[0.0, 0.1])
    peer = result(figures.PEER, [50.0, 45.0], others_cores=[0.9, 0.9])
    assert figures.ratio([ours, peer], OURS) == figures.Quotient(2.0, disturbed=True)
    assert figures.is_disturbed(peer)
    (promise,) = figures.promises([ours, peer], EXACT, cores=2, threads=2)
    assert promise.as_json()["disturbed"]


def test_what_was_not_measured_has_no_figure_and_no_promise() -> None:
    results = [result(OURS, [100.0])]
    assert figures.ratio(results, OURS, part="decode", batch=1) is None
    assert figures.ratio(results, OURS, part="prefill") is None
    assert figures.speed(results, "nobody", part="decode") is None
    assert held(results) == {}


@pytest.mark.parametrize(("speed", "holds"), [(99.0, False), (100.0, True)])
def test_the_floor_of_batch_1_is_the_peer(speed: float, holds: bool) -> None:
    results = [result(OURS, [speed]), result(figures.PEER, [100.0])]
    assert held(results) == {f"{OURS}: decode at batch 1, x {figures.PEER}": holds}


@pytest.mark.parametrize(
    ("at_eight", "at_sixteen", "more_tokens", "no_cheaper"),
    [
        (100.0, 150.0, True, True),
        (100.0, 94.0, False, True),  # fewer tokens/s with more rows
        (100.0, 215.0, True, False),  # a step of 8 rows costs more than one of 16
    ],
)
def test_steps_grow_with_the_batch(
    at_eight: float, at_sixteen: float, more_tokens: bool, no_cheaper: bool
) -> None:
    results = [result(OURS, [at_eight], batch=8), result(OURS, [at_sixteen], batch=16)]
    assert held(results) == {
        f"{OURS}: tokens/s at batch 16, x those at 8": more_tokens,
        f"{OURS}: a step at batch 16, x one at 8": no_cheaper,
    }


@pytest.mark.parametrize(("long", "holds"), [(96.0, True), (94.0, False)])
def test_a_long_context_costs_nothing_until_it_is_filled(long: float, holds: bool) -> None:
    results = [
        result(OURS, [100.0], part="context", ctx_len=512),
        result(OURS, [long], part="context", ctx_len=8192),
    ]
    assert held(results) == {f"{OURS}: decode at ctx_len 8192, x at 512": holds}


@pytest.mark.parametrize(
    ("beside", "cores", "threads", "holds"),
    [
        (51.0, 2, 2, True),
        (49.0, 2, 2, False),
        (70.0, 4, 4, False),
        (76.0, 4, 4, True),
        (99.0, 4, 3, False),  # a core is left for the other
        (100.0, 4, 3, True),
    ],
)
def test_a_busy_process_takes_a_core_and_no_more(
    beside: float, cores: int, threads: int, holds: bool
) -> None:
    results = [
        result(OURS, [100.0], part="busy", batch=8),
        result(OURS, [beside], part="busy", batch=8, beside_busy=True),
    ]
    about = f"{OURS}: decode at batch 8 beside a busy process, x alone"
    assert held(results, cores, threads) == {about: holds}


def test_texts_are_alike_by_their_first_word() -> None:
    ours = [" Paris.\n\nThe answer", " the cat", "x"]
    assert figures.alike([" Paris.\n\nThe end", " a dog", "x y"], ours) == pytest.approx(2 / 3)
    assert figures.alike([], ours) is None


@given(st.lists(st.floats(0.1, 1e6), min_size=1, max_size=9), st.floats(0.1, 10.0))
def test_a_ratio_does_not_depend_on_the_speed_of_the_machine(
    speeds: list[float], factor: float
) -> None:
    results = [result(OURS, [s * factor for s in speeds]), result(figures.PEER, speeds)]
    assert figures.ratio(results, OURS, part="decode").value == pytest.approx(factor)
