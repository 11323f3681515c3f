"""The ends of a server, through the command: signals, cards and a Ray that die under streams."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from awaited import ended
from marked_processes import MARK_VARIABLE, marked, until
from test_ends import COMMAND

pytestmark = pytest.mark.cluster

TOKENS = 60
PROMPTS = [f"number {number}" for number in range(6)]


class Stream(threading.Thread):
    """A greedy request that is read as it comes."""

    def __init__(self, address: str, prompt: str) -> None:
        super().__init__(daemon=True)
        self._where = urlsplit(address).netloc
        self._prompt = prompt
        self.text = ""
        self.error: dict[str, Any] | None = None
        self.status = 0
        self.is_whole = False
        self.start()

    def run(self) -> None:
        body = {"prompt": self._prompt, "max_tokens": TOKENS, "temperature": 0, "stream": True}
        body["ignore_eos"] = True
        with (
            suppress(OSError, HTTPException),
            closing(HTTPConnection(self._where, timeout=300)) as connection,
        ):
            connection.request("POST", "/v1/completions", json.dumps(body),
                               {"content-type": "application/json"})  # fmt: skip
            with connection.getresponse() as answer:
                self._read(answer)

    def _read(self, answer: HTTPResponse) -> None:
        self.status = answer.status
        if self.status != 200:
            self.error = json.load(answer)["error"]
            return
        for line in answer:
            if line.startswith(b"data: {"):
                self._take(json.loads(line[6:]))
            self.is_whole |= line == b"data: [DONE]\n"

    def _take(self, event: dict[str, Any]) -> None:
        self.error = event.get("error", self.error)
        for choice in event.get("choices", ()):
            self.text += choice["text"]


class Server:
    """A server of two cards whose steps are slow."""

    def __init__(self, folder: Path, process: subprocess.Popen[str], address: str) -> None:
        self.folder, self.process, self.address = folder, process, address

    def status(self, path: str) -> int:
        try:
            with urllib.request.urlopen(f"{self.address}{path}", timeout=60) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            with error:
                return error.code

    def streams(self) -> list[Stream]:
        """All of them begun, each with some text."""
        begun = [Stream(self.address, prompt) for prompt in PROMPTS]
        until(lambda: sum(bool(one.text) for one in begun) >= 4)
        return begun

    def said(self) -> str:
        return (self.folder / "said").read_text()

    def left(self) -> dict[int, bytes]:
        return marked(str(self.folder))

    def pids_of(self, part: bytes) -> list[int]:
        return [pid for pid, line in self.left().items() if part in line]


@contextmanager
def serving(folder: Path, checkpoint: Path, qpc: Path, *more: str) -> Iterator[Server]:
    slow = folder / "slow.json"
    slow.write_text(json.dumps({"faults": [{"kind": "slow", "factor": 12}]}))
    environment = {
        **{key: value for key, value in os.environ.items() if key != "RAY_AUTH_MODE"},
        "QAIC_RAY_SDK": "emulated",
        "QAIC_EMULATOR_FAULTS": str(slow),
        MARK_VARIABLE: str(folder),
    }
    command = [*COMMAND, "serve", str(qpc), "-m", str(checkpoint), "--port", "0", "--json"]
    command += ["--device-id", "0,1", *more]
    with (folder / "said").open("w") as said:
        process = subprocess.Popen(command, cwd=folder, env=environment, text=True, stderr=said,
                                   stdout=subprocess.PIPE)  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, (folder / "said").read_text()
        address = json.loads(line)["address"].removesuffix("/v1")
        yield Server(folder, process, address)
    finally:
        process.kill()
        ended(process)
        assert process.stdout is not None
        process.stdout.close()
        until(lambda: not marked(str(folder)), 60)


@pytest.fixture(scope="module")
def texts(
    tiny_checkpoint: Path, tiny_qpc: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[str]:
    """What `qaic-ray run` answers to the same requests."""
    folder = tmp_path_factory.mktemp("alone")
    lines = ({"prompt": prompt, "max_tokens": TOKENS, "ignore_eos": True} for prompt in PROMPTS)
    (folder / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [*COMMAND, "run", "--model-name", str(tiny_checkpoint), "--qpc", str(tiny_qpc)]
    command += ["--prompts-file", "p.jsonl", "--device-id", "0", "--output", "o", "--no-stream"]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_AUTH_MODE"}
    done = subprocess.run(command, cwd=folder, env={**environment, "QAIC_RAY_SDK": "emulated"},
                          capture_output=True, text=True, timeout=600, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    (output,) = folder.glob("o/*/outputs.jsonl")
    return [json.loads(line)["text"] for line in output.read_text().splitlines()]


def test_a_server_loses_a_card_and_drains(
    tiny_checkpoint: Path, tiny_qpc: Path, tmp_path: Path, texts: list[str]
) -> None:
    with serving(tmp_path, tiny_checkpoint, tiny_qpc) as server:
        assert server.status("/ready") == server.status("/health") == 200
        begun = server.streams()
        os.kill(server.pids_of(b"ray::card")[0], signal.SIGKILL)
        for one in begun:
            one.join(120)
        # Greedy, so that the card which takes over says the same; what was said is not said again.
        assert [one.text for one in begun] == texts
        assert all(one.is_whole and one.error is None for one in begun)

        begun = server.streams()
        server.process.terminate()
        until(lambda: server.status("/ready") == 503)
        assert server.status("/health") == 200
        late = Stream(server.address, "late")
        late.join(60)
        assert late.status == 503
        for one in begun:
            one.join(120)
        assert [one.text for one in begun] == texts
        assert server.process.wait(120) == 0, server.said()
        until(lambda: not server.left(), 60)
    assert "Traceback" not in server.said()


@pytest.mark.slow
def test_a_second_sigterm_ends_a_server_at_once(
    tiny_checkpoint: Path, tiny_qpc: Path, tmp_path: Path, texts: list[str]
) -> None:
    with serving(tmp_path, tiny_checkpoint, tiny_qpc, "--drain-s", "600") as server:
        begun = server.streams()
        server.process.terminate()
        until(lambda: server.status("/ready") == 503)
        ended_s = time.monotonic()
        server.process.terminate()
        assert server.process.wait(60) == 0, server.said()
        assert time.monotonic() - ended_s < 30.0
        for one, text in zip(begun, texts, strict=True):
            one.join(60)
            assert text.startswith(one.text)
            assert one.text == text or one.error is not None or not one.is_whole
        until(lambda: not server.left(), 60)
    assert "Traceback" not in server.said()


@pytest.mark.slow
def test_a_server_whose_ray_dies_says_so_in_every_stream_and_ends(
    tiny_checkpoint: Path, tiny_qpc: Path, tmp_path: Path, texts: list[str]
) -> None:
    with serving(tmp_path, tiny_checkpoint, tiny_qpc) as server:
        begun = server.streams()
        os.kill(server.pids_of(b"raylet/raylet")[0], signal.SIGKILL)
        for one, text in zip(begun, texts, strict=True):
            one.join(120)
            assert text.startswith(one.text)
            assert one.error is not None, (one.status, one.text)
            assert not one.is_whole
        assert server.process.wait(120) not in (0, 143)
        until(lambda: not server.left(), 60)
    assert "Traceback" not in server.said()
    assert server.said().splitlines()[-1].endswith(".")
