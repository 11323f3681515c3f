"""Configuration of Prometheus and Grafana for runs of this machine, in the folders that Ray uses.

FOLDER/prometheus/prometheus.yml              where the runs are
FOLDER/grafana/grafana.ini                    read-only for whoever can reach it
FOLDER/grafana/provisioning/datasources/      that Prometheus
FOLDER/grafana/provisioning/dashboards/       two providers: Ray's dashboards, and ours
FOLDER/grafana/dashboards/                    Ray's
FOLDER/grafana/qaic-ray/qaic-ray.json         ours
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qaic_ray.errors import UsageError
from qaic_ray.files.documents import json_text
from qaic_ray.files.folders import cache_folder, foreign_files, write_whole
from qaic_ray.telemetry.grafana import dashboard

RAY_TARGETS = Path("/tmp/ray/prom_metrics_service_discovery.json")
"""Where a Ray with a dashboard, started by `ray start`, says which nodes it has."""
SCRAPE_S = 10
"""Ray's agents have new values as often."""

_MARK = "made-by-qaic-ray"
_DASHBOARDS = "grafana/dashboards"
_OURS = "grafana/qaic-ray"
_GRAFANA_INI = """\
[server]
http_addr = 127.0.0.1

[security]
allow_embedding = true

[auth.anonymous]
enabled = true
org_name = Main Org.
org_role = Viewer

[paths]
data = {folder}/grafana-data
provisioning = {folder}/grafana/provisioning
"""


def targets_folder() -> Path:
    """Where runs say which nodes they have, a file each, while they go."""
    return cache_folder() / "prometheus"


@dataclass(frozen=True)
class MonitoringFolder:
    """What was written, and the commands that start both on it."""

    folder: Path
    files: tuple[Path, ...]

    @property
    def prometheus(self) -> str:
        """Starts Prometheus, on loopback."""
        config, data = self.folder / "prometheus/prometheus.yml", self.folder / "prometheus-data"
        places = [f"--config.file={config}", f"--storage.tsdb.path={data}"]
        return shlex.join(["prometheus", *places, "--web.listen-address=127.0.0.1:9090"])

    @property
    def grafana(self) -> str:
        """Starts Grafana, on loopback."""
        config = self.folder / "grafana/grafana.ini"
        words = ["grafana", "server", "--homepath", "/usr/share/grafana", "--config", str(config)]
        return shlex.join(words)


def write_monitoring(folder: Path, ray_dashboards: Mapping[str, str]) -> MonitoringFolder:
    """Write the configuration of both; what an earlier call wrote there is replaced.

    Args:
        folder: is made; must be empty, or ours.
        ray_dashboards: name of a file -> Ray's dashboard, as JSON text.

    Raises:
        UsageError: the folder has files of somebody else, or cannot be written.
    """
    folder = folder.absolute()
    texts = _texts(folder, ray_dashboards)
    try:
        _refuse_foreign(folder)
        for name, text in {_MARK: "", **texts}.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, text)
    except OSError as error:
        raise UsageError(
            f"{folder} cannot be written ({error.strerror}): name a new folder, or your own."
        ) from error
    return MonitoringFolder(folder, tuple(folder / name for name in texts))


def _refuse_foreign(folder: Path) -> None:
    """Where the mark is, all is ours; elsewhere nothing is."""
    if (folder / _MARK).exists() or not folder.exists():
        return
    foreign = foreign_files(folder, lambda _: False)
    if foreign:
        raise UsageError(
            f"{folder} has files that are not of this command ({', '.join(foreign)}): name an "
            "empty folder, or one that is not there yet."
        )


def _texts(folder: Path, ray_dashboards: Mapping[str, str]) -> dict[str, str]:
    return {
        "prometheus/prometheus.yml": _yaml(_prometheus()),
        "grafana/grafana.ini": _GRAFANA_INI.format(folder=folder),
        "grafana/provisioning/datasources/default.yml": _yaml(_DATASOURCES),
        "grafana/provisioning/dashboards/default.yml": _yaml(_providers(folder)),
        **{f"{_DASHBOARDS}/{name}": text for name, text in ray_dashboards.items()},
        f"{_OURS}/qaic-ray.json": json_text(dashboard(), indent=2),
    }


def _prometheus() -> dict[str, Any]:
    files = [str(RAY_TARGETS), str(targets_folder().absolute() / "*.json")]
    interval = f"{SCRAPE_S}s"
    return {
        "global": {"scrape_interval": interval, "evaluation_interval": interval},
        "scrape_configs": [
            {
                "job_name": "ray",
                "file_sd_configs": [{"files": files, "refresh_interval": "5s"}],
            }
        ],
    }


_DATASOURCES = {
    "apiVersion": 1,
    "datasources": [
        {
            "name": "Prometheus",
            "type": "prometheus",
            "url": "http://127.0.0.1:9090",
            "access": "proxy",
            "isDefault": True,
            "jsonData": {"timeInterval": f"{SCRAPE_S}s"},
        }
    ],
}


def _providers(folder: Path) -> dict[str, Any]:
    places = (("Ray", _DASHBOARDS), ("qaic-ray", _OURS))
    return {
        "apiVersion": 1,
        "providers": [
            {
                "name": name,
                "folder": name,
                "type": "file",
                "options": {"path": str(folder / where)},
            }
            for name, where in places
        ],
    }


def _yaml(document: dict[str, Any]) -> str:
    return yaml.safe_dump(document, sort_keys=False)
