"""Each kind of end has its own cause: no memory is blamed where Ray speaks of none."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import ray
import ray.exceptions as ray_errors
from ray.core.generated.common_pb2 import ActorDiedErrorContext

from qaic_ray.cluster.cluster import Cluster
from qaic_ray.cluster.compile_tasks import _built
from qaic_ray.cluster.losses import MAX_WORDS, last_line, loss
from qaic_ray.errors import CompileError

pytestmark = pytest.mark.cluster

CRASH = (  # of Ray 2.60, for a process that was killed
    "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker "
    "exit detail: Worker unexpectedly exits with a connection error code 2. End of file. Some "
    "common causes include: (1) the process was killed by the OOM killer due to high memory usage, "
    "(2) ray stop --force was called, or (3) the worker crashed unexpectedly due to SIGSEGV or "
    "another unexpected error."
)
NO_PACKAGE = """[Node 10.0.0.7] Traceback (most recent call last):
  File "pip.py", line 374, in _create_for_hash
utils.SubprocessCalledProcessError: Run cmd[9] failed with the following details.
Last 50 lines of stdout:
    ERROR: No matching distribution found for no_such_package==1
"""
OUT_OF_ROOM = "its node has no room left for its rows"


def died(text: str) -> ray_errors.ActorDiedError:
    """As Ray makes it of what its head tells."""
    context = ActorDiedErrorContext(
        class_name="CardWorker", actor_id=bytes(16), pid=7, error_message=text
    )
    return ray_errors.ActorDiedError(context)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ray_errors.ActorDiedError(), "its process died (ActorDiedError: The actor died"),
        (died(CRASH), "its process died (ActorDiedError: Worker unexpectedly exits with a "
                      "connection error code 2. End of file)"),
        (died("The actor is dead because it was killed by `ray.kill`."),
         "somebody ended its process through Ray (ActorDiedError: The actor is dead because it "),
        (died("The actor died because its node has died. Node Id: 1f\n\tthe node was lost"),
         "its node is gone (ActorDiedError: The actor died because its node has died. Node Id: 1f"),
        (died("2 worker(s) were killed due to the node running low on memory.\nMemory: 14 GB"),
         "its node ran out of memory, and Ray ended it (ActorDiedError: 2 worker(s) were"),
        (ray_errors.RuntimeEnvSetupError(NO_PACKAGE),
         "the environment of its process cannot be set up (RuntimeEnvSetupError: ERROR: No "
         "matching distribution found for no_such_package==1)"),
        (ray_errors.RuntimeEnvSetupError("[Node 10.0.0.7] no answer in 600 s"),
         "the environment of its process cannot be set up (RuntimeEnvSetupError: [Node 10.0.0.7] "),
        (ray_errors.WorkerCrashedError(), "its process died (WorkerCrashedError: The worker died"),
        (ray_errors.NodeDiedError("gone"), "its node is gone (NodeDiedError: gone)"),
        (ray_errors.ActorUnschedulableError("no node"), "its node is gone ("),
        (ray_errors.TaskUnschedulableError("no node"), "its node is gone ("),
        (ray_errors.LocalRayletDiedError(), "Ray is gone from this machine ("),
        (ray_errors.TaskCancelledError(), "somebody cancelled it ("),
        (ray_errors.ActorUnavailableError("rpc", None), "its process cannot be reached ("),
        (ray_errors.OutOfMemoryError("killed"), "its node ran out of memory, and Ray ended it ("),
        (ray_errors.ObjectStoreFullError("full"), f"{OUT_OF_ROOM} ("),
        (ray_errors.OutOfDiskError("full"), f"{OUT_OF_ROOM} ("),
        (ray_errors.ObjectLostError("0" * 56, None, ""), "rows of it were lost on their way ("),
        (ray_errors.RaySystemError("odd"), "Ray lost it (RaySystemError: System error: odd"),
    ],
)  # fmt: skip
def test_every_loss_is_a_sentence(error: ray_errors.RayError, told: str) -> None:
    assert loss(error).startswith(told)
    assert "\n" not in loss(error)
    if "memory" not in told:
        assert "memory" not in loss(error)


def test_pages_of_ray_become_one_line() -> None:
    assert last_line("Traceback:\n  File\nKeyError: 'a'\n\n") == "KeyError: 'a'"
    assert not last_line(" \n")
    long = loss(ray_errors.RuntimeEnvSetupError("x" * 10_000))
    assert len(long) < MAX_WORDS + 100


# -- what Ray itself raises


@ray.remote(max_retries=0)
def idle() -> None:
    """A task that needs nothing."""


@ray.remote(max_restarts=0)
class Idle:
    """An actor that does nothing, or ends."""

    def end(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


NO_SERVER = {"working_dir": "https://127.0.0.1:9/none.zip"}
"""An environment that no node can set up."""


def raised(ref: Any) -> ray_errors.RayError:
    with pytest.raises(ray_errors.RayError) as told:
        ray.get(ref, timeout=120)
    return told.value


@pytest.mark.parametrize("of", ["task", "actor"])
def test_an_environment_that_cannot_be_set_up_is_said(cluster: Cluster, of: str) -> None:
    if of == "task":
        ref = idle.options(runtime_env=NO_SERVER).remote()
    else:
        actor = Idle.options(runtime_env=NO_SERVER).remote()
        ref = actor.end.remote()
    told = loss(raised(ref))
    assert told.startswith("the environment of its process cannot be set up (RuntimeEnvSetupError")
    assert "Connection refused" in told
    assert "memory" not in told


def test_an_actor_that_was_killed_is_no_matter_of_memory(cluster: Cluster) -> None:
    told = loss(raised(Idle.remote().end.remote()))
    assert told.startswith("its process died (ActorDiedError: ")
    assert "memory" not in told


def test_a_compile_without_its_environment_names_what_to_mend(cluster: Cluster) -> None:
    refused = _built("mx6 14c", idle.options(runtime_env=NO_SERVER).remote())
    assert isinstance(refused, CompileError)
    assert str(refused).startswith(
        "The compile of mx6 14c was lost, the environment of its process cannot be set up"
    )
    assert str(refused).endswith("mend the runtime environment that Ray was given.")
