"""What the dispatcher hears and what it orders: plain frozen data that pickles. Knows nothing else.

Each command that something must come of has its events:

    ReadPrompts -> PromptsRead
    RunShard    -> RowsFinished (any number), then ShardFinished, ShardFailed or WorkerLost
    RetireWorker, DeliverRows   (nothing comes back)
"""

from __future__ import annotations

from dataclasses import dataclass

from qaic_ray.rows import Prompt, Row


@dataclass(frozen=True)
class RunStarted:
    """These workers are being opened."""

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


@dataclass(frozen=True)
class WorkerFailedToOpen:
    """A worker never got ready; `error` is a sentence."""

    worker: str
    error: str


@dataclass(frozen=True)
class WorkerLost:
    """A worker is gone, with everything it held."""

    worker: str
    error: str


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
    """A shard ended with an error. `retryable`: the worker is to blame, another may do it."""

    worker: str
    shard_id: int
    error: str
    retryable: bool


Event = (
    RunStarted
    | PromptsRead
    | WorkerReady
    | WorkerFailedToOpen
    | WorkerLost
    | RowsFinished
    | ShardFinished
    | ShardFailed
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
    """Give up a worker that still runs; whatever it holds has been taken back."""

    worker: str


Command = ReadPrompts | RunShard | DeliverRows | RetireWorker
