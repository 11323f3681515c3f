"""The site of the documentation, built into a folder of a test."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mkdocs.commands.build import build
from mkdocs.config import load_config

ROOT = Path(__file__).parents[2]


class Warned(logging.Handler):
    """Keeps what MkDocs warns of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def built(site: Path, docs: Path | None = None, nav: Sequence[Any] | None = None) -> list[str]:
    """Build the site by mkdocs.yml; what would have failed a strict build.

    Args:
        site: is made.
        docs: pages, in place of the repository's own.
        nav: of these.
    """
    other: dict[str, Any] = {} if docs is None else {"docs_dir": str(docs), "nav": nav}
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(site), strict=False, **other)
    warned = Warned()
    log = logging.getLogger("mkdocs")
    log.addHandler(warned)
    try:
        config.plugins.on_startup(command="build", dirty=False)
        build(config)
    finally:
        log.removeHandler(warned)
    return warned.said
