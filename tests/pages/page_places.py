"""What the reader of a page has before the first command, as the page says."""

from __future__ import annotations

import subprocess
from pathlib import Path

from page_reader import PageReader, Prepare

AMBER = "models--LLM360--Amber/snapshots/e691febcfceb864f235225f4e6dcae07e2be6332"


def nothing(reader: PageReader) -> None:
    """An empty folder."""


def amber(reader: PageReader) -> None:
    """A checkpoint where the published recipe has its own: SmolLM2 in place of a 7B model."""
    place = reader.folder / AMBER
    place.parent.mkdir(parents=True)
    (model,) = reader.models.glob("gguf-*")
    place.symlink_to(model.resolve())


PLACES: dict[str, Prepare] = {"docs/from-the-recipe.md": amber}


def end_kept_ray(reader: PageReader) -> None:
    """End a Ray that a page has left up; there is none where it ended its own."""
    if (reader.home / ".cache" / "qaic-ray" / "kept-ray.json").exists():
        program = str(Path(reader.environment["PATH"].partition(":")[0]) / "qaic-ray")
        subprocess.run([program, "ray", "stop", "--force"], env=reader.environment, check=True)
