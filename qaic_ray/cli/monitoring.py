"""The command that writes the configuration of Prometheus and Grafana."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qaic_ray.files.documents import user_path

if TYPE_CHECKING:
    from qaic_ray.cli import parameters
    from qaic_ray.telemetry.monitoring import MonitoringFolder


def monitoring(
    folder: Annotated[Path, typer.Argument(help="Folder to make, or one made before.")],
    show: parameters.JsonOptions,
) -> None:
    """Write configuration for Prometheus and Grafana: Ray's dashboards, and one of cards."""
    from qaic_ray.cli.screen import write
    from qaic_ray.cluster.monitoring.ray_dashboards import ray_dashboards
    from qaic_ray.files.documents import json_text
    from qaic_ray.telemetry.monitoring import write_monitoring

    written = write_monitoring(user_path(folder, "folder"), ray_dashboards())
    if show.as_json:
        write(json_text(_document(written)) + "\n")
        return
    write(
        f"{written.folder} has the configuration of both. Start them, each in a terminal:\n\n"
        f"    {written.prometheus}\n"
        f"    {written.grafana}\n\n"
        "Prometheus finds this user's runs on this machine by itself. Grafana is at "
        "http://127.0.0.1:3000, and the Ray dashboard shows it under Metrics.\n"
    )


def _document(written: MonitoringFolder) -> dict[str, Any]:
    return {
        "folder": str(written.folder),
        "files": list(map(str, written.files)),
        "commands": {"prometheus": written.prometheus, "grafana": written.grafana},
    }
