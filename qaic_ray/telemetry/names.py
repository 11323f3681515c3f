"""Every metric, once: its name, kind, tags, bucket boundaries and what it means.

`vllm_*` are the names, kinds, tags and boundaries of vLLM 0.32, as the dashboards of Ray and vLLM
ask for them; `qaic_*` are ours: a card's are the lines of `qaic-util -q`, in base units. Ray puts
`ray_` before a name and `_total` behind a counter's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum


class MetricKind(str, Enum):
    """What Prometheus calls its type."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True)
class Metric:
    """A metric. Every one of its `tags` is given with every value; `boundaries` are a histogram's.

    `line` is the line of `qaic-util -q` that a card's metric has its value from.
    """

    name: str
    kind: MetricKind
    description: str
    tags: tuple[str, ...]
    boundaries: tuple[float, ...] = ()
    line: str = ""

    @property
    def exported(self) -> tuple[str, ...]:
        """The names of its series as Ray exports them."""
        name = f"ray_{self.name}"
        match self.kind:
            case MetricKind.COUNTER:
                return (f"{name}_total",)
            case MetricKind.GAUGE:
                return (name,)
            case MetricKind.HISTOGRAM:
                return (f"{name}_bucket", f"{name}_sum", f"{name}_count")


REQUEST_TAGS = ("model_name", "engine", "ReplicaId")
"""`engine` is the worker's name. `ReplicaId` is empty outside Ray Serve, and has to be there."""
CARD_TAGS = ("qid",)
RUN_TAGS = ("run",)
FINISHED_REASONS = ("stop", "length", "abort", "error", "repetition")
"""vLLM's words for why a request ended."""

# vllm/v1/metrics/loggers.py and buckets.py of 0.32: quantiles compare over equal buckets only.
TTFT_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
TOKEN_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0),
)
REQUEST_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0),
    *(240.0, 480.0, 960.0, 1920.0, 7680.0),
)
TOKENS = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))[:-2]
"""Up to 100,000, as for a context of 131,072. One table for every context: a node's agent keeps the
boundaries that it saw first, and drops what was counted over others."""


def _counter(name: str, description: str, tags: tuple[str, ...] = REQUEST_TAGS) -> Metric:
    return Metric(name, MetricKind.COUNTER, description, tags)


def _gauge(name: str, description: str, tags: tuple[str, ...] = REQUEST_TAGS) -> Metric:
    return Metric(name, MetricKind.GAUGE, description, tags)


def _histogram(name: str, description: str, boundaries: tuple[float, ...]) -> Metric:
    return Metric(name, MetricKind.HISTOGRAM, description, REQUEST_TAGS, boundaries)


# -- requests: a sequence is one, so a prompt with n over 1 is several

PROMPT_LENS = _histogram("vllm_request_prompt_tokens", "Tokens of a prompt.", TOKENS)
ANSWER_LENS = _histogram("vllm_request_generation_tokens", "Tokens of an answer.", TOKENS)
TTFT = _histogram(
    "vllm_time_to_first_token_seconds",
    "From a prompt's arrival at the worker to its first token.",
    TTFT_S,
)
TIME_PER_TOKEN = _histogram(
    "vllm_request_time_per_output_token_seconds",
    "From the first token to the last, over the tokens after the first; one a request.",
    TOKEN_S,
)
E2E = _histogram(
    "vllm_e2e_request_latency_seconds", "From a prompt's arrival to its last token.", REQUEST_S
)
QUEUE_TIME = _histogram(
    "vllm_request_queue_time_seconds",
    "From a prompt's arrival to the first step that it takes part in.",
    REQUEST_S,
)
PREFILL_TIME = _histogram(
    "vllm_request_prefill_time_seconds", "From that step to the first token.", REQUEST_S
)
DECODE_TIME = _histogram(
    "vllm_request_decode_time_seconds", "From the first token to the last.", REQUEST_S
)
SUCCESS = _counter(
    "vllm_request_success",
    "Requests that ended, by finished_reason.",
    (*REQUEST_TAGS, "finished_reason"),
)
PROMPT_TOKENS = _counter("vllm_prompt_tokens", "Tokens of answered prompts.")
GENERATION_TOKENS = _counter("vllm_generation_tokens", "Tokens generated.")
PREFIX_QUERIES = _counter(
    "vllm_prefix_cache_queries", "Prompt tokens that were looked for in the KV caches of slots."
)
PREFIX_HITS = _counter("vllm_prefix_cache_hits", "Prompt tokens that a slot's KV cache held.")
RUNNING = _gauge("vllm_num_requests_running", "Rows in slots.")
WAITING = _gauge("vllm_num_requests_waiting", "Rows at the worker that wait for a slot.")
SWAPPED = _gauge("vllm_num_requests_swapped", "Always 0: a row keeps its slot.")
KV_USAGE = _gauge(
    "vllm_kv_cache_usage_perc", "Share of all slots' cache positions that running rows use, 0 to 1."
)
ENGINE_COUNTERS = (PROMPT_TOKENS, GENERATION_TOKENS, PREFIX_QUERIES, PREFIX_HITS)

# -- cards


def _card(name: str, description: str, line: str) -> Metric:
    return Metric(name, MetricKind.GAUGE, description, CARD_TAGS, line=line)


CARD_INFO_LINES = {
    "board_serial": "Board serial",
    "hw_serial": "HW Serial",
    "fw_version": "FW Version",
    "nsp_version": "NSP Version",
    "sku": "Sku Type",
    "pci": "PCI Address",
}
"""Tag of `qaic_device_info` -> line of `qaic-util -q`."""
CARD_INFO = _gauge(
    "qaic_device_info", "1; its tags say which card it is.", (*CARD_TAGS, *CARD_INFO_LINES)
)
CARD_STATUS = _card("qaic_device_status", "0 initializing, 1 ready, 2 error.", "Status")
SOC_READINGS = (
    _card("qaic_soc_power_watts", "Of one SoC; told from Apps 1.21 on.", "SOC power(Watts)"),
    _card("qaic_soc_tdp_cap_watts", "The most that one SoC may take.", "SOC TDP Cap(Watts)"),
)
"""What older tools do not tell."""
CARD_READINGS = (
    _card("qaic_nsp_total", "NSPs of the card.", "Nsp Total"),
    _card("qaic_nsp_free", "NSPs that no program holds.", "Nsp Free"),
    _card("qaic_dram_total_bytes", "DRAM of the card.", "Dram Total"),
    _card("qaic_dram_free_bytes", "DRAM that is free.", "Dram Free"),
    _card(
        "qaic_dram_bandwidth_bytes_per_second",
        "DRAM traffic, the mean of the last 100 ms.",
        "Last 100ms Average Dram Bw",
    ),
    _card("qaic_dram_fragmentation_ratio", "Fragmentation of DRAM, 0 to 1.", "Dram Fragmentation"),
    _card("qaic_soc_temperature_celsius", "Of the SoC.", "SoC temperature(degree C)"),
    _card(
        "qaic_board_power_watts",
        "Of the board, which several SoCs may share: see board_serial of qaic_device_info.",
        "Board power(Watts)",
    ),
    _card("qaic_tdp_cap_watts", "The most that the board may take.", "TDP Cap(Watts)"),
    *SOC_READINGS,
    _card("qaic_nsp_frequency_hertz", "Clock of the NSPs.", "NSP Frequency(Mhz)"),
    _card("qaic_ddr_frequency_hertz", "Clock of the DRAM.", "DDR Frequency(Mhz)"),
    _card("qaic_compnoc_frequency_hertz", "Clock of COMPNOC.", "COMPNOC Frequency(Mhz)"),
    _card("qaic_memnoc_frequency_hertz", "Clock of MEMNOC.", "MEMNOC Frequency(Mhz)"),
    _card("qaic_sysnoc_frequency_hertz", "Clock of SYSNOC.", "SYSNOC Frequency(Mhz)"),
    _card("qaic_networks_loaded", "Programs in DRAM.", "Networks Loaded"),
    _card("qaic_networks_active", "Programs that hold NSPs.", "Networks Active"),
    _card("qaic_constants_loaded", "Sets of constants in DRAM.", "Constants Loaded"),
    _card("qaic_constants_in_use", "Those of programs that hold NSPs.", "Constants In-Use"),
    _card("qaic_vc_free", "Virtual channels that are free.", "Vc Free"),
    _card("qaic_mcid_free", "Multicast ids that are free.", "MCID Free"),
    _card("qaic_semaphore_free", "Semaphores that are free.", "Semaphore Free"),
)

# -- the driver

ROWS = _counter("qaic_rows", "Rows that ended, by result: ok or failed.", (*RUN_TAGS, "result"))
ROW_RESULTS = ("ok", "failed")
RETRIES = _counter("qaic_retries", "Prompts given to a card another time.", RUN_TAGS)
LOSSES = _counter("qaic_worker_losses", "Workers lost, or of no use any more.", RUN_TAGS)
PROMPTS_WAITING = _gauge("qaic_prompts_waiting", "Prompts read that no card has.", RUN_TAGS)
WORKERS_READY = _gauge("qaic_workers_ready", "Workers that are open.", RUN_TAGS)

REQUEST_METRICS = (
    *(PROMPT_LENS, ANSWER_LENS, TTFT, TIME_PER_TOKEN, E2E, QUEUE_TIME, PREFILL_TIME, DECODE_TIME),
    *(SUCCESS, *ENGINE_COUNTERS, RUNNING, WAITING, SWAPPED, KV_USAGE),
)
CARD_METRICS = (CARD_INFO, CARD_STATUS, *CARD_READINGS)
RUN_METRICS = (ROWS, RETRIES, LOSSES, PROMPTS_WAITING, WORKERS_READY)
METRICS = (*REQUEST_METRICS, *CARD_METRICS, *RUN_METRICS)


def exported_names(metrics: Iterable[Metric] = METRICS) -> set[str]:
    """Every name that is scraped for these."""
    return {name for metric in metrics for name in metric.exported}
