"""What a worker is given, and what it reports of itself: plain data that crosses processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from qaic_ray.cards.lease import Part
from qaic_ray.options import Generation
from qaic_ray.timeouts import DEFAULT_TIMEOUTS, Timeouts


@dataclass(frozen=True)
class WorkerSpec:
    """What one worker is given by the driver.

    `model` is anything `open_checkpoint` takes; only its tokenizer and configuration are read, and
    these must have the `text` parts that the run began with, if any are given. `incarnation` is how
    often the worker was opened before, `metrics` whether its actor records what it does. The other
    fields are those of a `WorkerPlace`.
    """

    name: str
    device_ids: tuple[int, ...]
    sdk_root: str
    qpc: str
    model: str
    generation: Generation = field(default_factory=Generation)
    text: Mapping[str, str] = field(default_factory=dict)
    node_id: str = ""
    part: Part | None = None
    choices: tuple[int, ...] = ()
    incarnation: int = 0
    metrics: bool = False
    timeouts: Timeouts = DEFAULT_TIMEOUTS


@dataclass(frozen=True)
class WorkerInfo:
    """What an opened worker has, and which process it is."""

    name: str
    device_ids: tuple[int, ...]
    sdk: str
    slots: int
    prompt_len: int
    ctx_len: int
    load_s: float
    pid: int = 0
    host: str = ""
