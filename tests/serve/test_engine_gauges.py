"""What /metrics says of the cards, under vLLM's names."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from qaic_ray.metrics import EngineState
from qaic_ray.serve.http.server_metrics import ServerMetrics


def values(metrics: ServerMetrics, name: str) -> dict[str, float]:
    """Of one series of vLLM's, by engine; read by Prometheus's own parser."""
    families = text_string_to_metric_families(metrics.exposition().decode())
    samples = [sample for family in families for sample in family.samples if sample.name == name]
    return {sample.labels["engine"]: sample.value for sample in samples}


def test_the_gauges_are_those_of_each_card_and_of_what_waits_for_none() -> None:
    metrics = ServerMetrics("model")
    engines = {
        "card 0": EngineState(running=3, waiting=1, kv_usage=0.5),
        "card 1": EngineState(running=2, kv_usage=0.25),
    }
    metrics.looked(engines, 7)
    assert values(metrics, "vllm:num_requests_running") == {"": 0, "card 0": 3, "card 1": 2}
    assert values(metrics, "vllm:num_requests_waiting") == {"": 7, "card 0": 1, "card 1": 0}
    assert values(metrics, "vllm:kv_cache_usage_perc") == {"": 0, "card 0": 0.5, "card 1": 0.25}
    metrics.looked({"card 1": engines["card 1"]}, 0)
    assert values(metrics, "vllm:num_requests_running") == {"": 0, "card 0": 0, "card 1": 2}


def test_counters_rise_through_engines_that_are_made_anew() -> None:
    metrics = ServerMetrics("model")
    seen = []
    for state in (
        EngineState(prompt_tokens=10, reused_tokens=4, generated_tokens=7),
        EngineState(prompt_tokens=10, reused_tokens=4, generated_tokens=6),  # taken back
        EngineState(prompt_tokens=20, reused_tokens=4, generated_tokens=9),
        None,  # the card is lost
        EngineState(prompt_tokens=3, reused_tokens=1, generated_tokens=2, engine=1),
    ):
        metrics.looked({} if state is None else {"card 0": state}, 0)
        seen.append(
            tuple(
                values(metrics, f"vllm:{name}_total")["card 0"]
                for name in ("prompt_tokens", "prefix_cache_hits", "generation_tokens")
            )
        )
    assert seen == [(10, 4, 7), (10, 4, 7), (20, 4, 9), (20, 4, 9), (23, 5, 11)]
