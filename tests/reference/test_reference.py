"""The reference pages are what the code says, and the Grafana dashboard what its panels are."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest

from qaic_ray.environment import ENVIRONMENT
from qaic_ray.files.documents import json_text
from qaic_ray.reference.pages import ABOUT, pages
from qaic_ray.telemetry.grafana import dashboard

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "reference"


@cache
def made() -> dict[str, str]:
    return pages()


def test_the_folder_has_these_pages_and_no_other() -> None:
    assert {path.name for path in FOLDER.iterdir()} == set(made())


@pytest.mark.parametrize("name", [*ABOUT, "index.md", "job.schema.json"])
def test_a_page_is_not_stale(name: str) -> None:
    assert (FOLDER / name).read_text(encoding="utf-8") == made()[name], "run scripts/reference"


def test_the_dashboard_is_not_stale() -> None:
    kept = (ROOT / "configs" / "grafana" / "qaic-ray.json").read_text()
    assert json.loads(kept) == dashboard()
    assert kept == json_text(dashboard(), indent=2) + "\n"


def test_a_table_has_as_many_cells_in_each_row() -> None:
    for name, text in made().items():
        if name.endswith(".md"):
            width = 0
            for line in text.splitlines():
                cells = line.replace("\\|", "").count("|")
                is_table = line.startswith("| ") or line.startswith("|-")
                assert not is_table or not width or cells == width, f"{name}: {line}"
                width = cells if is_table else 0


def test_a_variable_of_ours_is_read_somewhere() -> None:
    text = "".join(path.read_text() for path in (ROOT / "qaic_ray").rglob("*.py"))
    assert all(text.count(f'"{name}"') >= 2 for name in ENVIRONMENT)
