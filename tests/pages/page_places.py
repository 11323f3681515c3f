"""What the reader of a page has before the first command, as the page says."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from page_blocks import ROOT
from page_reader import PageReader

AMBER = "models--LLM360--Amber/snapshots/e691febcfceb864f235225f4e6dcae07e2be6332"


def nothing(reader: PageReader) -> None:
    """An empty folder."""


def amber(reader: PageReader) -> None:
    """A checkpoint where the published recipe has its own: SmolLM2 in place of a 7B model."""
    place = reader.folder / AMBER
    place.parent.mkdir(parents=True)
    (model,) = reader.models.glob("gguf-*")
    place.symlink_to(model.resolve())


def own_checkpoint(reader: PageReader) -> None:
    """A checkpoint of the reader's own, that may be moved."""
    (model,) = reader.models.glob("gguf-*")
    shutil.copytree(model.resolve(), reader.folder / "my-llama")


def checkout(reader: PageReader) -> None:
    """The examples of the repository."""
    (reader.folder / "examples").symlink_to(ROOT / "examples")


PLACES: dict[str, Callable[[PageReader], None]] = {
    "docs/from-the-recipe.md": amber,
    "docs/how-to/serving.md": checkout,
    "docs/how-to/weight-free.md": own_checkpoint,
}


def rates_are_the_scripts(reader: PageReader) -> None:
    """runModel.py's arithmetic on each run's own rows gives the rate that its report has."""
    runs = sorted((reader.folder / "runs").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    for run, size in zip(runs, (1, 4), strict=True):
        rows = [json.loads(line) for line in (run / "outputs.jsonl").read_text().splitlines()]
        steps = sum(len(row["token_ids"]) - 2 for row in rows)
        seconds = sum(row["decode_s"] for row in rows)
        rate = json.loads((run / "report.json").read_text())["runmodel_tokens_per_s"]
        assert rate == pytest.approx(size * steps / seconds, rel=0.001)
        assert {row["worker"] for row in rows} <= {"card 2", "card 3"}


AFTERWARDS: dict[str, Callable[[PageReader], None]] = {
    "docs/from-the-recipe.md": rates_are_the_scripts
}
"""What is true of a reader's folder when the page is read, beside what the page shows."""


def end_kept_ray(reader: PageReader) -> None:
    """End a Ray that a page has left up; there is none where it ended its own."""
    if (reader.home / ".cache" / "qaic-ray" / "kept-ray.json").exists():
        program = str(Path(reader.environment["PATH"].partition(":")[0]) / "qaic-ray")
        subprocess.run([program, "ray", "stop", "--force"], env=reader.environment, check=True)
