"""A server with a batch of 5,000 requests, killed ten times: its answers, as if nothing was."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import openai
import pytest
from marked_processes import MARK_VARIABLE, marked, until

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

COMMAND = [sys.executable, "-c", "from qaic_ray.cli import main; main()"]
COMPLETIONS = "/v1/completions"
NUM_REQUESTS = 5000
WAYS = ["server", "worker", "controller", "all"]
NUM_KILLS = 10


class KilledServer:
    """`qaic-ray serve`, started again whenever it is gone."""

    def __init__(self, folder: Path, checkpoint: Path, qpc: Path) -> None:
        self.mark = str(folder)
        self.num_starts = 0
        self._folder = folder
        self._command = [
            *COMMAND,
            *("serve", str(qpc), "--model-name", str(checkpoint), "--device-id", "0,1"),
            *("--port", "0", "--folder", str(folder / "kept")),
        ]
        self._process: subprocess.Popen[str] | None = None
        self.start()

    def start(self) -> None:
        """Start it where it does not run, and wait until it answers."""
        if self._process is not None:
            if self._process.poll() is None:
                return
            assert self._process.stdout is not None
            self._process.stdout.close()
        until(lambda: not marked(self.mark))  # what the last one left ends by itself
        environment = {
            **os.environ,
            "RAY_AUTH_MODE": "disabled",
            "QAIC_RAY_SDK": "emulated",
            MARK_VARIABLE: self.mark,
        }
        self.num_starts += 1
        with (self._folder / "said").open("a") as said:
            self._process = subprocess.Popen(
                self._command, stdout=subprocess.PIPE, stderr=said, text=True, env=environment
            )
        assert self._process.stdout is not None
        first = self._process.stdout.readline()
        assert first.startswith("Serving"), (self._folder / "said").read_text()[-3000:]
        self.client = openai.OpenAI(
            base_url=first.split(" at ")[1].strip(), api_key="none", max_retries=0, timeout=30.0
        )

    def kill(self, way: str, any_: random.Random) -> None:
        """SIGKILL to a part of it."""
        assert self._process is not None
        found = marked(self.mark)
        workers = [pid for pid, command in found.items() if b"ray::card" in command]
        controllers = [pid for pid, command in found.items() if b"gcs_server" in command]
        pids = {
            "server": [self._process.pid],
            "worker": [any_.choice(workers)] if workers else [],
            "controller": controllers,
            "all": list(found),
        }[way]
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def end(self) -> None:
        assert self._process is not None
        self._process.terminate()
        self._process.wait(120.0)
        assert self._process.stdout is not None
        self._process.stdout.close()
        until(lambda: not marked(self.mark))

    def batch(self, id_: str) -> Any:
        """The batch, from the server that runs or the next one; one that dies is waited for."""
        while True:
            try:
                return self.client.batches.retrieve(id_)
            except openai.APIError:
                time.sleep(0.2)
                self.start()


def requests() -> bytes:
    lines = []
    for number in range(NUM_REQUESTS):
        body: dict[str, Any] = {"prompt": f"request {number % 700}", "max_tokens": 6}
        body |= {"temperature": 0.0} if number % 2 else {"temperature": 1.0, "seed": number}
        if number % 1000 == 7:
            body["prompt"] = "x" * 500  # longer than the context
        line = {"custom_id": f"c{number}", "method": "POST", "url": COMPLETIONS, "body": body}
        lines.append(json.dumps(line))
    return "\n".join(lines).encode() + b"\n"


def answers(client: openai.OpenAI, batch: Any) -> tuple[dict[str, Any], bytes]:
    """custom_id -> text or status; and the bytes of both files."""
    data = b"".join(
        client.files.content(id_).content for id_ in (batch.output_file_id, batch.error_file_id)
    )
    found: dict[str, Any] = {}
    for line in map(json.loads, data.splitlines()):
        assert line["custom_id"] not in found
        response = line["response"]
        is_ok = response["status_code"] == 200
        text = response["body"]["choices"][0]["text"] if is_ok else response["status_code"]
        found[line["custom_id"]] = text
    return found, data


def test_a_batch_survives_ten_kills_of_every_part_of_the_server(
    tmp_path: Path, tiny_checkpoint: Path, tiny_qpc: Path
) -> None:
    any_ = random.Random(15)
    server = KilledServer(tmp_path, tiny_checkpoint, tiny_qpc)
    data = requests()
    try:
        file = server.client.files.create(file=("requests.jsonl", data), purpose="batch")
        made = server.client.batches.create(
            input_file_id=file.id, endpoint=COMPLETIONS, completion_window="24h"
        )
        killed: list[str] = []
        at = [int(NUM_REQUESTS * (number + any_.random()) / 11) for number in range(NUM_KILLS)]
        seen = 0
        while (batch := server.batch(made.id)).status != "completed":
            assert batch.id == made.id
            assert batch.status in ("validating", "in_progress", "finalizing")
            counts = batch.request_counts
            assert counts.completed + counts.failed >= seen
            seen = counts.completed + counts.failed
            if len(killed) < NUM_KILLS and seen >= at[len(killed)]:
                way = WAYS[len(killed) % len(WAYS)]
                server.kill(way, any_)
                killed.append(way)
            time.sleep(0.05)
        assert len(killed) == NUM_KILLS
        assert server.num_starts > NUM_KILLS // 2

        client = server.client
        found, outputs = answers(client, batch)
        assert set(found) == {f"c{number}" for number in range(NUM_REQUESTS)}
        assert (batch.request_counts.completed, batch.request_counts.failed) == (4995, 5)
        assert batch.metadata["qaic_ray.inputs_sha256"] == hashlib.sha256(data).hexdigest()
        assert batch.metadata["qaic_ray.outputs_sha256"] == hashlib.sha256(outputs).hexdigest()

        undisturbed = client.batches.create(
            input_file_id=file.id, endpoint=COMPLETIONS, completion_window="24h"
        )
        until(lambda: server.batch(undisturbed.id).status == "completed", 600.0)
        assert found == answers(client, server.batch(undisturbed.id))[0]
        files = {each.id for each in client.files.list()}
        assert len(files) == 5  # the input, and two of each batch: no death has left another one
    finally:
        server.end()
