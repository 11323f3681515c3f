"""What Prometheus would scrape of a run on emulated cards, from Ray's agent over HTTP."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import ray
from byte_tokens import with_byte_tokenizer
from prometheus_client.parser import text_string_to_metric_families
from ray.util import metrics as ray_metrics

from qaic_ray.cluster.cluster import Cluster
from qaic_ray.cluster.monitoring.ray_metrics import RaySink, recorded_run
from qaic_ray.options import Generation
from qaic_ray.rows import Prompt, Row
from qaic_ray.runs.driver import Audience, Progress
from qaic_ray.runs.metering import metered
from qaic_ray.sampling_params import SamplingParams
from qaic_ray.telemetry import names
from qaic_ray.telemetry.monitoring import targets_folder
from qaic_ray.telemetry.names import METRICS, Metric, exported_names
from qaic_ray.timeouts import Timeouts
from qaic_ray.worker.worker import CardWorker, WorkerSpec

if TYPE_CHECKING:
    from tiny_qpcs import TinyQpcs

pytestmark = pytest.mark.cluster

NUM_TOKENS = 6
RUN = "metrics-export"
Samples = Mapping[str, list[Any]]


def scrape() -> tuple[dict[str, str], dict[str, list[Any]]]:
    """Types by family, and samples by name, of every target that Prometheus is told of."""
    types: dict[str, str] = {}
    samples: dict[str, list[Any]] = {}
    for path in targets_folder().glob("*.json"):
        for group in json.loads(path.read_text()):
            assert group["labels"] == {"job": "ray"}
            for target in group["targets"]:
                with urllib.request.urlopen(f"http://{target}/metrics", timeout=30) as answer:
                    text = answer.read().decode()
                for family in text_string_to_metric_families(text):
                    types[family.name] = family.type
                    for sample in family.samples:
                        samples.setdefault(sample.name, []).append(sample)
    return types, samples


def scraped_when(condition: Callable[[Samples], bool]) -> tuple[dict[str, str], Samples]:
    deadline_s = time.monotonic() + 60
    while True:
        types, samples = scrape()
        if condition(samples):
            return types, samples
        assert time.monotonic() < deadline_s, sorted(name for name in samples if "qaic" in name)
        time.sleep(0.3)


def total(samples: Samples, name: str, **labels: str) -> float:
    """The sum over the series of this run that have these labels."""
    return sum(
        sample.value
        for sample in samples.get(name, ())
        if all(sample.labels.get(label) == value for label, value in labels.items())
    )


@dataclass(frozen=True)
class Exported:
    """A run of two cards, and what was scraped when its rows were there and its cards open."""

    model: str
    rows: list[Row]
    types: dict[str, str]
    samples: Samples

    def mine(self, metric: Metric) -> list[Any]:
        """The series of this run's engines; other tests have the same Ray."""
        found = [sample for name in metric.exported for sample in self.samples[name]]
        return [sample for sample in found if sample.labels["model_name"] == self.model]


@pytest.fixture
def exported(cluster: Cluster, tiny: TinyQpcs, tmp_path: Path) -> Exported:
    model = str(with_byte_tokenizer(tiny.checkpoint, tmp_path / "words"))
    prompts = [*(Prompt(i, f"Hello {i % 7}") for i in range(24)), Prompt(24, "")]
    rows: list[Row] = []
    found: list[tuple[dict[str, str], Samples]] = []

    def on_progress(progress: Progress) -> None:
        if progress.rows_done == len(prompts) and not found:
            found.append(scraped_when(is_all_there))

    def is_all_there(samples: Samples) -> bool:
        ended = total(samples, "ray_qaic_rows_total", run=RUN)
        answered = total(samples, f"ray_{names.E2E.name}_count", model_name=model)
        tokens = total(samples, "ray_vllm_generation_tokens_total", model_name=model)
        has_cards = len(samples.get("ray_qaic_nsp_free", ())) >= 4
        return (ended, answered, tokens) == (25, 24, 24 * NUM_TOKENS) and has_cards

    sampling = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
    specs = [
        WorkerSpec(
            name=f"card {card}",
            device_ids=(card,),
            sdk_root=str(tiny.sdk.root),
            qpc=str(tiny.qpc()),
            model=model,
            generation=Generation(sampling=sampling),
            metrics=True,
            timeouts=Timeouts(record_engine_s=0.3, record_cards_s=0.5),
        )
        for card in (0, 1)
    ]
    with recorded_run(RUN, pytest.fail, Timeouts(record_run_s=0.5)) as recorder:
        audience = metered(Audience(on_row=rows.append, on_progress=on_progress), recorder)
        cluster.run_prompts(prompts, specs, worker_class=CardWorker, audience=audience)
    assert not list(targets_folder().glob("*.json"))
    return Exported(model, rows, *found[0])


def test_a_run_is_exported_with_the_names_types_tags_and_values_of_the_table(
    exported: Exported,
) -> None:
    samples = exported.samples
    told = [metric for metric in METRICS if metric not in names.SOC_READINGS]
    assert exported_names(told) - samples.keys() == set()
    for metric in told:
        # The parser names a counter's family without its suffix.
        assert exported.types[f"ray_{metric.name}"] == metric.kind.value, metric.name
        for sample in (sample for name in metric.exported for sample in samples[name]):
            assert {*metric.tags, "WorkerId", "NodeAddress"} <= sample.labels.keys()
    check_requests(exported)
    check_cards(samples)
    assert total(samples, "ray_qaic_rows_total", run=RUN, result="failed") == 1


def check_requests(exported: Exported) -> None:
    for metric in names.REQUEST_METRICS:
        found = exported.mine(metric)
        assert {sample.labels["ReplicaId"] for sample in found} == {""}
        assert {sample.labels["engine"] for sample in found} <= {"card 0", "card 1"}
        bounds = {float(sample.labels["le"]) for sample in found if "le" in sample.labels}
        assert bounds == ({*metric.boundaries, float("inf")} if metric.boundaries else set())
    assert len({sample.labels["WorkerId"] for sample in exported.mine(names.RUNNING)}) == 2
    of_model = {"model_name": exported.model}
    prompt_tokens = sum(row.prompt_tokens for row in exported.rows if row.ok)
    assert total(exported.samples, "ray_vllm_prompt_tokens_total", **of_model) == prompt_tokens
    for reason, count in {"length": 24, "error": 1, "stop": 0, "abort": 0, "repetition": 0}.items():
        series = [s for s in exported.mine(names.SUCCESS) if s.labels["finished_reason"] == reason]
        # Each is there from the start, or a first event would have no rate.
        assert (len(series), sum(sample.value for sample in series)) == (2, count)


def check_cards(samples: Samples) -> None:
    """One of the workers tells of all four cards of the machine, and says which they are."""
    assert {s.labels["qid"]: s.value for s in samples["ray_qaic_device_status"]} == {
        str(qid): 1 for qid in range(4)
    }
    assert {sample.value for sample in samples["ray_qaic_nsp_total"]} == {14}
    for sample in samples["ray_qaic_device_info"]:
        assert sample.labels["sku"] == "PCIe"
        assert sample.labels["board_serial"]


def test_where_ray_has_no_metrics_the_run_says_so_once_and_goes_on(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no agent")

    said: list[str] = []
    monkeypatch.setattr(ray_metrics.Counter, "__init__", refuse)
    with recorded_run("broken", said.append) as recorder:
        recorder.rows_ended(1, 0)
        recorder.worker_lost("card 0")
    assert said == ["Metrics are off from here on: RuntimeError: no agent"]


def test_targets_of_processes_that_are_gone_are_removed(cluster: Cluster) -> None:
    folder = targets_folder()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "4194305.json").write_text("[]")  # beyond the kernel's largest process id
    (folder / "mine.json").write_text("[]")
    with recorded_run("a run", pytest.fail):
        names_there = {path.name for path in folder.glob("*.json")}
    assert len(names_there) == 2
    assert "mine.json" in names_there
    (folder / "mine.json").unlink()


def test_a_folder_that_cannot_be_written_is_said_and_the_run_goes_on(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("QAIC_RAY_CACHE", str(tmp_path / "file"))
    said: list[str] = []
    with recorded_run("a run", said.append) as recorder:
        recorder.rows_ended(1, 0)
    assert len(said) == 1
    assert said[0].startswith("Prometheus cannot be told where this run is: ")


def test_ray_takes_every_definition(cluster: Cluster) -> None:
    assert ray.is_initialized()
    sink = RaySink()
    for metric in METRICS:
        tags = dict.fromkeys(metric.tags, "")
        match metric.kind:
            case names.MetricKind.COUNTER:
                sink.add(metric, 0, tags)
                sink.add(metric, 2, tags)
            case names.MetricKind.GAUGE:
                sink.set(metric, 0.5, tags)
            case names.MetricKind.HISTOGRAM:
                sink.observe(metric, 0.5, tags)
