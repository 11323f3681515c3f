"""The order in which a step's operations run: which rows each is for, and phases of them.

Where only some tokens' logits are wanted, what follows the last use of the others is computed for
those alone. A phase has operations that do not wait for each other but row by row; ten or so make a
layer. A buffer is used again once nothing reads it.
"""

from __future__ import annotations

from typing import Dict, List, NamedTuple, Set, Tuple

from . import operations as op
from .fuse import Fused, Operation

_ONE_PHASE = {op.PRODUCT: op.PRODUCTS, op.ATTEND: op.ATTENTION}


class Placed(NamedTuple):
    """An operation, the rows that it is for, and the buffers of its values."""

    operation: Operation
    domain: int
    out: int
    inputs: Tuple[int, ...]


class Phase(NamedTuple):
    """Operations `first` to `last` - 1 of the schedule."""

    kind: int
    first: int
    last: int
    domain: int


class Schedule(NamedTuple):
    """`buffers` are (numbers in a row, domain); a quantized value has a buffer of its own kind."""

    placed: List[Placed]
    phases: List[Phase]
    buffers: List[Tuple[int, int]]
    results: Dict[str, int]


def schedule(fused: Fused, byte_weights: Set[str]) -> Schedule:
    """Order a step.

    Args:
        fused: the operations.
        byte_weights: weights whose products take planes of bytes.
    """
    operations, widths = list(fused.operations), list(fused.widths)
    domains = _domains(operations, widths, set(fused.results.values()))
    operations = _quantized(operations, widths, domains, byte_weights)
    ordered, phases = _phases(operations, domains)
    return _placed(ordered, phases, (widths, domains), fused.results)


def _domains(operations: List[Operation], widths: List[int], results: Set[int]) -> List[int]:
    """Of each value, the rows that are needed; adds what takes the kept ones out of all."""
    selected = [o for o in operations if o.kind == op.SELECT]
    if not selected:
        return [op.ALL] * len(widths)
    same = {o.out: o.inputs[0] for o in selected}
    operations[:] = [
        o._replace(inputs=tuple(same.get(v, v) for v in o.inputs))
        for o in operations
        if o.kind != op.SELECT
    ]
    wanted: List[Set[int]] = [set() for _ in widths]
    for value in results:
        wanted[same.get(value, value)].add(op.KEPT)
    for operation in reversed(operations):
        if operation.kind == op.STORE:
            wanted[operation.out] = {op.ALL}
        domain = op.ALL if op.ALL in wanted[operation.out] else op.KEPT
        wanted[operation.out].add(domain)
        for value in operation.inputs:
            wanted[value].add(domain)
    domains = [op.ALL if op.ALL in w else op.KEPT for w in wanted]
    made: Dict[int, int] = {}
    result: List[Operation] = []
    stored = {o.out for o in operations if o.kind == op.STORE}
    for operation in operations:
        inputs = []
        for value in operation.inputs:
            if domains[operation.out] == op.KEPT != domains[value] and value not in stored:
                if value not in made:
                    made[value] = len(widths)
                    widths.append(widths[value])
                    domains.append(op.KEPT)
                    result.append(Operation(op.SELECT, made[value], (value,)))
                value = made[value]
            inputs.append(value)
        result.append(operation._replace(inputs=tuple(inputs)))
    operations[:] = result
    return domains


def _quantized(
    operations: List[Operation], widths: List[int], domains: List[int], byte_weights: Set[str]
) -> List[Operation]:
    made: Dict[int, int] = {}
    result: List[Operation] = []
    for operation in operations:
        if operation.kind == op.PRODUCT and operation.constants[0] in byte_weights:
            value = operation.inputs[0]
            if value not in made:
                made[value] = len(widths)
                widths.append(widths[value])
                domains.append(domains[value])
                result.append(Operation(op.QUANTIZE, made[value], (value,)))
            operation = operation._replace(inputs=(made[value],))
        result.append(operation)
    return result


def _phases(
    operations: List[Operation], domains: List[int]
) -> Tuple[List[Operation], List[Phase]]:
    waiting, done = list(operations), set()
    ordered: List[Operation] = []
    phases: List[Phase] = []
    while waiting:
        kind, domain, chosen = _next(waiting, done, domains)
        phases.append(Phase(kind, len(ordered), len(ordered) + len(chosen), domain))
        ordered += chosen
        done |= {o.out for o in chosen}
        taken = {o.out for o in chosen}
        waiting = [o for o in waiting if o.out not in taken]
    return ordered, phases


def _next(
    waiting: List[Operation], done: Set[int], domains: List[int]
) -> Tuple[int, int, List[Operation]]:
    for domain in (op.ALL, op.KEPT):
        by_row: List[Operation] = []
        made: Set[int] = set()
        for operation in waiting:
            if operation.kind in _ONE_PHASE or domains[operation.out] != domain:
                continue
            known = done if operation.kind == op.SELECT else done | made
            if all(value in known for value in operation.inputs):
                by_row.append(operation)
                made.add(operation.out)
        if by_row:
            return op.ROWWISE, domain, by_row
    ready = [o for o in waiting if all(value in done for value in o.inputs)]
    domain = domains[ready[0].out]
    products = [o for o in ready if o.kind == op.PRODUCT and domains[o.out] == domain]
    if products:
        return op.PRODUCTS, domain, products
    return op.ATTENTION, domain, ready[:1]


def _placed(
    ordered: List[Operation],
    phases: List[Phase],
    values: Tuple[List[int], List[int]],
    results: Dict[str, int],
) -> Schedule:
    widths, domains = values
    last_read: Dict[int, int] = {}
    for number, phase in enumerate(phases):
        for operation in ordered[phase.first : phase.last]:
            last_read[operation.out] = number
            last_read.update(dict.fromkeys(operation.inputs, number))
    last_read.update(dict.fromkeys(results.values(), len(phases)))
    buffers: List[Tuple[int, int]] = []
    place: Dict[int, int] = {}
    free: Dict[Tuple[int, int, bool], List[int]] = {}
    placed: List[Placed] = []
    for number, phase in enumerate(phases):
        for operation in ordered[phase.first : phase.last]:
            value = operation.out
            key = (widths[value], domains[value], operation.kind == op.QUANTIZE)
            if free.get(key):
                place[value] = free[key].pop()
            else:
                place[value] = len(buffers)
                buffers.append(key[:2])
            inputs = tuple(place[v] for v in operation.inputs)
            placed.append(Placed(operation, domains[value], place[value], inputs))
        kinds = {o.out: o.kind for o in ordered[: phase.last]}
        for value in [v for v, last in last_read.items() if last == number]:
            key = (widths[value], domains[value], kinds[value] == op.QUANTIZE)
            free.setdefault(key, []).append(place[value])
    return Schedule(placed, phases, buffers, {n: place[v] for n, v in results.items()})
