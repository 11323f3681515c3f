"""Every page is typed from top to bottom in a fresh folder, and prints what it shows.

`make test-pages` runs these alone; one page: `scripts/test tests/pages -k quickstart`.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import page_places
import pytest
from page_blocks import GENERATED, blocks_of, name_of, pages
from page_reader import PageReader

from qaic_ray.files.folders import cache_folder

FIRST = frozenset({"README.md", "docs/quickstart.md"})
"""Pages of somebody who is new: nothing but the model is there. Who reads another one has a program
that a page before it made."""
FAST = frozenset({"docs/emulated-sdk/coverage.md", "docs/how-to/check.md", "jobs/README.md"})
"""Pages that start no Ray, and end within seconds."""
WITH_RAY = frozenset({"docs/quickstart.md", "docs/how-to/resume.md"})
"""Pages of the tier that starts Rays; all others are slow."""


def _typed() -> Iterator[object]:
    for page in pages():
        if GENERATED in page.parents or page.name == "CONTRIBUTING.md":
            continue
        if any(b.is_run and (b.commands or b.kind == "python") for b in blocks_of(page)):
            yield pytest.param(page, id=name_of(page), marks=_marks(name_of(page)))


def _marks(name: str) -> list[pytest.MarkDecorator]:
    if name in FAST:
        return []
    return [
        pytest.mark.model,
        pytest.mark.cluster,
        *([] if name in WITH_RAY else [pytest.mark.slow]),
    ]


@pytest.fixture
def home() -> Iterator[Path]:
    """Goes with the test. Its path is short: sockets lie below it."""
    folder = Path(tempfile.mkdtemp(prefix="you-"))
    yield folder
    shutil.rmtree(folder)


@pytest.mark.timeout(3600)  # each command has a limit of its own
@pytest.mark.parametrize("page", list(_typed()))
def test_a_page_is_what_happens(page: Path, home: Path) -> None:
    name = name_of(page)
    kept = None if name in FIRST else cache_folder() / "of-other-readers"
    with PageReader(home, cache_folder() / "models", kept) as reader:
        page_places.PLACES.get(name, page_places.nothing)(reader)
        try:
            for block in blocks_of(page):
                reader.read(block)
            reader.finish()
            page_places.AFTERWARDS.get(name, page_places.nothing)(reader)
        finally:
            page_places.end_kept_ray(reader)


def test_every_place_is_of_a_page() -> None:
    known = {name_of(page) for page in pages()}
    assert set(page_places.PLACES) | set(page_places.AFTERWARDS) | FIRST | FAST | WITH_RAY <= known
