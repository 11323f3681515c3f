"""Which `ray_vllm_*` names the installed Ray's dashboards ask for, and why some are not ours."""

from __future__ import annotations

import importlib
import re

from qaic_ray.telemetry.names import exported_names

DATA_LLM, SERVE_LLM = "data_llm", "serve_llm"
OFFLOAD = "nothing of a KV cache is moved off the card"
NIXL = "no KV cache travels from one engine to another"
NOT_OURS = {
    "ray_vllm_external_prefix_cache": "there is no prefix cache outside the engine",
    "ray_vllm_kv_offload": OFFLOAD,
    "ray_vllm_nixl": NIXL,
}
"""What no run of ours can have, by how its name begins; none of it is Data-LLM's."""


def asked_for(dashboard: str) -> set[str]:
    """Every `ray_vllm_*` name in the queries of one of Ray's dashboards."""
    module = importlib.import_module(
        f"ray.dashboard.modules.metrics.dashboards.{dashboard}_dashboard_panels"
    )
    text = str([vars(value) for value in _configs(module)])
    found = set(re.findall(r"ray_vllm_[a-z0-9_]+", text))
    assert len(found) > 15
    return found


def _configs(module: object) -> list[object]:
    return [v for name, v in vars(module).items() if name.endswith("dashboard_config")]


def is_known(name: str) -> bool:
    """Whether it is a series of ours, or the name of a histogram whose series are built of it."""
    known = exported_names()
    return name in known or f"{name}_bucket" in known
