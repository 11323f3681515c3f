"""Our Grafana dashboard: what Ray's and vLLM's lack. Cards, the driver, and how full engines are.

`scripts/reference` writes it to `configs/grafana/qaic-ray.json`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

UID = "qaicRayCards"
_WIDTH, _HEIGHT = 12, 8
_ROW_HEIGHT = 1
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
# A card's readings have its id alone; the info series has the rest, from the same process.
_INFO = "on (WorkerId, qid) group_left (board_serial, sku) ray_qaic_device_info"
_CARDS = 'NodeAddress=~"$node"'
_RUN = 'run=~"$run"'
_MODEL = 'model_name=~"$model"'
_CARD = "{{NodeAddress}} card {{qid}}"
_ENGINE = "{{engine}}"


@dataclass(frozen=True)
class Panel:
    """A panel: its queries, each with the words of its legend."""

    title: str
    description: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    kind: str = "timeseries"
    mappings: tuple[tuple[int, str, str], ...] = ()


def _each_card(name: str) -> str:
    """A reading of each card; two Rays on a machine see the same ones."""
    return f"max by (NodeAddress, qid) ({name}{{{_CARDS}}})"


def _rate(name: str, labels: str, by: str = "") -> str:
    total = f"sum by ({by})" if by else "sum"
    return f"{total} (rate({name}{{{labels}}}[$__rate_interval]))"


_OF_CARDS = (
    Panel(
        "Status",
        "What each card says of itself.",
        "none",
        ((_each_card("ray_qaic_device_status"), _CARD),),
        "state-timeline",
        ((0, "initializing", "yellow"), (1, "ready", "green"), (2, "error", "red")),
    ),
    Panel(
        "Temperature",
        "Of each SoC.",
        "celsius",
        ((_each_card("ray_qaic_soc_temperature_celsius"), _CARD),),
    ),
    Panel(
        "Power",
        "Of each board, which several cards may share, and of all boards.",
        "watt",
        (
            (
                f"max by (board_serial) (ray_qaic_board_power_watts{{{_CARDS}}} * {_INFO})",
                "board {{board_serial}}",
            ),
            (
                f"sum (max by (board_serial) (ray_qaic_board_power_watts{{{_CARDS}}} * {_INFO}))",
                "all boards",
            ),
        ),
    ),
    Panel(
        "DRAM in use",
        "Share of each card's DRAM that programs hold.",
        "percentunit",
        (
            (
                f"1 - {_each_card('ray_qaic_dram_free_bytes')} / "
                f"{_each_card('ray_qaic_dram_total_bytes')}",
                _CARD,
            ),
        ),
    ),
    Panel(
        "DRAM traffic",
        "Mean of the last 100 ms before each look.",
        "Bps",
        ((_each_card("ray_qaic_dram_bandwidth_bytes_per_second"), _CARD),),
    ),
    Panel(
        "NSPs in use",
        "That programs hold, of each card.",
        "none",
        (
            (
                f"{_each_card('ray_qaic_nsp_total')} - {_each_card('ray_qaic_nsp_free')}",
                _CARD,
            ),
        ),
    ),
    Panel(
        "NSP clock",
        "Of each card.",
        "hertz",
        ((_each_card("ray_qaic_nsp_frequency_hertz"), _CARD),),
    ),
    Panel(
        "Programs",
        "In DRAM and with NSPs, on all cards.",
        "none",
        (
            (f"sum ({_each_card('ray_qaic_networks_loaded')})", "loaded"),
            (f"sum ({_each_card('ray_qaic_networks_active')})", "active"),
        ),
    ),
)
_OF_RUNS = (
    Panel(
        "Rows",
        "That ended, each second.",
        "rps",
        ((_rate("ray_qaic_rows_total", _RUN, "run, result"), "{{run}} {{result}}"),),
    ),
    Panel(
        "Rows so far",
        "Of each run, by result.",
        "none",
        ((f"sum by (run, result) (ray_qaic_rows_total{{{_RUN}}})", "{{run}} {{result}}"),),
    ),
    Panel(
        "Queue",
        "Prompts that were read and that no card has.",
        "none",
        ((f"sum by (run) (ray_qaic_prompts_waiting{{{_RUN}}})", "{{run}}"),),
    ),
    Panel(
        "Workers",
        "Open, and lost so far.",
        "none",
        (
            (f"sum by (run) (ray_qaic_workers_ready{{{_RUN}}})", "{{run}} open"),
            (f"sum by (run) (ray_qaic_worker_losses_total{{{_RUN}}})", "{{run}} lost"),
        ),
    ),
    Panel(
        "Retries",
        "Prompts given to a card another time, so far.",
        "none",
        ((f"sum by (run) (ray_qaic_retries_total{{{_RUN}}})", "{{run}}"),),
    ),
)
_OF_ENGINES = (
    Panel(
        "Rows in slots",
        "Of each engine, and rows that wait at it.",
        "none",
        (
            (f"sum by (engine) (ray_vllm_num_requests_running{{{_MODEL}}})", _ENGINE),
            (f"sum (ray_vllm_num_requests_waiting{{{_MODEL}}})", "waiting, all engines"),
        ),
    ),
    Panel(
        "KV cache in use",
        "Share of all slots' positions that running rows use.",
        "percentunit",
        ((f"max by (engine) (ray_vllm_kv_cache_usage_perc{{{_MODEL}}})", _ENGINE),),
    ),
    Panel(
        "Tokens",
        "Generated each second, by engine and by all.",
        "none",
        (
            (_rate("ray_vllm_generation_tokens_total", _MODEL, "engine"), _ENGINE),
            (_rate("ray_vllm_generation_tokens_total", _MODEL), "all engines"),
        ),
    ),
    Panel(
        "Requests that ended",
        "Each second, by reason.",
        "rps",
        (
            (
                _rate("ray_vllm_request_success_total", _MODEL, "finished_reason"),
                "{{finished_reason}}",
            ),
        ),
    ),
)
SECTIONS = (("Cards", _OF_CARDS), ("Runs", _OF_RUNS), ("Engines", _OF_ENGINES))


def dashboard() -> dict[str, Any]:
    """The whole dashboard, as Grafana reads it."""
    panels: list[dict[str, Any]] = []
    top = 0
    for title, section in SECTIONS:
        panels.append(_row(title, top))
        top += _ROW_HEIGHT
        panels += [_panel(panel, at, top) for at, panel in enumerate(section)]
        top += -(-len(section) // 2) * _HEIGHT
    for number, panel in enumerate(panels, start=1):
        panel["id"] = number
    return {
        "uid": UID,
        "title": "Cloud AI 100 cards and runs",
        "tags": ["qaic-ray"],
        "timezone": "browser",
        "schemaVersion": 39,
        "version": 1,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "graphTooltip": 1,
        "templating": {"list": _variables()},
        "panels": panels,
    }


def _variables() -> list[dict[str, Any]]:
    source = {"name": "datasource", "label": "Prometheus", "type": "datasource"}
    return [
        {**source, "query": "prometheus", "hide": 2},
        _variable("node", "Node", "label_values(ray_qaic_device_status, NodeAddress)"),
        _variable("run", "Run", "label_values(ray_qaic_workers_ready, run)"),
        _variable("model", "Model", "label_values(ray_vllm_num_requests_running, model_name)"),
    ]


def _variable(name: str, label: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": _SOURCE,
        "definition": query,
        "query": {"query": query, "refId": "values"},
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
    }


def _row(title: str, top: int) -> dict[str, Any]:
    place = {"x": 0, "y": top, "w": 2 * _WIDTH, "h": _ROW_HEIGHT}
    return {"type": "row", "title": title, "collapsed": False, "gridPos": place, "panels": []}


def _panel(panel: Panel, at: int, top: int) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0}
    if panel.mappings:
        values = {str(n): {"text": text, "color": colour} for n, text, colour in panel.mappings}
        defaults["mappings"] = [{"type": "value", "options": values}]
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": _SOURCE,
        "gridPos": {
            "x": at % 2 * _WIDTH,
            "y": top + at // 2 * _HEIGHT,
            "w": _WIDTH,
            "h": _HEIGHT,
        },
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + number), "expr": query, "legendFormat": legend}
            for number, (query, legend) in enumerate(panel.queries)
        ],
    }
