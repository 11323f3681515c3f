"""docs/options.md is what the option tree says, and the Grafana dashboard what its panels are."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

from qaic_ray.cli.commands import app
from qaic_ray.environment import ENVIRONMENT
from qaic_ray.files.documents import json_text
from qaic_ray.telemetry.grafana import dashboard

ROOT = Path(__file__).parents[2]


def test_the_page_of_options_is_not_stale() -> None:
    made = runpy.run_path(str(ROOT / "scripts" / "reference"))["page"]()
    assert (ROOT / "docs" / "options.md").read_text() == made


def test_the_dashboard_is_not_stale() -> None:
    kept = (ROOT / "configs" / "grafana" / "qaic-ray.json").read_text()
    assert json.loads(kept) == dashboard()
    assert kept == json_text(dashboard(), indent=2) + "\n"


def test_the_page_names_every_command_and_variable() -> None:
    page = (ROOT / "docs" / "options.md").read_text()
    assert all(f"### qaic-ray {command.name}" in page for command in app.registered_commands)
    assert all(f"`{name}`" in page for name in ENVIRONMENT)


def test_a_variable_of_the_page_is_read_somewhere() -> None:
    text = "".join(path.read_text() for path in (ROOT / "qaic_ray").rglob("*.py"))
    assert all(text.count(f'"{name}"') >= 2 for name in ENVIRONMENT)
