"""What a worker is told to be, and what it tells of itself: plain data that crosses processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from qaic_ray.cards.locks import Part
from qaic_ray.options import Generation


@dataclass(frozen=True)
class WorkerSpec:
    """What one card is to do; plain data, made by the driver.

    `model` is anything `open_checkpoint` takes; only its tokenizer and configuration are read, and
    these must have the `text` parts that the run began with, where any are given. The other fields
    are a `WorkerPlace`'s; `incarnation` is how often the worker was opened before.
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


@dataclass(frozen=True)
class TakenBack:
    """Prompts of a shard that will not be answered here, among its rows."""

    indexes: tuple[int, ...]
