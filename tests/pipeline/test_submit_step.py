"""What of a job is sent to a cluster, and what a job's state and log say of it."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from awaited import joined

from qaic_ray.errors import QaicRayError, UsageError
from qaic_ray.pipeline import submit_step
from qaic_ray.pipeline.job import load_job
from qaic_ray.pipeline.submit_step import (
    SubmitRequest,
    entry_command,
    pack,
    progress_line,
    read_status,
)

Request = Callable[..., SubmitRequest]


@pytest.fixture
def request_for(tmp_path: Path) -> Request:
    """A request for a job in a folder of many other things."""
    (tmp_path / "home" / "private").mkdir(parents=True)
    (tmp_path / "home" / "private" / "key").write_text("secret")

    def make(*, model: str = "some/hub-id", send: bool = True, **run: object) -> SubmitRequest:
        path = tmp_path / "home" / "job.yaml"
        path.write_text(yaml.safe_dump({"name": "x", "model": {"name": model}, "run": run}))
        return SubmitRequest(load_job(path), Path("/there"), "/py thon", send)

    return make


def packed(request: SubmitRequest, tmp_path: Path) -> tuple[submit_step.Parcel, Path]:
    folder = tmp_path / "parcel"
    folder.mkdir()
    return pack(request, folder), folder


def test_the_job_and_its_prompts_are_sent_and_nothing_else(
    request_for: Request, tmp_path: Path
) -> None:
    (tmp_path / "home" / "job.yaml.jsonl").write_text('{"prompt": "a"}\n')
    parcel, folder = packed(request_for(prompts="job.yaml.jsonl", generation_len=7), tmp_path)
    assert set(parcel.sent) == {"job.yaml", "prompts/job.yaml.jsonl"}
    assert parcel.expected == ()
    sent = load_job(folder / "job.yaml")  # as the cluster reads it, wherever it was put
    assert sent.run.prompts == str(folder / "prompts" / "job.yaml.jsonl")
    assert sent.run.generation_len == 7
    assert Path(sent.run.prompts).read_text() == '{"prompt": "a"}\n'


def test_what_is_only_named_is_said(request_for: Request, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    asked = request_for(
        model=str(tmp_path / "model"), prompts="/far/p.jsonl", draft_qpc="draft", send=False
    )
    parcel, folder = packed(asked, tmp_path)
    assert set(parcel.sent) == {"job.yaml"}
    assert parcel.expected == ("/far/p.jsonl", str(tmp_path / "model"), "/there/draft")
    assert load_job(folder / "job.yaml").run.prompts == "/far/p.jsonl"


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ("-", "no stdin"),
        ("gone.jsonl", "There is no prompts file"),
        ("private", "is a folder"),
        ("job.yaml", "no more than 0 MiB are sent"),
    ],
)
def test_prompts_that_cannot_be_sent_are_refused(
    request_for: Request,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    prompts: str,
    words: str,
) -> None:
    monkeypatch.setattr(submit_step, "MAX_SENT_BYTES", 4)
    with pytest.raises(UsageError, match=words):
        packed(request_for(prompts=prompts), tmp_path)


def test_uris_are_read_there_and_only_one_file_is_sent(
    request_for: Request, tmp_path: Path
) -> None:
    (tmp_path / "home" / "job.yaml.jsonl").write_text('{"prompt": "a"}\n')
    parcel, folder = packed(request_for(prompts=["s3://b/x", "job.yaml.jsonl"]), tmp_path)
    assert set(parcel.sent) == {"job.yaml", "prompts/job.yaml.jsonl"}
    sent = load_job(folder / "job.yaml").run.prompts
    assert sent == ("s3://b/x", str(folder / "prompts" / "job.yaml.jsonl"))
    with pytest.raises(UsageError, match="Only one file of prompts is sent"):
        pack(request_for(prompts=["job.yaml.jsonl", "job.yaml"]), folder)


def test_the_command_is_the_interpreter_and_words(request_for: Request) -> None:
    command = entry_command(request_for(prompt="a"))
    assert command[:2] == ["/py thon", "-c"]
    assert command[3:] == [
        *("launch", "job.yaml", "--folder", "/there", "--address", "auto"),
        *("--no-stream", "--json"),
    ]


@pytest.fixture
def submitted() -> Callable[..., object]:
    """A job as a cluster tells of it; Ray is loaded for it."""
    from qaic_ray.cluster.jobs import SubmittedJob

    return lambda state, **more: SubmittedJob(
        "x-1", state, metadata={"qaic_ray_job": "x"}, started_s=1.0, **more
    )


def test_a_log_says_how_far_its_job_is(submitted: Callable[..., object]) -> None:
    report = json.dumps({"rows": 9, "failed_rows": 2, "folder": "/r"})
    so_far = f"begun\n{progress_line(3, 0)}\n{progress_line(5, 1)}\n"
    running = read_status(submitted("RUNNING"), so_far)  # type: ignore[arg-type]
    assert (running.state, running.rows, running.failed_rows) == ("running", 5, 1)
    assert (running.job, running.folder, running.error) == ("x", None, None)
    done = read_status(submitted("FAILED", exit_code=1), so_far + report + "\n")  # type: ignore[arg-type]
    assert (done.state, done.rows, done.failed_rows, done.folder) == ("done", 9, 2, "/r")
    assert read_status(submitted("PENDING"), "").rows is None  # type: ignore[arg-type]
    answered = read_status(submitted("STOPPED"), so_far + '{"rows": 1}')  # type: ignore[arg-type]
    assert (answered.state, answered.rows) == ("stopped", 5)


def test_a_job_that_failed_says_why(submitted: Callable[..., object]) -> None:
    log = f"qaic-ray: No card is ready.\n{progress_line(1, 0)}\n"
    for said, code, words in (
        (log, 2, r"^No card is ready\.$"),
        ("sh: not found\n", 127, "launch --python"),
        ("", 9, "^It was killed$"),
    ):
        job = submitted("FAILED", exit_code=code, message="It was\nkilled")
        status = read_status(job, said)  # type: ignore[arg-type]
        assert status.state == "failed"
        assert re.search(words, status.error or "")


class Refusing(BaseHTTPRequestHandler):
    """A web server that answers everything with one status."""

    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web_server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        joined(thread)


def test_what_is_no_cluster_is_said_in_one_sentence(
    web_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qaic_ray.cluster.jobs import SubmittedJobs

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")  # goes behind an address that is given
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        closed = f"127.0.0.1:{taken.getsockname()[1]}"
        for address, status, words in (
            ("ray://head:10001", 200, "is for Ray Client"),
            ("head", 200, "no address of a Ray cluster"),
            (closed, 200, "No Ray cluster answers at"),
            (f"http://{closed}", 200, "--include-dashboard=true"),
            (web_server, 200, "neither a Ray head nor its dashboard"),
            (f"http://{web_server}", 200, "did not take the request"),
            (f"http://{web_server}", 404, "did not take the request"),
            (f"http://{web_server}", 500, "500 Server Error"),
            (f"http://{web_server}", 401, "wants its token: copy ~/.ray/auth_token"),
            (f"http://{web_server}", 403, "RAY_AUTH_TOKEN"),
            (None, 200, "at http://127.0.0.1:1 "),
        ):
            monkeypatch.setattr(Refusing, "status", status)
            with pytest.raises(QaicRayError, match=re.escape(words)) as refused:
                SubmittedJobs(address)
            assert "\n" not in str(refused.value)
