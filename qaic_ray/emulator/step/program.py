"""A step and its weights, where the QPC has them; shared by the activations of a program."""

from __future__ import annotations

from typing import Any, Callable, Dict, NamedTuple, Set

import numpy as np

from ..kernels import operations as op
from ..kernels.native import step_function
from ..numbers import panels
from .fuse import Fused
from .schedule import Schedule, schedule

PANEL = panels.WIDTH


class Weight(NamedTuple):
    """A MatMul's weight [K, N] in panels: uint8 [panels, bytes of one]; `kind` of its values."""

    panels: Any
    kind: str
    num_rows: int


class StepProgram:
    """A step and its weights, for all activations of a program.

    Args:
        fused: what to compute.
        weight: gives the panels of a product's weight.
        table: gives any other constant, float32 or (for embeddings) float16.
        planes: of 8 bits that activations of MXFP6 weights are cut into; 0 for float32. Where it is
            one, those of which an error shows most have two: what goes into a layer's last product,
            in which a few numbers are far larger than the others, and into the logits'.

    Attributes:
        results: output -> numbers in a row, and their type.
        group: query heads, at most, that share a head of the cache.
        planes: weight -> planes of its activations, for products of bytes.
        most_packed: planes -> rows of a product, at most, that take a weight as it is packed.
    """

    def __init__(
        self,
        fused: Fused,
        weight: Callable[[str], Weight],
        table: Callable[[str], Any],
        planes: int,
    ) -> None:
        step_function()  # compiled now, not while the first prompt waits
        self.most_packed: Dict[int, int] = {}
        self.fused = fused
        names = {o.constants[0] for o in fused.operations if o.kind == op.PRODUCT}
        self.weights = {name: weight(name) for name in sorted(names)}
        fine = _fine_weights(fused) if planes == 1 else set()
        self.planes = {
            name: 2 if name in fine else planes
            for name, kept in self.weights.items()
            if planes and kept.kind == "mxfp6"
        }
        self.schedule: Schedule = schedule(fused, self.planes)
        self.tables: Dict[str, Any] = {}
        scales = {o.numbers[3] for o in fused.operations if o.kind == op.ATTEND}
        self.factors = {scale: np.array([scale], np.float32) for scale in scales}
        for operation in fused.operations:
            if operation.kind in (op.PRODUCT, op.STORE, op.ATTEND):
                continue
            for name in operation.constants:
                if name not in self.tables:
                    self.tables[name] = _padded(table(name), operation.kind == op.EMBED)
        self.num_embeddings = next(
            int(o.numbers[0]) for o in fused.operations if o.kind == op.EMBED
        )
        heads = [o.numbers for o in fused.operations if o.kind == op.ATTEND]
        self.group = max(int(n[0] // n[1]) for n in heads)
        kinds = {o.out: o.kind for o in fused.operations}
        self.results = {
            name: (fused.widths[v], np.int64 if kinds[v] == op.ARGMAX else np.float32)
            for name, v in fused.results.items()
        }


def _fine_weights(fused: Fused) -> Set[str]:
    """Weights of products that take a gated activation, or that are results."""
    gated = {o.out for o in fused.operations if o.kind == op.SILU_TIMES}
    read = {value for o in fused.operations for value in o.inputs if o.kind != op.ARGMAX}
    return {
        o.constants[0]
        for o in fused.operations
        if o.kind == op.PRODUCT and (o.inputs[0] in gated or o.out not in read)
    }


def _padded(array: Any, is_large: bool) -> Any:
    """A constant with room to read beyond its end; a large table stays where it is."""
    if is_large:
        return array
    room = np.zeros(array.size + 2 * PANEL, np.float32)
    room[: array.size] = array.reshape(-1)
    return room
