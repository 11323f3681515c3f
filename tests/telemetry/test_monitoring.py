"""The Grafana dashboard, and the folder of configuration that both programs start from."""

from __future__ import annotations

import configparser
import json
import re
import shlex
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from qaic_ray.cluster.monitoring.ray_dashboards import ray_dashboards
from qaic_ray.errors import UsageError
from qaic_ray.telemetry import names
from qaic_ray.telemetry.grafana import dashboard
from qaic_ray.telemetry.monitoring import targets_folder, write_monitoring
from qaic_ray.telemetry.names import CARD_METRICS, METRICS, RUN_METRICS, exported_names

KEPT = Path(__file__).parents[2] / "configs" / "grafana" / "qaic-ray.json"
GRAFANAS_OWN = {"$__rate_interval"}


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    loaded = json.loads(KEPT.read_text())
    assert loaded == dashboard()
    return loaded


def queries(document: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in document["panels"] for target in panel.get("targets", ())]


# -- the dashboard


def test_panels_have_ids_and_places_of_their_own(document: dict[str, Any]) -> None:
    panels = document["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for one, other in combinations([panel["gridPos"] for panel in panels], 2):
        apart_x = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        apart_y = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert apart_x or apart_y
    for panel in panels:
        refs = [target["refId"] for target in panel.get("targets", ())]
        assert len(set(refs)) == len(refs)
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24


def test_its_id_is_none_of_rays(document: dict[str, Any]) -> None:
    theirs = {json.loads(text)["uid"] for text in ray_dashboards().values()}
    assert {"rayDataLlmDashboard", "rayServeLlmDashboard", "rayDefaultDashboard"} <= theirs
    assert document["uid"] not in theirs
    assert len(document["uid"]) <= 40  # Grafana takes no longer one


def test_queries_have_no_doubled_braces_and_only_known_names_and_variables(
    document: dict[str, Any],
) -> None:
    variables = {f"${entry['name']}" for entry in document["templating"]["list"]}
    asked = [*queries(document), *(e["query"]["query"] for e in document["templating"]["list"][1:])]
    assert len(asked) > 20
    for query in asked:
        assert "{{" not in query
        assert query.count("(") == query.count(")")
        found = set(re.findall(r"ray_[a-z0-9_]+", query))
        assert found
        assert found <= exported_names(), query
        assert set(re.findall(r"\$\w+", query)) <= variables | GRAFANAS_OWN


def test_legends_are_made_of_tags_that_the_query_keeps(document: dict[str, Any]) -> None:
    for panel in document["panels"]:
        for target in panel.get("targets", ()):
            by = re.findall(r"by \(([^)]*)\)", target["expr"])
            kept = {name.strip() for names_ in by for name in names_.split(",")}
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= kept, panel["title"]


def test_it_shows_what_rays_dashboards_lack(document: dict[str, Any]) -> None:
    shown = set(re.findall(r"ray_[a-z0-9_]+", " ".join(queries(document))))
    assert exported_names(RUN_METRICS) <= shown
    wanted = {
        "qaic_soc_temperature_celsius",
        "qaic_board_power_watts",
        "qaic_dram_free_bytes",
        "qaic_nsp_free",
        "qaic_device_status",
    }
    assert {f"ray_{name}" for name in wanted} <= shown & exported_names(CARD_METRICS)
    assert exported_names([names.RUNNING, names.KV_USAGE]) <= shown


# -- the folder


def test_both_programs_find_what_they_need_in_the_folder(tmp_path: Path) -> None:
    written = write_monitoring(tmp_path / "m", {"default.json": "{}"})
    root = tmp_path / "m"
    (job,) = yaml.safe_load((root / "prometheus/prometheus.yml").read_text())["scrape_configs"]
    assert job["job_name"] == "ray"
    (where,) = job["file_sd_configs"]
    assert where["files"] == [
        "/tmp/ray/prom_metrics_service_discovery.json",
        str(targets_folder() / "*.json"),
    ]
    ini = configparser.ConfigParser()
    ini.read(root / "grafana/grafana.ini")
    assert ini["server"]["http_addr"] == "127.0.0.1"
    provisioning = Path(ini["paths"]["provisioning"])
    assert provisioning == root / "grafana/provisioning"
    providers = yaml.safe_load((provisioning / "dashboards/default.yml").read_text())["providers"]
    found = {provider["name"]: Path(provider["options"]["path"]) for provider in providers}
    assert [path.name for path in found["Ray"].iterdir()] == ["default.json"]
    ours = found["qaic-ray"] / "qaic-ray.json"
    assert json.loads(ours.read_text()) == dashboard()
    (source,) = yaml.safe_load((provisioning / "datasources/default.yml").read_text())[
        "datasources"
    ]
    assert f"--web.listen-address={source['url'].removeprefix('http://')}" in written.prometheus
    assert f"--config.file={root / 'prometheus/prometheus.yml'}" in shlex.split(written.prometheus)
    assert shlex.split(written.grafana)[-1] == str(root / "grafana/grafana.ini")
    assert all(path.is_file() for path in written.files)


def test_rays_dashboards_are_the_installed_rays_own() -> None:
    made = ray_dashboards()
    assert {"default_grafana_dashboard.json", "data_llm_grafana_dashboard.json"} <= made.keys()
    for text in made.values():
        document = json.loads(text)
        assert document["panels"]
        assert "{{{" not in text


def test_a_second_call_writes_anew_and_leaves_what_others_put_there(tmp_path: Path) -> None:
    write_monitoring(tmp_path / "m", {"default.json": "{}"})
    data = tmp_path / "m" / "prometheus-data" / "wal"
    data.parent.mkdir()
    data.write_text("samples")
    (tmp_path / "m" / "grafana" / "grafana.ini").write_text("changed")
    write_monitoring(tmp_path / "m", {"default.json": "[]"})
    assert data.read_text() == "samples"
    assert "changed" not in (tmp_path / "m" / "grafana" / "grafana.ini").read_text()
    assert (tmp_path / "m" / "grafana" / "dashboards" / "default.json").read_text() == "[]"


def test_a_folder_of_somebody_else_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    config = tmp_path / "prometheus" / "prometheus.yml"
    config.parent.mkdir()
    config.write_text("theirs")
    with pytest.raises(UsageError, match=r"not of this command \(prometheus/prometheus.yml\)"):
        write_monitoring(tmp_path, {})
    assert config.read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["prometheus"]


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    write_monitoring(tmp_path, {})
    assert (tmp_path / "prometheus" / "prometheus.yml").exists()


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be written"):
        write_monitoring(tmp_path / "file" / "m", {})


def test_every_metric_is_on_the_page_about_monitoring() -> None:
    page = (KEPT.parents[2] / "docs" / "how-to" / "monitoring.md").read_text()
    assert {metric.name for metric in METRICS if f"`{metric.name}`" not in page} == set()
