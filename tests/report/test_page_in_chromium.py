"""The pages in a browser: no error, nothing wider than the screen, light and dark."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from run_folders import FolderMaker

from qaic_ray.report.comparison import compare, comparison_page
from qaic_ray.report.document import redraw

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
WIDTHS = (400, 1000, 1600)
LOOK = """
<script>
const words = [...document.querySelectorAll("body *")].filter(
  one => one.childElementCount === 0 && one.textContent.trim() && one.offsetParent);
const found = {
  width: innerWidth,
  wide: document.documentElement.scrollWidth,
  ground: getComputedStyle(document.body).backgroundColor,
  ink: getComputedStyle(document.body).color,
  smallest: Math.min(...words.map(one => parseFloat(getComputedStyle(one).fontSize))),
  charts: [...document.querySelectorAll("svg")].map(one => one.getBoundingClientRect().width),
};
const note = document.createElement("pre");
note.id = "found";
note.textContent = JSON.stringify(found);
document.body.append(note);
</script>
"""

FRAME = """<!doctype html><meta charset="utf-8"><meta name="color-scheme" content="light dark">
<iframe id="page" src="looked.html" style="width: WIDTHpx; height: 3000px; border: 0"></iframe>
<script>
const page = document.getElementById("page");
page.onload = () => document.body.append(page.contentDocument.getElementById("found"));
</script>
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: `apt install chromium`)"),
]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    name = "a run of a job with a name that is rather long"
    many = FolderMaker(folder / name, cards=12, losses=8)
    many.session(400, ends=False)
    many.session(400, pause_s=20_000.0)
    one = FolderMaker(folder / "one", cards=1, slots=1, losses=0)
    one.session(1)
    found = {}
    for name, maker in (("many", many), ("one", one)):
        redraw(maker.folder)
        found[name] = maker.folder / "report.html"
    found["compared"] = folder / "compared.html"
    runs = [many.folder, one.folder, many.folder, one.folder]
    found["compared"].write_text(comparison_page(compare(runs)), encoding="utf-8")
    return found


def browse(page: Path, width: int, *, dark: bool, scratch: Path) -> tuple[dict[str, Any], str]:
    """What the browser makes of a page, and what it says of errors."""
    # A window is not narrower than 500 px, but a frame in it is.
    looked, frame = scratch / "looked.html", scratch / "frame.html"
    looked.write_text(page.read_text("utf-8").replace("</body>", f"{LOOK}</body>"), "utf-8")
    frame.write_text(FRAME.replace("WIDTH", str(width)), "utf-8")
    done = subprocess.run(
        [
            str(CHROMIUM),
            *("--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"),
            *(f"--window-size={max(width, 500)},2000", f"--user-data-dir={scratch / 'profile'}"),
            *(["--blink-settings=preferredColorScheme=0"] if dark else []),
            *("--allow-file-access-from-files", "--dump-dom", f"file://{frame}"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    match = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert match, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(unescape(match[1]))
    return found, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["many", "one", "compared"])
def test_a_page_is_readable(
    pages: dict[str, Path], tmp_path: Path, name: str, width: int, dark: bool
) -> None:
    found, console = browse(pages[name], width, dark=dark, scratch=tmp_path)
    assert console == ""
    assert found["width"] == width
    assert found["wide"] <= width
    assert found["smallest"] >= 10
    assert all(60 < drawn <= width for drawn in found["charts"])
    ground, ink = (sum(map(int, re.findall(r"\d+", found[key])[:3])) for key in ("ground", "ink"))
    assert (ground < ink) == dark
    assert abs(ground - ink) > 400
