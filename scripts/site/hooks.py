"""What MkDocs does for our site beside what it can: `mkdocs.yml` names this file.

Pages link to files of the repository that are no pages of docs/, as a git host shows them. Markdown
among those is a page of the site, a file or a folder becomes one, and the links are rewritten; a
link to what is not there fails the build. Diagrams of states are drawn here, and search gets the
worker that a page opened as a file may have: nothing of the site comes from a network.
"""

from __future__ import annotations

import logging
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pymdownx.slugs
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from states import drawn

log = logging.getLogger("mkdocs.hooks.site")

ROOT = Path(__file__).parents[2]
PAGES = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "jobs/README.md": "reference/jobs.md",
}
"""Pages of the repository that stand elsewhere than in docs/, and where they are in the site."""
HOME = ("README.md", "docs/index.md")
"""The first page of the site, and the one of the repository that it stands for."""
SOURCES = "files"
"""The folder of the site with the other files and folders that pages link to."""

_BLOCK = re.compile(r"^( *)(```+).*?^\1\2`*\s*$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(!?\[(?:[^\]\[]|\[[^\]]*\])*\]\()([^)\s]+)(\))")
_CODE_IN_ROW = re.compile(r"(?<=[|\s])`[^`\n]*\\\|[^`\n]*`(?=.*\|$)", re.MULTILINE)
"""A pipe in code is written with a backslash in a table; MkDocs would show that too."""
_SPAN = re.compile(r"(`+)(?!`).*?(?<!`)\1(?!`)", re.DOTALL)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Anchors as a git host makes them, and our drawing of states."""
    config.mdx_configs["toc"]["slugify"] = pymdownx.slugs.slugify(case="lower")
    fence = {"name": "mermaid", "class": "states", "format": _states}
    config.mdx_configs["pymdownx.superfences"] = {"custom_fences": [fence]}
    # The offline plugin would load this from a CDN; it leaves a file of this name alone.
    config.extra["polyfills"] = ["javascripts/iframe-worker.js"]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what stands elsewhere in the repository."""
    for place, uri in PAGES.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / place)))
    linked = {
        target
        for file in files.documentation_pages()
        for _, target in _outside(_place(file.src_uri), file.content_string)
    }
    for place in sorted(filter(_is_shown, linked)):
        inside = sorted(path for path in (ROOT / place).glob("*") if path.is_file())
        if inside:
            links = "\n".join(f"- [{path.name}]({path.stem}.md)" for path in inside)
            text = f"# {place}/\n\nFiles of the repository:\n\n{links}\n"
            files.append(File.generated(config, f"{SOURCES}/{place}/index.md", content=text))
        for path in inside or [ROOT / place]:
            uri = _source_uri(path.relative_to(ROOT).as_posix())
            if files.get_file_from_path(uri) is None:
                files.append(File.generated(config, uri, content=_source_page(path)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links out of docs/ become links within the site, and tables show what a git host shows."""
    here = page.file.src_uri
    markdown = _CODE_IN_ROW.sub(lambda found: found[0].replace("\\|", "|"), markdown)
    for link, target in set(_outside(_place(here), markdown)):
        uri = _uri(target)
        if files.get_file_from_path(uri) is None:
            log.warning("%s links to %s, which the site cannot have", here, link)
            continue
        new = posixpath.relpath(uri, posixpath.dirname(here) or ".")
        markdown = markdown.replace(f"]({link})", f"]({new})")
        markdown = markdown.replace(f"]({link}#", f"]({new}#")
    return markdown


def _uri(target: str) -> str:
    """Where the site has a file of the repository."""
    if target in PAGES:
        return PAGES[target]
    if target in HOME:
        return "index.md"
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    return f"{SOURCES}/{target}/index.md" if (ROOT / target).is_dir() else _source_uri(target)


def _source_uri(target: str) -> str:
    return f"{SOURCES}/{posixpath.splitext(target)[0]}.md"


def _is_shown(target: str) -> bool:
    """Whether it is a file or folder that is linked, and no page of the site already."""
    path = ROOT / target
    known = target in PAGES or target in HOME or target.startswith("docs/")
    return not known and path.exists() and path.suffix != ".md"


def _source_page(path: Path) -> str:
    """A file of the repository as a page, which no search finds."""
    name, kind = path.relative_to(ROOT).as_posix(), path.suffix.removeprefix(".")
    head = f"---\nsearch: {{exclude: true}}\n---\n# {name}\n\n"
    return f"{head}``````{kind}\n{path.read_text(encoding='utf-8')}``````\n"


def _place(uri: str) -> str:
    """Where a page of the site stands in the repository."""
    standing = {there: place for place, there in PAGES.items()}
    return standing.get(uri, f"docs/{uri}")


def _outside(place: str, markdown: str) -> Iterator[tuple[str, str]]:
    """Links that a page of the site cannot have as they are, and the files that they mean."""
    prose = _SPAN.sub("", _BLOCK.sub("", markdown))
    for _, link, _ in _LINK.findall(prose):
        path = link.partition("#")[0]
        if not path or re.match(r"[a-z]+:|/", path):
            continue
        target = posixpath.normpath(posixpath.join(posixpath.dirname(place), path))
        if place in PAGES or not target.startswith("docs/") or target in HOME:
            yield path, target


def _states(source: str, *_: Any, **__: Any) -> str:
    return drawn(source)
