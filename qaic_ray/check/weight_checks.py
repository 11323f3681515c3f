"""Checks of weights and memory: what MXFP6 can compress, and what fits a card. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import TypeAlias

from qaic_ray.check.facts import Artifact, ArtifactFinding, GraphFacts, OperatorFacts, Target
from qaic_ray.check.rules import found
from qaic_ray.limits import GIB

Findings: TypeAlias = Iterator[ArtifactFinding]

MIN_ELEMENTS = 1024
"""A matrix of fewer is no weight that anybody would notice."""
MIN_SHARE = 0.05
"""Of all weights of multiplications: less of them outside of MXFP6 costs nothing that is seen."""
SLOW_FP16_BYTES = 2 * GIB
"""Weights of MatMul in fp16 that a Standard card reads in 16 ms, once a token."""
RESERVE_BYTES = 192 * 2**20
"""What activating a program took more than it says, at most, in public logs."""
MXFP6_BITS = 6.25
MXINT8_BITS = 8.25

_FOLDED = ("Transpose", "Identity")
_PASSED = frozenset(
    {
        *("Cast", "DequantizeLinear", "QuantizeLinear", "Reshape", "Unsqueeze", "Squeeze"),
        *("Mul", "Div", "Sub", "Clip", "Expand", "Slice", "Split", "Gather"),
    }
)
_MAX_STEPS = 12


@dataclass(frozen=True)
class Multiplied:
    """A weight that is a multiplication's second operand: where it comes from and through what."""

    label: str
    op: str
    name: str
    num_elements: int
    passed: tuple[str, ...]
    is_constant: bool
    is_gathered: bool

    @property
    def rule(self) -> str:
        """Why MXFP6 does not see it; empty where it does."""
        if not self.is_constant:
            return "mxfp6-not-constant"
        if self.is_gathered:
            return "mxfp6-gathered"
        if self.passed:
            return "mxfp6-hidden"
        return "mxfp6-gemm" if self.op == "Gemm" else ""


def multiplied(facts: GraphFacts) -> list[Multiplied]:
    """The weights of all MatMul and Gemm."""
    makers = {name: node for node in facts.nodes for name in node.outputs}
    inputs = {
        v.name: prod(d for d in v.dims if isinstance(d, int))
        for v in facts.inputs
        if len(v.dims) >= 2
        and all(isinstance(dim, int) for dim in v.dims)
        and v.type.startswith(("FLOAT", "BFLOAT"))
        and v.name not in facts.states
    }
    weights = []
    for node in facts.nodes:
        if node.op in ("MatMul", "Gemm") and not node.domain and len(node.inputs) > 1:
            one = _trace(node, facts, makers, inputs)
            if one is not None and one.num_elements >= MIN_ELEMENTS:
                weights.append(one)
    return weights


def _trace(
    node: OperatorFacts,
    facts: GraphFacts,
    makers: Mapping[str, OperatorFacts],
    inputs: Mapping[str, int],
) -> Multiplied | None:
    """What a multiplication's second operand is made of; None where that is no weight."""
    name, passed, is_gathered = node.inputs[1], list[str](), False
    for _ in range(_MAX_STEPS):
        tensor = facts.tensors.get(name)
        if tensor is not None:
            if len(tensor.dims) < 2:
                return None
            size = tensor.num_elements
            return Multiplied(node.label, node.op, name, size, tuple(passed), True, is_gathered)
        if name in inputs:
            is_known = name in facts.weight_inputs
            size = inputs[name]
            return Multiplied(node.label, node.op, name, size, tuple(passed), is_known, is_gathered)
        maker = makers.get(name)
        if maker is None or maker.domain or not maker.inputs:
            return None
        if maker.op == "Gather" and maker.inputs[-1] not in facts.fixed:
            is_gathered = True
        elif maker.op not in _FOLDED and maker.op not in _PASSED:
            return None
        if maker.op not in _FOLDED:
            passed.append(maker.op)
        name = maker.inputs[0]
    return None


_SAYS = {
    "mxfp6-not-constant": "is an input of the graph",
    "mxfp6-gathered": "is chosen at run time by Gather",
    "mxfp6-hidden": "comes through {passed}",
    "mxfp6-gemm": "is the weight of Gemm",
}
_REMEDIES = {
    "mxfp6-not-constant": "Make it an initializer, or name its tensor in the metadata "
    "com.qti.aisw.extdata.",
    "mxfp6-gathered": "Multiply by each matrix and choose among the products, where that is cheap.",
    "mxfp6-hidden": "Fold it into the initializer before the export (onnxsim does).",
    "mxfp6-gemm": "Export it as MatMul and Add.",
}


def hidden_from_mxfp6(artifact: Artifact, target: Target) -> Findings:
    """Weights that stay as they are with -mxfp6-matmul."""
    facts = artifact.graph
    if facts is None or not facts.is_readable:
        return
    if artifact.command is not None and not artifact.command.has("-mxfp6-matmul"):
        return
    weights = multiplied(facts)
    total = sum(one.num_elements for one in weights)
    for rule, why in _SAYS.items():
        of_rule = [one for one in weights if one.rule == rule]
        share = sum(one.num_elements for one in of_rule) / max(total, 1)
        if not of_rule or share < MIN_SHARE:
            continue
        first = of_rule[0]
        more = f", and so do {len(of_rule) - 1} more" if len(of_rule) > 1 else ""
        says = why.format(passed=" and ".join(dict.fromkeys(first.passed)))
        yield found(
            rule,
            facts.place,
            f"{first.label}: {first.name} {says}{more}: {share:.0%} of the weights that are "
            "multiplied stay uncompressed with -mxfp6-matmul.",
            _REMEDIES[rule],
        )


def uncompressed(artifact: Artifact, target: Target) -> Findings:
    """A language model of some size that is compiled without MXFP6."""
    facts, command = artifact.graph, artifact.command
    if facts is None or command is None or not facts.states or command.has("-mxfp6-matmul"):
        return
    seen = {one.name: one.num_elements for one in multiplied(facts) if not one.rule}
    num_bytes = 2 * sum(seen.values()) / _num_devices(artifact)
    if num_bytes >= SLOW_FP16_BYTES:
        yield found(
            "mxfp6-missing",
            command.place,
            f"-mxfp6-matmul is missing: each token reads {num_bytes / GIB:.1f} GiB of weights on a "
            f"card, and {num_bytes * MXFP6_BITS / 16 / GIB:.1f} GiB with it.",
            "Add -mxfp6-matmul; compare the answers with those of fp16.",
        )


def _num_devices(artifact: Artifact) -> int:
    facts = artifact.partitions
    return max(1, len({device for device, _ in facts.devices})) if facts is not None else 1


@dataclass(frozen=True)
class Memory:
    """What a program needs on each SoC, in bytes; the least that it can be."""

    weights: float
    cache: float
    activations: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.cache + self.activations


def memory(artifact: Artifact, *, mxfp6: bool | None = None) -> Memory | None:
    """The memory of a graph under its longest specialization; None where that is not known.

    Args:
        artifact: with graph and shapes.
        mxfp6: whether its weights are compressed; None as the command says, and where none does,
            they are.
    """
    facts, command = artifact.graph, artifact.command
    if facts is None or not facts.is_readable:
        return None
    if mxfp6 is None:
        mxfp6 = command is None or command.has("-mxfp6-matmul")
    is_fp16 = command is None or command.has("-convert-to-fp16")
    packed = {one.name for one in multiplied(facts) if not one.rule or one.rule == "mxfp6-gemm"}
    bits = 0.0
    sizes = [(t.name, t.num_elements, t.is_float, t.num_bytes) for t in facts.tensors.values()]
    for value in facts.inputs:
        if value.name in facts.weight_inputs and all(isinstance(dim, int) for dim in value.dims):
            count = prod(dim for dim in value.dims if isinstance(dim, int))
            sizes.append((value.name, count, True, 4 * count))
    for name, count, is_float, num_bytes in sizes:
        if is_float and mxfp6 and name in packed:
            bits += MXFP6_BITS * count
        else:
            bits += (16 if is_fp16 else 32) * count if is_float else 8 * num_bytes
    devices = _num_devices(artifact)
    return Memory(
        bits / 8 / devices, _cache_bytes(artifact) / devices, _activations(facts) / devices
    )


def _cache_bytes(artifact: Artifact) -> float:
    facts, listed, shapes = artifact.graph, artifact.custom_io, artifact.shapes
    if facts is None:
        return 0.0
    kinds = listed.precisions if listed is not None and not listed.fault else {}
    entries = shapes.sizes if shapes is not None else ()
    symbols = {key for entry in entries for key in entry}
    largest = {key: max(entry.get(key, 0) for entry in entries) for key in symbols}
    total = 0.0
    for value in facts.inputs:
        if value.name in facts.states:
            # A size that nobody says counts as nothing: this is the least that it can be.
            sizes = [dim if isinstance(dim, int) else largest.get(dim, 0) for dim in value.dims]
            bits = {"mxint8": MXINT8_BITS, "float": 32}.get(kinds.get(value.name, "").lower(), 16)
            total += bits / 8 * prod(sizes)
    return total


def _activations(facts: GraphFacts) -> float:
    """The largest operator's inputs and outputs, in fp16: all of them are there at once."""
    if not facts.shapes:
        return 0.0
    shapes, most = facts.shapes[0], 0
    kept = {*facts.states, *facts.states.values(), *facts.tensors, *facts.weight_inputs}
    for node in facts.nodes:
        total = 0
        for name in {*node.inputs, *node.outputs} - kept:
            dims = shapes.get(name, ())
            if dims and None not in dims:
                total += prod(dim for dim in dims if dim is not None)
        most = max(most, total)
    return 2.0 * most


def fits(artifact: Artifact, target: Target) -> Findings:
    """Weights, cache and activations against the memory of an SoC."""
    need, facts, card = memory(artifact), artifact.graph, target.card
    if need is None or facts is None or card is None:
        return
    parts = (
        f"{need.weights / GIB:.1f} GiB of weights, {need.cache / GIB:.1f} of cache and "
        f"{need.activations / GIB:.1f} of activations"
    )
    has = f"a {card.name} SoC has {card.dram_bytes / GIB:.1f}"
    if need.total > card.dram_bytes:
        yield found("dram", facts.place, f"It needs {parts}; {has}.", _smaller(artifact, target))
    elif need.total + RESERVE_BYTES > card.dram_bytes:
        yield found(
            "dram-tight",
            facts.place,
            f"It needs {parts}; {has}: little is left for what activation takes.",
            _smaller(artifact, target),
        )


def _smaller(artifact: Artifact, target: Target) -> str:
    packed = memory(artifact, mxfp6=True)
    command = artifact.command
    is_packed = command is None or command.has("-mxfp6-matmul")
    most = target.card.dram_bytes if target.card is not None else 0
    if packed is not None and not is_packed and packed.total + RESERVE_BYTES <= most:
        return f"Compile with -mxfp6-matmul: it needs {packed.total / GIB:.1f} GiB then."
    return (
        "Take fewer rows or a shorter context, keep the cache as mxint8, or compile for several "
        "SoCs (MDP)."
    )


CHECKS = (hidden_from_mxfp6, uncompressed, fits)
