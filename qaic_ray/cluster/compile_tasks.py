"""Compiles as Ray tasks: so many at a time, each under its variant's name in the dashboard."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import TypeVar

import ray
import ray.exceptions as ray_errors
from ray import ObjectRef

from qaic_ray.cluster.connection import call_for
from qaic_ray.cluster.losses import loss, ran_out_of_memory
from qaic_ray.cluster.worker_logs import say
from qaic_ray.errors import CompileError, QaicRayError
from qaic_ray.timeouts import Timeouts

Request = TypeVar("Request")
Result = TypeVar("Result")


def run_builds(
    build: Callable[[Request], Result],
    requests: Mapping[str, Request],
    *,
    parallel: int,
    on_done: Callable[[str, Result | QaicRayError], None],
    on_begin: Callable[[str], None] | None = None,
    timeouts: Timeouts,
) -> None:
    """Run `build` on every request, each as one Ray task named `compile <label>`.

    Args:
        build: a module's function, so that another process finds it.
        requests: label -> request.
        parallel: how many run at a time.
        on_done: called with each label and its result, as they come. An error of ours is a
            result; a task that was lost is a CompileError.
        on_begin: called with each label whose task is submitted.
        timeouts: `cancel_s` is used.
    """
    waiting = deque(requests.items())
    running: dict[ObjectRef, str] = {}
    try:
        while waiting or running:
            while waiting and len(running) < parallel:
                label, request = waiting.popleft()
                task = _BUILD.options(name=f"compile {label}", num_cpus=1, max_retries=0)
                running[task.remote(build, label, request)] = label
                if on_begin is not None:
                    on_begin(label)
            (ref,), _ = ray.wait(list(running), num_returns=1)
            label = running.pop(ref)
            on_done(label, _built(label, ref))
    finally:
        _cancel(list(running), timeouts.cancel_s)


def _cancel(refs: list[ObjectRef], timeout_s: float) -> None:
    """Interrupt tasks, and wait up to `timeout_s` for their end."""

    def cancel() -> None:
        for ref in refs:
            ray.cancel(ref)
        ray.wait(refs, num_returns=len(refs), timeout=timeout_s)

    if refs:
        call_for(timeout_s + 1.0, cancel)


def compile_variant(
    build: Callable[[Request], Result], label: str, request: Request
) -> Result | QaicRayError:
    say(f"compiles {label}")
    try:
        result = build(request)
    except QaicRayError as error:
        say(f"did not compile {label}: {error}")
        return error
    say(f"compiled {label}")
    return result


_BUILD = ray.remote(compile_variant)


def _built(label: str, ref: ObjectRef[Result | QaicRayError]) -> Result | QaicRayError:
    try:
        result: Result | QaicRayError = ray.get(ref)
    except ray_errors.RayTaskError as error:
        raise error.cause from error
    except ray_errors.RayError as error:
        why, remedy = loss(error), _remedy(error)
        return CompileError(f"The compile of {label} was lost, {why}: {remedy}.")
    return result


def _remedy(error: ray_errors.RayError) -> str:
    if isinstance(error, ray_errors.RuntimeEnvSetupError):
        return "mend the runtime environment that Ray was given"
    if ran_out_of_memory(error):
        return "compile fewer at a time with --jobs"
    if isinstance(error, ray_errors.WorkerCrashedError):
        # The kernel's own end of a process for its memory is not told to Ray.
        return "if `dmesg` says that it had too much memory, compile fewer at a time with --jobs"
    return "give the command again, and what is compiled already stays"
