"""Requests that come at random, alone and beside a batch that would take every slot."""

from __future__ import annotations

import json
import random
import tempfile
import threading
import time
import urllib.request
import uuid
from pathlib import Path
from typing import Any

from serving.latency import (
    CARDS,
    COMPLETIONS,
    CTX_LEN,
    PROMPT_LEN,
    SETTLE_S,
    SLOTS,
    STEP_MS,
    arrivals,
    body,
    length,
)
from serving.load import Plan
from serving.servers import Server, load, make_stage, ours, timed

BATCH_S = 600.0
SLOWER = 1.1


def measure(share: float, seconds: float, requests: int) -> dict[str, Any]:
    """The figures of the part `batch`."""
    with tempfile.TemporaryDirectory(prefix="qaic-ray-serve-") as name:
        stage = make_stage(
            Path(name),
            cards=CARDS,
            step_ms=STEP_MS,
            slots=SLOTS,
            prompt_len=PROMPT_LEN,
            ctx_len=CTX_LEN,
        )
        arguments = [stage.qpc, "-m", stage.model, *stage.arguments(CARDS)]
        with ours(stage.folder, arguments, env=timed(stage)) as server:
            load(server, Plan(COMPLETIONS, [body(1, 8)], clients=1))
            bodies, at_s = arrivals(share, seconds)
            plan = Plan(COMPLETIONS, bodies, at_s=at_s, quiet_s=SETTLE_S)
            alone = load(server, plan)
            batch = Batch(server, requests)
            batch.start()
            batch.wait_for(SLOTS * CARDS)
            beside = load(server, plan)
            was_running = batch.counts()["completed"] < requests
            batch.join(BATCH_S)
    return {
        "step_ms": STEP_MS,
        "alone": alone,
        "beside": beside,
        "batch": {"requests": requests, "ran_all_the_time": was_running, **batch.ended},
    }


class Batch(threading.Thread):
    """A batch of the server, from its file to its end."""

    def __init__(self, server: Server, requests: int) -> None:
        super().__init__(daemon=True)
        self._server = server
        self._requests = requests
        self._id = ""
        self.ended: dict[str, Any] = {}

    def run(self) -> None:
        """Make it, and wait for its end."""
        chance = random.Random(2)
        lines = [
            {
                "custom_id": f"c{number}",
                "method": "POST",
                "url": COMPLETIONS,
                "body": body(50_000 + number, length(chance)),
            }
            for number in range(self._requests)
        ]
        file = self._upload("".join(json.dumps(line) + "\n" for line in lines))
        asked = {"input_file_id": file, "endpoint": COMPLETIONS, "completion_window": "24h"}
        begun_s = time.monotonic()
        self._id = str(self._call("/v1/batches", json.dumps(asked).encode())["id"])
        while (told := self._told())["status"] in ("validating", "in_progress", "finalizing"):
            time.sleep(0.25)
        self.ended = {
            "status": told["status"],
            "counts": told["request_counts"],
            "tokens": told["usage"]["output_tokens"],
            "seconds": time.monotonic() - begun_s,
        }

    def wait_for(self, completed: int) -> None:
        """Wait until so many of its requests are done."""
        while not self._id or self.counts()["completed"] < completed:
            time.sleep(0.1)

    def counts(self) -> dict[str, int]:
        """Its requests by what became of them."""
        found: dict[str, int] = self._told()["request_counts"] or {"completed": 0}
        return found

    def _told(self) -> dict[str, Any]:
        return self._call(f"/v1/batches/{self._id}")

    def _upload(self, text: str) -> str:
        edge = uuid.uuid4().hex
        parts = (
            f'--{edge}\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
            f'--{edge}\r\ncontent-disposition: form-data; name="file"; filename="b.jsonl"\r\n'
            f"content-type: application/jsonl\r\n\r\n{text}\r\n--{edge}--\r\n"
        )
        kind = f"multipart/form-data; boundary={edge}"
        return str(self._call("/v1/files", parts.encode(), kind)["id"])

    def _call(
        self, path: str, data: bytes | None = None, kind: str = "application/json"
    ) -> dict[str, Any]:
        request = urllib.request.Request(
            f"{self._server.address}{path}", data, {"content-type": kind}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            found: dict[str, Any] = json.load(answer)
        return found


def promises(figures: dict[str, Any]) -> list[tuple[str, float, float, bool]]:
    """What is promised of them: in words, the figure, the limit, and whether it holds."""
    alone, beside, step_ms = figures["alone"], figures["beside"], figures["step_ms"]
    most_first = alone["ttft_ms"]["p99"] + 2 * step_ms  # a chunk and a step
    most_gap = SLOWER * alone["inter_token_ms"]["p99"]
    first, gap = beside["ttft_ms"]["p99"], beside["inter_token_ms"]["p99"]
    counts = figures["batch"]["counts"]
    return [
        ("first token p99 beside a batch, ms", first, most_first, first <= most_first),
        ("inter-token p99 beside a batch, ms", gap, most_gap, gap <= most_gap),
        ("requests of the batch that failed", counts["failed"], 0, counts["failed"] == 0),
    ]
