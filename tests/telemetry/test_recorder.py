"""From what happens to values, in memory: each value by its formula, and what a fault does."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from memory_sink import MemorySink
from simulated_cards import DirectReader, SimulatedCards

from qaic_ray.metrics import EngineState
from qaic_ray.rows import Prompt, Row
from qaic_ray.runs.driver import Audience, Driver, Progress
from qaic_ray.runs.metering import metered
from qaic_ray.sdk import parse_lines
from qaic_ray.telemetry import names
from qaic_ray.telemetry.names import Metric
from qaic_ray.telemetry.recorder import (
    CardRecorder,
    EndedRequest,
    GuardedSink,
    NoSink,
    RequestRecorder,
    RunRecorder,
)

ENDED = EndedRequest("stop", 40, 11, scheduled_s=0.5, first_token_s=2.0, end_s=7.0)


def recorder(sink: MemorySink) -> RequestRecorder:
    return RequestRecorder(sink, "smollm2", "card 3")


# -- requests


def test_every_series_of_an_engine_is_there_before_its_first_request() -> None:
    sink = MemorySink()
    recorder(sink)
    for metric in (*names.ENGINE_COUNTERS, names.RUNNING, names.WAITING, names.KV_USAGE):
        assert sink.value(metric) == 0
        assert sink.tags(metric) == {("smollm2", "card 3", "")}
    assert sink.tags(names.SUCCESS) == {
        ("smollm2", "card 3", "", reason)
        for reason in ("stop", "length", "abort", "error", "repetition")
    }
    assert sink.value(names.SWAPPED) == 0


def test_a_requests_times_are_what_their_names_say() -> None:
    sink = MemorySink()
    recorder(sink).ended(ENDED)
    assert {m.name: sink.all(m) for m in names.REQUEST_METRICS if m.boundaries} == {
        "vllm_request_prompt_tokens": [40],
        "vllm_request_generation_tokens": [11],
        "vllm_time_to_first_token_seconds": [2.0],
        "vllm_request_time_per_output_token_seconds": [0.5],
        "vllm_e2e_request_latency_seconds": [7.0],
        "vllm_request_queue_time_seconds": [0.5],
        "vllm_request_prefill_time_seconds": [1.5],
        "vllm_request_decode_time_seconds": [5.0],
    }
    assert sink.value(names.SUCCESS, finished_reason="stop") == 1


def test_one_token_has_no_time_between_tokens() -> None:
    sink = MemorySink()
    recorder(sink).ended(replace(ENDED, generated_tokens=1))
    assert sink.all(names.TIME_PER_TOKEN) == []


def test_requests_without_an_answer_are_counted_and_have_no_times() -> None:
    sink = MemorySink()
    told = recorder(sink)
    told.unanswered("error")
    told.unanswered("abort", 3)
    told.unanswered("abort", 0)
    assert sink.value(names.SUCCESS, finished_reason="error") == 1
    assert sink.value(names.SUCCESS, finished_reason="abort") == 3
    assert not sink.observed


def test_gauges_are_the_state_and_counters_what_came_since_the_last_look() -> None:
    sink = MemorySink()
    told = recorder(sink)
    told.looked(EngineState(3, 2, 0.25, prompt_tokens=50, reused_tokens=10, generated_tokens=7))
    told.looked(EngineState(1, 0, 0.125, prompt_tokens=60, reused_tokens=15, generated_tokens=9))
    assert [sink.value(m) for m in (names.RUNNING, names.WAITING, names.KV_USAGE)] == [1, 0, 0.125]
    assert [sink.value(metric) for metric in names.ENGINE_COUNTERS] == [60, 9, 60, 15]


@given(st.lists(st.lists(st.integers(0, 100)), max_size=4))
def test_a_counter_is_the_sum_over_engines_of_the_most_that_each_had(
    lives: list[list[int]],
) -> None:
    sink = MemorySink()
    told = recorder(sink)
    for engine, counts in enumerate(lives):
        for count in counts:
            told.looked(EngineState(generated_tokens=count, engine=engine))
    expected = sum(max(counts, default=0) for counts in lives)
    assert sink.value(names.GENERATION_TOKENS) == expected


# -- cards

OPEN_TOOL = """\
QID 0
\tStatus:Ready
\tPCI Address:0000:36:00.0
\tHW Serial:0x1a
\tFW Version:1.20.2
\tNSP Version:1.20.2
\tDram Total:16308 MB
\tDram Free:8154 MB
\tDram Fragmentation:12.50%
\tVc Free:15
\tNsp Total:14
\tNsp Free:0
\tLast 100ms Average Dram Bw:1000.5 KBps
\tMCID Free:3072
\tSemaphore Free:31
\tConstants Loaded:2
\tConstants In-Use:1
\tNetworks Loaded:2
\tNetworks Active:1
\tNSP Frequency(Mhz):595.20
\tDDR Frequency(Mhz):2133.00
\tCOMPNOC Frequency(Mhz):1450.00
\tMEMNOC Frequency(Mhz):1000.00
\tSYSNOC Frequency(Mhz):667.00
\tSku Type:PCIe
\tBoard serial:B7
\tSoC temperature(degree C):-3.50
\tBoard power(Watts):18.25
\tTDP Cap(Watts):75.00
QID 1
\tStatus:Error
\tPCI Address:0000:37:00.0
QID 2
\tStatus:Initializing
QID 3
\tStatus:Ready
\tDram Total:31391744 KB
\tBoard power(Watts):60.00
\tBoard TDP Cap(Watts):150.00
\tSOC power(Watts):15.00
\tSOC TDP Cap(Watts):40.00
"""


def test_each_line_of_qaic_util_is_a_gauge_in_base_units() -> None:
    sink = MemorySink()
    CardRecorder(sink).looked(parse_lines(OPEN_TOOL))
    told = [metric for metric in names.CARD_METRICS if metric not in names.SOC_READINGS]
    of_first = {metric.name: sink.value(metric, qid="0") for metric in told}
    assert of_first == {
        "qaic_device_info": 1,
        "qaic_device_status": 1,
        "qaic_nsp_total": 14,
        "qaic_nsp_free": 0,
        "qaic_dram_total_bytes": 16308 * 2**20,
        "qaic_dram_free_bytes": 8154 * 2**20,
        "qaic_dram_bandwidth_bytes_per_second": 1000.5 * 1024,
        "qaic_dram_fragmentation_ratio": 0.125,
        "qaic_soc_temperature_celsius": -3.5,
        "qaic_board_power_watts": 18.25,
        "qaic_tdp_cap_watts": 75,
        "qaic_nsp_frequency_hertz": pytest.approx(595.2e6),
        "qaic_ddr_frequency_hertz": 2133e6,
        "qaic_compnoc_frequency_hertz": 1450e6,
        "qaic_memnoc_frequency_hertz": 1000e6,
        "qaic_sysnoc_frequency_hertz": 667e6,
        "qaic_networks_loaded": 2,
        "qaic_networks_active": 1,
        "qaic_constants_loaded": 2,
        "qaic_constants_in_use": 1,
        "qaic_vc_free": 15,
        "qaic_mcid_free": 3072,
        "qaic_semaphore_free": 31,
    }
    info = ("0", "B7", "0x1a", "1.20.2", "1.20.2", "PCIe", "0000:36:00.0")
    assert info in sink.tags(names.CARD_INFO)


def test_a_card_that_is_not_ready_has_a_status_and_no_made_up_readings() -> None:
    sink = MemorySink()
    CardRecorder(sink).looked(parse_lines(OPEN_TOOL))
    assert [sink.value(names.CARD_STATUS, qid=str(qid)) for qid in range(4)] == [1, 2, 0, 1]
    for metric in names.CARD_READINGS:
        assert {"1", "2"}.isdisjoint(qid for (qid,) in sink.tags(metric)), metric.name


def test_the_newer_tools_names_are_read_too() -> None:
    sink = MemorySink()
    CardRecorder(sink).looked(parse_lines(OPEN_TOOL))
    values = {metric.name: metric for metric in names.CARD_READINGS}
    assert sink.value(values["qaic_tdp_cap_watts"], qid="3") == 150
    assert sink.value(values["qaic_board_power_watts"], qid="3") == 60
    assert sink.value(values["qaic_soc_power_watts"], qid="3") == 15
    assert sink.value(values["qaic_soc_tdp_cap_watts"], qid="3") == 40
    assert sink.value(values["qaic_dram_total_bytes"], qid="3") == 31391744 * 2**10


# -- the driver


def test_a_run_over_cards_that_die_is_told_row_by_row() -> None:
    sink = MemorySink()
    cards = SimulatedCards([0.0, 0.0, 0.0], slots=2, mean_life_s=8.0)
    rows: list[Row] = []
    attempts: list[int] = []
    prompts: list[Prompt | Row] = [Prompt(i, f"prompt {i}") for i in range(60)]
    prompts[7] = Row.failed(Prompt(7, ""), "It is empty.")
    audience = metered(Audience(on_row=rows.append), RunRecorder(sink, "tiny-1"))
    run = cards.run

    def counted(shard: object) -> None:
        if shard.attempt > 1:  # type: ignore[attr-defined]
            attempts.extend(prompt.index for prompt in shard.prompts)  # type: ignore[attr-defined]
        run(shard)  # type: ignore[arg-type]

    cards.run = counted  # type: ignore[method-assign]
    result = Driver(cards, prompts, audience, clock=cards.clock, reader=DirectReader).run()  # type: ignore[arg-type]
    failed = sum(not row.ok for row in rows)
    assert failed >= 1
    assert sink.value(names.ROWS, result="failed") == failed
    assert sink.value(names.ROWS, result="ok") == 60 - failed
    assert sink.value(names.RETRIES) == len(attempts) > 0
    assert sink.value(names.LOSSES) == sum(worker.losses for worker in result.workers) > 0
    assert sink.value(names.PROMPTS_WAITING) == 0
    assert sink.value(names.WORKERS_READY) == sum(w.ready_at_end for w in result.workers)
    assert sink.tags(names.ROWS) == {("tiny-1", "ok"), ("tiny-1", "failed")}


def test_prompts_wait_until_a_worker_has_them() -> None:
    sink = MemorySink()
    waiting: list[float] = []
    cards = SimulatedCards([0.0], slots=1)
    recorder = RunRecorder(sink, "tiny-1")
    audience = metered(Audience(), recorder)
    look = audience.on_progress

    def on_progress(progress: Progress) -> None:
        look(progress)
        waiting.append(sink.value(names.PROMPTS_WAITING))

    audience = replace(audience, on_progress=on_progress)
    prompts = [Prompt(i, "same") for i in range(30)]
    Driver(cards, prompts, audience, clock=cards.clock, reader=DirectReader).run()  # type: ignore[arg-type]
    assert max(waiting) > 10
    assert waiting[-1] == 0


# -- faults


class Broken(NoSink):
    """Fails from the third value on."""

    left = 2

    def add(self, metric: Metric, amount: float, tags: Mapping[str, str]) -> None:
        if not self.left:
            raise RuntimeError("the agent is gone")
        self.left -= 1


def test_a_sink_that_fails_is_said_once_and_ends_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    said: list[str] = []
    with caplog.at_level(logging.WARNING):
        told = RunRecorder(GuardedSink(Broken, said.append), "run")
        for _ in range(5):
            told.worker_lost("card 0")
    assert said == ["Metrics are off from here on: RuntimeError: the agent is gone"]
    assert [record.message for record in caplog.records] == said


def test_a_sink_that_cannot_be_made_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    def make() -> NoSink:
        raise ImportError("no metrics here")

    said: list[str] = []
    RunRecorder(GuardedSink(make, said.append), "run").worker_lost("card 0")
    assert said == ["Metrics are off from here on: ImportError: no metrics here"]
