"""A real Prometheus, started as `qaic-ray monitoring` says, on a run that Ray's dashboard lists."""

from __future__ import annotations

import json
import math
import shlex
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from byte_tokens import with_byte_tokenizer
from names_of_dashboards import DATA_LLM, NOT_OURS, SERVE_LLM, asked_for, is_known

from qaic_ray.cluster.cluster import Cluster
from qaic_ray.cluster.monitoring.ray_dashboards import ray_dashboards
from qaic_ray.cluster.monitoring.ray_metrics import recorded_run
from qaic_ray.options import Generation
from qaic_ray.rows import Prompt
from qaic_ray.runs.driver import Audience, Progress
from qaic_ray.runs.metering import metered
from qaic_ray.sampling_params import SamplingParams
from qaic_ray.telemetry import monitoring
from qaic_ray.telemetry.grafana import dashboard
from qaic_ray.telemetry.monitoring import write_monitoring
from qaic_ray.timeouts import Timeouts
from qaic_ray.worker.worker import CardWorker, WorkerSpec

if TYPE_CHECKING:
    from one_ray import OneRay
    from tiny_qpcs import TinyQpcs

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("prometheus") is None, reason="needs Prometheus: apt install prometheus"
    ),
]

RUN_S = 20.0
"""Some scrapes of rising counters."""
WINDOW = "30s"
VARIABLES = {
    "$vllm_model_name": ".*",
    "$workerid": ".*",
    "$interval": WINDOW,
    "$__rate_interval": WINDOW,
    "$node": ".*",
    "$run": ".*",
    "$model": ".*",
}


class Prometheus:
    """The server at a port of this machine."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"

    def get(self, path: str, **arguments: str) -> Any:
        url = f"{self._url}/api/v1/{path}?{urllib.parse.urlencode(arguments)}"
        with urllib.request.urlopen(url, timeout=30) as answer:
            document = json.load(answer)
        assert document["status"] == "success"
        return document["data"]

    def values(self, query: str) -> list[float]:
        """What a query of a panel gives now; a query that does not parse is an HTTP error."""
        for variable, value in VARIABLES.items():
            query = query.replace(variable, value)
        return [float(found["value"][1]) for found in self.get("query", query=query)["result"]]

    def names(self) -> set[str]:
        return set(self.get("label/__name__/values"))

    def targets(self) -> list[dict[str, Any]]:
        return list(self.get("targets")["activeTargets"])


@contextmanager
def prometheus(command: str) -> Iterator[Prometheus]:
    """Started by the command that people are told, at a port that is free."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = shlex.split(command.replace(":9090", f":{port}"))
    server = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield Prometheus(port)
    finally:
        server.terminate()
        server.wait(30)


@contextmanager
def with_dashboard() -> Iterator[Cluster]:
    """A Ray with its dashboard, whose agents export every second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_metrics_report_interval_ms", "1000")
        with Cluster(2, dashboard=True) as started:
            yield started


@dataclass(frozen=True)
class Seen:
    """What Prometheus had while the run went: its names, its targets, and values by query."""

    names: set[str]
    targets: list[dict[str, Any]]
    values: dict[str, list[float]]


@pytest.fixture
def seen(one_ray: OneRay, tiny: TinyQpcs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Seen:
    cluster = one_ray.use("with dashboard", with_dashboard)
    assert cluster._own is not None
    listed = cluster._own.session.temp_dir / "prom_metrics_service_discovery.json"
    monkeypatch.setattr(monitoring, "RAY_TARGETS", listed)
    monkeypatch.setattr(monitoring, "SCRAPE_S", 1)
    written = write_monitoring(tmp_path / "monitoring", ray_dashboards())
    promtool = ["promtool", "check", "config", str(written.files[0])]
    subprocess.run(promtool, check=True, capture_output=True)
    found: list[Seen] = []
    stop_s = time.monotonic() + RUN_S

    def prompts() -> Iterator[Prompt]:
        index = 0
        while time.monotonic() < stop_s:
            text = "" if index % 20 == 19 else f"Hello {index % 7}"
            yield Prompt(index, text)
            index += 1
            time.sleep(0.1)

    def on_progress(progress: Progress) -> None:
        if progress.input_exhausted and progress.rows_done == progress.rows_read and not found:
            time.sleep(3)
            found.append(look(server))

    spec = {
        "sdk_root": str(tiny.sdk.root),
        "qpc": str(tiny.qpc()),
        "model": str(with_byte_tokenizer(tiny.checkpoint, tmp_path / "words")),
        "generation": Generation(sampling=SamplingParams(max_tokens=6, ignore_eos=True)),
        "metrics": True,
        "timeouts": Timeouts(record_engine_s=0.5, record_cards_s=1.0),
    }
    specs = [WorkerSpec(name=f"card {card}", device_ids=(card,), **spec) for card in (0, 1)]
    with (
        prometheus(written.prometheus) as server,
        recorded_run("prometheus-1", pytest.fail, Timeouts(record_run_s=0.5)) as recorder,
    ):
        audience = metered(Audience(on_progress=on_progress), recorder)
        cluster.run_prompts(prompts(), specs, worker_class=CardWorker, audience=audience)
    return found[0]


def look(server: Prometheus) -> Seen:
    asked = [*queries(dashboard()), *queries(data_llm())]
    return Seen(server.names(), server.targets(), {query: server.values(query) for query in asked})


def data_llm() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(ray_dashboards()["data_llm_grafana_dashboard.json"])
    return document


def queries(document: dict[str, Any]) -> list[str]:
    panels = [*document["panels"]]
    panels += [inner for panel in panels for inner in panel.get("panels", ())]
    return [target["expr"] for panel in panels for target in panel.get("targets", ())]


def test_prometheus_scrapes_the_run_and_every_query_returns_data(seen: Seen) -> None:
    # Ray's list and ours name the same agent, which is scraped once.
    addresses = [target["scrapeUrl"] for target in seen.targets]
    assert len(set(addresses)) == len(addresses) > 0
    assert {target["labels"]["job"] for target in seen.targets} == {"ray"}
    assert {target["health"] for target in seen.targets} == {"up"}

    for name in (*asked_for(DATA_LLM), *asked_for(SERVE_LLM)):
        is_there = any(f"{name}{end}" in seen.names for end in ("", "_bucket"))
        assert is_there == is_known(name), name
        assert is_there or name.startswith(tuple(NOT_OURS)), name

    of_ours, of_rays = queries(dashboard()), queries(data_llm())
    assert len(of_ours) > 20
    assert len(of_rays) > 20
    empty = [query for query in (*of_ours, *of_rays) if not seen.values[query]]
    assert empty == []
    without_number = [query for query, some in seen.values.items() if all(map(math.isnan, some))]
    assert without_number == []
