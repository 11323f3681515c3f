"""Checks of a graph: operators, shapes, types, states and the files of its weights. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from math import prod
from typing import TypeAlias

from qaic_ray.check.facts import Artifact, ArtifactFinding, Dims, GraphFacts, OperatorFacts, Target
from qaic_ray.check.rules import found
from qaic_ray.files.documents import shown
from qaic_ray.limits import CACHE_INDEX_BEFORE, EXTDATA_FROM, OLDEST_APPS

Findings: TypeAlias = Iterator[ArtifactFinding]

MAX_EACH = 3
"""Findings of one rule in one graph; the last says how many more there are."""
MAX_PROTOBUF_BYTES = 2**31 - 1
FP16_MAX = 65504.0

CARD_DOMAINS = ("com.qti.aisw.onnx", "com.qualcomm.cloud")
KNOWN_DOMAINS = (*CARD_DOMAINS, "com.microsoft", "ai.onnx.ml")
IO_TYPES = frozenset(
    ("FLOAT", "FLOAT16", "BFLOAT16", "INT64", "INT32", "INT16", "INT8", "UINT8", "BOOL")
)
"""Element types that a binding of a program can have."""

_RIGHT_ALIGNED = frozenset(
    {
        *("Add", "Sub", "Mul", "Div", "Pow", "Mod", "Max", "Min", "Where", "And", "Or", "Xor"),
        *("Equal", "Greater", "Less", "GreaterOrEqual", "LessOrEqual"),
    }
)
"""Operators whose inputs are broadcast to each other."""
_SHAPED_BY: Mapping[str, int] = {
    **{"Reshape": 1, "Expand": 1, "Tile": 1, "ConstantOfShape": 0, "OneHot": 1, "TopK": 1},
    **{"Pad": 1, "Resize": 3},
}
"""Operator -> the input that decides the shape of its output."""
_CARD_OPS = frozenset(
    {
        *("CustomRMSNorm", "CtxScatter", "CtxGather", "CtxScatterCB", "CtxGatherCB"),
        *("CtxScatter3D", "CtxGather3D", "CtxScatterCB3D", "CtxGatherCB3D", "CtxScatter3DInt"),
        *("CtxGatherBlockedKV", "CtxGatherBlockedKVCB", "UnpackMxfp6"),
    }
)

_Check: TypeAlias = Callable[[GraphFacts], Iterator[tuple[str, str, str]]]
"""Rule, what is wrong, what to do."""


def graph(artifact: Artifact, target: Target) -> Findings:
    """Everything that the graph alone says."""
    facts = artifact.graph
    if facts is None:
        return
    for rule, says in facts.faults:
        yield found(rule, facts.place, says, _FILE_REMEDIES[rule])
    if not facts.is_readable:
        return
    checks: Sequence[_Check] = (
        _size,
        _operators,
        _names,
        _types,
        _ranges,
        _run_time_shapes,
        _shapes,
        _values,
        _states,
    )
    for check in checks:
        for rule, says, remedy in _few(list(check(facts))):
            yield found(rule, facts.place, says, remedy)
    yield from _of_sdk(facts, target)


_FILE_REMEDIES = {
    "onnx-unreadable": "Export the model again.",
    "weights-missing": "Copy the files of the weights beside the model, as the export left them.",
    "weights-short": "Copy the file again, or export the model again.",
    "extdata": "Bring checkpoint and metadata together again: export anew, or name the folder of "
    "the checkpoint with AIC_EXTERNAL_DATA_ROOT.",
}


def _few(all_found: list[tuple[str, str, str]]) -> Iterator[tuple[str, str, str]]:
    """The first ones of each rule, and how many more there are."""
    counts: dict[str, int] = {}
    for rule, _, _ in all_found:
        counts[rule] = counts.get(rule, 0) + 1
    shown_so_far: dict[str, int] = {}
    for rule, says, remedy in all_found:
        shown_so_far[rule] = shown_so_far.get(rule, 0) + 1
        more = counts[rule] - MAX_EACH
        if shown_so_far[rule] < MAX_EACH or (shown_so_far[rule] == MAX_EACH and more == 0):
            yield rule, says, remedy
        elif shown_so_far[rule] == MAX_EACH:
            yield rule, f"{says} There are {more} more of its kind.", remedy


def _size(facts: GraphFacts) -> Iterator[tuple[str, str, str]]:
    if facts.file_bytes > MAX_PROTOBUF_BYTES:
        yield (
            "onnx-too-large",
            f"It has {facts.file_bytes / 2**30:.1f} GiB, weights inside: the compiler's reader of "
            "protobuf takes less than 2 GiB.",
            "Save it with external data (onnx.save(..., save_as_external_data=True)).",
        )


@lru_cache(maxsize=1)
def _plain_operators() -> frozenset[str]:
    import onnx

    return frozenset(schema.name for schema in onnx.defs.get_all_schemas() if not schema.domain)


def _operators(facts: GraphFacts) -> Iterator[tuple[str, str, str]]:
    for node in facts.nodes:
        key = (node.domain, node.op)
        is_card = node.domain in CARD_DOMAINS and node.op in _CARD_OPS
        if key in facts.functions or is_card or node.domain == "com.microsoft":
            continue
        if node.domain or node.op not in _plain_operators():
            name = f"{node.domain}::{node.op}" if node.domain else node.op
            yield (
                "operator",
                f"{node.label}: {name} is no operator of ONNX, and no function of the file.",
                "Export it as plain operators, or with its function in the model.",
            )
        elif node.op == "Einsum":
            yield (
                "einsum",
                f"{node.label}: Einsum may not be supported.",
                "Write it as Transpose, Reshape and MatMul; the vendor's Model Preparator does.",
            )


def _names(facts: GraphFacts) -> Iterator[tuple[str, str, str]]:
    """Inputs and outputs that cannot be the buffers of a program."""
    made = {name for node in facts.nodes for name in node.outputs} | facts.tensors.keys()
    given: set[str] = set()
    asked: set[str] = set()
    for side, values, seen in (("input", facts.inputs, given), ("output", facts.outputs, asked)):
        for value in values:
            name = value.name
            if not name or name in seen:
                what = f"two {side}s {shown(name)}" if name else f"an {side} without a name"
                yield "io-names", f"It has {what}.", "Give each a name of its own."
            elif side == "output" and name in given:
                yield (
                    "io-names",
                    f"{shown(name)} is an input and an output: a buffer has one direction.",
                    "Hand the value out by an Identity of another name.",
                )
            elif side == "output" and name not in made:
                yield (
                    "io-names",
                    f"No operator computes the output {shown(name)}.",
                    "Look at what the exporter left out.",
                )
            seen.add(name)


def _types(facts: GraphFacts) -> Iterator[tuple[str, str, str]]:
    for value in (*facts.inputs, *facts.outputs):
        if value.type not in IO_TYPES and value.name not in facts.weight_inputs:
            yield (
                "io-type",
                f"{shown(value.name)} is {value.type}, which no buffer of a program can be.",
                "Cast it inside of the graph.",
            )


def _ranges(facts: GraphFacts) -> Iterator[tuple[str, str, str]]:
    for node in facts.nodes:
        if node.op == "Range" and not node.domain:
            for name, what in zip(node.inputs, ("start", "limit", "delta"), strict=False):
                if name not in facts.fixed:
                    yield (
                        "range",
                        f"{node.label}: the {what} of Range is computed at run time: `Range: "
                        f"Non-constant {what} tensor not supported`.",
                        "Make the whole range from a shape, and add to it or compare with it.",
                    )
                    break


def _run_time_shapes(facts: GraphFacts) -> Iterator[tuple[str, str, str]]:
    for node in facts.nodes:
        position = _SHAPED_BY.get(node.op) if not node.domain else None
        if position is None or len(node.inputs) <= position or not node.inputs[position]:
            continue
        if node.inputs[position] not in facts.fixed:
            yield (
                "shape-at-run-time",
                f"{node.label}: the shape that {node.op} makes is computed at run time from "
                f"{shown(node.inputs[position])}; a program has fixed shapes.",
                "Take it from shapes of inputs, or from constants.",
            )


def _shapes(facts: GraphFacts) -> Iterator[tuple[str, str, str]]:
    """Operators whose inputs do not fit each other; each once, by the first specialization."""
    seen: set[str] = set()
    for shapes in facts.shapes:
        for node in facts.nodes:
            if node.domain or node.label in seen:
                continue
            one = _misfit(node, shapes)
            if one is not None:
                seen.add(node.label)
                yield one


def _misfit(node: OperatorFacts, shapes: Mapping[str, Dims]) -> tuple[str, str, str] | None:
    dims = [shapes.get(name) for name in node.inputs]
    known = [each for each in dims if each is not None]
    if node.op == "ScatterND" and len(known) == len(dims) == 3:
        return _scatter(node, known)
    if node.op in _RIGHT_ALIGNED and not _fit(known):
        said = " and ".join(_text(each) for each in known)
        return (
            "broadcast",
            f"{node.label}: {node.op} cannot broadcast {said}.",
            "Look at the shapes that the graph was exported with.",
        )
    if node.op == "Reshape" and node.outputs:
        return _reshape(node, dims[0] if dims else None, shapes.get(node.outputs[0]))
    return None


def _scatter(node: OperatorFacts, dims: list[Dims]) -> tuple[str, str, str] | None:
    data, indices, updates = dims
    depth = indices[-1] if indices else None
    if not indices or depth is None or depth > len(data):
        return None
    wanted = (*indices[:-1], *data[depth:])
    is_even = len(wanted) == len(updates) and all(
        a == b or a is None or b is None for a, b in zip(wanted, updates, strict=True)
    )
    if is_even:
        return None
    return (
        "scatter",
        f"{node.label}: ScatterND has updates {_text(updates)} for indices {_text(indices)}: "
        "`Indices and updates must have same lengths!`",
        "Give an update for each index: expand them to the same rows, heads and positions.",
    )


def _reshape(
    node: OperatorFacts, given: Dims | None, made: Dims | None
) -> tuple[str, str, str] | None:
    if given is None or made is None or None in given or None in made:
        return None
    before, after = (prod(d for d in dims if d is not None) for dims in (given, made))
    if before == after:
        return None
    return (
        "reshape",
        f"{node.label}: Reshape makes {_text(made)} ({after} elements) of {_text(given)} "
        f"({before}).",
        "Look at the sizes that the exporter wrote into the graph as constants.",
    )


def _fit(all_dims: list[Dims]) -> bool:
    """Whether shapes can be broadcast to each other, as far as they are known."""
    sizes: dict[int, int] = {}
    for dims in all_dims:
        for place, size in enumerate(reversed(dims)):
            if size not in (None, 1) and sizes.setdefault(place, size or 0) != size:
                return False
    return True


def _text(dims: Dims) -> str:
    return "[" + ", ".join("?" if size is None else str(size) for size in dims) + "]"


def _values(facts: GraphFacts) -> Iterator[tuple[str, str, str]]:
    for tensor in facts.tensors.values():
        if tensor.largest > FP16_MAX:
            yield (
                "fp16-range",
                f"The constant {shown(tensor.name)} has {tensor.largest:g}, which fp16 does not "
                "hold: it becomes infinite.",
                "Clip it to 65504 before the export; for a mask take -inf or -65504.",
            )


def _states(facts: GraphFacts) -> Iterator[tuple[str, str, str]]:
    inputs = {value.name: value for value in facts.inputs}
    outputs = {value.name: value for value in facts.outputs}
    for name, kept in facts.states.items():
        given, made = inputs[name], outputs[kept]
        unlike = given.type != made.type or (
            made.dims and given.dims and len(given.dims) != len(made.dims)
        )
        if unlike:
            yield (
                "state-unlike",
                f"{name} is {given.type} of rank {len(given.dims)}, and {kept} {made.type} of rank "
                f"{len(made.dims)}.",
                "Make both the same: what is kept is what is read.",
            )
    for name in outputs:
        if name.endswith("_InternalRetainedState"):
            yield (
                "state-renamed",
                f"The output {name} was to be renamed after the export: it is no state.",
                "Rename it to X_RetainedState, or export without subfunctions.",
            )
    alone = [
        n for n in inputs if n.startswith(("past_key.", "past_value.")) and n not in facts.states
    ]
    if alone:
        yield (
            "state-alone",
            f"{alone[0]} has no output {alone[0]}_RetainedState"
            + (f", nor have {len(alone) - 1} more" if len(alone) > 1 else "")
            + ": the cache travels through the host in each step.",
            "Export with the cache as retained state.",
        )


def _of_sdk(facts: GraphFacts, target: Target) -> Findings:
    cloud = next((node for node in facts.nodes if node.domain == CARD_DOMAINS[1]), None)
    if cloud is not None and target.before(CACHE_INDEX_BEFORE):
        yield found(
            "contract",
            facts.place,
            f"{cloud.label}: {cloud.op} is no operator of Apps {target.apps_text}: these compilers "
            "take graphs with cache_index.",
            "Export with --io cache-index, or compile with Apps 1.16 or newer.",
        )
    if facts.weight_inputs and target.before(EXTDATA_FROM):
        yield found(
            "extdata-sdk",
            facts.place,
            f"Weights lie in files of a checkpoint, {min(facts.weight_inputs)} for one, which the "
            f"compiler of Apps {target.apps_text} is not known to read: they become inputs, to be "
            "given in each run.",
            "Export with --weights copy, or compile with Apps 1.22 or newer.",
        )
    if facts.states and target.before(OLDEST_APPS):
        yield found(
            "retained-state",
            facts.place,
            f"It has {len(facts.states)} states, and the compiler of Apps {target.apps_text} knows "
            "no -retained-state.",
            "Install Apps 1.12 or newer.",
        )


CHECKS = (graph,)
