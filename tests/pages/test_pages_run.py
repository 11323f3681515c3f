"""Every page is typed from top to bottom in a fresh folder, and prints what it shows.

`make test-pages` runs these alone; one page: `scripts/test tests/pages -k quickstart`.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import page_places
import pytest
from page_blocks import GENERATED, blocks_of, name_of, pages
from page_reader import PageReader

from qaic_ray.files.folders import cache_folder

QUICK = frozenset({"docs/quickstart.md", "docs/how-to/resume.md"})
"""Pages of the tier that starts Rays; the others are slow."""


def _typed() -> Iterator[object]:
    for page in pages():
        if GENERATED in page.parents or page.name == "CONTRIBUTING.md":
            continue
        if any(b.is_run and (b.commands or b.kind == "python") for b in blocks_of(page)):
            marks = [] if name_of(page) in QUICK else [pytest.mark.slow]
            yield pytest.param(page, id=name_of(page), marks=marks)


@pytest.fixture
def new_reader() -> Iterator[Callable[[], PageReader]]:
    """Makes a reader whose home goes with the test. Its path is short: sockets lie below it."""
    home = Path(tempfile.mkdtemp(prefix="you-"))
    readers: list[PageReader] = []

    def make() -> PageReader:
        shared = {"QAIC_EMULATOR_CACHE": str(cache_folder() / "emulator-of-pages")}
        readers.append(PageReader(home, cache_folder() / "models", shared))
        return readers[-1]

    yield make
    for reader in readers:
        reader.__exit__()
    shutil.rmtree(home)


@pytest.mark.model
@pytest.mark.cluster
@pytest.mark.parametrize("page", _typed())
def test_a_page_is_what_happens(page: Path, new_reader: Callable[[], PageReader]) -> None:
    reader = new_reader()
    page_places.PLACES.get(name_of(page), page_places.nothing)(reader)
    try:
        for block in blocks_of(page):
            reader.read(block)
        reader.finish()
        page_places.AFTERWARDS.get(name_of(page), page_places.nothing)(reader)
    finally:
        page_places.end_kept_ray(reader)


def test_every_place_is_of_a_page() -> None:
    known = {name_of(page) for page in pages()}
    assert set(page_places.PLACES) | set(page_places.AFTERWARDS) | QUICK <= known
