"""What replicas of the interface and of cards tell each other, but for tokens and rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from qaic_ray.metrics import EngineState
from qaic_ray.rows import Prompt
from qaic_ray.serve.ray_serve.replica_choice import ReplicaChoice
from qaic_ray.worker.worker import WorkerInfo


@dataclass(frozen=True)
class Inbox:
    """Where a replica of the interface listens for tokens.

    Attributes:
        host, port: of its node.
        secret: whoever connects shows it first.
    """

    host: str
    port: int
    secret: str = field(repr=False)


@dataclass(frozen=True)
class Question:
    """A prompt, and where its tokens go while they come.

    Attributes:
        prompt: what is asked.
        call: tells it apart in its inbox, each attempt of a prompt too.
        inbox: of who asks.
        choice: who is to answer; it stays in the process of who asks.
    """

    prompt: Prompt
    call: int
    inbox: Inbox
    choice: ReplicaChoice | None = field(default=None, compare=False, repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return Question, (self.prompt, self.call, self.inbox)


@dataclass(frozen=True)
class FleetState:
    """How the fleet of one replica of cards stands.

    Attributes:
        workers: those that are ready.
        engines: by worker.
        num_waiting: prompts that no worker has.
        pid: of the replica's process.
    """

    workers: tuple[WorkerInfo, ...]
    engines: dict[str, EngineState]
    num_waiting: int
    pid: int
