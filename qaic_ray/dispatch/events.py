"""What the dispatcher hears and what it orders: plain frozen data that pickles.

Each command that something must come of has its events:

    ReadPrompts   -> PromptsRead
    RunShard      -> RowsFinished (any number), then ShardFinished, ShardFailed or WorkerLost
    ReplaceWorker -> WorkerReady or WorkerFailedToOpen
    DeliverRows, RetireWorker, QuarantineWorker   (nothing comes back)

A worker has an incarnation for each time that it is opened, counted from 0. What is said of the
worker itself carries its `incarnation`, so that late words of one that was replaced are not taken
for the new one's. What is said of a shard needs none: a shard's id is given once.
"""

from __future__ import annotations

from dataclasses import dataclass

from qaic_ray.rows import Prompt, Row


@dataclass(frozen=True)
class RunStarted:
    """These workers are being opened, each for the first time."""

    workers: tuple[str, ...]


@dataclass(frozen=True)
class PromptsRead:
    """The next prompts of the input, by rising index; `exhausted` when there are no more."""

    prompts: tuple[Prompt, ...]
    exhausted: bool


@dataclass(frozen=True)
class WorkerReady:
    """A worker is open and runs `slots` prompts side by side."""

    worker: str
    slots: int
    incarnation: int = 0


@dataclass(frozen=True)
class WorkerFailedToOpen:
    """A worker never got ready; `error` is a sentence."""

    worker: str
    error: str
    incarnation: int = 0


@dataclass(frozen=True)
class WorkerLost:
    """A worker is gone, with everything it held."""

    worker: str
    error: str
    incarnation: int = 0


@dataclass(frozen=True)
class WorkerProgress:
    """A worker's engine has made `num_steps` steps since it was opened.

    From its first one on a worker is watched: while it has prompts and makes no step for a limit
    that follows from its own speed, it is stalled.
    """

    worker: str
    num_steps: int
    incarnation: int = 0


@dataclass(frozen=True)
class RowsFinished:
    """Some rows of a running shard."""

    worker: str
    shard_id: int
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class ShardFinished:
    """A shard has given all its rows."""

    worker: str
    shard_id: int


@dataclass(frozen=True)
class ShardFailed:
    """A shard ended with an error. `retryable`: the worker is to blame, and it may be passing."""

    worker: str
    shard_id: int
    error: str
    retryable: bool


@dataclass(frozen=True)
class TimePassed:
    """Nothing happened until the dispatcher's `wake_s`."""


Event = (
    RunStarted
    | PromptsRead
    | WorkerReady
    | WorkerFailedToOpen
    | WorkerLost
    | WorkerProgress
    | RowsFinished
    | ShardFinished
    | ShardFailed
    | TimePassed
)


@dataclass(frozen=True)
class ReadPrompts:
    """Read up to `num_prompts` more from the input."""

    num_prompts: int


@dataclass(frozen=True)
class RunShard:
    """Let a worker answer these; `attempt` counts from 1 and is the same for all of them."""

    worker: str
    shard_id: int
    prompts: tuple[Prompt, ...]
    attempt: int


@dataclass(frozen=True)
class DeliverRows:
    """These rows are final, each the only one of its prompt."""

    rows: tuple[Row, ...]


@dataclass(frozen=True)
class RetireWorker:
    """End a worker that may still run. Its prompts wait again; it will be replaced."""

    worker: str
    error: str


@dataclass(frozen=True)
class ReplaceWorker:
    """End whatever is left of a worker, and open it again as this incarnation."""

    worker: str
    incarnation: int


@dataclass(frozen=True)
class QuarantineWorker:
    """End whatever is left of a worker, for the rest of this run; `error` is its last failure."""

    worker: str
    error: str


Command = ReadPrompts | RunShard | DeliverRows | RetireWorker | ReplaceWorker | QuarantineWorker
