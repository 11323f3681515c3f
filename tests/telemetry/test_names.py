"""The table of metrics against what the installed Ray's dashboards ask for, and vLLM's buckets."""

from __future__ import annotations

import re

import pytest
from names_of_dashboards import DATA_LLM, NOT_OURS, SERVE_LLM, asked_for, is_known

from qaic_ray.telemetry import names
from qaic_ray.telemetry.names import METRICS, MetricKind


def test_every_name_of_the_data_llm_dashboard_is_ours() -> None:
    assert {name for name in asked_for(DATA_LLM) if not is_known(name)} == set()


def test_what_the_serve_llm_dashboard_asks_for_beyond_that_has_a_reason() -> None:
    missing = {name for name in asked_for(SERVE_LLM) if not is_known(name)}
    assert {name for name in missing if not name.startswith(tuple(NOT_OURS))} == set()
    for begin in NOT_OURS:
        assert any(name.startswith(begin) for name in missing), f"{begin}: nobody asks for it"


def test_buckets_are_vllms() -> None:
    ttft = "0.001 .005 .01 .02 .04 .06 .08 .1 .25 .5 .75 1 2.5 5 7.5 10 20 40 80 160 640 2560"
    token = ".01 .025 .05 .075 .1 .15 .2 .3 .4 .5 .75 1 2.5 5 7.5 10 20 40 80"
    request = ".3 .5 .8 1 1.5 2 2.5 5 10 15 20 30 40 50 60 120 240 480 960 1920 7680"
    tokens = "1 2 5 10 20 50 100 200 500 1000 2000 5000 10000 20000 50000 100000"
    expected = {
        "vllm_time_to_first_token_seconds": ttft,
        "vllm_request_time_per_output_token_seconds": token,
        "vllm_e2e_request_latency_seconds": request,
        "vllm_request_queue_time_seconds": request,
        "vllm_request_prefill_time_seconds": request,
        "vllm_request_decode_time_seconds": request,
        "vllm_request_prompt_tokens": tokens,
        "vllm_request_generation_tokens": tokens,
    }
    found = {metric.name: metric.boundaries for metric in METRICS if metric.boundaries}
    assert found == {name: tuple(map(float, text.split())) for name, text in expected.items()}


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_a_definition_is_one_that_ray_takes(metric: names.Metric) -> None:
    assert re.fullmatch(r"(vllm|qaic)_[a-z0-9_]+", metric.name)  # Ray's core takes no `:`
    assert not metric.name.endswith("_total") or metric.kind is MetricKind.GAUGE
    assert metric.description.endswith(".")
    assert len(set(metric.tags)) == len(metric.tags)
    assert all(metric.tags)
    assert (metric.kind is MetricKind.HISTOGRAM) == bool(metric.boundaries)
    assert list(metric.boundaries) == sorted(set(metric.boundaries))
    assert all(boundary > 0 for boundary in metric.boundaries)
    if metric.name.startswith("vllm_"):
        assert metric.tags[:3] == ("model_name", "engine", "ReplicaId")


def test_a_name_is_given_once() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    series = [name for metric in METRICS for name in metric.exported]
    assert len(set(series)) == len(series)
