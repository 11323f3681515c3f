"""Which kernel when: measured once for a program and a machine, and kept in the user's cache.

What is chosen between computes the same bits: products of a few rows take a weight as it is packed,
those of more rows unpack a stretch of it first. From how many rows on that pays depends on the
processor, its memory and the weights.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any, Dict, List, Optional

import numpy as np

from ..kernels import operations as op
from ..kernels.machine import AVX512, features, processor, sources_digest
from ..kernels.native import cache_folder, keep, one_at_a_time, step_function
from .program import StepProgram
from .tables import Tables, address_of
from .team import ALIGN, Scratch

DEFAULT_MOST_PACKED = {1: 4, 2: 4, 3: 8}
"""By planes: rows that take a weight as it is packed, where nothing was measured."""

_ROWS = (4, 8, 12, 16)
_BYTES = 24 << 20
_ROUNDS = 3
_MOST_IN_FILE = 1 << 10


def most_packed(program: StepProgram, digest: str) -> Dict[int, int]:
    """By planes: rows, at most, that take a weight as it is packed.

    Args:
        program: the step.
        digest: of the QPC.
    """
    target = processor()
    if not program.planes or target is None or target.kind != AVX512:
        return {}
    path, kinds = _file(program, digest), sorted(set(program.planes.values()))
    if path is None:
        return {planes: DEFAULT_MOST_PACKED[planes] for planes in kinds}
    with one_at_a_time():
        found = _read(path, kinds)
        if found is None:
            found = {planes: _measured(program, planes) for planes in kinds}
            keep(path, json.dumps({"most_packed": found}).encode())
    return found


def _file(program: StepProgram, digest: str) -> Optional[Path]:
    folder = cache_folder()
    if folder is None:
        return None
    machine = (processor(), features(), os.cpu_count(), sources_digest())
    key = hashlib.sha256(
        repr((digest, sorted(program.planes.items()), machine)).encode()
    ).hexdigest()
    return folder / f"choice-{key[:32]}.json"


def _read(path: Path, kinds: List[int]) -> Optional[Dict[int, int]]:
    try:
        kept = json.loads(path.read_bytes()[:_MOST_IN_FILE])["most_packed"]
        found = {planes: int(kept[str(planes)]) for planes in kinds}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if all(0 <= rows <= max(_ROWS) for rows in found.values()) else None


def _measured(program: StepProgram, planes: int) -> int:
    """The largest number of rows up to which packed weights are the quicker way."""
    trial = _Trial(program, planes)
    best = 2
    for rows in _ROWS:
        seconds: Dict[int, float] = {}
        for _ in range(_ROUNDS):
            for packed in (0, rows):
                taken = trial.seconds(rows, packed)
                seconds[packed] = min(taken, seconds.get(packed, taken))
        if seconds[rows] > seconds[0]:
            break
        best = rows
    return best


class _Trial:
    """Products of so many planes, on rows of zeros: some that together do not fit a cache."""

    def __init__(self, program: StepProgram, planes: int) -> None:
        states: Dict[str, Any] = {}
        for operation in program.fused.operations:
            if operation.kind == op.STORE:
                heads, dim = (int(n) for n in operation.numbers)
                states[operation.constants[0]] = np.zeros((1, heads, 1, dim), np.float32)
        self._tables = Tables(program, states, 1, max(_ROWS))
        self._phases = []
        size = 0
        for phase in program.schedule.phases:
            placed = program.schedule.placed[phase.first : phase.last]
            if phase.kind != op.PRODUCTS or size > _BYTES:
                continue
            names = [p.operation.constants[0] for p in placed]
            if any(program.planes.get(name) != planes for name in names):
                continue
            weights = [program.weights[name] for name in names]
            size += sum(weight.panels.nbytes for weight in weights)
            panels = sum(len(weight.panels) for weight in weights)
            self._phases.append([phase.kind, phase.first, phase.last, panels, 0, 0])
        self._scratch = Scratch()

    def seconds(self, rows: int, packed: int) -> float:
        """Of this thread's own time."""
        phases = np.array(self._phases, np.int64)
        phases[:, op.BLOCK] = phases[:, op.ROWS] = rows
        operations = self._tables.operations.copy()
        operations[operations[:, op.KIND] == op.PRODUCT, op.P9] = packed
        counters = np.zeros(len(phases) * op.COUNTER_BYTES + ALIGN, np.uint8)
        start = address_of(counters)
        begin = time.thread_time()
        step_function()(
            address_of(operations),
            address_of(phases),
            len(phases),
            address_of(self._tables.token_addresses),
            start + -start % ALIGN,
            self._scratch.address(op.SCRATCH_BYTES),
        )
        return time.thread_time() - begin
