"""The order in which a step's operations run: which rows each is for, and phases of them.

Where only some tokens' logits are wanted, what follows the last use of the others is computed for
those alone. A phase has operations that do not wait for each other but row by row; ten or so make a
layer. A buffer is used again once nothing reads it.
"""

from __future__ import annotations

from typing import Dict, List, Mapping, NamedTuple, Set, Tuple

from ..kernels import operations as op
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


def schedule(fused: Fused, planes: Mapping[str, int]) -> Schedule:
    """Order a step.

    Args:
        fused: the operations.
        planes: weights whose products take planes of bytes, and how many.
    """
    operations, widths = list(fused.operations), list(fused.widths)
    domains = _domains(operations, widths, set(fused.results.values()))
    operations = _quantized(operations, widths, domains, planes)
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
    operations: List[Operation],
    widths: List[int],
    domains: List[int],
    planes: Mapping[str, int],
) -> List[Operation]:
    made: Dict[Tuple[int, int], int] = {}
    result: List[Operation] = []
    for operation in operations:
        if operation.kind == op.PRODUCT and operation.constants[0] in planes:
            value, count = operation.inputs[0], planes[operation.constants[0]]
            if (value, count) not in made:
                made[value, count] = len(widths)
                widths.append(widths[value])
                domains.append(domains[value])
                made_by = Operation(op.QUANTIZE, made[value, count], (value,), numbers=(count,))
                result.append(made_by)
            operation = operation._replace(inputs=(made[value, count],))
        result.append(operation)
    return result


def _phases(operations: List[Operation], domains: List[int]) -> Tuple[List[Operation], List[Phase]]:
    readers: Dict[int, List[int]] = {}
    missing = [len(set(o.inputs)) for o in operations]
    for index, operation in enumerate(operations):
        for value in set(operation.inputs):
            readers.setdefault(value, []).append(index)
    ready = {index for index, count in enumerate(missing) if not count}
    ordered: List[Operation] = []
    phases: List[Phase] = []
    while ready:
        kind, domain, chosen = _choose(operations, ready, domains)
        waiting, taken = list(chosen), []
        later: Set[int] = ready - set(chosen)
        while waiting:
            index = waiting.pop()
            taken.append(index)
            for reader in readers.get(operations[index].out, ()):
                missing[reader] -= 1
                if missing[reader]:
                    continue
                # A row's next operation joins the phase; what takes other rows waits for its end.
                follows = _is_by_row(operations[reader]) and operations[reader].kind != op.SELECT
                same = domains[operations[reader].out] == domain
                if kind == op.ROWWISE and follows and same:
                    waiting.append(reader)
                else:
                    later.add(reader)
        phases.append(Phase(kind, len(ordered), len(ordered) + len(taken), domain))
        ordered += [operations[index] for index in sorted(taken)]
        ready = later
    return ordered, phases


def _is_by_row(operation: Operation) -> bool:
    return operation.kind not in _ONE_PHASE


def _choose(
    operations: List[Operation], ready: Set[int], domains: List[int]
) -> Tuple[int, int, List[int]]:
    """The kind of the next phase, its rows, and what of the ready operations it has."""
    for domain in (op.ALL, op.KEPT):
        by_row = [
            i for i in ready if _is_by_row(operations[i]) and domains[operations[i].out] == domain
        ]
        if by_row:
            return op.ROWWISE, domain, by_row
    first = min(ready)
    domain = domains[operations[first].out]
    products = [
        i
        for i in sorted(ready)
        if operations[i].kind == op.PRODUCT and domains[operations[i].out] == domain
    ]
    return (op.PRODUCTS, domain, products) if products else (op.ATTENTION, domain, [first])


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
    dying: Dict[int, List[int]] = {}
    for value, number in last_read.items():
        dying.setdefault(number, []).append(value)
    planes = {o.out: int(o.numbers[0]) for o in ordered if o.kind == op.QUANTIZE}
    buffers: List[Tuple[int, int]] = []
    place: Dict[int, int] = {}
    free: Dict[Tuple[int, int, int], List[int]] = {}
    placed: List[Placed] = []
    for number, phase in enumerate(phases):
        for operation in ordered[phase.first : phase.last]:
            value = operation.out
            key = (widths[value], domains[value], planes.get(value, 0))
            if free.get(key):
                place[value] = free[key].pop()
            else:
                place[value] = len(buffers)
                buffers.append(key[:2])
            inputs = tuple(place[v] for v in operation.inputs)
            placed.append(Placed(operation, domains[value], place[value], inputs))
        for value in dying.get(number, ()):
            key = (widths[value], domains[value], planes.get(value, 0))
            free.setdefault(key, []).append(place[value])
    return Schedule(placed, phases, buffers, {n: place[v] for n, v in results.items()})
