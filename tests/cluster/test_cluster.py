"""Real Ray: actors, streams, deaths, compile tasks, and what a driver leaves behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fake_worker
import pytest
import ray
from awaited import joined
from fake_worker import IMPATIENT, FakeWorker, build, meet, specs

from qaic_ray.cluster.cluster import Cluster
from qaic_ray.cluster.connection import join
from qaic_ray.errors import CompileError, DeviceBusy, QaicRayError, UsageError
from qaic_ray.rows import Prompt, Row
from qaic_ray.runs.driver import Audience
from qaic_ray.runs.result import FleetResult
from qaic_ray.timeouts import Timeouts
from qaic_ray.worker.worker import WorkerInfo

pytestmark = pytest.mark.cluster


def run(
    cluster: Cluster,
    prompts: Sequence[Prompt],
    cards: Sequence[Any],
    **audience: Callable[[Any], None],
) -> tuple[FleetResult, list[Row]]:
    rows: list[Row] = []
    result = cluster.run_prompts(
        prompts,
        cards,
        worker_class=FakeWorker,  # type: ignore[arg-type]
        policy=IMPATIENT,
        audience=Audience(on_row=rows.append, **audience),
    )
    assert [row.index for row in rows] == list(range(len(prompts)))
    return result, rows


def texts(*texts: str) -> list[Prompt]:
    return [Prompt(i, text) for i, text in enumerate(texts)]


def until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Poll, because nothing tells us."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come true in time"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return "(zombie)" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


# -- runs


def test_every_prompt_is_answered_in_order_by_all_cards(cluster: Cluster, tmp_path: Path) -> None:
    infos: list[WorkerInfo] = []

    def on_worker_ready(info: WorkerInfo) -> None:
        infos.append(info)
        if len(infos) == 4:
            (tmp_path / "open").touch()

    prompts = texts(f"until {tmp_path / 'open'}", *(f"prompt {i}" for i in range(99)))
    result, rows = run(cluster, prompts, specs(4, row_s=0.02), on_worker_ready=on_worker_ready)
    assert [row.text for row in rows] == [prompt.text[::-1] for prompt in prompts]
    assert result.ok
    assert result.broken_off is None
    assert sorted(info.name for info in infos) == ["card 0", "card 1", "card 2", "card 3"]
    assert all(info.sdk.endswith("OMP_NUM_THREADS=1") for info in infos)
    assert [worker.info.device_ids for worker in result.workers if worker.info] == [
        (0,),
        (1,),
        (2,),
        (3,),
    ]
    assert sum(worker.measurement.rows for worker in result.workers) == 100
    assert all(worker.measurement.decode_tokens == 70 for worker in result.workers)
    assert result.total.generated_tokens == 200


def test_rows_come_while_their_shard_still_runs(cluster: Cluster, tmp_path: Path) -> None:
    rows: list[Row] = []

    def hear(row: Row) -> None:
        rows.append(row)
        (tmp_path / "heard").touch()

    # The shortest comes last, and is not answered before somebody has heard of the first.
    cluster.run_prompts(
        texts("a" * 300, "b" * 300, f"until {tmp_path / 'heard'}"),
        specs(1, slots=6),
        worker_class=FakeWorker,  # type: ignore[arg-type]
        policy=IMPATIENT,
        audience=Audience(on_row=hear),
    )
    assert [row.ok for row in rows] == [True] * 3
    assert rows[2].attempts == 1


def test_a_prompt_that_kills_is_found_and_the_others_are_answered(cluster: Cluster) -> None:
    prompts = texts(*("die" if i == 7 else f"prompt {i}" for i in range(40)))
    result, rows = run(cluster, prompts, specs(4))
    assert [row.index for row in rows if not row.ok] == [7]
    assert 4 <= rows[7].attempts <= 7
    assert rows[7].error is not None
    assert f"Given up after {rows[7].attempts} attempts" in rows[7].error
    assert "its process died (ActorDiedError: " in rows[7].error
    assert result.broken_off is None


def test_a_killed_process_is_an_event_while_others_go_on(cluster: Cluster) -> None:
    victims: list[int] = []

    def kill_the_first(info: WorkerInfo) -> None:
        if info.name == "card 0":
            victims.append(int(info.sdk.split("pid ")[1].split(",")[0]))

    def on_progress(progress: Any) -> None:
        if progress.rows_done >= 10 and victims:
            os.kill(victims.pop(), signal.SIGKILL)

    prompts = texts(*(f"prompt {i}" for i in range(60)))
    result, rows = run(
        cluster,
        prompts,
        specs(2, row_s=0.02),
        on_worker_ready=kill_the_first,
        on_progress=on_progress,
    )
    assert result.ok
    assert "its process died" in (result.workers[0].error or "")
    assert result.workers[1].error is None
    assert max(row.attempts for row in rows) == 2


def test_a_card_that_breaks_is_tried_again_and_retired_with_its_own_words(
    cluster: Cluster,
) -> None:
    result, rows = run(cluster, texts("a", "break", "c", "d"), specs(2, slots=1))
    assert [row.ok for row in rows] == [True, False, True, True]
    assert rows[1].error is not None
    assert rows[1].error.endswith("DeviceError: The card is off.")
    assert all("The card is off." in (worker.error or "") for worker in result.workers)


def test_a_bug_in_a_worker_costs_the_row_and_no_card(cluster: Cluster) -> None:
    result, rows = run(cluster, texts("a", "bug", "c"), specs(1))
    assert [row.ok for row in rows] == [True, False, True]
    assert rows[1].error is not None
    assert rows[1].error.endswith("KeyError: 'a bug'")
    assert result.workers[0].error is None


@pytest.mark.parametrize("how", ["device", "exit"])
def test_a_card_that_cannot_be_opened_is_named(cluster: Cluster, how: str) -> None:
    cards = [*specs(1), fake_worker.FakeSpec("card 1", (1,), open_error=how)]
    result, _ = run(cluster, texts(*"abcd"), cards)
    assert result.ok
    # A quick run may end before the other card has failed.
    assert result.workers[1].info is None


def test_cards_that_never_open_leave_the_prompts_undone(cluster: Cluster) -> None:
    rows: list[Row] = []
    result = cluster.run_prompts(
        texts(*"ab"),
        specs(1, open_error="device"),
        worker_class=FakeWorker,  # type: ignore[arg-type]
        policy=IMPATIENT,
        audience=Audience(on_row=rows.append),
    )
    assert rows == []
    assert result.broken_off is not None
    assert result.workers[0].error == "DeviceError: No NSPs are free."


@pytest.mark.parametrize(
    ("how", "error", "text"),
    [
        ("usage", UsageError, "The QPC was compiled for 14 NSPs."),
        ("bug", KeyError, "a bug"),
        (
            "make",
            UsageError,
            r"card \d cannot be made .*: No module named 'nowhere'\).*same qaic-ray",
        ),
    ],
)
def test_a_wrong_request_ends_the_run(
    cluster: Cluster, how: str, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text) as info:
        run(cluster, texts("a"), specs(2, open_error=how))
    assert type(info.value) is error


def test_cards_are_given_back(cluster: Cluster) -> None:
    run(cluster, texts("a"), specs(2))
    with pytest.raises(ZeroDivisionError):
        cluster.run_prompts(
            texts("a"),
            specs(2),
            worker_class=FakeWorker,  # type: ignore[arg-type]
            policy=IMPATIENT,
            audience=Audience(on_row=lambda row: 1 // 0),  # type: ignore[arg-type, return-value]
        )
    until(lambda: ray.available_resources().get("QAIC") == 4)


def test_more_cards_than_the_cluster_has_are_refused_with_the_remedy(cluster: Cluster) -> None:
    with pytest.raises(UsageError, match=r"5 cards .* offers 4: .*ray start --address=.*QAIC"):
        run(cluster, texts("a"), specs(5))


def test_cards_that_others_hold_are_busy(cluster: Cluster) -> None:
    holder = ray.remote(FakeWorker).options(resources={"QAIC": 2}, num_cpus=0).remote(specs(1)[0])
    ray.get(holder.open.remote(), timeout=60)
    try:
        until(lambda: ray.available_resources().get("QAIC") == 2)
        told: list[str] = []
        with (
            Cluster(0, timeouts=Timeouts(busy_s=0.3)) as impatient,
            pytest.raises(DeviceBusy, match="3 cards are asked for and 1 of them are held"),
        ):
            impatient.run_prompts(
                texts("a"),
                specs(3),
                worker_class=FakeWorker,  # type: ignore[arg-type]
                policy=IMPATIENT,
                audience=Audience(on_wait=told.append),
            )
        assert len(told) == 1
        assert told[0].endswith("are held by others: waiting for up to 0 s.")
    finally:
        ray.kill(holder)


# -- compile tasks


def test_variants_are_built_with_errors_as_values(cluster: Cluster, tmp_path: Path) -> None:
    done: dict[str, object] = {}

    def on_done(label: str, result: object) -> None:
        done[label] = result
        (tmp_path / label).touch()

    waits = f"until {tmp_path / 'no'}"  # however long the other process takes to start
    cluster.compile_variants(
        build,
        {"slow": (waits, 0.0), "no": ("refuse", 0.0), "dead": ("die", 0.0), "ok": ("ok", 0.0)},
        parallel=2,
        on_done=on_done,
    )
    assert set(done) == {"slow", "no", "dead", "ok"}
    assert done["slow"] == f"built {waits}"
    refused, dead = done["no"], done["dead"]
    assert type(refused) is CompileError
    assert (str(refused), refused.exit_code, refused.log) == ("The compiler said no.", 255, "text")
    assert isinstance(dead, CompileError)
    assert str(dead).startswith("The compile of dead was lost, its process died (WorkerCrash")
    assert str(dead).endswith("too much memory, compile fewer at a time with --jobs.")
    assert next(iter(done)) == "no"


def test_variants_are_built_side_by_side(cluster: Cluster, tmp_path: Path) -> None:
    wanted = (str(tmp_path), 2)
    done: dict[str, object] = {}
    requests = {"a": wanted, "b": wanted}
    cluster.compile_variants(meet, requests, parallel=2, on_done=done.__setitem__)
    assert done == {"a": "met", "b": "met"}


def test_a_bug_in_a_build_is_raised(cluster: Cluster) -> None:
    with pytest.raises(KeyError, match="a bug"):
        cluster.compile_variants(build, {"a": ("bug", 0.0)}, parallel=1, on_done=print)


# -- drivers of their own


@contextmanager
def own_driver(*texts: str, row_s: float) -> Iterator[subprocess.Popen[str]]:
    """A driver process on the session's Ray."""
    script = Path(__file__).parent / "driver_script.py"
    address = ray.get_runtime_context().gcs_address
    with subprocess.Popen(
        [sys.executable, str(script), address, str(row_s), *texts],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # The Ray listens on the loopback interface, where Ray looks for one only when told.
        env={**os.environ, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"},
    ) as driver:
        try:
            yield driver
        finally:
            driver.kill()


def test_a_driver_on_a_running_cluster_prints_nothing_of_rays(cluster: Cluster) -> None:
    with own_driver("a", "die", "b", row_s=0.0) as driver:
        out, err = driver.communicate(timeout=300)
    assert (driver.returncode, err) == (0, "")
    *pids, last = out.splitlines()
    assert all(pid.isdecimal() for pid in pids)
    assert last.startswith("failed ")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_driver_leaves_no_actor_behind(
    cluster: Cluster, how: signal.Signals
) -> None:
    with own_driver(*["again"] * 1000, row_s=0.5) as driver:
        assert driver.stdout is not None
        pids = [int(driver.stdout.readline()) for _ in range(2)]
        assert all(map(is_running, pids))
        os.killpg(driver.pid, how)
        _, err = driver.communicate(timeout=300)
    assert driver.returncode == -how
    if how == signal.SIGINT:
        assert err.splitlines()[-1] == "KeyboardInterrupt"
    until(lambda: not any(map(is_running, pids)))
    until(lambda: ray.available_resources().get("QAIC") == 4)


# -- addresses


JOIN = """
from qaic_ray.errors import UsageError
from qaic_ray.cluster.cluster import Cluster
try:
    with Cluster(1, address={address!r}):
        print("joined")
except UsageError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("127.0.0.1:1", "No Ray cluster answers at 127.0.0.1:1"),
        ("nowhere", "nowhere is no address of a Ray cluster: write host:port, or auto."),
        ("127.0.0.1:999999", "No Ray cluster answers at 127.0.0.1:999999"),
        ("ray://127.0.0.1:10001", "is for Ray Client"),
    ],
)
def test_an_address_without_a_cluster_is_one_sentence(address: str, sentence: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", JOIN.format(address=address)],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert sentence in result.stdout
    assert len(result.stdout.splitlines()) == 1


def test_a_driver_that_ray_sent_to_another_ray_says_so(cluster: Cluster) -> None:
    """As its supervisor does where several Rays run on the machine."""
    told = {"metadata": {"job_submission_id": "of-another-ray"}}
    address = ray.get_runtime_context().gcs_address
    result = subprocess.run(
        [sys.executable, "-c", JOIN.format(address="auto")],
        env=os.environ
        | {
            "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps(told),
            "RAY_ADDRESS": address,
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # as in `own_driver`
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    (sentence,) = result.stdout.splitlines()
    assert sentence.startswith(f"Ray has sent this job to another Ray, at {address}, for several")


def test_an_address_of_something_else_is_one_sentence() -> None:
    """As of the dashboard in the head's place."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1024)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(UsageError, match="is no Ray head: its port is 6379"):
            join(address, Timeouts(), name="test")
        joined(thread)


def refuse(said: bytes, error: Exception) -> Callable[..., None]:
    """A `ray.init` that says something past Python, and fails."""

    def init(**_: object) -> None:
        os.write(2, said)
        raise error

    return init


@pytest.mark.parametrize(
    ("said", "error", "sentence"),
    [
        (
            b"gcs: InvalidAuthToken",
            ConnectionError("no"),
            "The Ray cluster at auto wants its token",
        ),
        (b"", ray.exceptions.AuthenticationError("no token"), "wants its token"),
        (b"gcs: x", ConnectionError("Failed\nto"), r"could not be joined \(Failed\): run on one"),
        (b"", RuntimeError("Version mismatch"), r"joined \(Version mismatch\)"),
    ],
)
def test_a_cluster_that_cannot_be_joined_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    said: bytes,
    error: Exception,
    sentence: str,
) -> None:
    monkeypatch.setattr(ray, "init", refuse(said, error))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(UsageError, match=sentence), Cluster(1, address="auto"):
        pass
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("failures", [1, 2])
def test_a_start_that_fails_is_tried_once_more(
    monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    class Context:
        dashboard_url = ""
        address_info = {"node_ip_address": "127.0.0.1"}  # noqa: RUF012

    tries: list[dict[str, object]] = []

    def init(**options: object) -> Context:
        tries.append(options)
        if len(tries) <= failures:
            raise Exception("The current node timed out during startup.")
        return Context()

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    if failures == 2:
        with pytest.raises(QaicRayError, match=r"did not start .*timed out during"), Cluster(1):
            pass
    else:
        with Cluster(3) as started:
            assert started.dashboard is None
    assert len(tries) == 2
    assert tries[-1]["dashboard_host"] == "127.0.0.1"
    assert tries[-1]["resources"] == {"QAIC": 1 if failures == 2 else 3}
