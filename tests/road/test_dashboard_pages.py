"""A launched job in the dashboard's pages, as headless Chromium shows them to a person.

`scripts/dashboard_pictures` runs this too: with QAIC_RAY_PICTURES=FOLDER each page is put there.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from awaited import ended
from headless_chromium import PROGRAM, REMEDY, HeadlessChromium
from marked_processes import MARK_VARIABLE, marked, until

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.skipif(PROGRAM is None, reason=REMEDY),
]

PICTURES = os.environ.get("QAIC_RAY_PICTURES")
CARDS = ("card 0", "card 1")
NUM_ROWS = 600
SLOW = {"faults": [{"kind": "slow", "factor": 40}]}
"""So that the run is at work while its pages are looked at."""


@dataclass
class Seen:
    """A dashboard in a browser that has been let in."""

    page: HeadlessChromium
    url: str
    hidden: dict[str, str]
    """What a picture shows in place of this machine's own names."""

    def opens(self, path: str, *words: str) -> str:
        self.page.go_to(f"{self.url}/#/{path}")
        return self.page.until(*words)

    def picture(self, name: str, height: int) -> None:
        if PICTURES is not None:
            self.page.replace(self.hidden)
            self.page.picture(Path(PICTURES) / f"dashboard-{name}.png", height)


@pytest.fixture(scope="module")
def seen(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    """A job that runs, and its dashboard; the token is typed, as a person types it."""
    folder = tmp_path_factory.mktemp("pages")
    rows = ({"prompt": f"number {i}", "ignore_eos": True} for i in range(NUM_ROWS))
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "slow.json").write_text(json.dumps(SLOW))
    (folder / "tiny").symlink_to(tiny_checkpoint)
    shapes = {"batch_size": 2, "prompt_len": [16, 32], "ctx_len": 128, "num_cores": 7}
    job = {
        "name": "nightly",
        "model": {"name": "tiny"},
        "export": {"verify": "off"},
        "compile": {"precision": "fp32", **shapes},
        "run": {
            "variant": {"prompt_len": 16},
            "devices": [0, 1],
            "prompts": "prompts.jsonl",
            "generation_len": 100,
        },
    }
    (folder / "nightly.yaml").write_text(yaml.safe_dump(job))
    environment = {k: v for k, v in os.environ.items() if k != "RAY_AUTH_MODE"} | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "QAIC_RAY_SDK": "emulated",
        "QAIC_EMULATOR_FAULTS": str(folder / "slow.json"),
        MARK_VARIABLE: str(folder),
    }
    program = "from qaic_ray.cli import main; main()"
    with (folder / "said").open("w") as said:
        run = subprocess.Popen(
            ["python", "-c", program, "launch", "nightly.yaml", "--no-stream"],
            cwd=folder, env=environment, stdout=said, stderr=said,
        )  # fmt: skip
    try:
        until(lambda: "card 1 ready" in words(folder) or run.poll() is not None)
        said_lines = words(folder).splitlines()
        assert run.poll() is None, words(folder)
        (url,) = [line for line in said_lines if line.startswith("http://")]
        (asks,) = [line for line in said_lines if line.startswith("It asks for a token: cat ")]
        token = Path(asks.split()[-1]).read_text()
        with HeadlessChromium(tmp_path_factory.mktemp("chromium")) as page:
            page.go_to(url)
            page.until("Authentication Token Required")
            page.write("input[type=password]", token)
            page.click("SUBMIT")
            page.until("nightly")
            yield Seen(page, url, {os.uname().nodename: "my-machine", str(folder): "/home/me"})
    finally:
        run.terminate()
        ended(run)
        until(lambda: not marked(str(folder)), 60)


def words(folder: Path) -> str:
    return (folder / "said").read_text()


def test_the_list_of_jobs_has_the_jobs_name(seen: Seen) -> None:
    text = seen.opens("jobs", "Job List", "nightly", "RUNNING")
    assert "launch nightly.yaml" in text
    seen.picture("jobs", 560)


def test_the_actors_are_the_cards(seen: Seen) -> None:
    text = seen.opens("actors", *CARDS, "ALIVE")
    for card in CARDS:
        assert text.count(card) == 2, text  # its name, and its `repr`
    seen.picture("actors", 540)


def test_a_cards_log_is_behind_its_actor(seen: Seen) -> None:
    seen.opens("actors", *CARDS)
    seen.page.click("Log", "td a")
    seen.page.until("ready after", "2 slots")
    seen.page.scroll_to("Required Resources", "p")
    seen.picture("log", 560)


def test_the_processes_are_the_cards(seen: Seen) -> None:
    seen.opens("cluster", *(f"ray::{card}" for card in CARDS))
    seen.page.scroll_to("ray::card", "a", "center")
    seen.picture("cluster", 800)


def test_the_tasks_are_the_compiles_and_the_shards(seen: Seen) -> None:
    seen.opens("jobs/01000000", "Task Table")
    seen.page.click("Task Table", "h4")
    seen.page.until("shard ", "Page Size")
    seen.page.write_last("input[value='10']", "200")
    text = seen.page.until(
        "compile fp32 7c pl16 cl128 bs2",
        "compile fp32 7c pl32 cl128 bs2",
        *(f"open {card}" for card in CARDS),
        "shard 0 on card",
    )
    shards = {int(number): card for number, card in re.findall(r"shard (\d+) on (card \d)", text)}
    assert set(shards) == set(range(max(shards) + 1))
    assert set(shards.values()) == set(CARDS)
    for poll in ("num_steps", "measurement"):
        assert poll not in text
    seen.page.scroll_to("Task Table", "h4")
    seen.picture("tasks", 800)
