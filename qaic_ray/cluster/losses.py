"""What Ray's errors say of a process that is gone: the cause, and Ray's own words for it."""

from __future__ import annotations

import ray.exceptions as ray_errors

from qaic_ray.cluster.connection import first_line

MAX_WORDS = 300
"""Letters of Ray's own words in a sentence of ours."""

# Of Ray's texts (2.60). What follows the first is its guess at causes, memory before all others.
_GUESSES = ". Some common causes include"
_DETAIL = "Worker exit detail: "
_KILLED = "killed by `ray.kill`"
_LOW_MEMORY = "running low on memory"
_NODE_DIED = "node has died"

_WHY = (
    (ray_errors.RuntimeEnvSetupError, "the environment of its process cannot be set up"),
    (ray_errors.ObjectStoreFullError, "its node has no room left for its rows"),
    (ray_errors.OutOfDiskError, "its node has no room left for its rows"),
    (ray_errors.ObjectLostError, "rows of it were lost on their way"),
    (ray_errors.NodeDiedError, "its node is gone"),
    (ray_errors.TaskUnschedulableError, "its node is gone"),
    (ray_errors.ActorUnschedulableError, "its node is gone"),
    (ray_errors.LocalRayletDiedError, "Ray is gone from this machine"),
    (ray_errors.TaskCancelledError, "somebody cancelled it"),
    (ray_errors.ActorUnavailableError, "its process cannot be reached"),
    (ray_errors.ActorDiedError, "its process died"),
    (ray_errors.WorkerCrashedError, "its process died"),
)


def loss(error: ray_errors.RayError) -> str:
    """Why a worker or a task is gone: words for a sentence, with Ray's own behind them."""
    said = str(error)
    if ran_out_of_memory(error):
        why = "its node ran out of memory, and Ray ended it"
    elif _NODE_DIED in said:
        why = "its node is gone"
    elif _KILLED in said:
        why = "somebody ended its process through Ray"
    else:
        why = next((words for kind, words in _WHY if isinstance(error, kind)), "Ray lost it")
    return f"{why} ({type(error).__name__}: {_in_rays_words(error)})"


def ran_out_of_memory(error: ray_errors.RayError) -> bool:
    """Whether Ray says that it ended the process for its node's memory."""
    return isinstance(error, ray_errors.OutOfMemoryError) or _LOW_MEMORY in str(error)


def last_line(text: str) -> str:
    """The last line of a text that has pages: a traceback ends with its error, pip with its own."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def _in_rays_words(error: ray_errors.RayError) -> str:
    """The one line that tells most."""
    if isinstance(error, ray_errors.RuntimeEnvSetupError):
        words = last_line(str(error))
    elif isinstance(error, ray_errors.ActorDiedError):
        # Its first line says that an actor died, and the next ones, each behind a tab, which.
        told = [line for line in str(error).splitlines()[1:] if line and line[0] != "\t"]
        words = told[0] if told else first_line(error)
        words = words.partition(_DETAIL)[2] or words
    else:
        words = first_line(error)
    words = words.partition(_GUESSES)[0]
    return words if len(words) <= MAX_WORDS else f"{words[:MAX_WORDS]}..."
