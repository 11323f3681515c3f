"""What Ray's dashboard is told of a run: names of jobs, actors, processes and tasks, and no polls;
and who may see it."""

from __future__ import annotations

import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fake_worker import FakeSpec, FakeWorker, build
from one_ray import OneRay
from ray.util import state

from qaic_ray.cluster.cluster import Cluster
from qaic_ray.metrics import Measurement
from qaic_ray.rows import Prompt
from qaic_ray.runs.driver import Audience
from qaic_ray.timeouts import Timeouts
from qaic_ray.worker.worker import WorkerInfo

pytestmark = pytest.mark.cluster

LAG_S = 4.0
"""What was a task this long ago is in Ray's list."""
MANY_POLLS = Timeouts(steps_s=0.05)


@contextmanager
def with_dashboard() -> Iterator[Cluster]:
    """As `launch` starts it, token and all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_AUTH_MODE", raising=False)
        with Cluster(2, dashboard=True, name="nightly", timeouts=MANY_POLLS) as started:
            yield started


@pytest.fixture
def watched(one_ray: OneRay) -> Cluster:
    return one_ray.use("dashboard", with_dashboard)


def api(cluster: Cluster) -> str:
    assert cluster.dashboard is not None
    return cluster.dashboard.url


def tasks(cluster: Cluster) -> set[tuple[str, str]]:
    """The id and the name of all that Ray lists."""
    listed = state.list_tasks(address=api(cluster), limit=10_000)
    return {(task.task_id, task.name) for task in listed}


def run(cluster: Cluster, num_prompts: int, row_s: float, audience: Audience) -> None:
    specs = [FakeSpec(f"card {i}", (i,), row_s=row_s) for i in (3, 5)]
    prompts = [Prompt(i, f"prompt {i}") for i in range(num_prompts)]
    cluster.run_prompts(prompts, specs, worker_class=FakeWorker, audience=audience)  # type: ignore[arg-type]


def until_listed(cluster: Cluster, *wanted: str) -> set[str]:
    """Ray's list lags behind by a second or so."""
    deadline_s = time.monotonic() + 60
    while not set(wanted) <= (names := {name for _, name in tasks(cluster)}):
        assert time.monotonic() < deadline_s, sorted(names)
        time.sleep(0.2)
    return names


def test_jobs_actors_processes_and_tasks_have_names(watched: Cluster, tmp_path: Path) -> None:
    titles: dict[str, str] = {}
    infos: dict[str, WorkerInfo] = {}

    def on_row(row: object) -> None:
        for name, info in infos.items():
            titles[name] = Path(f"/proc/{info.pid}/cmdline").read_text().rstrip("\0")

    watched.write_logs_to(tmp_path, pytest.fail)
    compiles = {"fp16 c14 b1": ("ok", 0.0)}
    watched.compile_variants(build, compiles, parallel=1, on_done=lambda *_: None)
    audience = Audience(on_row=on_row, on_worker_ready=lambda info: infos.update({info.name: info}))
    run(watched, 30, 0.1, audience)
    names = until_listed(watched, "compile fp16 c14 b1", "open card 3", "open card 5")
    shards = {name for name in names if name.startswith("shard ")}
    assert {name.partition(" on ")[2] for name in shards} == {"card 3", "card 5"}
    assert not [name for name in names if "num_steps" in name or "measurement" in name]
    assert titles == {"card 3": "ray::card 3", "card 5": "ray::card 5"}
    actors = state.list_actors(address=api(watched), detail=True)
    assert {actor.repr_name for actor in actors} == {"card 3", "card 5"}
    jobs = state.list_jobs(address=api(watched), detail=True)
    assert [job.metadata for job in jobs] == [{"job_name": "nightly"}]
    logs = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert logs.keys() == {"card-3.log", "card-5.log", "compile-fp16-c14-b1.log"}
    assert f"process {infos['card 3'].pid} opens device 3" in logs["card-3.log"]


@pytest.mark.parametrize("seconds", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_asking_for_steps_is_in_no_list(watched: Cluster, seconds: int) -> None:
    """Each card is asked twenty times a second here; its shards alone are tasks."""
    asked: list[Measurement] = []
    time.sleep(LAG_S)
    before = tasks(watched)
    run(watched, seconds * 2, 1.0, Audience(on_row=lambda _: asked.append(Measurement())))
    time.sleep(LAG_S)
    new = sorted(name for _, name in tasks(watched) - before)
    shards = [name for name in new if name.startswith("shard ")]
    assert len(asked) == seconds * 2
    assert len(new) == len(shards) + 4, new  # two were made and opened
    assert len(shards) <= seconds * 2 * 2  # a row may be run twice, in the end


def test_only_who_has_the_token_sees_it_and_no_log_has_it(watched: Cluster) -> None:
    assert watched.dashboard is not None
    assert watched.dashboard.token_command is not None
    token_file = Path(watched.dashboard.token_command.removeprefix("cat "))
    token = token_file.read_text()
    url = f"{api(watched)}/api/cluster_status"
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(url)
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request) as answer:
        assert answer.status == 200
    logs = [path for path in token_file.parent.rglob("*") if path.is_file()]
    found = [path for path in logs if path != token_file and has(path, token)]
    assert found == []
    assert len(logs) > 10
    assert os.stat(token_file).st_mode & 0o777 == 0o600


def has(path: Path, token: str) -> bool:
    return token.encode() in path.read_bytes()
