"""The site: whole, strict, and its own; nothing of it is fetched from a network."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from built_site import ROOT, built
from headless_chromium import PROGRAM, REMEDY, HeadlessChromium

in_chromium = [
    pytest.mark.slow,
    pytest.mark.skipif(PROGRAM is None, reason=REMEDY),
]
NARROW = 400
"""Width of a telephone's window, in pixels."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    assert built(folder) == []
    return folder


LOADED = {"link": "href", "script": "src", "img": "src", "iframe": "src", "source": "src"}
"""What a browser fetches by itself: tags and their attributes."""


class Links(HTMLParser):
    """What a page loads, where it leads, and the anchors that it has."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.leads: list[str] = []
        self.anchors: set[str] = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors.update(filter(None, (given.get("id"), given.get("name"))))
        if tag in LOADED and given.get(LOADED[tag]) and given.get("rel") != "canonical":
            self.loads.append(given[LOADED[tag]])
        if tag == "a" and given.get("href"):
            self.leads.append(given["href"])


def pages_of(site: Path) -> Iterator[Path]:
    """But for that of a server, whose paths begin at its root."""
    return (page for page in sorted(site.rglob("*.html")) if page.name != "404.html")


def test_every_link_and_anchor_of_every_page_leads_to_a_file_of_the_site(site: Path) -> None:
    known = {page: Links(page) for page in pages_of(site)}
    assert len(known) > 40
    for page, links in known.items():
        for target in (*links.leads, *links.loads):
            if urlsplit(target).scheme in ("http", "https", "mailto"):
                continue
            path, _, anchor = target.partition("#")
            file = (page.parent / unquote(path)).resolve() if path else page
            assert file.is_file(), f"{page.relative_to(site)}: {target}"
            assert not anchor or anchor in known[file].anchors or anchor == "__codelineno", target


def test_nothing_is_loaded_from_a_network(site: Path) -> None:
    for page in site.rglob("*.html"):
        for target in Links(page).loads:
            assert not urlsplit(target).scheme, f"{page.name} loads {target}"
            assert not target.startswith("//")
    for sheet in site.rglob("*.css"):
        text = re.sub(r"/\*.*?\*/", "", sheet.read_text(encoding="utf-8"), flags=re.DOTALL)
        assert not re.search(r"url\(['\"]?(https?:)?//|@import", text), sheet.name


def test_every_page_of_the_repository_is_in_the_site(site: Path) -> None:
    text = (site / "index.html").read_text(encoding="utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        name = page.relative_to(ROOT / "docs").with_suffix(".html").as_posix()
        assert (site / name.replace("README.html", "index.html")).is_file()
    for name in ("contributing.html", "changelog.html", "reference/jobs.html"):
        assert (site / name).is_file()
    assert "Quickstart" in text


def test_a_pipe_in_code_of_a_table_is_shown_as_it_is(site: Path) -> None:
    shown = (site / "reference" / "job.html").read_text(encoding="utf-8")
    assert "<code>prompt: My name is|The capital of France is</code>" in shown
    assert "<td>&lt;base&gt;-kv</td>" in shown


def test_a_file_that_a_page_links_to_is_a_page_too(site: Path) -> None:
    shown = (site / "files" / "examples" / "ray_serve_llm.html").read_text(encoding="utf-8")
    assert "QaicServer" in shown
    assert "openai_chat" in (site / "files" / "examples" / "index.html").read_text("utf-8")


# -- what fails a build


BROKEN = {
    "[a](none.md)": "'none.md', but the target is not found",
    "[a](other.md#none)": "does not contain an anchor '#none'",
    "[b](#gone)": "there is no such anchor",
    "![c](none.png)": "'none.png', but the target is not found",
    "[d](../none/there.py)": "which the site cannot have",
    "[e](/etc/passwd)": "absolute link",
}
"""Links, and what is said of them."""


def test_each_broken_link_fails_the_build(tmp_path: Path) -> None:
    whole = "[f](other.md#with-a-head) [g](#a-page) `[h](never.md)`"
    text = "\n\n".join(["# A page", whole, *BROKEN])
    warned = built_of(tmp_path, text, also="lost.md")
    for link, said in BROKEN.items():
        assert any(said in line for line in warned), f"{link}: {warned}"
    assert any("lost.md" in line for line in warned), "a page that no list names"
    assert not any(name in line for line in warned for name in ("head", "a-page", "never"))


def built_of(folder: Path, text: str, also: str = "") -> list[str]:
    """What a build of a few pages warns of."""
    docs = folder / "docs"
    for name in ("stylesheets/extra.css", "javascripts/iframe-worker.js"):
        (docs / name).parent.mkdir(parents=True)
        (docs / name).write_bytes((ROOT / "docs" / name).read_bytes())
    (docs / "index.md").write_text(text)
    (docs / "other.md").write_text("# Other\n\n## With a head\n")
    if also:
        (docs / also).write_text("# Lost\n")
    warned = built(folder / "site", docs, ["index.md", "other.md", *OUTSIDE])
    return [said for said in warned if not any(page in said for page in OUTSIDE)]


OUTSIDE = ["contributing.md", "changelog.md", "reference/jobs.md"]
"""Pages that stand elsewhere in the repository, and are in each build."""


def test_the_build_is_strict() -> None:
    class Loader(yaml.SafeLoader):
        """Passes over what only MkDocs reads."""

    Loader.add_multi_constructor("", lambda *_: None)
    config = yaml.load((ROOT / "mkdocs.yml").read_text("utf-8"), Loader)
    assert config["strict"] is True
    made = (ROOT / "Makefile").read_text("utf-8")
    # With --quiet MkDocs would not count its warnings.
    assert re.search(r"^docs: install\n\t.*mkdocs build$", made, re.MULTILINE)


# -- in a browser


@pytest.mark.parametrize("width", [NARROW, 1280])
class TestInChromium:
    pytestmark = in_chromium

    def test_no_page_is_wider_than_the_window(self, width: int, site: Path, tmp_path: Path) -> None:
        wide = {}
        with HeadlessChromium(tmp_path / "profile", width=width, height=800) as chromium:
            for page in pages_of(site):
                chromium.go_to(page.as_uri())
                loaded(chromium, page)
                found = chromium.evaluate("document.documentElement.scrollWidth")
                if found > width:
                    wide[page.relative_to(site).as_posix()] = found
        assert wide == {}

    def test_a_word_is_found_in_files_without_a_server(
        self, width: int, site: Path, tmp_path: Path
    ) -> None:
        with HeadlessChromium(tmp_path / "profile", width=width, height=800) as chromium:
            page = site / "how-to" / "dl2q.html"
            chromium.go_to(page.as_uri())
            loaded(chromium, page)
            if width == NARROW:
                chromium.evaluate("document.querySelector('label[for=__search]').click()")
            field = "[data-md-component=search-query]"
            chromium.evaluate(f"document.querySelector('{field}').focus()")
            chromium.write(field, "prefix_reuse")
            hits = "[...document.querySelectorAll('.md-search-result__link')].map(a => a.href)"
            deadline_s = time.monotonic() + 60
            while not (found := chromium.evaluate(hits)):
                assert time.monotonic() < deadline_s, "nothing is found"
                time.sleep(0.1)
            assert any(urlsplit(hit).path.endswith("reference/job.html") for hit in found)


def loaded(chromium: HeadlessChromium, page: Path) -> None:
    """Wait until a page is there, its pictures too."""
    deadline_s = time.monotonic() + 60
    state = f"location.href.split('#')[0] === '{page.as_uri()}' && document.readyState"
    while chromium.evaluate(state) != "complete":
        assert time.monotonic() < deadline_s, f"{page} does not load"
        time.sleep(0.02)
